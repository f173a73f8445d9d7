"""One HTML file that needs no network, from the parts in web/: escaped text, own style and script, a strict policy."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Iterable, Sequence
from hashlib import sha256
from html import escape
from importlib.resources import files

from attnprune.errors import printable


def build(body: str, styles: Iterable[str], scripts: Iterable[str], json_data: str, **parts: str) -> str:
    """Fill page.html (UTF-8). Its content security policy allows no request and no script but its own.

    Args:
        body: name of the file in web/ that stands between the introduction and the report.
        styles, scripts: names of files in web/, one behind the other.
        json_data: what the script reads from `#data`.
        parts: HTML for the other marks of both; text in it must be escaped, see `text`.
    """
    script = "\n" + "".join(map(part, scripts))
    filled = parts | {
        "data": json_data.replace("<", "\\u003c"),
        "style": "".join(map(part, styles)),
        "script": script,
        "script_hash": f"sha256-{b64encode(sha256(script.encode()).digest()).decode()}",
    }
    template = part("page.html").replace("@@body@@", part(body))
    return re.sub("@@([a-z_]+)@@", lambda found: filled[found[1]], template)


def toggle(models: Sequence[tuple[str, str, str]]) -> str:
    """Radio buttons when there are two models; each is (kind, name, what is shown of the name)."""
    if len(models) < 2:
        return ""
    buttons = "\n".join(
        f'<label title="{text(name)}"><input type="radio" name="model" value="{index}"'
        f"{' checked' if index == 0 else ''}>{kind} <span class=dim>{text(label)}</span></label>"
        for index, (kind, name, label) in enumerate(models)
    )
    return f"<fieldset><legend>model</legend>\n{buttons}</fieldset>"


def part(name: str) -> str:
    """A file of web/."""
    return files("attnprune.report").joinpath("web", name).read_text("utf-8")


def text(value: object) -> str:
    """Text for a page: on one line, control characters visible, no markup."""
    return escape(printable(value))
