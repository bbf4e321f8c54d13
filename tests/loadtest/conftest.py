from __future__ import annotations

from html.parser import HTMLParser

import pytest

VOID = {"meta", "br", "img"}


class Checker(HTMLParser):
    """Remembers what is open, and everything that a browser would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        if tag in {"script", "link", "img", "iframe", "object"}:
            self.fetched.append(tag)
        self.fetched += [name for name, _ in attrs if name in {"src", "href"} or name[:2] == "on"]

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def _checked(html: str) -> Checker:
    checker = Checker()
    checker.feed(html)
    assert checker.open == []
    assert checker.fetched == []
    assert "url(" not in html
    assert "@import" not in html
    return checker


@pytest.fixture
def checked():
    """Asserts that a page is well-formed and needs nothing from outside; returns what it saw."""
    return _checked
