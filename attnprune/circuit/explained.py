"""Why an attention edge of a task's first test prompt is open: asked for by name, and what is shown of it."""

from __future__ import annotations

import re
from typing import Any, Literal

import torch
from pydantic import Field

from attnprune.circuit.model.adapters import anatomy_of
from attnprune.circuit.model.explain import Explanation, Term, explain
from attnprune.circuit.record import Opening, Writer
from attnprune.circuit.search.splits import pattern_visible
from attnprune.circuit.tasks import Prompts, Task
from attnprune.errors import InputError

SCHEMA = "attnprune-explained-edge-1"
REMOVED = 5  # terms of either side that are removed and run
_EDGE = re.compile(r"a(\d+)\.h(\d+):([\w+.-]+)<-([\w+.-]+)")


class ExplainedEdge(Opening):
    """An explained edge, and the prompt that it is of."""

    schema_id: Literal["attnprune-explained-edge-1"] = SCHEMA
    model: str
    task: str
    edge: str
    prompt: list[str] = Field(description="tokens")
    query: int
    key: int


def explain_edge(model: Any, tokenizer: Any, name: str, task: Task, asked: str) -> ExplainedEdge:
    """Explain `asked`, for example "a5.h1:END<-S1": positions from 0 on, or roles of the task's first test prompt.

    Raises:
        InputError: not such an edge.
        UnsupportedModelError: no adapter, or a family with a soft cap.
    """
    found = _EDGE.fullmatch(asked)
    if found is None:
        raise InputError(f"{asked}: is no edge HEAD:QUERY<-KEY", hint="for example a5.h1:12<-4, or a5.h1:END<-S1")
    prompts = task.test[0]
    layer, head = int(found[1]), int(found[2])
    query, key = (_place(prompts, text, asked) for text in (found[3], found[4]))
    anatomy = anatomy_of(model)
    dense = not anatomy.gated
    ids = prompts.clean[:1].to(model.device)
    with pattern_visible(anatomy):
        why = explain(anatomy, ids, (layer, head, query, key), dense=dense, removed=REMOVED)
    return ExplainedEdge(
        **opening(why).model_dump(), model=name, task=task.name, edge=asked, query=query, key=key,
        prompt=[tokenizer.decode([token]) for token in ids[0].tolist()],
    )  # fmt: skip


def opening(why: Explanation, most: int | None = None) -> Opening:
    """As a record, with at most so many writers of either side; the others are in the remainder."""
    sides = [[_writer(term, why) for term in terms[:most]] for terms in (why.query, why.key)]
    rest = [why.score - sum(writer.value for writer in side) for side in sides]
    return Opening(
        score=why.score, bias=why.bias, is_open=why.is_open, by_query=sides[0], by_key=sides[1],
        query_remainder=rest[0], key_remainder=rest[1],
    )  # fmt: skip


def _writer(term: Term, why: Explanation) -> Writer:
    is_open = None if term.without is None or why.bias is None else term.without + why.bias > 0
    return Writer(source=term.source, value=term.value, without=term.without, open_without=is_open)


def _place(prompts: Prompts, text: str, asked: str) -> int:
    """A position of the first prompt: a number, or a role's first token."""
    if text.isdecimal():
        return int(text)
    roles = {role: spans[0] for role, spans in prompts.roles.items() if int(spans[0, 1])}
    if text not in roles:
        raise InputError(f"{asked}: {text} is no position and no role", hint=f"roles: {', '.join(sorted(roles))}")
    return int(torch.as_tensor(roles[text])[0])
