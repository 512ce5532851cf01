"""docs/survival.md holds the one table of exit statuses, and all of them."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click

from moce_ds.common.errors import LOST_PEER, STOPPED, MoceError
from tools.source_tree import modules, parse, product, read_tree

DOCS = Path(__file__).parents[1] / "docs"
ENDS = {"exit", "_exit", "SystemExit"}


def table(page: Path) -> list[int]:
    """The statuses in the table of a page."""
    _, _, text = page.read_text(encoding="utf-8").partition("| exit status |")
    return [int(number) for number in re.findall(r"^\| (\d+) \|", text.partition("\n\n")[0], re.MULTILINE)]


def numbers(text: str) -> Iterator[int]:
    """Statuses that a module writes as numbers: where it ends the process, and in classes of errors."""
    for node in ast.walk(parse(text)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ENDS:
            yield from (part.value for part in ast.walk(node) if isinstance(part, ast.Constant))  # type: ignore[misc]
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "status":
            yield from (part.value for part in ast.walk(node.value) if isinstance(part, ast.Constant))  # type: ignore[misc]


def kinds(error: type[MoceError]) -> Iterator[type[MoceError]]:
    yield error
    for kind in error.__subclasses__():
        yield from kinds(kind)


def test_one_table_holds_all_statuses() -> None:
    listed = table(DOCS / "survival.md")
    assert sorted(listed) == sorted({0, MoceError.status, click.UsageError.exit_code, STOPPED, LOST_PEER})
    assert [page.name for page in DOCS.glob("*.md") if table(page)] == ["survival.md"]
    assert {kind.status for kind in kinds(MoceError)} <= set(listed)


def test_the_code_ends_with_no_other_number() -> None:
    found = {module: list(numbers(text)) for module, text in product(modules(read_tree())).items()}
    assert {number for written in found.values() for number in written if isinstance(number, int)} <= {0, 1}
    assert any(found.values())
