from __future__ import annotations

import copy
import functools
import re
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from timm_ghn import drawing
from timm_ghn.errors import GraphError, MissingDependencyError
from timm_ghn.graph import Graph, Node, Op, to_graph

pytest.importorskip("matplotlib")

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread

from timm_ghn.drawing.figure import draw
from timm_ghn.drawing.layout import arrange, lay_out

SVG = "{http://www.w3.org/2000/svg}"
SUFFIXES = {".svg": b"<?xml", ".png": b"\x89PNG", ".pdf": b"%PDF"}


@functools.cache
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


def texts(path: Path) -> Counter[str]:
    return Counter("".join(element.itertext()).strip() for element in ET.parse(path).iter(f"{SVG}text"))


def centers(figure: Figure) -> np.ndarray:
    return np.concatenate([np.asarray(nodes.get_offsets()) for nodes in figure.axes[0].collections])


def closest(points: np.ndarray) -> float:
    distances = np.linalg.norm(points[:, None] - points[None], axis=2)
    return float(distances[~np.eye(len(points), dtype=bool)].min())


def test_svg_has_every_node_and_text(resnet: Graph, tmp_path: Path) -> None:
    path = drawing.save(resnet, tmp_path / "resnet.svg", titles="ResNet-50")
    found = texts(path)
    assert {"ResNet-50", "127 nodes, 142 edges", *resnet.operators} <= set(found)
    assert not {op.value for op in Op} - set(resnet.operators) & set(found)
    kernels = Counter(str(node.shape[-1] if len(node.shape) == 4 else 1) for node in resnet.nodes if node.op is Op.CONV)
    assert {text: count for text, count in found.items() if text.isdecimal()} == kernels
    symbols = Counter(
        collection.get_label()
        for collection in draw([resnet], [""]).axes[0].collections
        for _ in collection.get_offsets()
    )
    assert symbols == resnet.operators


@pytest.mark.parametrize("title", ["a < b & c", "$x_1$ for $5", "_private"])
def test_titles_are_text_and_no_markup(title: str, tmp_path: Path) -> None:
    assert title in texts(drawing.save(chain(Op.CONV), tmp_path / "graph.svg", titles=title))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_same_graph_same_bytes(suffix: str, convnext: Graph, tmp_path: Path) -> None:
    one = drawing.save(convnext, tmp_path / f"one{suffix}", titles="x")
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.hashsalt": "another"}):
        other = drawing.save(copy.deepcopy(convnext), tmp_path / f"other{suffix}", titles="x")
    assert one.read_bytes() == other.read_bytes()
    assert one.read_bytes().startswith(SUFFIXES[suffix])


def test_settings_of_matplotlib_stay(tmp_path: Path) -> None:
    before = dict(mpl.rcParams)
    drawing.save(chain(Op.CONV), tmp_path / "graph.svg")
    assert dict(mpl.rcParams) == before


@pytest.mark.parametrize("name", ["convnext_base", "densenet121", "inception_v3", "mobilenetv3_small_100", "hrnet_w18"])
def test_nodes_do_not_overlap_and_lie_within_the_drawing(name: str) -> None:
    graph = graph_of(name)
    figure = draw([graph], [name])
    points = centers(figure)
    assert len(points) == len(graph)
    assert closest(points) >= 18
    (left, right), (bottom, top) = figure.axes[0].get_xlim(), figure.axes[0].get_ylim()
    assert left < points[:, 0].min() <= points[:, 0].max() < right
    assert top < points[:, 1].min() <= points[:, 1].max() < bottom
    assert 1.0 < (right - left) / (bottom - top) < 2.2


@pytest.mark.parametrize("name", ["convnext_base", "densenet121", "inception_v3", "hrnet_w18"])
def test_edges_join_their_nodes_and_pass_by_others(name: str) -> None:
    graph = graph_of(name)
    layout = lay_out(graph, 30)
    for (source, target), line in zip(graph.edges, layout.edges, strict=True):
        assert (line[0] == layout.nodes[source]).all()
        assert (line[-1] == layout.nodes[target]).all()
        if len(line) > 2:
            distances = np.linalg.norm(line[1:-1, None] - layout.nodes[None], axis=2)
            assert distances.min() > 0.5


def test_graphs_stand_beside_each_other(resnet: Graph, convnext: Graph) -> None:
    figure = draw([resnet, convnext], ["ResNet-50", "ConvNeXt-Base"])
    second = next(text for text in figure.axes[0].texts if text.get_text() == "ConvNeXt-Base").get_position()[0]
    columns = centers(figure)[:, 0]
    assert (columns < second).sum() == len(resnet)
    assert 1.0 < figure.get_figwidth() / figure.get_figheight() < 2.2


def test_texts_do_not_overlap(resnet: Graph) -> None:
    figure = draw([resnet, chain(Op.CONV), resnet], ["ResNet-50", "A long title of a small graph", ""])
    FigureCanvasAgg(figure).draw()
    legend = figure.axes[0].get_legend()
    assert legend is not None
    found = [text for text in (*figure.axes[0].texts, *legend.get_texts()) if text.get_text()]
    boxes = [text.get_window_extent() for text in found]
    for index, box in enumerate(boxes):
        assert not box.count_overlaps(boxes[:index]), found[index]


def test_deep_graphs_are_folded() -> None:
    (layout,) = arrange([chain(*[Op.CONV] * 400)])
    assert 1.0 < layout.width / layout.height < 2.0
    steps = np.linalg.norm(np.diff(layout.nodes, axis=0), axis=1)
    assert steps.max() < 30  # the next node is below, above, or in the next column
    assert closest(layout.nodes) >= 18


@pytest.mark.parametrize("graph", [Graph((Node(Op.INPUT),), ()), chain(Op.CONV), chain(*Op)], ids=["1", "2", "all"])
def test_small_graphs(graph: Graph, tmp_path: Path) -> None:
    assert set(graph.operators) <= set(texts(drawing.save(graph, tmp_path / "graph.svg")))
    assert len(centers(draw([graph], [""]))) == len(graph)


@pytest.mark.parametrize(("graphs", "names"), [([], None), ([chain(Op.CONV)], ["a", "b"])])
def test_nothing_to_draw(graphs: list[Graph], names: list[str] | None, tmp_path: Path) -> None:
    with pytest.raises(GraphError, match="cannot draw"):
        drawing.save(graphs, tmp_path / "graph.svg", titles=names)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".PNG"])
def test_save(suffix: str, tmp_path: Path) -> None:
    path = drawing.save(chain(Op.CONV, Op.BIAS), tmp_path / "new" / f"graph{suffix}")
    assert path.read_bytes().startswith(SUFFIXES[suffix.lower()])
    assert list(path.parent.iterdir()) == [path]


def test_png_shows_something(tmp_path: Path) -> None:
    pixels = imread(drawing.save(chain(Op.CONV, Op.BIAS, Op.SUM), tmp_path / "graph.png"))
    assert (pixels[0] == 1).all()  # a white edge
    assert pixels.std() > 0.05


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "graph.png"
    path.write_text("before")

    def fail(self: Figure, file: Path, **options: object) -> None:
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        drawing.save(chain(Op.CONV), path)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"graph.png": "before"}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_without_matplotlib(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if re.match(r"matplotlib(\.|$)|timm_ghn\.drawing\.figure", name)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'timm-ghn\[plot\]'"):
        drawing.save(chain(Op.CONV), tmp_path / f"graph{suffix}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["graph.gif", "graph"])
def test_unknown_suffix(name: str, tmp_path: Path) -> None:
    with pytest.raises(GraphError, match=r"use \.svg or \.png or \.pdf"):
        drawing.save(chain(Op.CONV), tmp_path / name)
