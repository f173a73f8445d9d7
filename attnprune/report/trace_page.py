"""A trace as one HTML page that needs no network: arcs over the tokens, a slider over the size, controls, method."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from attnprune.report.pages import build, text, toggle
from attnprune.report.traces import none_can_go, said, shown
from attnprune.units import duration, percent

if TYPE_CHECKING:
    from attnprune.tracing.result import Measured, ModelTrace, Shift, Trace

# What the page's script reads of a model. Names and the text are not among it: they are escaped here.
_DRAWN = {"layers", "heads", "open", "full", "closed", "curve"}


def render_page(result: Trace) -> str:
    """The page as text (UTF-8). Its content security policy allows no request and no script but its own."""
    first = result.models[0]
    return build(
        "trace.html", ("page.css", "trace.css"), ("page.js", "trace_view.js"), _data(result),
        title=text(f"Trace of {Path(first.name).name}: {said(result, 60)} → {shown(first.predicted.text)}"),
        intro=_intro(result), toggle=toggle([(m.kind, m.name, Path(m.name).name) for m in result.models]),
        report=_report(result), method=_method(result),
    )  # fmt: skip


def _data(result: Trace) -> str:
    """Tokens as people read them; the script only ever sets them as text."""
    models = [
        model.model_dump(mode="json", include=_DRAWN)
        | {
            "answer": shown(model.predicted.text),
            "messages": [
                m.model_dump(mode="json", exclude={"raises", "lowers"})
                | {"raises": _shifts(m.raises), "lowers": _shifts(m.lowers)}
                for m in model.messages
            ],
        }
        for model in result.models
    ]
    return json.dumps({"tokens": [shown(token.text) for token in result.tokens], "models": models}, allow_nan=False)


def _shifts(shifts: list[Shift]) -> list[dict[str, str | float]]:
    return [{"text": shown(shift.text), "logit": shift.logit} for shift in shifts]


def _intro(result: Trace) -> str:
    """One line per model."""
    return "\n".join(
        f"<p><b>{text(Path(model.name).name)}</b> <span class=dim>({model.kind})</span>: {len(model.messages):,} of "
        f"{model.open:,} messages sent keep {model.kept.share:z.3f} of the prediction "
        f"<code>{text(shown(model.predicted.text))}</code> ({percent(model.predicted.probability)}) against "
        f"<code>{text(shown(model.against.text))}</code> ({percent(model.against.probability)}), target "
        f"{result.target:g}{'' if model.kept.same else '; <b>alone they predict another token</b>'}</p>"
        for model in result.models
    )


def _report(result: Trace) -> str:
    """The table of sets and controls, a column per model."""
    models = result.models

    def row(name: str, cell: Callable[[ModelTrace], str]) -> str:
        return f"<tr><th>{name}</th>{''.join(f'<td>{text(cell(model))}</td>' for model in models)}</tr>"

    rows = (
        row("messages kept", lambda m: f"{len(m.messages):,} of {m.open:,} sent ({percent(len(m.messages) / m.open)})"),
        row("of all pairs of tokens", lambda m: f"{m.visible:,}"),
        row("kept set alone", lambda m: measured(m.kept)),
        row("all others alone", lambda m: measured(m.complement)),
        row("random sets of this size", _random),
        row("every message closed", lambda m: measured(m.closed)),
        row("full run", lambda m: f"logit difference {m.full.difference:.3f}"),
        row("no message can go alone", none_can_go),
        row("runs of the model", lambda m: f"{m.runs:,} in {duration(m.seconds)}"),
    )
    head = "".join(f"<th>{text(Path(model.name).name)}</th>" for model in models)
    return f"<table id=report><thead><tr><th></th>{head}</tr></thead>\n<tbody>\n{chr(10).join(rows)}\n</tbody></table>"


def measured(m: Measured) -> str:
    """A run in words."""
    return (
        f"share {m.share:z.3f}, KL {m.kl:.3g} nats, logit difference {m.difference:.3f}, predicted token "
        f"{percent(m.probability)}{'' if m.same else ', no longer the likeliest'}"
    )


def _random(model: ModelTrace) -> str:
    r = model.random
    return (
        f"share {r.share:z.3f}, from {r.share_low:z.3f} to {r.share_high:z.3f} in {r.draws} draws; "
        f"KL {r.kl:.3g}, from {r.kl_low:.3g} to {r.kl_high:.3g}"
    )


def _method(result: Trace) -> str:
    """How it was measured; the text; the command."""
    lines = [
        "A message is what one head in one layer moves from one token (the key) to another (the query). Every message "
        f"outside the set is closed as a gate closes it: <code>{text(result.closing)}</code>. Keys of closed messages "
        "still stand in the softmax. Messages that stay pass through their own gates, whose scores may move. Share: "
        f"<code>{text(result.share)}</code>. Gradients ranked the messages, runs decided.",
        "Effect: what the KL grows by without that message; ≈ where it was estimated by gradients instead. Raises "
        "and lowers: the value through the output map of its head and the unembedding, divided by the final norm's "
        "scale in the full run at the token that receives it, against the mean of the vocabulary: its path alone, not "
        "what later layers make of it. Following goes from a message to those that wrote where it reads, in earlier "
        "layers, and to those that read where it writes, in later ones.",
        "Score, into the query, into the key (<code>--explain</code>): what heads and MLPs wrote there adds up to the "
        "score, with the norm held as it was; in brackets the score without that writer, with the norm run again.",
        f"<span class=dim>text</span> <code>{text(result.text)}</code>, prediction behind token {result.position}",
        *(text(note) for note in result.notes),
        f"<code>{text(result.command)}</code> <span class=dim>({duration(result.seconds)})</span>",
    ]
    return "\n".join(f"<p>{line}</p>" for line in lines)
