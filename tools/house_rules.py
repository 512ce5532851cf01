"""Count how well the code keeps the house rules: `python -m tools.house_rules -h`.

`make check` runs it. A count that breaks its bound is a failure, and the places are listed. Bounds of 0 are rules;
other bounds are what has been reached, to be lowered with it. `tests/test_architecture.py` holds the rules that have no
count: layers, doors, and what a module must not reach.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import NamedTuple

import click
from rich.table import Table

from moce_ds.common.host.program import run_command, say_error, show
from tools.source_tree import (
    Function,
    Sources,
    circles,
    functions,
    imports,
    is_in,
    last_name,
    modules,
    parse,
    part,
    product,
    reached,
    read_commit,
    read_tree,
)

Tree = Mapping[str, str]
"""Texts by path: Python files and documents."""

MOST_LINES = 450
LONG, TOO_LONG = 40, 80
"""Lines of a function: more than LONG are counted, more than TOO_LONG are refused."""

VERB = re.compile(r"moce_ds\.(cli|stages)(\.\w+){0,2}:pretrain")
"""The function of the verb `moce pretrain`, in `cli/stages`, and where earlier commits have it."""

ODD_WORDS = re.compile(
    r"\b(anew|told|untold|spoken|borne|hence|lest|whither|hither|thereby|therein|thereof|whereupon|beforehand|"
    r"(goes|go|going|went|gone) on|of which|what it is made of|as it stands|worth the name|makes do|speaks of|"
    r"last but (one|two)|is no (file|folder|image|package|path|result|UTF-8)|said)\b"
)
"""Words that technical English has better ones for."""


class Measure(NamedTuple):
    """A number, and the places that make it up."""

    value: int
    places: Sequence[str] = ()


class Rule(NamedTuple):
    """A count of the code with its bound: the most allowed, or with `least` the fewest."""

    name: str
    measure: Callable[[Tree], Measure]
    bound: int
    least: bool = False

    def is_broken(self, count: int) -> bool:
        """Whether a count is beyond the bound."""
        return count < self.bound if self.least else count > self.bound


def long_files(tree: Tree) -> Measure:
    """Files of more than MOST_LINES lines, tests included."""
    return _places(f"{path}: {_lines(text)} lines" for path, text in tree.items() if _lines(text) > MOST_LINES)


def median_lines(tree: Tree) -> Measure:
    """Median lines of the product's modules; `__init__.py` files that only describe a package are left out."""
    own = product(modules(tree))
    return Measure(round(median(_lines(text) for text in own.values() if len(parse(text).body) > 1)))


def long_functions(tree: Tree, most: int = LONG) -> Measure:
    """Functions of the product of more than `most` lines, decorators left out."""
    lengths = ((place, (node.end_lineno or 0) - node.lineno + 1) for place, node in _product_functions(tree))
    return _places(f"{place}: {length} lines" for place, length in lengths if length > most)


def too_long_functions(tree: Tree) -> Measure:
    """Functions of the product of more than TOO_LONG lines."""
    return long_functions(tree, TOO_LONG)


def whole_settings(tree: Tree) -> Measure:
    """Signatures with a parameter that is the settings of a whole run, not only those of a part."""
    whole = _settings_of_runs(product(modules(tree)))
    return _places(
        place
        for place, node in _product_functions(tree)
        if any(whole & _names(argument.annotation) for argument in _arguments(node))
    )


def _settings_of_runs(sources: Sources) -> set[str]:
    """Names of settings classes that hold the group `run` beside others, what derives from them, and their TypeVars."""
    nodes = [node for text in sources.values() for node in ast.walk(parse(text))]
    classes = [node for node in nodes if isinstance(node, ast.ClassDef) and node.name.endswith("Settings")]
    whole = {node.name for node in classes if any(_field(line) == "run" for line in node.body)}
    while more := {c.name for c in classes if whole & {last_name(base) for base in c.bases}} - whole:
        whole |= more
    for node in nodes:
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Call)
            and last_name(node.value.func) == "TypeVar"
        ):
            bounds = {last_name(word.value) for word in node.value.keywords} | set(map(last_name, node.value.args))
            whole |= {last_name(target) for target in node.targets} if bounds & whole else set()
    return whole


def _field(line: ast.stmt) -> str:
    if isinstance(line, ast.AnnAssign):
        return last_name(line.target)
    return line.name if isinstance(line, ast.FunctionDef) else ""


def _arguments(node: Function) -> list[ast.arg]:
    given = node.args
    return [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]


def _names(annotation: ast.AST | None) -> set[str]:
    """Names in an annotation, also in quotes; not those of `type[...]` and `Callable[...]`."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = parse(annotation.value)
    if annotation is None or (isinstance(annotation, ast.Subscript) and last_name(annotation.value) in _NO_VALUE):
        return set()
    return {last_name(annotation)}.union(*map(_names, ast.iter_child_nodes(annotation)))


_NO_VALUE = ("type", "Callable")


def kind_tests(tree: Tree) -> Measure:
    """Comparisons of `arch` or `gate` with text, outside settings modules and models/build.py."""
    return _places(
        f"{module}:{node.lineno}"
        for module, text in product(modules(tree)).items()
        if not (module.endswith("settings") or module == "moce_ds.models.build")
        for node in ast.walk(parse(text))
        if isinstance(node, ast.Compare | ast.Match) and _tests_kind(node)
    )


def _tests_kind(node: ast.Compare | ast.Match) -> bool:
    if isinstance(node, ast.Match):
        return last_name(node.subject) in ("arch", "gate")
    sides = [node.left, *node.comparators]
    texts = any(isinstance(part, ast.Constant) and isinstance(part.value, str) for s in sides for part in ast.walk(s))
    return texts and any(last_name(side) in ("arch", "gate") for side in sides)


def levels_to_a_step(tree: Tree) -> Measure:
    """Calls between the verb `moce pretrain` and the function that calls `engine.step()`, on the shortest way."""
    chain = step_chain(product(modules(tree)))
    return Measure(len(chain) - 1, chain)


def step_chain(sources: Sources) -> list[str]:
    """Functions (`module:Class.name`) from the verb to the optimizer step, on the shortest way.

    What a function calls is read from the names that it uses: a name alone is the function that is in scope, and
    `x.name(...)` a method of any class that the module can reach by its imports.

    Raises:
        click.ClickException: there is no such way.
    """
    graph = _import_graph(sources)
    known = {
        f"{module}:{name}": node
        for module, text in sources.items()
        for name, node in functions(text)
        if "<locals>" not in name  # the outer function stands for it
    }
    ways = [[place] for place in known if VERB.fullmatch(place)]
    seen: set[str] = set()
    for way in ways:  # grows: breadth first
        module, node = way[-1].split(":")[0], known[way[-1]]
        if any(_is_engine_step(part) for part in ast.walk(node)):
            return way
        scope, methods = _scope(module, sources[module]), _called_methods(node)
        reachable = reached([module], graph)
        names = {scope.get(part.id, "") for part in ast.walk(node) if isinstance(part, ast.Name)}
        called = {
            place
            for place in known
            if place in names or (place.rpartition(".")[2] in methods and place.split(":")[0] in reachable)
        }
        ways += [[*way, place] for place in sorted(called - seen)]
        seen |= called
    raise click.ClickException(f"No way from {VERB.pattern} to a call of engine.step() in {len(sources)} modules.")


def _is_engine_step(node: ast.AST) -> bool:
    method = node.func if isinstance(node, ast.Call) else None
    return isinstance(method, ast.Attribute) and method.attr == "step" and last_name(method.value) == "engine"


def _scope(module: str, text: str) -> dict[str, str]:
    """What the names of a module stand for, as `module:name`; imports inside functions included."""
    lines = list(ast.walk(parse(text)))
    own = {line.name: f"{module}:{line.name}" for line in lines if isinstance(line, Function)}
    imported = {
        alias.asname or alias.name: f"{line.module}:{alias.name}"
        for line in lines
        if isinstance(line, ast.ImportFrom)
        for alias in line.names
    }
    return own | imported


def _called_methods(node: Function) -> set[str]:
    calls = (part.func for part in ast.walk(node) if isinstance(part, ast.Call))
    return {method.attr for method in calls if isinstance(method, ast.Attribute)}


def package_circles(tree: Tree) -> Measure:
    """Parts of the package, and launchers and tools, that import one another, also inside functions."""
    edges: dict[str, set[str]] = {}
    for module, imported in _import_graph(product(modules(tree))).items():
        edges.setdefault(_part(module), set()).update(map(_part, imported))
    return _places(" <-> ".join(circle) for circle in circles(edges))


def _part(module: str) -> str:
    return f"moce_ds.{part(module)}" if is_in(module, "moce_ds") else module.split(".")[0]


def module_circles(tree: Tree) -> Measure:
    """Modules that are in a circle of imports, also of imports inside functions."""
    return _places(module for circle in circles(_import_graph(product(modules(tree)))) for module in circle)


def _import_graph(sources: Sources, at_import_only: bool = False) -> dict[str, set[str]]:
    """Modules that each of `sources` imports. `moce_ds` itself has the version and the lazy API: left out."""
    known = sources.keys() - {"moce_ds"}
    return {name: set(imports(name, text, at_import_only)) & known - {name} for name, text in sources.items()}


def step_closure(tree: Tree) -> Measure:
    """Modules of the product that are loaded for a training step: what the module of `pretrain` imports, and so on."""
    own = product(modules(tree))
    edges = _import_graph(own, at_import_only=True)
    closure = reached([step_chain(own)[1].split(":")[0]], edges)
    return _places(sorted(name for name in closure if len(parse(own[name]).body) > 1))


def undocumented(tree: Tree) -> Measure:
    """Public functions and methods of the product without a docstring; not methods that a base class may describe."""
    own = product(modules(tree))
    return _places(f"{module}:{name}" for module, text in own.items() for name in _undocumented(parse(text), False))


def _undocumented(scope: ast.Module | ast.ClassDef, derived: bool) -> Iterator[str]:
    for node in scope.body:
        if isinstance(node, Function) and not (derived or node.name.startswith("_") or ast.get_docstring(node)):
            yield node.name
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            bases = {last_name(base.value if isinstance(base, ast.Subscript) else base) for base in node.bases}
            inherits = bool(bases - {"NamedTuple", "Protocol", "Generic", "ABC"})
            yield from (f"{node.name}.{name}" for name in _undocumented(node, inherits))


def odd_words(tree: Tree) -> Measure:
    """Words of ODD_WORDS in the product and in the documents."""
    return _places(
        f"{path}:{number}: {found[0]}"
        for path, text in tree.items()
        if not path.startswith("tests/") and path != "tools/house_rules.py"
        for number, line in enumerate(text.splitlines(), 1)
        for found in ODD_WORDS.finditer(line)
    )


def _product_functions(tree: Tree) -> Iterator[tuple[str, Function]]:
    for module, text in product(modules(tree)).items():
        yield from ((f"{module}:{name}", node) for name, node in functions(text))


def _lines(text: str) -> int:
    return text.count("\n")


def _places(found: Iterator[str] | Sequence[str]) -> Measure:
    places = list(found)
    return Measure(len(places), places)


RULES = (
    Rule(f"files of more than {MOST_LINES} lines", long_files, 0),
    Rule("lines of a module, median (aim: 150 to 300)", median_lines, 150, least=True),
    Rule(f"functions of more than {LONG} lines", long_functions, 4),
    Rule(f"functions of more than {TOO_LONG} lines", too_long_functions, 0),
    Rule("signatures with the settings of a whole run", whole_settings, 5),
    Rule("comparisons of arch or gate outside settings", kind_tests, 0),
    Rule("calls from the verb to a training step", levels_to_a_step, 3),
    Rule("packages that import one another", package_circles, 0),
    Rule("modules in a circle of imports", module_circles, 0),
    Rule("modules loaded for a training step", step_closure, 87),
    Rule("public functions without a docstring", undocumented, 0),
    Rule("odd English words", odd_words, 2),
)


@click.command(context_settings={"max_content_width": 100, "help_option_names": ["-h", "--help"]})
@click.option("--base", default=None, metavar="COMMIT", help="Print the counts of this commit beside today's.")
@click.option("--places", default="", metavar="WORD", help="List the places of the rules whose name holds WORD.")
def main(base: str | None, places: str) -> None:
    """Print the counts of the house rules; end with status 1 where one is beyond its bound."""
    tree = read_tree()
    try:
        before = read_commit(base) if base else None
    except subprocess.CalledProcessError:
        raise click.BadParameter(f"got {base!r}; expected a commit of this repository.", param_hint="--base") from None
    table = Table("rule", *(["before"] if before else []), "now", "bound")
    broken = []
    for rule in RULES:
        now = rule.measure(tree)
        counts = [str(rule.measure(before).value)] if before else []
        table.add_row(rule.name, *counts, str(now.value), f"{'>=' if rule.least else '<='} {rule.bound}")
        if rule.is_broken(now.value):
            broken.append(rule)
        if rule in broken or (places and places in rule.name):
            say_error(f"{rule.name}:", *(f"  {place}" for place in now.places))
    show(table)
    if broken:
        say_error(*(f"Broken: {rule.name}" for rule in broken))
        sys.exit(1)


if __name__ == "__main__":
    run_command(main, "python -m tools.house_rules")
