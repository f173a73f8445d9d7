"""mkdocs hook: what pages link to outside of docs/ (results, schemas, notebooks) becomes a part of the site.

Links are written as they work in the repository. Markdown files that are linked to become pages, other files lie
beside them under the same path, and a link to a folder becomes plain text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?\)")
CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.DOTALL)


def in_tree(source: str) -> str:
    """The path in the repository of what has this path in the site."""
    return f"docs/{source}" if (ROOT / "docs" / source).exists() else source


def target_of(source: str, link: str) -> str:
    """The path in the site of what a page links to."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(in_tree(source)), link))
    return path.removeprefix("docs/")


def prose(text: str) -> list[str]:
    """The text, cut into prose (even places) and code."""
    return CODE.split(text)


def on_files(files: Files, config: Any) -> Files:
    """Add what is linked to, and what that links to."""
    pages = [file.src_uri for file in files.documentation_pages()]
    while pages:
        source = pages.pop()
        text = (ROOT / in_tree(source)).read_text(encoding="utf-8")
        for _, _, link, _ in LINK.findall("".join(prose(text)[::2])):
            target = target_of(source, link)
            path = ROOT / in_tree(target)
            if files.get_file_from_path(target) is None and path.is_file():
                level = InclusionLevel.NOT_IN_NAV
                files.append(File.generated(config, target, abs_src_path=str(path), inclusion=level))
                pages += [target] if target.endswith(".md") else []
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Let links lead to where their targets are in the site."""
    source = page.file.src_uri

    def moved(found: re.Match[str]) -> str:
        picture, text, link, anchor = found.groups()
        target = target_of(source, link)
        if (ROOT / in_tree(target)).is_dir():
            return text
        return f"{picture}[{text}]({posixpath.relpath(target, posixpath.dirname(source) or '.')}{anchor or ''})"

    parts = prose(markdown)
    return "".join(LINK.sub(moved, part) if place % 2 == 0 else part for place, part in enumerate(parts))
