"""A report's page, as tests read it."""

import base64
import html
import re
from html.parser import HTMLParser
from pathlib import Path


class Page(HTMLParser):
    """Headings, images, links and the names of all elements of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = path.read_text(encoding="utf-8")
        self.elements: set[str] = set()
        self.images: list[dict[str, str]] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.feed(self.text)
        self.headings = [html.unescape(heading) for heading in re.findall(r"<h[23][^>]*>(.*?)</h", self.text)]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = {key: value or "" for key, value in attrs}
        self.elements.add(tag)
        if tag == "img":
            self.images.append(named)
        if tag == "a":
            self.links.append(named["href"])
        if "id" in named:
            self.ids.append(named["id"])

    @property
    def plots(self) -> dict[str, str]:
        """The SVG of every plot, by its description."""
        plots = [image for image in self.images if image["src"].startswith("data:image/svg")]
        return {image["alt"]: base64.b64decode(image["src"].partition(",")[2]).decode() for image in plots}

    @property
    def rows(self) -> list[list[str]]:
        """The cells of all rows of tables, with their markup."""
        return [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", self.text, re.S)]
