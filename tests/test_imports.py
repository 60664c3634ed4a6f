"""Imports go one way: shards, benchmarks and commands -> training -> models and data, and never in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import REPOSITORY

PACKAGES = ("dist_train", "shards", "benchmarks")


def modules() -> dict[str, Path]:
    """Every module of the project by its name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            parts = path.relative_to(REPOSITORY).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def is_for_types(node: ast.AST) -> bool:
    """Whether this is `if TYPE_CHECKING:`, which imports nothing when it runs."""
    return isinstance(node, ast.If) and ast.unparse(node.test).rpartition(".")[2] == "TYPE_CHECKING"


def statements(tree: ast.AST, everywhere: bool, types: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports of a module. everywhere: those within functions too, which run later, or never. types: and those of
    what is only named in types."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif everywhere or not (isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)):
            if types or not is_for_types(node):
                yield from statements(node, everywhere, types)


def imported(module: str, everywhere: bool) -> set[str]:
    """The project's modules that a module imports by name, without those that come along as their packages."""
    found = set()
    path = MODULES[module]
    types = path.name != "__init__.py"  # a package names for type checkers what it imports when it is asked for it
    for node in statements(ast.parse(path.read_text(encoding="utf-8")), everywhere, types):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif node.module:
            assert not node.level, f"{module}: a relative import; write the whole name"
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {part if part in MODULES else node.module for part in parts}
    return found & MODULES.keys() - {module}


def circles(everywhere: bool) -> list[list[str]]:
    """The groups of modules that import one another, directly or through others (Tarjan's components)."""
    graph = {module: sorted(imported(module, everywhere)) for module in MODULES}
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(module: str) -> None:
        number[module] = lowest[module] = len(number)
        stack.append(module)
        for other in graph[module]:
            if other not in number:
                visit(other)
                lowest[module] = min(lowest[module], lowest[other])
            elif other in stack:
                lowest[module] = min(lowest[module], number[other])
        if lowest[module] == number[module]:
            at = stack.index(module)
            if len(stack) - at > 1:
                found.append(sorted(stack[at:]))
            del stack[at:]

    for module in graph:
        if module not in number:
            visit(module)
    return found


@pytest.mark.parametrize("everywhere", [False, True], ids=["at import", "within functions too"])
def test_no_modules_import_one_another_in_a_circle(everywhere: bool) -> None:
    assert circles(everywhere) == []


LAYERS = {
    "dist_train.data": {"dist_train.models", "dist_train.train", "dist_train.cluster", "dist_train.use"},
    "dist_train.models": {"dist_train.data", "dist_train.train", "dist_train.cluster", "dist_train.use"},
    "dist_train.train": {"dist_train.cluster", "dist_train.use"},
    "dist_train": {"shards", "benchmarks"},
    "shards": {"benchmarks", "dist_train.models", "dist_train.train", "dist_train.cluster", "dist_train.use"},
}
"""What a package, and all in it, never imports."""

KNOWN = {("dist_train.train.loop", "dist_train.cluster.watch")}
"""Imports against the direction that are there today: none is to be added."""


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def test_imports_go_one_way() -> None:
    against = {
        (module, other)
        for package, never in LAYERS.items()
        for module in MODULES
        if is_in(module, package)
        for other in imported(module, everywhere=True)
        if any(is_in(other, one) for one in never)
    }
    assert against - KNOWN == set()
