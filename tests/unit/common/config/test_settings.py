"""The machinery of settings: what wins, what is refused and in which words, and that YAML gives back what it got."""

from dataclasses import field, fields
from functools import reduce
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from moce_ds.common.config.composition import Layer
from moce_ds.common.config.settings import (
    KeysOf,
    differences,
    from_layers,
    help_text,
    keys,
    load,
    option,
    read_yaml,
    settings,
    to_tree,
    to_yaml,
    word,
    words_layer,
)
from moce_ds.common.errors import ConfigError


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


def dotted(config: Any) -> list[tuple[str, Any]]:
    """Keys and values of a settings object."""
    return [(key, reduce(getattr, key.split("."), config)) for key, _ in keys(type(config))]


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


@settings
class Silo:
    """A group of every type that settings have."""

    place: Path | None = option(None)
    text: str = option("")
    label: str | None = option(None)
    share: float | None = option(None)
    count: int = option(1)
    on: bool = option(True)
    level: Literal[1, 2] = option(1)
    names: list[str] = option([])
    places: dict[str, Path] = option({})
    more: dict[str, str | bool] = option({})
    grid: Annotated[dict[str, list[Any]], KeysOf(Mill, several=True, own=("processes",))] = option({})


# The same in a YAML file and as a word, where the value of a word is what follows the first `=`.
@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("count", "016", 16),  # YAML 1.1: octal 14
        ("count", "1e3", 1000),
        ("count", "8.0", 8),
        ("count", "+3", 3),
        ("share", "1e-4", 1e-4),  # YAML 1.1: text
        ("share", ".5", 0.5),
        ("share", "null", None),
        ("label", "null", None),
        ("text", "null", "null"),
        ("text", "yes", "yes"),
        ("text", "007", "007"),
        ("text", "1:30", "1:30"),
        ("text", "2024-01-01", "2024-01-01"),
        ("place", "007", Path("007")),
        ("place", "2024-01-01", Path("2024-01-01")),
        ("place", "off", Path("off")),
        ("on", "False", False),
        ("level", "02", 2),
        ("names", "[yes, 007, a=b, c: d]", None),
        ("names", "[yes, 007, a=b]", ["yes", "007", "a=b"]),
        ("more", "{exclusive: true, nice: 100}", {"exclusive": True, "nice": "100"}),
        ("places", "{a: 1}", {"a": Path("1")}),
        ("grid", "{sieve.rounds: [01, 1e1], processes: [02]}", {"sieve.rounds": [1, 10], "processes": [2]}),
        ("grid", "{sieve: {mesh: [1, 0.50, 1e-2]}}", {"sieve.mesh": [1, 0.5, "1e-2"]}),
        ("grid", "{sieve.kind: [no], nonsense: [no]}", {"sieve.kind": ["no"], "nonsense": ["no"]}),
        ("grid", "{sieve.layers: [[0, 01], [2]], source: [01]}", {"sieve.layers": [[0, 1], [2]], "source": ["01"]}),
        ("count", "yes", None),
        ("count", "1_000", None),
        ("count", "0x10", None),
        ("share", "yes", None),
        ("share", "1:30", None),
        ("on", "yes", None),
        ("on", "on", None),
        ("on", "1", None),
        ("level", "true", None),
    ],
)
def test_the_declared_type_says_what_text_means(tmp_path: Path, key: str, text: str, value: Any) -> None:
    file = tmp_path / "silo.yaml"
    file.write_text(f"{key}: {text}\n")
    for origin, arguments in ((str(file), (file, [])), ("the command line", (None, [f"{key}={text}"]))):
        if value is not None or text == "null":
            assert getattr(load(Silo, *arguments), key) == value
        else:
            with pytest.raises(ConfigError, match=f"Settings refused .{origin}.:\n  {key}"):
                load(Silo, *arguments)


def test_words_are_taken_as_typed() -> None:
    for text in ("a #2", " a ", "'a'", '"a"', "a: b", "[a]", "{a}", "- a", "!a", "&a", "a=b", ""):
        assert load(Silo, None, [f"text={text}"]).text == text
        if text:
            assert load(Silo, None, [f"place={text}"]).place == Path(text)


def test_homes_and_variables_in_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me$")
    monkeypatch.setenv("SET", "x y")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.chdir(tmp_path)
    for text, path in {
        "~": "/home/me$",
        "~/$SET/${SET}z": "/home/me$/x y/x yz",
        "a/~": "a/~",
        "./~a": "~a",
        "a$$SET$": "a$SET$",
        "$1": None,
        "$EMPTY/a": None,
    }.items():
        (tmp_path / "silo.yaml").write_text(f"places: {{one: '{text}'}}\n")
        for arguments in ((tmp_path / "silo.yaml", []), (None, [f"places.one={text}"])):
            if path is None:
                with pytest.raises(ConfigError, match=r"places.one: got .*the environment variable"):
                    load(Silo, *arguments)
            else:
                assert load(Silo, *arguments).places == {"one": Path(path)}
    (tmp_path / "a$SET").touch()
    assert load(Silo, None, ["place=a$SET"]).place == Path("a$SET")  # what is there is meant


def test_a_key_given_twice_is_refused_with_its_lines(tmp_path: Path) -> None:
    file = tmp_path / "mill.yaml"
    file.write_text("source: s\nsieve:\n  mesh: 0.5\non: true\nsieve:\n  rounds: 2\n")
    assert "mill.yaml is not valid YAML: sieve is given twice, in lines 2 and 5; write it once." in refusal(file=file)
    file.write_text("source: s\nsieve: {mesh: 0.5, 'mesh': 0.7}\n")
    assert "sieve.mesh is given twice, in line 2" in refusal(file=file)


def test_anchors_merge_and_own_keys_win(tmp_path: Path) -> None:
    file = tmp_path / "mill.yaml"
    file.write_text("source: s\nsieve:\n  <<: &a {mesh: 0.5, rounds: 7}\n  rounds: 8\n")
    assert load(Mill, file).sieve == Sieve(mesh=0.5, rounds=8)


def test_each_fault_is_told_under_its_origin(tmp_path: Path) -> None:
    file = tmp_path / "mill.yaml"
    file.write_text("sieve:\n  mesh: yes\n  rounds: 0.5\n")
    said = refusal("sieve.rounds=many", "sieve.rond=1", file=file)
    assert f"Settings refused ({file}):\n  sieve.mesh: got 'yes'" in said
    assert f"Settings refused ({file} and the command line):\n  source: required" in said
    words = said.partition("Settings refused (the command line):\n")[2]
    assert "sieve.rounds: got 'many'" in words and "sieve.rond: no such setting" in words
    assert "sieve.mesh" not in words.replace("Did you mean sieve.mesh", "")


def test_mappings_are_merged_and_all_else_is_replaced() -> None:
    layers = [
        Layer("a", {"names": ["x"], "places": {"a": "1"}}),
        words_layer(["names=[y]", "places={b: 2}", "places.c=3"]),
    ]
    silo = from_layers(Silo, layers)
    assert silo.names == ["y"] and silo.places == {"a": Path("1"), "b": Path("2"), "c": Path("3")}


def test_a_heading_with_nothing_under_it_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "mill.yaml"
    file.write_text("source: s\nsieve:\n#  mesh: 0.1\n")
    assert load(Mill, file, ["sieve.rounds=5"]).sieve == Sieve(rounds=5)


def test_without_a_declared_type_yaml_1_2_says_what_text_means(tmp_path: Path) -> None:
    file = tmp_path / "any.yaml"
    file.write_text("a: [016, 1e-4, yes, true, null, ~, '1', 2.0, -3]\n")
    assert read_yaml(file) == {"a": [16, 1e-4, "yes", True, None, None, "1", 2.0, -3]}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("sieve.mseh=0.5", "sieve.mseh: no such setting. Did you mean sieve.mesh?"),
        ("round=3", "round: no such setting. Did you mean sieve.rounds?"),
        ("seive.mash=1", "seive: no such setting. Did you mean sieve?"),
        ("zzz=1", "zzz: no such setting. Known settings: source, sieve.mesh, sieve.rounds,"),
        ("sieve.rounds=many", "sieve.rounds: got 'many'; expected a whole number, such as 16."),
        ("sieve.rounds=2.5", "sieve.rounds: got '2.5'; expected a whole number, such as 16."),
        ("sieve.mesh=1", "sieve.mesh: got 1; expected a number less than 1"),
        ("sieve.mesh=.nan", "sieve.mesh: got '.nan'; expected a number, such as 0.5 or 1e-4."),
        ("sieve.window=[0, inf]", "sieve.window.1: got 'inf'; expected a number, such as 0.5 or 1e-4."),
        ("sieve.mesh=1e999", "sieve.mesh: got '1e999'; expected a number that 64 bits can hold."),
        ("sieve.mesh=1e-999", "sieve.mesh: got '1e-999'; expected a number that 64 bits can hold."),
        ("sieve.window=[0,1,2]", "sieve.window: got [0, 1, '2']; expected at most 2 of them, not 3"),
        ("source=", "source: got ''; expected a path, and . for the current folder."),
        ("sieve.cover=", "sieve.cover: got ''; expected a path"),
        ("source=$NOT_SET/x", "source: got '$NOT_SET/x'; the environment variable NOT_SET is not set; write $$ for"),
        ("source=~no-such-user/x", "source: got '~no-such-user/x'; the home folder of ~no-such-user is unknown"),
        ("sieve.round=3", "sieve.round: no such setting. Did you mean sieve.rounds?"),
        ("sieve.window=[1]", "sieve.window.1: required, and not given."),
        ("sieve.kind=medium", "sieve.kind: got 'medium'; expected 'fine' or 'coarse'"),
        ("sieve.layers=3", "sieve.layers: got '3'; expected a list"),
        ("sieve=3", "sieve: got '3'; it is a group of settings, such as sieve.NAME=VALUE."),
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
        (["sieve.layers=[1"], "The value of sieve.layers is not a list or mapping: while parsing a flow sequence"),
        (["sieve.layers=[1] # no"], "The value of sieve.layers is not a list or mapping: '# no' follows its end."),
        (["sieve={rounds: 1, rounds: 2}"], "rounds is given twice, in line 1; write it once."),
        (["on=true", "on.x=2"], "on: given as a whole and in parts (the command line); give it once"),
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
        ("source: !!python/object/apply:os.mkdir [{witness}]", "line 1: source has the tag tag:yaml.org,2002:python"),
        ("source: !!python/name:os.system", "line 1: source has the tag tag:yaml.org,2002:python/name:os.system;"),
        (LAUGHS + "source: s\nsieve: {{mesh: *l11}}", "sieve.mesh: got [["),
        (LAUGHS + "source: s\nsieve: *l11", "sieve: got [["),
        (LAUGHS + "source: *l11", "source: got [["),
        ("source: " + "[" * 1500, "is not valid YAML: maximum recursion depth"),
        ("source: s\nsieve: {{rounds: " + "9" * 5000 + "}}", "99'; expected a whole number, such as 16."),
        ("source: !!timestamp soon", "is not valid YAML"),
        ("source: !!bool perhaps", "is not valid YAML"),
        ("source: &own [*own]", "source.0 contains itself"),
        ("source: s\n? [a, b]\n: 3", "line 2: a key is not plain text"),
        ("source: s\n<<: 3", "line 2: << merges a value that is not a mapping"),
        ("1: 2\nsource: s", "1: no such setting."),
    ],
)
def test_hostile_yaml_is_refused_in_few_words(tmp_path: Path, content: str, message: str) -> None:
    file, witness = tmp_path / "mill.yaml", tmp_path / "witness"
    file.write_text(content.format(witness=witness))
    said = refusal(file=file)
    assert str(file) in said and message in said and len(said) < 2500
    assert not witness.exists()


@pytest.mark.parametrize("value", ["!!python/object/apply:os.getcwd []", "[" * 1500, "9" * 5000, "2001-99-99"])
def test_text_of_words_is_not_looked_into(value: str) -> None:
    assert load(Mill, None, [f"source={value}"]).source == Path(value)


def test_a_deep_list_in_a_word_is_refused_in_few_words() -> None:
    said = refusal("source=s", f"sieve.layers={'[' * 1500}")
    assert "The value of sieve.layers is not a list or mapping" in said and len(said) < 800


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "mill.yaml").write_text("# nothing\n")
    assert load(Mill, tmp_path / "mill.yaml", ["source=s"]) == load(Mill, None, ["source=s"])


@given(
    st.floats(1e-300, 1, exclude_max=True),
    st.integers(-(10**20), 100),
    st.sampled_from(["fine", "coarse"]),
    st.lists(st.integers()),
    st.text("abc/ :#'\"é=~${}[],\n\t\U0001f600", min_size=1),
)
def test_yaml_gives_the_same_settings_back(mesh: float, rounds: int, kind: str, layers: list[int], name: str) -> None:
    sieve = Sieve(mesh=mesh, rounds=rounds, kind=kind, layers=layers, cover=Path(name))  # type: ignore[arg-type]
    config = Mill(source=Path(name), sieve=sieve)
    words = [word(key, value) for key, value in dotted(config)]
    assert load(Mill, None, words) == config
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
