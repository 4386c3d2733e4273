"""An HTML page taken apart, for tests of what it shows and of what it must not hold."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = {"meta", "img", "br", "path", "circle", "line"}


class Page(HTMLParser):
    """The tags, the text and the scripts of a page; every tag must be closed where it was opened."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self._open: list[str] = []
        self._text: list[str] = []
        self.feed(str(html))
        self.close()
        assert self._open == [], f"not closed: {self._open}"

    @property
    def text(self) -> str:
        """All visible text, with white space as a browser shows it."""
        return " ".join("".join(self._text).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of every such tag."""
        return [attrs for name, attrs in self.tags if name == tag]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        inside = self._open[-1] if self._open else ""
        if inside == "script":
            attrs, text = self.scripts.pop()
            self.scripts.append((attrs, text + data))
        elif inside != "style":
            self._text.append(data)


def loads_nothing(html: str) -> Page:
    """Return the page, after checking that it is one file: it refers to nothing but itself."""
    page = Page(html)
    for tag, attrs in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form", "video", "audio")
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert (attrs.get(name) or "#").startswith(("data:image/", "#"))
    assert not re.search(r"url\(|@import|@font-face", html)
    (policy,) = (attrs["content"] or "" for attrs in page.all("meta") if attrs.get("http-equiv"))
    assert policy.startswith("default-src 'none'; img-src data:;")
    return page
