"""The frame of a report's page: one file, no scripts, nothing fetched from anywhere."""

from __future__ import annotations

from html import escape
from importlib import resources
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def page(title: str, sections: Iterable[str]) -> str:
    """A whole HTML document."""
    style = (resources.files("loadtest") / "page.css").read_text(encoding="utf-8")
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width,initial-scale=1">'
        '<meta name=color-scheme content="light dark">'
        f"<title>{escape(title)}</title><style>{style}</style><main>{''.join(sections)}</main></html>"
    )


def hero(verdicts: Sequence[tuple[str, bool]], figure: str, caption: str, detail: str) -> str:
    """The page's head: badges (word, whether it is good), one large figure, what it means."""
    badges = "".join(
        f'<span class="badge {"good" if good else "bad"}">{escape(word)}</span>'
        for word, good in verdicts
    )
    return (
        f"<header><div class=badges>{badges}</div><div class=figure>{escape(figure)}</div>"
        f"<p class=caption>{escape(caption)}</p><p class=detail>{escape(detail)}</p></header>"
    )


def tiles(items: Iterable[tuple[str, str, str]]) -> str:
    """(name, figure, remark) side by side."""
    cells = "".join(
        f"<div class=tile><b>{escape(name)}</b><strong>{escape(figure)}</strong>"
        f"<small>{escape(remark)}</small></div>"
        for name, figure, remark in items
    )
    return f"<section class=tiles>{cells}</section>"


def charts(figures: Iterable[str]) -> str:
    return f"<section class=charts>{''.join(figures)}</section>"


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]], note: str = "") -> str:
    """`` when there are no rows. The first column is text, the rest are figures."""
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    if not body:
        return ""
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    remark = f"<p class=note>{escape(note)}</p>" if note else ""
    return (
        f"<section><h2>{escape(title)}</h2>{remark}<div class=scroll><table><thead><tr>{names}</tr>"
        f"</thead><tbody>{body}</tbody></table></div></section>"
    )


def facts(title: str, items: Iterable[tuple[str, str]]) -> str:
    """Names and values as a list."""
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in items)
    return f"<section><h2>{escape(title)}</h2><dl>{rows}</dl></section>"
