"""YAML files that are based on other files: merging, paths, refusals, and where each value is from."""

from pathlib import Path
from typing import Any

import pytest

from moce_ds.common.config.command_line import read_settings, settings_layers
from moce_ds.common.config.composition import Layer, file_layers
from moce_ds.common.config.printing import explained, origin_of
from moce_ds.common.config.settings import from_layers, load, option, partial_tree, settings, to_tree, words_layer
from moce_ds.common.errors import ConfigError


@settings
class Wheels:
    count: int = option(4, "how many")
    sizes: list[int] = option([16, 16], "of each, in inches")


@settings
class Cart:
    name: str = option(help="what it is called")
    wheels: Wheels = option(Wheels(), "")
    loads: dict[str, Path] = option({}, "what it carries")
    lid: str | None = option(None, "what covers it")


@settings
class Fleet:
    cart: Path = option(help="file of a cart", formerly="base")
    count: int = option(1, "of carts")


def write(folder: Path, **files: str) -> Path:
    """Write `NAME.yaml` for each keyword; returns the path of the first one."""
    for name, text in files.items():
        place = folder / f"{name}.yaml"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    return folder / f"{next(iter(files))}.yaml"


def refusal(path: Path, cls: Any = Cart) -> str:
    with pytest.raises(ConfigError) as caught:
        load(cls, path)
    return str(caught.value)


# Merging


def test_bases_have_bases_and_the_nearer_file_wins(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        mine="base: middle.yaml\nwheels:\n  count: 2\nloads: {hay: mine}\n",
        middle="base: first.yaml\nname: middle\nwheels:\n  sizes: [20]\n",
        first="name: first\nlid: cloth\nwheels:\n  count: 8\n  sizes: [10, 12, 14]\nloads: {hay: first, corn: first}\n",
    )
    cart = load(Cart, path, ["loads.corn=word"])
    assert cart == Cart(
        name="middle",
        lid="cloth",
        wheels=Wheels(count=2, sizes=[20]),
        loads={"hay": Path("mine"), "corn": Path("word")},
    )
    assert "base" not in to_tree(cart)


def test_of_several_bases_the_later_one_wins_and_a_shared_one_is_below_both(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        mine="base: [heavy.yaml, covered.yaml]\n",
        heavy="base: cart.yaml\nwheels: {count: 6}\nname: heavy\n",
        covered="base: cart.yaml\nlid: cloth\nname: covered\n",
        cart="name: cart\nlid: none\nwheels: {count: 4}\n",
    )
    assert load(Cart, path) == Cart(name="covered", lid="cloth", wheels=Wheels(count=6))


def test_null_takes_the_defaults_of_a_group_and_an_empty_heading_changes_nothing(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        mine="base: cart.yaml\nwheels:\n#  count: 2\nlid: null\n",
        cart="name: n\nwheels: {count: 8}\nlid: l\n",
    )
    assert load(Cart, path) == Cart(name="n", wheels=Wheels(count=8))
    path.write_text("base: cart.yaml\nwheels: null\n")
    assert load(Cart, path) == Cart(name="n", lid="l")


def test_a_file_without_settings_of_its_own_is_its_base(tmp_path: Path) -> None:
    path = write(tmp_path, mine="base: cart.yaml\n", cart="name: cart\n")
    assert load(Cart, path) == Cart(name="cart")
    for none in ("base: null\n", "base: []\n", "base:\n"):
        path.write_text(f"{none}name: mine\n")
        assert load(Cart, path) == Cart(name="mine")


# Paths


def test_a_base_is_relative_to_the_file_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, **{"a/b/mine": "base: ../middle.yaml", "a/middle": "base: c/cart.yaml", "a/c/cart": "name: cart"})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load(Cart, Path("../a/b/mine.yaml")).name == "cart"


def test_homes_and_variables_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WHICH", "cart")
    write(tmp_path, **{"home/cart": "name: home", "cart": "name: here", "$WHICH": "name: as typed"})
    path = tmp_path / "mine.yaml"
    for base, name in {"~/cart.yaml": "home", "$HOME/$WHICH.yaml": "home", "$WHICH.yaml": "as typed"}.items():
        path.write_text(f"base: {base}\n")
        assert load(Cart, path).name == name
    path.write_text("base: $NOWHERE/cart.yaml\n")
    assert f"{path}:1: base: got '$NOWHERE/cart.yaml'; the environment variable NOWHERE is not set" in refusal(path)


# Refusals


def test_files_that_are_based_on_one_another_are_refused_with_their_names(tmp_path: Path) -> None:
    path = write(tmp_path, a="name: a\nbase: b.yaml\n", b="base: c.yaml\n", c="\n\nbase: a.yaml\n")
    a, b, c = (tmp_path / f"{name}.yaml" for name in "abc")
    assert refusal(path) == (
        f"{a} is its own base: remove one of these `base` lines.\n  Bases: {a}:2 -> {b}:1 -> {c}:3 -> {a}"
    )
    path.write_text("base: a.yaml\n")
    assert f"{a} is its own base" in refusal(path)


@pytest.mark.parametrize(
    ("base", "told"),
    [
        (None, "b.yaml not found: expected a YAML file of settings."),
        ("name: [", "b.yaml is not valid YAML"),
        ("- a\n", "b.yaml holds a list; expected `key: value` lines."),
    ],
)
def test_a_base_that_cannot_be_read_is_named_with_the_files_that_lead_to_it(
    tmp_path: Path, base: str | None, told: str
) -> None:
    path = write(tmp_path, top="base: a.yaml\n", a="name: a\nbase: b.yaml\n", **({"b": base} if base else {}))
    said = refusal(path)
    assert told in said
    assert said.endswith(f"\n  Bases: {tmp_path}/top.yaml:1 -> {tmp_path}/a.yaml:2 -> {tmp_path}/b.yaml")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("base: {a: 1}", "base: got {'a': '1'}; expected the path of a YAML file, or a list of such paths."),
        ("base: [[a.yaml]]", "base: got [['a.yaml']]; expected the path of a YAML file, or a list of such paths."),
        ("base: ''", "base: got ''; expected a path"),
        ("base: .", "is a folder; expected a YAML file of settings"),
    ],
)
def test_a_base_that_is_no_path_is_refused(tmp_path: Path, text: str, told: str) -> None:
    assert told in refusal(write(tmp_path, mine=f"name: mine\n{text}\n"))


def test_a_base_of_another_kind_is_refused_under_its_own_name(tmp_path: Path) -> None:
    path = write(tmp_path, top="base: mine.yaml\n", mine="base: fleet.yaml\nname: mine\n", fleet="cart: x\ncount: 2\n")
    top, mine, fleet = (tmp_path / f"{name}.yaml" for name in ("top", "mine", "fleet"))
    said = refusal(path)
    assert said.startswith(f"Settings refused ({fleet}, base of {mine}, base of {top}):\n  cart: no such setting.")


def test_what_is_missing_is_told_under_the_file_that_was_named(tmp_path: Path) -> None:
    path = write(tmp_path, mine="base: cart.yaml\nlid: l\n", cart="name:\nwheels: {count: 2}\n")
    assert refusal(path) == f"Settings refused ({path}):\n  name: required, and not given."


def test_base_is_no_word_of_a_command(tmp_path: Path) -> None:
    for word in ("base=cart.yaml", "base=cart"):
        with pytest.raises(ConfigError, match=r"base is a line of YAML files. As a word, name the file itself"):
            read_settings(Cart, ["name=n", word])


def test_a_base_inside_a_group_is_a_setting_that_there_is_not(tmp_path: Path) -> None:
    path = write(tmp_path, mine="name: mine\nwheels: {base: cart.yaml}\n", cart="name: cart\n")
    assert "wheels.base: no such setting" in refusal(path)


# A setting that was called `base` before files had bases


def test_the_earlier_setting_base_is_read_under_its_new_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, **{"fleets/old": "base: cart.yaml\ncount: 3\n", "cart": "name: cart\n"})
    assert load(Fleet, path) == Fleet(cart=Path("cart.yaml"), count=3)
    assert caplog.messages == [f"{path}: the setting base is now called cart."]
    assert read_settings(Fleet, ["base=cart.yaml", "count=3"]) == Fleet(cart=Path("cart.yaml"), count=3)
    assert from_layers(Fleet, [Layer("a record", {"base": "cart.yaml"})]) == Fleet(cart=Path("cart.yaml"))
    path.write_text("base: gone.yaml\n")
    assert load(Fleet, path) == Fleet(cart=Path("gone.yaml"))  # whoever reads that file says that it is gone
    with pytest.raises(ConfigError, match="base is the earlier name of cart: give one of them"):
        read_settings(Fleet, ["base=a.yaml", "cart=b.yaml"])


def test_a_file_of_the_same_kind_is_a_base_there_too(tmp_path: Path) -> None:
    path = write(tmp_path, new="base: old.yaml\ncount: 2\n", old="cart: cart.yaml\n")
    assert load(Fleet, path) == Fleet(cart=Path("cart.yaml"), count=2)


# Origins


def test_origins_are_the_last_file_and_line_or_word_that_gives_a_value(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        mine="base: cart.yaml\nwheels:\n  sizes:\n  - 3\n",
        cart="lid: &l cloth\nwheels:\n  <<: &w {count: 2}\n  sizes: [1]\nloads:\n  hay: a\n  corn: b\n",
    )
    words = ["name=n", "loads.corn=c"]
    layers = [*file_layers(path, Cart, "mine.yaml"), words_layer(words)]
    base = tmp_path / "cart.yaml"
    origins = {
        "name": "the command line",
        "lid": f"{base}:1",
        "wheels.count": f"{base}:3",
        "wheels.sizes": "mine.yaml:3",
        "loads.hay": f"{base}:6",
        "loads.corn": "the command line",
        "loads.oats": "default",
    }
    assert {key: origin_of(key, layers) for key in origins} == origins


def test_explained_settings_are_read_as_the_same_settings(tmp_path: Path) -> None:
    path = write(tmp_path, mine="base: cart.yaml\nname: 'yes # no'\n", cart="wheels: {count: 2}\nloads: {hay: a$$b}\n")
    words = [f"wheels.sizes=[{','.join('1' * 60)}]", "lid=007"]
    layers = settings_layers(Cart, [str(path), *words])
    cart = from_layers(Cart, layers)
    lines = explained(Cart, to_tree(cart), layers)
    assert max(map(len, [line for line in lines if str(tmp_path) not in line])) <= 100
    copy = tmp_path / "copy.yaml"
    copy.write_text("\n".join(lines))
    assert load(Cart, copy) == cart
    assert any(line.endswith(f"# {tmp_path / 'cart.yaml'}:1") for line in lines)


def test_what_is_required_and_not_given_is_a_comment(tmp_path: Path) -> None:
    layers = settings_layers(Cart, ["wheels.count=3"])
    lines = explained(Cart, partial_tree(Cart, layers), layers)
    assert lines[0].split() == ["#", "name:", "#", "required,", "not", "given"]
    copy = tmp_path / "copy.yaml"
    copy.write_text("\n".join(lines))
    assert load(Cart, copy, ["name=n"]) == Cart(name="n", wheels=Wheels(count=3))
    with pytest.raises(ConfigError, match=r"wheels.count: got 'x'"):
        partial_tree(Cart, settings_layers(Cart, ["wheels.count=x"]))
