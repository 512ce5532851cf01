"""The machinery of settings: what wins, what is refused and in which words, and that YAML gives back what it got."""

from dataclasses import field, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from moce_ds.config import differences, from_tree, help_text, keys, load, option, settings, to_tree, to_yaml
from moce_ds.errors import ConfigError


@settings
class Sieve:
    mesh: Annotated[float, Field(gt=0, lt=1)] = option(0.75, "share that is held back")
    rounds: int = option(3, "times round")
    kind: Literal["fine", "coarse"] = option("fine", "which one")
    layers: list[int] = option([1, 2], "where")
    window: tuple[float, float] = option((0.5, 1.0), "from, to")
    cover: Path | None = option(None, "a lid")


@settings
class Mill:
    source: Path = option(help="where the corn is")
    sieve: Sieve = field(default_factory=Sieve)
    on: bool = option(True)

    def __post_init__(self) -> None:
        if self.sieve.rounds > 100:
            raise ValueError(f"sieve.rounds: {self.sieve.rounds} wears the sieve out; expected at most 100")


def refusal(*words: str, file: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load(Mill, file, words)
    return str(caught.value)


def test_defaults_then_file_then_words(tmp_path: Path) -> None:
    file = tmp_path / "mill.yaml"
    file.write_text("source: corn\nsieve:\n  mesh: 0.5\n  rounds: 7\n")
    config = load(Mill, file, ["sieve.rounds=8", "sieve.window=[0, 2.5e-1]", "sieve.rounds=9", "on=false"])
    assert config.source == Path("corn") and config.sieve.kind == "fine"  # from the file; by default
    assert config.sieve.mesh == 0.5 and config.sieve.rounds == 9  # from the file; from the last word
    assert config.sieve.window == (0.0, 0.25) and config.on is False
    assert load(Mill, None, ["source=s"]).sieve == Sieve()


def test_values_mean_what_they_look_like() -> None:
    config = load(Mill, None, ["source=a=b.txt", "sieve.mesh=1e-4", "sieve.layers=[]", "sieve.cover=null"])
    assert (config.source, config.sieve.mesh, config.sieve.layers, config.sieve.cover) == (
        Path("a=b.txt"),
        1e-4,
        [],
        None,
    )


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("sieve.mseh=0.5", "sieve.mseh: no such setting. Did you mean sieve.mesh?"),
        ("round=3", "round: no such setting. Did you mean sieve.rounds?"),
        ("zzz=1", "zzz: no such setting. Known settings: source, sieve.mesh, sieve.rounds,"),
        ("sieve.rounds=many", "sieve.rounds: got 'many'; Input should be a valid integer"),
        ("sieve.rounds=2.5", "sieve.rounds: got 2.5; Input should be a valid integer"),
        ("sieve.mesh=1", "sieve.mesh: got 1; Input should be less than 1"),
        ("sieve.mesh=.nan", "sieve.mesh: got nan; Input should be a finite number"),
        ("sieve.window=[0, .inf]", "sieve.window.1: got inf; Input should be a finite number"),
        ("sieve.window=[1]", "sieve.window.1: required, and not given."),
        ("sieve.kind=medium", "sieve.kind: got 'medium'; Input should be 'fine' or 'coarse'"),
        ("sieve.layers=3", "sieve.layers: got 3; Input should be a valid list"),
        ("sieve=3", "sieve: got 3; it is a group of settings, such as sieve.NAME=VALUE."),
        ("sieve.rounds=101", "sieve.rounds: 101 wears the sieve out; expected at most 100"),
    ],
)
def test_refusals_name_key_and_value_and_what_is_allowed(word: str, message: str) -> None:
    said = refusal("source=s", word)
    assert said.startswith("Settings refused (the command line):\n  ") and message in said
    assert "dataclass" not in said and "pydantic" not in said


def test_every_fault_is_listed_at_once() -> None:
    said = refusal("sieve.mesh=7", "on=perhaps", "sieve.rond=1")
    assert "source: required, and not given." in said
    assert "sieve.mesh: got 7" in said and "on: got 'perhaps'" in said and "Did you mean sieve.rounds?" in said
    assert said.count("\n") == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sieve.mesh"], "'sieve.mesh' is not a setting: expected key=value, such as"),
        (["=3"], "'=3' is not a setting"),
        (["sieve.mesh=[1"], "The value of sieve.mesh is not valid YAML: '[1'"),
        (["on=true", "on.x=2"], "on.x: on is a single setting and has no part 'x'."),
    ],
)
def test_words_that_are_no_settings(words: list[str], message: str) -> None:
    assert message in refusal(*words)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"sieve: [1", "is not valid YAML"),
        (b"\xff\xfe\x00", "is not valid YAML"),
        (b"- a\n- b\n", "holds a list; expected `key: value` lines."),
        (b"sieve:\n  mesh: 2\nsource: s\n", "Settings refused ("),
        (None, "not found: expected a YAML file of settings."),
    ],
)
def test_files_that_are_no_settings_are_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "mill.yaml"
    if content is not None:
        file.write_bytes(content)
    said = refusal(file=file)
    assert str(file) in said and message in said
    assert str(tmp_path) in refusal(file=tmp_path)  # a folder is no file either


LAUGHS = "".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}' if n else 'lol'] * 9)}]\n" for n in range(12))
"""A list of 9 lists of 9 lists ...: 9 ** 12 times lol."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("source: !!python/object/apply:os.mkdir [{witness}]", "could not determine a constructor"),
        ("source: !!python/name:os.system", "could not determine a constructor"),
        (LAUGHS + "source: s\nsieve: {{mesh: *l11}}", "sieve.mesh: got [["),
        (LAUGHS + "source: s\nsieve: *l11", "sieve: got [["),
        (LAUGHS + "source: *l11", "source: got [["),
        ("source: " + "[" * 1500, "is not valid YAML: maximum recursion depth"),
        ("source: s\nsieve: {{rounds: " + "9" * 5000 + "}}", "is not valid YAML: Exceeds the limit"),
        ("source: 2001-99-99", "is not valid YAML: month must be"),
        ("source: !!timestamp soon", "is not valid YAML"),
        ("source: !!bool perhaps", "is not valid YAML"),
        ("1: 2\nsource: s", "1: got 1; Keys should be strings"),
    ],
)
def test_hostile_yaml_is_refused_in_few_words(tmp_path: Path, content: str, message: str) -> None:
    file, witness = tmp_path / "mill.yaml", tmp_path / "witness"
    file.write_text(content.format(witness=witness))
    said = refusal(file=file)
    assert str(file) in said and message in said and len(said) < 2500
    assert not witness.exists()


@pytest.mark.parametrize("value", ["!!python/object/apply:os.getcwd []", "[" * 1500, "9" * 5000, "2001-99-99"])
def test_hostile_words_are_refused_in_few_words(value: str) -> None:
    said = refusal(f"source={value}")
    assert "The value of source is not valid YAML" in said and len(said) < 800


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "mill.yaml").write_text("# nothing\n")
    assert load(Mill, tmp_path / "mill.yaml", ["source=s"]) == load(Mill, None, ["source=s"])


@given(
    st.floats(1e-300, 1, exclude_max=True),
    st.integers(-(10**20), 100),
    st.sampled_from(["fine", "coarse"]),
    st.lists(st.integers()),
    st.text("abc/ :#'\"é=", min_size=1),
)
def test_yaml_gives_the_same_settings_back(mesh: float, rounds: int, kind: str, layers: list[int], name: str) -> None:
    sieve = {"mesh": mesh, "rounds": rounds, "kind": kind, "layers": layers, "cover": name}
    config = from_tree(Mill, {"source": name, "sieve": sieve}, "a test")
    with TemporaryDirectory() as folder:
        file = Path(folder) / "mill.yaml"
        file.write_text(to_yaml(config), encoding="utf-8")
        assert load(Mill, file) == config


def test_settings_cannot_be_changed_and_share_no_defaults() -> None:
    config = load(Mill, None, ["source=s"])
    with pytest.raises(AttributeError):
        config.on = False  # type: ignore[misc]
    config.sieve.layers.append(9)
    assert load(Mill, None, ["source=s"]).sieve.layers == [1, 2]


def test_differences_are_dotted_keys_with_both_values() -> None:
    old = to_tree(load(Mill, None, ["source=s"]))
    new = to_tree(load(Mill, None, ["source=s", "sieve.rounds=4", "on=false"]))
    assert differences(old, new) == {"sieve.rounds": (3, 4), "on": (True, False)}
    assert differences(old, old) == {}
    assert differences({"a": 1, "b": {"c": 2}}, {"b": 5, "d": None, "e": 0}) == {
        "a": (1, None), "b": ({"c": 2}, 5), "e": (None, 0)
    }  # fmt: skip


def test_help_shows_every_key_as_it_would_be_typed() -> None:
    lines = help_text(Mill).splitlines()
    assert [line.split("=")[0].strip() for line in lines] == [key for key, _ in keys(Mill)]
    assert len(lines) == 2 + len(fields(Sieve))
    assert lines[0].split() == ["source=(required)", "where", "the", "corn", "is"]
    assert lines[1].split() == ["sieve.mesh=0.75", "share", "that", "is", "held", "back"]
    typed = [line.split()[0] for line in lines[1:]]  # what help shows can be typed
    assert load(Mill, None, ["source=s", *typed]) == load(Mill, None, ["source=s"])
