"""The text of this project, as the rules read it: of the working tree or of a commit, without importing any of it."""

import ast
import io
import subprocess
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
CODE = ("moce_ds", "launchers", "tools", "tests")
TEXTS = ("README.md", "docs")

Sources = Mapping[str, str]
"""Source text by dotted module name."""


def read_tree() -> dict[str, str]:
    """Texts by path of the working tree: Python files of CODE, and the documents."""
    paths = [path for folder in CODE for path in (ROOT / folder).rglob("*.py")]
    paths += [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    return {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in sorted(paths)}


def read_commit(commit: str) -> dict[str, str]:
    """The same of a commit.

    Raises:
        subprocess.CalledProcessError: git knows no such commit; it has printed why.
    """
    archive = ["git", "-C", str(ROOT), "archive", "--format=tar", commit, "--", *CODE, *TEXTS]
    packed = subprocess.run(archive, check=True, stdout=subprocess.PIPE).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as members:
        files = {member.name: members.extractfile(member) for member in members if member.isfile()}
    return {
        name: file.read().decode("utf-8")
        for name, file in sorted(files.items())
        if file is not None and name.endswith((".py", ".md"))
    }


def modules(tree: Mapping[str, str]) -> dict[str, str]:
    """The Python files of a tree by dotted module name; a package by its own name."""
    code = {path.removesuffix(".py"): text for path, text in tree.items() if path.endswith(".py")}
    return {path.replace("/", ".").removesuffix(".__init__"): text for path, text in code.items()}


def product(sources: Sources) -> dict[str, str]:
    """The modules that are not tests."""
    return {name: text for name, text in sources.items() if not is_in(name, "tests")}


def is_in(name: str, package: str) -> bool:
    """Whether a dotted name is a package or something in it."""
    return name == package or name.startswith(f"{package}.")


GROUPS = ("cli", "common")
"""Folders of the package whose folders and modules are parts of their own."""


def part(module: str) -> str:
    """The part of `moce_ds` that a module is in: "data", "common.storage"; "__init__" for the package itself."""
    names = module.split(".")[1:] or ["__init__"]
    return ".".join(names[: 2 if names[0] in GROUPS else 1])


parse = cache(ast.parse)
Function = ast.FunctionDef | ast.AsyncFunctionDef


def last_name(node: ast.AST | None) -> str:
    """`c` of the expressions `c` and `a.b.c`; empty for others."""
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def functions(text: str) -> Iterator[tuple[str, Function]]:
    """Every function of a module by its qualified name: `Class.method`, `function.<locals>.inner`."""
    yield from _functions(parse(text), "")


def _functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, Function]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            yield f"{prefix}{child.name}", child
            yield from _functions(child, f"{prefix}{child.name}.<locals>.")
        else:
            yield from _functions(child, f"{prefix}{child.name}." if isinstance(child, ast.ClassDef) else prefix)


@cache
def imports(module: str, text: str, at_import_only: bool = False) -> frozenset[str]:
    """Dotted names that a module imports; `from a import b` gives a and a.b, since b may be a module.

    With `at_import_only`, not those inside functions or for type checkers.
    """
    return frozenset(_imports(module, parse(text), at_import_only))


def _imports(module: str, tree: ast.AST, at_import_only: bool) -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        if at_import_only and (isinstance(node, ast.FunctionDef) or _for_type_checkers(node)):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(module.split(".")[: -node.level]) if node.level else ""
            origin = ".".join(part for part in (above, node.module) if part)
            yield from (origin, *(f"{origin}.{alias.name}" for alias in node.names))
        elif isinstance(node, ast.Call) and last_name(node.func) in ("__import__", "import_module"):
            yield from (str(word.value) for word in node.args[:1] if isinstance(word, ast.Constant))
        yield from _imports(module, node, at_import_only)


def _for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and last_name(node.test) == "TYPE_CHECKING"


def reached(start: Iterable[str], edges: Mapping[str, Iterable[str]]) -> set[str]:
    """The nodes that `start` leads to along `edges`, `start` included."""
    found: set[str] = set()
    waiting = set(start)
    while waiting:
        name = waiting.pop()
        found.add(name)
        waiting |= set(edges.get(name, ())) - found
    return found


def circles(edges: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Groups of nodes that lead to one another, each sorted."""
    reach = {node: reached(edges[node], edges) for node in edges}
    groups = {frozenset(other for other in reach[node] if node in reach.get(other, ())) for node in edges}
    return sorted(sorted(group) for group in groups if len(group) > 1)
