"""An atlas as one HTML page that needs no network: a grid of heads per model, search, a dossier of the chosen head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnprune.errors import printable
from attnprune.report.atlases import labels_line
from attnprune.report.pages import build, text
from attnprune.report.traces import shown
from attnprune.units import counted, duration

if TYPE_CHECKING:
    from attnprune.heads.result import Atlas, Head, ModelAtlas, Reading

DIGITS = 5  # of the numbers in the page; the record has all


def render_page(result: Atlas) -> str:
    """The page as text (UTF-8). Its content security policy allows no request and no script but its own."""
    return build(
        "atlas.html", ("page.css", "atlas.css"), ("page.js", "atlas_view.js"), _data(result),
        title=text(f"Atlas of {Path(result.models[0].name).name} on {result.data}"), intro=_intro(result),
        report=_report(result), method=_method(result),
    )  # fmt: skip


def _data(result: Atlas) -> str:
    """Tokens as people read them; the script only ever sets them as text."""
    models = [
        {
            "name": printable(Path(model.name).name), "kind": model.kind, "layers": model.layers,
            "heads_per_layer": model.heads_per_layer, "closed": model.closed, "heads": list(map(_head, model.heads)),
        }
        for model in result.models
    ]  # fmt: skip
    page = {"edges": result.offset_edges, "kinds": list(result.kinds), "definitions": result.kinds, "models": models}
    return json.dumps(page, allow_nan=False, separators=(",", ":"))


def _head(head: Head) -> dict[str, Any]:
    return {
        "layer": head.layer, "head": head.head, "open": head.open, "visible": head.visible,
        "queries": round(head.queries, DIGITS), "edges_per_query": head.edges_per_query,
        "edges": None if head.edges is None else _reading(head.edges), "mass": _reading(head.mass),
        "examples": [
            example.model_dump(include={"block", "query", "key", "weight", "strength"})
            | {"text": [{"start": w.start, "tokens": list(map(printable, w.tokens))} for w in example.text]}
            for example in head.examples
        ],
        "directions": [
            {"share": round(d.share, DIGITS)}
            | {side: list(map(shown, tokens)) for side, tokens in (("raises", d.raises), ("lowers", d.lowers))}
            for d in head.directions
        ],
    }  # fmt: skip


def _reading(reading: Reading) -> dict[str, Any]:
    return {
        "kinds": {
            name: {"share": round(kind.share, DIGITS), "control": round(kind.control, DIGITS)}
            for name, kind in reading.kinds.items()
        },
        "offset": reading.offset, "distances": [round(share, DIGITS) for share in reading.distances],
        "labels": reading.labels,
    }  # fmt: skip


def _intro(result: Atlas) -> str:
    """The text, and one line per model."""
    lines = [
        f"{text(result.data)}: {counted(result.tokens, 'token')} in {counted(result.blocks, 'block')} "
        f"of {result.seq_len}"
    ]
    lines += [
        f"<b>{text(Path(model.name).name)}</b> <span class=dim>({model.kind})</span>: {text(labels_line(model))}"
        for model in result.models
    ]
    return "\n".join(f"<p>{line}</p>" for line in lines)


def _report(result: Atlas) -> str:
    """What each kind is, and how many heads of each model have it as a label."""

    def count(model: ModelAtlas, name: str) -> int:
        return sum(name in head.reading.labels for head in model.heads)

    head = "".join(f"<th>{text(f'{model.kind} heads')}</th>" for model in result.models)
    rows = [
        f"<tr><th>{name}</th><td>{text(meaning)}</td>"
        + "".join(f"<td>{count(model, name)}</td>" for model in result.models)
        + "</tr>"
        for name, meaning in result.kinds.items()
    ]
    title = f"<tr><th></th><th>edges from a query to</th>{head}</tr>"
    return f"<table id=report><thead>{title}</thead>\n<tbody>\n{chr(10).join(rows)}\n</tbody></table>"


def _method(result: Atlas) -> str:
    """How it was counted; the command."""
    lines = [
        "An edge is what one head moves from one token (the key) to another (the query). Open edges count 1 each; "
        "attention mass counts every pair with its weight <code>P_ij A_ij</code>. In a dense model every edge is open: "
        "only its mass is read. Kinds overlap: shares need not add up to 1.",
        f"Label: <code>{text(result.rule)}</code>. The black line of a bar is the control: {text(result.control)}.",
        f"Examples are the strongest by {text(result.strength)}; a key appears once per block. The number is P_ij.",
        "What it can write: singular vectors of <code>W_V W_O</code> on the side of the output, through the weights of "
        "the final norm and the unembedding; a vector's sign means nothing. The share is that of its squared singular "
        "value. It is read from the weights alone, and later layers may change what it means.",
        *map(text, result.notes),
        f"<code>{text(result.command)}</code> <span class=dim>({duration(result.seconds)})</span>",
    ]
    return "\n".join(f"<p>{line}</p>" for line in lines)
