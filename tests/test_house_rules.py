"""tools/house_rules.py: the code keeps the rules, and each rule is caught at work on a small breach."""

from functools import cache
from pathlib import Path

import pytest
from click.testing import CliRunner

from tools.house_rules import MOST_LINES, RULES, Measure, Rule, Tree, levels_to_a_step, main
from tools.source_tree import read_tree

REAL = read_tree()
BY_NAME = {rule.measure.__name__: rule for rule in RULES}
ROUTER = "moce_ds/training/router.py"


@cache
def today(name: str) -> Measure:
    """What a rule counts in the real tree."""
    return BY_NAME[name].measure(REAL)


def lengthened(path: str, added: str) -> Tree:
    """The real tree with lines added to a file, or with a new file of them."""
    return {**REAL, path: f"{REAL.get(path, '')}\n{added}\n"}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.measure.__name__)
def test_the_code_keeps(rule: Rule) -> None:
    measure = today(rule.measure.__name__)
    assert not rule.is_broken(measure.value), measure.places


# Rule, file, lines added to it, and what the rule lists then.
BREACHES = [
    ("long_files", "tests/test_docs.py", "\n" * MOST_LINES, "tests/test_docs.py: "),
    ("long_functions", ROUTER, "def f():\n" + "    pass\n" * 40, "moce_ds.training.router:f: 41 lines"),
    ("too_long_functions", ROUTER, "class C:\n  def f(self):\n" + "    pass\n" * 80, "moce_ds.training.router:C.f: 81"),
    ("whole_settings", ROUTER, "def f(config: PretrainSettings): pass", "moce_ds.training.router:f"),
    ("whole_settings", ROUTER, "def f(*, config: 'FinetuneSettings | None'): pass", "moce_ds.training.router:f"),
    (
        "whole_settings",
        ROUTER,
        "class ASettings:\n  run: int\nclass BSettings(ASettings): pass\nT = TypeVar('T', bound=BSettings)\n"
        "def f(of: list[T]): pass",
        "moce_ds.training.router:f",
    ),
    ("kind_tests", ROUTER, "def f(c): return c.experts.gate == 'cluster'", "moce_ds.training.router:"),
    ("kind_tests", ROUTER, "def f(arch): return arch not in ('mae', 'sdr')", "moce_ds.training.router:"),
    ("kind_tests", ROUTER, "def f(spec):\n    match spec.arch:\n        case 'mae': pass", "moce_ds.training.router:"),
    (
        "package_circles",
        "moce_ds/common/text.py",
        "def f():\n    import moce_ds.common.host.program",
        "moce_ds.common.host <-> moce_ds.common.text",
    ),
    ("package_circles", "moce_ds/common/text.py", "from launchers import local", "launchers <-> "),
    ("module_circles", "moce_ds/moe/routing_plan.py", "import moce_ds.moe.deepspeed_layer", "moce_ds.moe.routing_plan"),
    ("step_closure", "moce_ds/common/text.py", "import moce_ds.exporting.write", "moce_ds.exporting.write"),
    ("undocumented", ROUTER, "def shown(): pass", "moce_ds.training.router:shown"),
    ("undocumented", ROUTER, "class Shown:\n  def f(self): pass", "moce_ds.training.router:Shown.f"),
    ("odd_words", "docs/method.md", "It is made anew.", "anew"),
]


@pytest.mark.parametrize(("name", "path", "added", "place"), BREACHES)
def test_a_breach_is_counted(name: str, path: str, added: str, place: str) -> None:
    rule = BY_NAME[name]
    before, after = today(name), rule.measure(lengthened(path, added))
    assert after.value > before.value
    assert any(place in line for line in after.places)
    assert rule._replace(bound=before.value).is_broken(after.value)


# What looks like a breach and is none.
ALLOWED = [
    ("whole_settings", ROUTER, "def f(kind: type[PretrainSettings], run: RunSettings): pass"),
    ("whole_settings", ROUTER, "def f(start: Callable[[PretrainSettings], None]): pass"),
    ("whole_settings", "tests/test_docs.py", "def f(config: PretrainSettings): pass"),
    ("kind_tests", "moce_ds/models/build.py", "def f(c): return c.arch == 'mae'"),
    ("kind_tests", ROUTER, "def f(c): return c.gate == c.arch"),
    ("package_circles", "moce_ds/moe/routing_plan.py", "import moce_ds.moe.deepspeed_layer"),
    ("undocumented", ROUTER, "def _hidden(): pass\nclass M(nn.Module):\n  'Doc.'\n  def forward(self): pass"),
    ("step_closure", "moce_ds/common/text.py", "def f():\n    import moce_ds.exporting.write"),
]


@pytest.mark.parametrize(("name", "path", "added"), ALLOWED)
def test_what_is_no_breach_is_not_counted(name: str, path: str, added: str) -> None:
    assert BY_NAME[name].measure(lengthened(path, added)).value == today(name).value


def test_short_modules_lower_the_median() -> None:
    rule = BY_NAME["median_lines"]
    split = {**REAL, **{f"moce_ds/part{number}.py": "import a\nimport b\n" for number in range(1000)}}
    assert rule.measure(split).value == 2 and rule.is_broken(2)


def test_the_way_to_a_training_step_grows_with_a_level() -> None:
    """A verb that calls a function which calls a method is two calls away from the step."""
    verb = "from moce_ds.training.run import start\ndef pretrain(): start()"
    run = "from moce_ds.training.loop import Loop\ndef start(): Loop().fit()"
    loop = "class Loop:\n    def fit(self): self.engine.step()"
    tree = {"moce_ds/cli/stages/pretraining.py": verb, "moce_ds/training/run.py": run, "moce_ds/training/loop.py": loop}
    assert levels_to_a_step(tree).places == [
        "moce_ds.cli.stages.pretraining:pretrain",
        "moce_ds.training.run:start",
        "moce_ds.training.loop:Loop.fit",
    ]
    longer = loop.replace("self.engine.step()", "self.one()\n    def one(self): self.engine.step()")
    assert levels_to_a_step({**tree, "moce_ds/training/loop.py": longer}).value == 3


def test_the_real_way_begins_at_the_verb_and_ends_in_training() -> None:
    chain = today("levels_to_a_step").places
    assert chain[:2] == ["moce_ds.cli.stages.pretraining:pretrain", "moce_ds.training.pretrain:pretrain"]
    assert chain[-1].startswith("moce_ds.training.")


def test_the_command_prints_counts_of_a_commit_beside_todays(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = [rule for rule in RULES if "functions" in rule.name]
    monkeypatch.setattr("tools.house_rules.RULES", rules)
    done = CliRunner().invoke(main, ["--base", "HEAD", "--places", "than 40"])
    assert done.exit_code == 0, done.output
    assert "before" in done.output and all(rule.name in done.output for rule in rules)
    assert all(place in done.output for place in today("long_functions").places)


def test_an_unknown_commit_is_named() -> None:
    done = CliRunner().invoke(main, ["--base", "no-such-commit"])
    assert done.exit_code == 2 and "no-such-commit" in done.output


def test_a_broken_bound_ends_with_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    strict = [rule._replace(bound=0) for rule in RULES if rule.measure.__name__ == "long_functions"]
    monkeypatch.setattr("tools.house_rules.RULES", strict)
    done = CliRunner().invoke(main, [])
    assert done.exit_code == 1
    assert f"Broken: {strict[0].name}" in done.output


def test_make_check_runs_the_rules() -> None:
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    assert "-m tools.house_rules" in makefile
