"""Every `moce` command in the documentation is one that the program understands: verbs, options, settings, files."""

import re
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

import click
import pytest

from moce_ds.cli.config_verbs import KINDS
from moce_ds.cli.main import moce
from moce_ds.cli.options import Verb
from moce_ds.common.config.settings import keys
from tests.test_docs import DOCUMENTS, ROOT


def commands_of(text: str) -> Iterator[str]:
    """Commands in blocks, fenced or indented, with lines put together; without those that leave words out (...)."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    fenced = [block for language, block in blocks if language in ("", "sh")]
    rest = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    indented = "\n".join(line.strip() for line in rest.splitlines() if line.startswith("    "))
    for line in "\n".join([*fenced, indented]).replace("\\\n", " ").splitlines():
        command = line.split(" #")[0].strip()
        if command.startswith("moce ") and "..." not in command:
            yield command


def check(group: click.Group, words: Sequence[str]) -> None:
    """Raise click.UsageError or AssertionError if a command line would be refused before anything is read."""
    name, command, rest = group.resolve_command(click.Context(group), list(words))
    assert command is not None and name is not None
    if isinstance(command, click.Group):
        return check(command, rest)
    params = command.make_context(name, list(rest)).params
    if group.name == "config":
        check_settings(KINDS[params["kind"]].load(), params["words"])
    elif group.name == "launch":
        at = next(number for number, word in enumerate(rest) if word in moce.commands)
        check(moce, rest[at:])
        check_words(command, rest[:at] if name == "slurm" else [])
    else:
        check_words(command, params.get("words", ()))
    return None


def check_words(command: click.Command, words: Sequence[str]) -> None:
    """Words are settings that the verb has, or a YAML file."""
    if not words:
        return
    assert isinstance(command, Verb), words
    module, name = command.settings.split(":")
    check_settings(getattr(__import__(module, fromlist=[name]), name), words)


def check_settings(cls: Any, words: Sequence[str]) -> None:
    """Words are settings of a class, or a YAML file, which is there if it is one of ours."""
    for word in words:
        key, equals, _ = word.partition("=")
        if not equals:
            assert not word.startswith("configs/") or (ROOT / word).is_file(), f"{word} is not there"
            continue
        known = [key for key, _ in keys(cls)]
        assert key in known or key.split(".")[0] in known, f"{cls.__name__} has no setting {key}"


DOCUMENTED = [
    pytest.param(command, id=f"{path.stem}: {command[:50]}")
    for path in DOCUMENTS
    for command in commands_of(path.read_text())
]


def test_there_are_commands() -> None:
    assert len(DOCUMENTED) > 34


@pytest.mark.parametrize("command", DOCUMENTED)
def test_a_documented_command_is_understood(command: str) -> None:
    check(moce, shlex.split(command)[1:])


@pytest.mark.parametrize(
    "command",
    ["moce selekt RUN", "moce select RUN --dota x", "moce pretrain configs/none.yaml", "moce pretrain optim.epoch=1"],
)
def test_what_is_not_understood_is_found(command: str) -> None:
    with pytest.raises((click.UsageError, AssertionError)):
        check(moce, shlex.split(command)[1:])
