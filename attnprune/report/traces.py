"""Traces on the terminal: the ranked messages, and what the set is worth. No torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from attnprune.errors import printable
from attnprune.report.tables import filled
from attnprune.units import duration, percent

if TYPE_CHECKING:
    from attnprune.circuit.record import Writer
    from attnprune.tracing.result import Measured, Message, ModelTrace, Trace

ROWS = 20  # messages of a table
NARROW = 14  # characters of a token
WORST = -10  # share of a prediction that is still printed as a number
_PART = "\N{REPLACEMENT CHARACTER}"  # what a token says that has only some bytes of a character


def shown(token: str, limit: int | None = None) -> str:
    """A token as people read it: spaces as dots, control characters escaped."""
    return printable(token.replace(" ", "·"), limit)


def said(result: Trace, limit: int) -> str:
    """The end of the text up to the traced token, on one line."""
    text = _text(result)
    if len(printable(text)) <= limit:
        return printable(text)
    start = next(start for start in range(len(text) + 1) if len(printable(text[start:])) < limit)
    return "…" + printable(text[start:])  # whole characters, with their escapes


def _text(result: Trace) -> str:
    """The text up to the traced token; tokens with parts of a character do not have it, the whole text does."""
    joined = "".join(token.text for token in result.tokens)
    for mark in ("", result.tokens[0].text):  # a mark of the beginning is not in the text
        if (found := _found(joined[len(mark) :], result.text)) is not None:
            return mark + found
    return joined


def _found(joined: str, whole: str) -> str | None:
    """What tokens are of a text, from its beginning; None: unknown. n replacement characters are 1 to n of its own."""
    ends = {0}  # where what was read so far may end
    for part in re.findall(f"{_PART}+|[^{_PART}]+", joined):
        if part[0] == _PART:
            ends = {end + step for end in ends for step in range(1, len(part) + 1) if end + step <= len(whole)}
        else:
            ends = {end + len(part) for end in ends if whole.startswith(part, end)}
    if len(whole) in ends:
        return whole
    is_cut = joined.endswith(_PART)  # the last character may not be all there
    return whole[: min(ends)] if ends and not is_cut else None


def summary(result: Trace) -> list[Any]:
    """The answer for a person: per model the ranked messages; then all that was measured, side by side."""
    lines: list[Any] = [f"{said(result, 76)}"]
    for model in result.models:
        lines += [messages_table(result, model), ""]
        if any(message.opened for message in model.messages):
            lines += [openings_table(model), _WHY, ""]
    lines.append(sets_table(result))
    share = "share kept: 1 - KL(full || set) / KL(full || none), all other messages closed exactly"
    lines.append(filled(f"{share}; target {result.target:g}; {duration(result.seconds)}"))
    return lines + [filled(f"note: {printable(note)}") for note in result.notes]


def messages_table(result: Trace, model: ModelTrace) -> Table:
    """The messages of a set, the most effective first."""
    title = f"{Path(model.name).name} ({model.kind}): {_tokens(model)}"
    table = Table(title=escape(printable(title, 78)), title_justify="left", title_style="bold", box=None)
    for name, justify in (("", "right"), ("head", "right"), ("from", "left"), ("to", "left"), ("weight", "right"),
                          ("effect", "right"), ("value raises", "left")):  # fmt: skip
        table.add_column(name, justify=justify, header_style="dim", no_wrap=True)  # pyright: ignore[reportArgumentType]
    for rank, message in enumerate(model.messages[:ROWS], 1):
        table.add_row(str(rank), *_cells(result, message))
    if len(model.messages) > ROWS:
        table.add_row("", "", f"[dim]+{len(model.messages) - ROWS:,} more[/]")
    return table


def _cells(result: Trace, m: Message) -> list[str]:
    effect = f"{m.effect:.3g}" if m.exact else f"≈{m.effect:.2g}"
    raises = escape(" ".join(shown(shift.text, 9) for shift in m.raises[:2]))
    return [
        f"{m.layer}.{m.head}", _token(result, m.key), _token(result, m.query), f"{m.weight:.2f}", effect,
        f"[dim]{raises}[/]",
    ]  # fmt: skip


def _token(result: Trace, position: int) -> str:
    return f"[cyan]{escape(shown(result.tokens[position].text, NARROW))}[/][dim] {position}[/]"


_WHY = "terms add up to the score; in brackets the score without it, x: then closed"


def openings_table(model: ModelTrace) -> Table:
    """Why edges are open: score, bias, and the largest writers into query and key."""
    table = Table(title="Why they are open", title_justify="left", title_style="bold", box=None, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for m in model.messages:
        if (why := m.opened) is not None:
            bias = "" if why.bias is None else f", bias {why.bias:+.2f}"
            table.add_row(f"{m.layer}.{m.head}", f"{m.query} <- {m.key}", f"score {why.score:.2f}{bias}")
            table.add_row("", "query", _terms(why.by_query, why.query_remainder))
            table.add_row("", "key", _terms(why.by_key, why.key_remainder))
    return table


def _terms(writers: list[Writer], rest: float) -> str:
    def term(w: Writer) -> str:
        then = "" if w.without is None else f" [dim]({w.without:.2f}{'x' if w.open_without is False else ''})[/]"
        return f"{w.source} {w.value:+.2f}{then}"

    return "  ".join([*map(term, writers), f"[dim]others[/] {rest:+.2f}"])


def _tokens(model: ModelTrace) -> str:
    return f"{shown(model.predicted.text)} {percent(model.predicted.probability)}, against {shown(model.against.text)}"


def sets_table(result: Trace) -> Table:
    """What the set keeps, beside its controls: a column per model."""
    table = Table(title="What the messages keep", title_justify="left", title_style="bold", box=None)
    table.add_column("", style="dim")
    for model in result.models:
        table.add_column(escape(printable(f"{Path(model.name).name} ({model.kind})", 28)), justify="right")

    def row(name: str, *cells: str) -> None:
        table.add_row(name, *map(escape, cells))

    models = result.models
    row("predicted", *(f"{shown(m.predicted.text)} {percent(m.predicted.probability)}" for m in models))
    row("against", *(f"{shown(m.against.text)} {percent(m.against.probability)}" for m in models))
    row("messages kept", *(f"{len(m.messages):,}" for m in models))
    row("  sent", *(f"{m.open:,} of {m.visible:,}" for m in models))
    row("  none can go", *map(none_can_go, models))
    row("share kept", *(_share(m.kept.share, 3) for m in models))
    row("  all others", *(_share(m.complement.share, 3) for m in models))
    row("  random sets", *map(_random, models))
    row("KL to full, nats", *(f"{m.kept.kl:.4g}" for m in models))
    row("  all others", *(f"{m.complement.kl:.4g}" for m in models))
    row("  none", *(f"{m.closed.kl:.4g}" for m in models))
    row("probability", *(percent(m.kept.probability) for m in models))
    row("  full", *(percent(m.full.probability) for m in models))
    row("logit difference", *(_difference(m.kept) for m in models))
    row("  full", *(_difference(m.full) for m in models))
    row("  all others", *(_difference(m.complement) for m in models))
    row("  none", *(_difference(m.closed) for m in models))
    return table


def none_can_go(model: ModelTrace) -> str:
    """Whether each message of the set is needed."""
    if model.minimal:
        return "yes"
    return "not tried for each" if model.can_go is None else f"no: {model.can_go} could"


def _random(model: ModelTrace) -> str:
    drawn = model.random
    return f"{_share(drawn.share)} [{_share(drawn.share_low)}, {_share(drawn.share_high)}]"


def _share(value: float, digits: int = 2) -> str:
    """A share of a prediction; where closing everything hardly changes it, shares of that have no meaning left."""
    return f"{value:z.{digits}f}" if value >= WORST else f"< {WORST}"


def _difference(m: Measured) -> str:
    return f"{m.difference:.3f}"
