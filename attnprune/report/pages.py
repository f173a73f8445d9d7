"""One HTML file that needs no network, from the parts in web/: escaped text, own style and script, a strict policy."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Iterable
from hashlib import sha256
from html import escape
from importlib.resources import files

from attnprune.errors import printable


def build(template: str, styles: Iterable[str], scripts: Iterable[str], json_data: str, **parts: str) -> str:
    """Fill a template (UTF-8). Its content security policy allows no request and no script but its own.

    Args:
        styles, scripts: names of files in web/, one behind the other.
        json_data: what the script reads from `#data`.
        parts: HTML for the other marks of the template; text in it must be escaped, see `text`.
    """
    script = "\n" + "".join(map(part, scripts))
    filled = parts | {
        "data": json_data.replace("<", "\\u003c"),
        "style": "".join(map(part, styles)),
        "script": script,
        "script_hash": f"sha256-{b64encode(sha256(script.encode()).digest()).decode()}",
    }
    return re.sub("@@([a-z_]+)@@", lambda found: filled[found[1]], part(template))


def part(name: str) -> str:
    """A file of web/."""
    return files("attnprune.report").joinpath("web", name).read_text("utf-8")


def text(value: object) -> str:
    """Text for a page: on one line, control characters visible, no markup."""
    return escape(printable(value))
