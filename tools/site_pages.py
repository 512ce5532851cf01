"""The pages of the documentation site that are generated: the reference, the start page and the navigation.

MkDocs calls the functions `on_...` (mkdocs.yml). Pages of docs/ are taken as they are, and need no entry here: those
that `SECTIONS` does not name are how-to guides. Nothing that is generated is written into the repository.
"""

import inspect
import posixpath
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import moce_ds
from moce_ds.cli.main import moce
from moce_ds.cli.options import Verb
from moce_ds.common.config.settings import described_keys

ROOT = Path(__file__).parent.parent
GUIDES = "How-to guides"
SECTIONS = {
    "Tutorials": ("tutorial.md", "own-images.md"),
    GUIDES: (),
    "Reference": ("settings.md", "data-format.md", "checkpoint-format.md", "dependencies.md", "api.md"),
    "Explanation": ("method.md", "architecture.md", "performance.md", "scaling.md", "security.md"),
}
_SIGNATURE = 70  # columns of a signature in one line
START, COMMANDS, PYTHON = "index.md", "reference/commands", "reference/python.md"
# On a wide screen options and keys stay whole; on a narrow one they break, so that no table needs scrolling.
_STYLE = "@media (min-width: 60em) { .md-typeset td:first-child code { white-space: nowrap } }\n"
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!\w+:)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the start page, which is README.md, and the reference; leave out what is no page, such as notebooks."""
    for file in list(files):
        if file.src_uri.endswith((".ipynb", ".py")):
            files.remove(file)
    readme = (ROOT / "README.md").read_text("utf-8").replace("](docs/", "](")
    generated = {START: readme, "site.css": _STYLE, PYTHON: python_page(), **dict(command_pages())}
    for name, text in generated.items():
        files.append(File.generated(config, name, content=text))
    config.nav = navigation([file.src_uri for file in files.documentation_pages()])
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links name the title of a page instead of its file, and become text if they lead to a file that is no page."""
    folder = posixpath.dirname(page.file.src_uri)

    def mended(link: re.Match[str]) -> str:
        label, target, anchor = link.groups(default="")
        path = posixpath.normpath(posixpath.join(folder, target))
        if path == "../README.md":
            path, target = START, posixpath.relpath(START, folder or ".")
        if (file := files.get_file_from_path(path)) is not None:
            title = re.search(r"^# (.*)", file.content_string, flags=re.MULTILINE) if path.endswith(".md") else None
            return f"[{title[1] if title and label.endswith('.md') else label}]({target}{anchor})"
        exists = (ROOT / "docs" / path).exists() or (page.file.src_uri == START and (ROOT / path).exists())
        return label if exists else link[0]  # MkDocs reports what leads nowhere

    return _as_github_reads(_LINK.sub(mended, markdown))


def navigation(pages: list[str]) -> list[Any]:
    """The sections with their pages, generated ones last."""
    named = {page for listed in SECTIONS.values() for page in listed}
    generated = sorted(page for page in pages if page.startswith(COMMANDS))
    nav: list[Any] = [{"Start": START}]
    for section, listed in SECTIONS.items():
        found: list[Any] = [page for page in listed if page in pages]
        if section == GUIDES:
            found += sorted({*pages} - {*named, *generated, START, PYTHON})
        elif section == "Reference":
            found += [PYTHON, {"Commands": generated}]
        nav.append({section: found})
    return nav


def _as_github_reads(text: str) -> str:
    """Two things that Python-Markdown reads otherwise: lists within lists are indented by two columns, not four, and in
    tables a pipe within backticks has a backslash."""
    lines, fenced = [], False
    for line in text.splitlines():
        fenced ^= line.lstrip().startswith("```")
        if not fenced and (nested := re.match(r"(?: {2})+(?=[-*] )", line)):
            line = nested[0] + line
        elif not fenced and line.startswith("|"):
            line = re.sub(r"`[^`]*`", lambda code: code[0].replace("\\|", "|"), line)
        lines.append(line)
    return "\n".join(lines) + "\n"


def command_pages() -> Iterator[tuple[str, str]]:
    """Name and text of a page for each verb, and one with those of its group."""
    yield f"{COMMANDS}/index.md", _page("moce", moce)
    for name, command in moce.commands.items():
        parts = [_page(f"moce {name}", command)]
        if isinstance(command, click.Group):
            parts += [_page(f"moce {name} {below}", part, "##") for below, part in command.commands.items()]
        yield f"{COMMANDS}/{name}.md", "\n".join(parts)


def _page(path: str, command: click.Command, heading: str = "#") -> str:
    """What `--help` says, with options and settings as tables."""
    context = click.Context(command, info_name=path)
    text = textwrap.dedent(inspect.cleandoc(command.help or ""))
    blocks = [
        "```\n" + block.removeprefix("\b\n") + "\n```" if block.startswith("\b") else block
        for block in text.split("\n\n")
    ]
    usage = command.get_usage(context).removeprefix("Usage: ")
    parts = [f"{heading} {path}", *blocks, f"```\n{usage}\n```"]
    options = [
        record for param in command.get_params(context) if (record := param.get_help_record(context)) and record[1]
    ]
    if options:
        parts.append(_table("option", "meaning", [(f"`{name}`", meaning) for name, meaning in options]))
    if isinstance(command, Verb):
        module, name = command.settings.split(":")
        rows = described_keys(getattr(__import__(module, fromlist=[name]), name))
        parts.append(f"Settings ([how values are read]({'../' * path.count('/')}../../settings.md)):")
        parts.append(
            _table("key=default", "meaning", [(f"`{key}={default}`", meaning) for key, default, meaning in rows])
        )
    return "\n\n".join(parts) + "\n"


def _table(first: str, second: str, rows: list[tuple[str, str]]) -> str:
    cells = [(left.replace("|", "\\|"), right.replace("|", "\\|").replace("<", "&lt;")) for left, right in rows]
    lines = [f"| {first} | {second} |", "|---|---|", *(f"| {left} | {right} |" for left, right in cells)]
    return "\n".join(lines)


def python_page() -> str:
    """Signatures and docstrings of what `import moce_ds` offers."""
    parts = ["# Python reference", "What `import moce_ds` offers."]
    for name in moce_ds.__all__:
        if name.startswith("_"):
            continue
        thing = getattr(moce_ds, name)
        parts.append(_described(f"moce_ds.{name}", thing, "##"))
        members = vars(thing).items() if inspect.isclass(thing) else ()
        parts += [
            _described(f"{name}.{member}", getattr(thing, member), "###")
            for member, value in members
            if not member.startswith("_") and not isinstance(value, str) and inspect.getdoc(value)
        ]
    return "\n\n".join(parts) + "\n"


def _described(name: str, thing: Any, heading: str) -> str:
    """Heading, signature and docstring; sections such as `Args:` become lists."""
    signature = f"```python\n{name}{_signature(thing)}\n```\n\n" if callable(thing) else ""
    text = re.sub(r"^(\w[\w ,()]*):\n((?: {4,}.*\n?)+)", _section, inspect.getdoc(thing) or "", flags=re.MULTILINE)
    return f"{heading} {name}\n\n{signature}{text}"


def _signature(thing: Any) -> str:
    """Parameters and result, without the modules of types; a parameter a line if they are long."""
    signature = inspect.signature(thing)
    parameters = [p for p in signature.parameters.values() if p.name != "self"]
    text = str(signature.replace(parameters=parameters)).removesuffix(" -> None" if inspect.isclass(thing) else "")
    if len(text) > _SIGNATURE:
        text = "(\n" + "".join(f"    {p},\n" for p in parameters) + ")" + text.rpartition(")")[2]
    text = re.sub(r"numpy\.ndarray\[.*?numpy\.dtype\[numpy\.(\w+)\]\]", r"NDArray[\1]", text)
    return re.sub(r"\b(?:[A-Za-z_]\w*\.)+(?=[A-Z])", "", text)


def _section(found: re.Match[str]) -> str:
    entries = re.split(r"\n(?=\S)", textwrap.dedent(found[2]).strip())
    lines = [re.sub(r"^([\w, *]+):", r"`\1`:", " ".join(entry.split())) for entry in entries]
    return f"**{found[1]}**\n\n" + "\n".join(f"- {line}" for line in lines) + "\n"
