"""A circuit's record as a table in Markdown, sparse against dense: python examples/circuit_table.py DIR [DIR ...]

Sizes on three levels, what the prompts show, the controls and the published way of counting, side by side. A DIR holds
circuit.json or circuit.json.gz. It may hold `more-1.json` and `more-2.json`: the circuits of its first and second model
on more test prompts, as `attnprune circuit MODEL --task TASK --edges FILE --prompts N --json` prints with the search's
seed; FILE is DIR/eap-ig.json for the first model and DIR/eap-ig-against.json for the second.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path

from attnprune.circuit.folder import read_record
from attnprune.circuit.given import GivenCircuit
from attnprune.circuit.result import CircuitResult, Evaluation, Level, LevelCircuit, LevelRatio, ModelCircuit, Ratio
from attnprune.errors import InputError
from attnprune.report.circuits import PUBLISHED, level_ratio, levels_of

LEVELS: dict[Level, str] = {"edges": "edges", "nodes": "heads and MLPs", "messages": "messages per prompt"}
More = list[GivenCircuit | None]


def table(result: CircuitResult, more: More) -> str:
    """The lines of a table; `more` are the circuits of its models on more prompts, None where there are none."""
    kinds = [model.kind for model in result.models]
    names = kinds if len(set(kinds)) == len(kinds) else [model.name for model in result.models]
    lines = [["", *names, *([f"{names[1]} / {names[0]}"] if result.compare else [])]]
    lines += [*_sizes(result), *_tests(result, more), *_controls(result), *_published(result)]
    width = len(lines[0])
    rows = ["| " + " | ".join(cells + [""] * (width - len(cells))) + " |" for cells in lines]
    return "\n".join([rows[0], "|---" * width + "|", *rows[1:]])


def _sizes(result: CircuitResult) -> Iterator[list[str]]:
    models, compare = result.models, result.compare
    ratios = {ratio.level: ratio for ratio in compare.levels} if compare else {}
    for level, name in LEVELS.items():
        found = [levels_of(model, level) for model in models]
        for place, searched in enumerate(zip_longest(*found)):
            search = f", search {place + 1}" if max(map(len, found)) > 1 else ""
            ratio = [_level_ratio(ratios[level])] if level in ratios and not place else []
            yield [name + search, *map(_level, searched), *ratio]
    if not any(model.levels for model in models):  # a record of the first version
        yield [
            "edges",
            *(f"{m.counts.edges:,} of {m.graph.edges:,}" for m in models),
            *_ratio(compare and compare.edges),
        ]
    yield ["the edges' heads", *(f"{model.counts.heads:,}" for model in models), *_ratio(compare and compare.heads)]
    yield ["their MLPs", *(f"{model.counts.mlps:,}" for model in models), *_ratio(compare and compare.mlps)]
    yield ["their messages per prompt", *map(_messages, models), *_ratio(compare and compare.messages)]
    yield ["edges by ranking alone", *(f"{model.ranked.edges:,}" for model in models)]
    yield ["edges by EAP-IG alone", *map(_eap_ig, models)]


def _level(one: LevelCircuit | None) -> str:
    if one is None:
        return ""
    shown = "" if one.reached else ", not shown"
    return f"{_count(one.size)} of {_count(one.whole)} at {one.faithfulness.value:.2f}{shown}"


def _count(size: float) -> str:
    return f"{size:,.0f}" if size == round(size) or size >= 100 else f"{size:.1f}"


def _level_ratio(ratio: LevelRatio) -> str:
    value, bounds = level_ratio(ratio)
    return (value or "none") + (f" ({bounds})" if bounds else "")


def _ratio(ratio: Ratio | None) -> list[str]:
    return [] if ratio is None else ["none" if ratio.value is None else f"{ratio.value:.2f}x"]


def _messages(model: ModelCircuit) -> str:
    counts = model.counts
    if counts.messages is None:
        return ""
    return _count(counts.messages) + ("" if counts.open_messages is None else f" of {_count(counts.open_messages)}")


def _eap_ig(model: ModelCircuit) -> str:
    curve = next((curve for curve in model.curves if curve.ranking == "eap-ig abs"), None)
    return "none" if curve is None or curve.stable is None else f"{curve.stable:,}"


def _tests(result: CircuitResult, more: More) -> Iterator[list[str]]:
    models, task = result.models, result.task
    yield ["faithfulness, validation", *(f"{model.validation_faithfulness:.3f}" for model in models)]
    yield [f"faithfulness, {task.test} test prompts (bounds)", *(_evaluation(model.test) for model in models)]
    for count in sorted({one.prompts for one in more if one}):
        cells = ("" if one is None or one.prompts != count else _evaluation(one.test) for one in more)
        yield [f"the same, {count} test prompts", *cells]
    reached = ("reached" if model.reached else "not shown" for model in models)
    yield [f"target {result.method.target:g} with {task.test} prompts", *reached]
    able = (f"{_share(model.accuracy)}; {_share(model.test.accuracy)}" for model in models)
    yield ["accuracy of the model; of the circuit", *able]


def _evaluation(test: Evaluation) -> str:
    bounds = "" if test.lower is None or test.upper is None else f" ({test.lower:z.2f} to {test.upper:z.2f})"
    return f"{test.faithfulness.value:z.3f}{bounds}"


def _share(value: float) -> str:
    return f"{100 * value:.0f} %"


def _controls(result: CircuitResult) -> Iterator[list[str]]:
    models = result.models

    def row(name: str, cell: Callable[[ModelCircuit], str | None]) -> Iterator[list[str]]:
        cells = [cell(model) for model in models]
        if any(cells):
            yield [name, *(one or "" for one in cells)]

    yield from row("nonsense answers", _nonsense)
    yield from row("worst other ablation", _worst)
    yield from row("all other edges", lambda m: _number(m.controls.complement))
    yield from row("random circuits", lambda m: m.controls.random and _number(m.controls.random.faithfulness))
    yield from row("templates share", lambda m: m.controls.templates and _number(m.controls.templates.mean))
    if result.compare:
        swapped = (result.compare.first_in_second, result.compare.second_in_first)
        yield ["explains in the other model", *(_number(value) or "" for value in swapped)]
        yield ["edges shared (Jaccard)", "", "", f"{result.compare.jaccard:.2f}"]


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:z.2f}"


def _nonsense(model: ModelCircuit) -> str | None:
    found = model.controls.nonsense
    if found is None:
        return None
    size = "no circuit; at best" if found.edges is None else f"{found.edges:,} edges at"
    return f"{size} {_number(found.test) or 'none'}"


def _worst(model: ModelCircuit) -> str | None:
    trial = model.controls.stress and model.controls.stress.worst_trial
    if trial is None or trial.faithfulness is None:
        return None
    return f"{_number(trial.faithfulness)}, {_share(trial.share)} {trial.ablation}"


def _published(result: CircuitResult) -> Iterator[list[str]]:
    counted = [model.published for model in result.models if model.published]
    if len(counted) < len(result.models):
        return
    ratios = result.compare and result.compare.published
    for name, field in PUBLISHED.items():
        ratio = ratios and getattr(ratios, field)
        counts = ("not reached" if one.heads is None else _count(getattr(one, field)) for one in counted)
        yield [f"published: {name.strip().removeprefix('published: ')}", *counts, *([f"{ratio:.2f}x"] if ratio else [])]


def more_prompts(folder: Path, result: CircuitResult) -> More:
    """The circuits of a record on more test prompts, where the folder has them.

    Raises:
        InputError: another model, task or circuit than the record's.
    """
    found: More = []
    for place, model in enumerate(result.models):
        file = folder / f"more-{place + 1}.json"
        given = GivenCircuit.model_validate(json.loads(file.read_text())) if file.exists() else None
        if given and (given.task, given.edges, given.ablation) != (
            result.task.name, model.counts.edges, result.method.ablation,
        ):  # fmt: skip
            raise InputError(f"{file}: not the circuit of {model.name} for {result.task.name}")
        found.append(given)
    return found


if __name__ == "__main__":
    for name in sys.argv[1:]:
        result = read_record(Path(name))
        print(f"{result.task.name}\n\n{table(result, more_prompts(Path(name), result))}\n")
        for reason in result.compare.reasons if result.compare else []:
            print(f"- {reason}")
