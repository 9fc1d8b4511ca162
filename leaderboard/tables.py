"""Tables as HTML: real ones, so that they can be read aloud, reached by keyboard, printed and scrolled on a phone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any
from urllib.parse import quote


@dataclass(frozen=True)
class Field:
    """One field of a table; every text is escaped, because names come from other people's files."""

    text: str
    #: Shown under the text in small letters, such as why there is no number.
    small: str = ""
    #: `best`, `tied`, `front`, `grey`, `none` (nothing measured), `pass`, `fail`, `unsure`, `prose` (may be broken into
    #: lines); several by a space.
    look: str = ""
    href: str = ""
    number: bool = False


def table(head: Sequence[Any], rows: Sequence[Sequence[Any]], caption: str) -> str:
    """
    Args:
        head, rows: fields, or plain text.
        caption: what the table is, for those who do not see what stands around it.
    """
    tops = "".join(f'<th scope="col">{_inside(_field(h))}</th>' for h in head)
    body = "".join(
        "<tr>" + "".join(_cell(_field(f), first=i == 0) for i, f in enumerate(row)) + "</tr>" for row in rows
    )
    return (
        f'<div class="board" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{tops}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def link(page: str, **parameters: str) -> str:
    """The address of a page of the board with what it is to show."""
    words = "&".join(f"{quote(k)}={quote(v)}" for k, v in parameters.items())
    return f"{page}?{words}" if words else page


def _field(value: str | Field) -> Field:
    return value if isinstance(value, Field) else Field(value)


def _cell(field: Field, *, first: bool) -> str:
    tag, scope = ("th", ' scope="row"') if first else ("td", "")
    look = " ".join(filter(None, [field.look, "number" if field.number else ""]))
    return f'<{tag}{scope} class="{escape(look)}">{_inside(field)}</{tag}>'


def _inside(field: Field) -> str:
    text = escape(field.text)
    if field.href:
        text = f'<a href="{escape(field.href)}" target="_self">{text}</a>'
    marks = {
        "best": ("★", "best"),
        "tied": ("≈", "not told apart from the best"),
        "front": ("◆", "on the Pareto front"),
    }
    for look, (sign, says) in marks.items():
        if look in field.look.split():
            text += f' <span class="mark" role="img" aria-label="{says}" title="{says}">{sign}</span>'
    return text + (f"<small>{escape(field.small)}</small>" if field.small else "")
