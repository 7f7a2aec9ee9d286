"""The structure of the package: modules build on each other in one direction."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import timm_ghn

ROOT = Path(timm_ghn.__file__).parent


def modules(root: Path) -> dict[str, Path]:
    """All modules of the package by name; a package by the name of its folder."""
    files = {path: path.relative_to(root.parent).with_suffix("").parts for path in root.rglob("*.py")}
    return {".".join(parts[:-1] if parts[-1] == "__init__" else parts): path for path, parts in files.items()}


def imports(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules of the package that a file imports, within functions and for types as well."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in known else node.module for name in names if node.module in known)


def order(root: Path) -> list[str]:
    """The modules, each behind all that it imports."""
    known = modules(root)
    graph = {name: set(imports(path, known)) - {name} for name, path in known.items()}
    return list(graphlib.TopologicalSorter(graph).static_order())


def test_no_module_imports_what_imports_it() -> None:
    found = order(ROOT)
    assert found.index("timm_ghn.graph.nodes") < found.index("timm_ghn.ghn.model") < found.index("timm_ghn.hook")


def test_a_circle_would_be_found(tmp_path: Path) -> None:
    package = tmp_path / "timm_ghn"
    package.mkdir()
    (package / "a.py").write_text("from timm_ghn.b import x\n")
    (package / "b.py").write_text("def f():\n    from timm_ghn import a\n")
    (package / "__init__.py").write_text("")
    with pytest.raises(graphlib.CycleError, match="cycle"):
        order(package)
