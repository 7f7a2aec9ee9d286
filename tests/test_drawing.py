from __future__ import annotations

import math
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import timm
import torch

from timm_ghn import drawing
from timm_ghn.errors import GraphError, MissingDependencyError
from timm_ghn.graph import Graph, Node, Op, to_graph

SVG = "{http://www.w3.org/2000/svg}"


def graph_of(name: str) -> Graph:
    with torch.device("meta"):
        return to_graph(timm.create_model(name))


@pytest.fixture(scope="module")
def resnet() -> Graph:
    return graph_of("resnet50")


@pytest.fixture(scope="module")
def convnext() -> Graph:
    return graph_of("convnext_base")


def chain(*ops: Op) -> Graph:
    nodes = tuple(Node(op) for op in (Op.INPUT, *ops))
    return Graph(nodes, tuple((index, index + 1) for index in range(len(ops))))


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ET.fromstring(svg).iter(f"{SVG}text")]


def titles(svg: str) -> list[str]:
    return [element.text or "" for element in ET.fromstring(svg).iter(f"{SVG}title")]


def test_svg_is_well_formed_and_has_every_node(resnet: Graph) -> None:
    svg = drawing.to_svg(resnet, titles="ResNet-50")
    tooltips = titles(svg)
    assert len(tooltips) == len(resnet)
    assert "1 conv 64x3x7x7 conv1.weight" in tooltips
    assert {"ResNet-50", "127 nodes, 142 edges", "7"} <= set(texts(svg))


def test_legend_names_the_operators_that_occur(resnet: Graph) -> None:
    found = set(texts(drawing.to_svg(resnet)))
    assert {op.value for op in Op} & found == set(resnet.operators)


def test_titles_are_escaped() -> None:
    assert "a < b & c" in texts(drawing.to_svg(chain(Op.CONV), titles="a < b & c"))


def test_same_graph_same_bytes(resnet: Graph) -> None:
    assert drawing.to_svg(resnet) == drawing.to_svg(Graph.from_json(resnet.to_json()))


@pytest.mark.parametrize("name", ["convnext_base", "densenet121", "inception_v3", "mobilenetv3_small_100", "hrnet_w18"])
def test_nodes_do_not_overlap_and_lie_within_the_drawing(name: str) -> None:
    graph = graph_of(name)
    scene = drawing.to_scene(graph)
    centers = [_center(item) for item in scene.items if isinstance(item, drawing.Curve) and item.tooltip]
    assert len(centers) == len(graph)
    cells: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for x, y in centers:
        assert 0 < x < scene.width
        assert 0 < y < scene.height
        near = [p for i in (-1, 0, 1) for j in (-1, 0, 1) for p in cells.get((int(x) // 20 + i, int(y) // 20 + j), [])]
        assert all(math.dist(p, (x, y)) >= 18 for p in near)
        cells.setdefault((int(x) // 20, int(y) // 20), []).append((x, y))


def _center(curve: drawing.Curve) -> tuple[float, float]:
    points = [point for _, points in curve.commands for point in points]
    x, y = zip(*points, strict=True)
    return (min(x) + max(x)) / 2, (min(y) + max(y)) / 2


def test_graphs_stand_beside_each_other_without_overlap(resnet: Graph, convnext: Graph) -> None:
    scene = drawing.to_scene([resnet, convnext], titles=["ResNet-50", "ConvNeXt-Base"])
    nodes = [_center(item)[0] for item in scene.items if isinstance(item, drawing.Curve) and item.tooltip]
    second = next(item for item in scene.items if isinstance(item, drawing.Text) and item.text == "ConvNeXt-Base")
    assert max(nodes[: len(resnet)]) < second.position[0] <= min(nodes[len(resnet) :])
    assert 1.0 < scene.width / scene.height < 2.2


def test_texts_do_not_overlap(resnet: Graph, convnext: Graph) -> None:
    scene = drawing.to_scene([resnet, convnext], titles=["ResNet-50", "ConvNeXt-Base"])
    boxes = []
    for text in (item for item in scene.items if isinstance(item, drawing.Text) and not item.centered):
        x, y = text.position
        boxes.append((x, y - text.size / 2, x + 0.6 * text.size * len(text.text), y + text.size / 2))
    for index, a in enumerate(boxes):
        assert a[2] <= scene.width
        for b in boxes[:index]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_deep_graphs_are_folded() -> None:
    scene = drawing.to_scene(chain(*[Op.CONV] * 400))
    assert scene.width / scene.height > 0.8


@pytest.mark.parametrize("graph", [Graph((Node(Op.INPUT),), ()), chain(Op.CONV), chain(*Op)], ids=["1", "2", "all"])
def test_small_graphs(graph: Graph) -> None:
    assert len(titles(drawing.to_svg(graph))) == len(graph)


@pytest.mark.parametrize(("graphs", "names"), [([], None), ([chain(Op.CONV)], ["a", "b"])])
def test_nothing_to_draw(graphs: list[Graph], names: list[str] | None) -> None:
    with pytest.raises(GraphError, match="cannot draw"):
        drawing.to_svg(graphs, titles=names)


def test_save_svg(tmp_path: Path) -> None:
    path = drawing.save(chain(Op.CONV, Op.BIAS), tmp_path / "new" / "graph.svg", titles="x")
    assert path.read_text(encoding="utf-8") == drawing.to_svg(chain(Op.CONV, Op.BIAS), titles="x")


def test_save_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = drawing.save(chain(Op.CONV, Op.BIAS, Op.SUM), tmp_path / "graph.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    from matplotlib.image import imread

    pixels = imread(path)
    assert pixels.std() > 0.05


def test_png_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if re.match(r"matplotlib(\.|$)", name)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match=r"timm-ghn\[plot\]"):
        drawing.save(chain(Op.CONV), tmp_path / "graph.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["graph.gif", "graph"])
def test_unknown_suffix(name: str, tmp_path: Path) -> None:
    with pytest.raises(GraphError, match=r"\.svg or \.png"):
        drawing.save(chain(Op.CONV), tmp_path / name)
