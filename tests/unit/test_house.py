"""Rules of the house that no linter checks: who reads raw settings, arguments by name, sizes, one home for a table."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import grimp
import pytest

from ltx_train.config.command_table import COMMANDS
from tests.conftest import REPOSITORY

PACKAGE = REPOSITORY / "ltx_train"
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text()) for path in FILES}
DECIDES = ("config/", "assembly/resolve.py")
# Names that hold a configuration.
CONFIGURATIONS = ("config", "settings", "saved", "before", "own", "other", "trained_with")


def raw_reads(tree: ast.AST) -> Iterator[str]:
    """Accesses to `strategy.*`, `memory.*` of a configuration and `adapter.kind`, directly or through an alias."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
        is_group = node.attr in ("strategy", "memory") and owner in CONFIGURATIONS
        if is_group or node.attr == "strategy" or (node.attr == "kind" and owner == "adapter"):
            yield f"line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("name", [name for name in TREES if not name.startswith(DECIDES)])
def test_raw_settings_are_read_in_one_place(name: str) -> None:
    assert list(raw_reads(TREES[name])) == []


@pytest.mark.parametrize(
    "line",
    [
        "config.strategy.name",
        "setup.config.memory.keep",
        "x = config.memory",
        "self._config.strategy",
        "a.adapter.kind",
    ],
)
def test_the_rule_about_raw_settings_can_fail(line: str) -> None:
    assert list(raw_reads(ast.parse(line)))


@pytest.mark.parametrize("name", TREES)
def test_dataclasses_with_more_than_four_fields_take_keywords(name: str) -> None:
    positional: list[str] = []
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ClassDef):
            decorators = [ast.unparse(d) for d in node.decorator_list]
            fields = sum(isinstance(part, ast.AnnAssign) for part in node.body)
            if fields > 4 and any("dataclass" in d and "kw_only=True" not in d for d in decorators):
                positional.append(node.name)
    assert positional == []


def test_functions_and_files_are_short() -> None:
    long = [
        f"{name}: {node.name}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 80
    ]
    assert long == []
    assert [path.name for path in FILES if len(path.read_text().splitlines()) >= 350] == []
    assert not [path for path in FILES if path.name == "utils.py"]


def test_no_imports_in_a_circle() -> None:
    """Between modules, imports inside functions and for types included."""
    graph = grimp.build_graph("ltx_train", cache_dir=None)
    imports = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
    assert len(imports) > 150
    graphlib.TopologicalSorter(imports).prepare()


def test_commands_holds_the_commands_and_nothing_else() -> None:
    modules = {path.stem for path in (PACKAGE / "commands").glob("*.py")} - {"__init__"}
    # `completion` is answered by the command line itself.
    assert modules == COMMANDS.keys() - {"completion"}


def test_optimizers_and_strategies_are_named_in_their_tables_alone() -> None:
    """And in the tests of equality that a kind has of its own, none of which exist."""
    names = {"paged_adamw8bit": "updates/kinds.py", "zero1": "distributed/strategies.py"}
    for word, home in names.items():
        quoted = [
            name
            for name, tree in TREES.items()
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and node.value == word
        ]
        assert set(quoted) == {home}, word


def test_every_package_has_a_docstring() -> None:
    """Each package's docstring says what it owns."""
    for path in FILES:
        if path.name == "__init__.py":
            assert ast.get_docstring(ast.parse(path.read_text())), Path(path).relative_to(PACKAGE)
