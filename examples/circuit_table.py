"""A circuit's record as a table in Markdown, sparse against dense: python examples/circuit_table.py DIR [DIR ...]

Sizes on three levels, what the prompts show, the controls and the published way of counting, side by side. A DIR holds
circuit.json or circuit.json.gz, and may hold `more-1.json` and `more-2.json`: the circuits of its first and second
model on more test prompts, as `attnprune circuit MODEL --task TASK --edges DIR/eap-ig.json --prompts N --json` prints.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from attnprune.circuit.folder import read_record
from attnprune.circuit.given import GivenCircuit
from attnprune.circuit.result import CircuitResult, Evaluation, LevelCircuit, LevelRatio, ModelCircuit

LEVELS = {"nodes": "heads and MLPs", "edges": "edges", "messages": "messages per prompt"}


def table(result: CircuitResult, more: list[GivenCircuit | None]) -> str:
    """The lines of a table; `more` are the circuits of its models on more prompts, None where there are none."""
    names = [model.kind for model in result.models]
    lines = [["", *names, *([f"{names[1]} / {names[0]}"] if result.compare else [])]]
    lines += [*_sizes(result), *_tests(result, more), *_controls(result), *_published(result)]
    width = len(lines[0])
    padded = [cells + [""] * (width - len(cells)) for cells in lines]
    rows = ["| " + " | ".join(cells) + " |" for cells in padded]
    return "\n".join([rows[0], "|---" * width + "|", *rows[1:]])


def _sizes(result: CircuitResult) -> Iterator[list[str]]:
    ratios = {ratio.level: ratio for ratio in result.compare.levels} if result.compare else {}
    for level, name in LEVELS.items():
        found = [[one for one in model.levels if one.level == level] for model in result.models]
        for place in range(len(found[0])):
            search = f", search {place + 1}" if len(found[0]) > 1 else ""
            ratio = [_ratio(ratios[level])] if level in ratios and not place else []
            yield [name + search, *(_level(one[place]) for one in found), *ratio]
    yield ["edges by ranking alone", *(f"{model.ranked.edges:,}" for model in result.models)]
    yield ["edges by EAP-IG alone", *(_eap_ig(model) for model in result.models)]


def _level(one: LevelCircuit) -> str:
    shown = "" if one.reached else ", not shown"
    return f"{_count(one.size)} of {_count(one.whole)} at {one.faithfulness.value:.2f}{shown}"


def _count(size: float) -> str:
    return f"{size:,.0f}" if size == round(size) or size >= 100 else f"{size:.1f}"


def _ratio(ratio: LevelRatio) -> str:
    if ratio.value is None or ratio.low is None or ratio.high is None:
        return "none"
    return f"{ratio.value:.2f}x ({ratio.low:.2f}-{ratio.high:.2f})"


def _eap_ig(model: ModelCircuit) -> str:
    curve = next(curve for curve in model.curves if curve.ranking == "eap-ig abs")
    return "none" if curve.stable is None else f"{curve.stable:,}"


def _tests(result: CircuitResult, more: list[GivenCircuit | None]) -> Iterator[list[str]]:
    models, task = result.models, result.task
    yield ["faithfulness, validation", *(f"{model.validation_faithfulness:.3f}" for model in models)]
    yield [f"faithfulness, {task.test} test prompts (bounds)", *(_evaluation(model.test) for model in models)]
    if any(more):
        count = next(one.prompts for one in more if one)
        yield [f"the same, {count} test prompts", *("" if one is None else _evaluation(one.test) for one in more)]
    yield [f"target with {task.test} prompts", *("reached" if model.reached else "not shown" for model in models)]
    able = (f"{_share(model.accuracy)}; {_share(model.test.accuracy)}" for model in models)
    yield ["accuracy of the model; of the circuit", *able]


def _evaluation(test: Evaluation) -> str:
    if test.lower is None or test.upper is None:
        return f"{test.faithfulness.value:.3f}"
    return f"{test.faithfulness.value:.3f} ({test.lower:.2f}-{test.upper:.2f})"


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
    return f"{size} {found.test:z.2f}"


def _worst(model: ModelCircuit) -> str | None:
    trial = model.controls.stress and model.controls.stress.worst_trial
    return trial and f"{trial.faithfulness:z.2f}, {_share(trial.share)} {trial.ablation}"


def _published(result: CircuitResult) -> Iterator[list[str]]:
    counted = [model.published for model in result.models]
    if not all(counted):
        return
    ratios = result.compare and result.compare.published
    for field, name in (("heads", "heads"), ("edges", "edges among them"), ("token_edges", "open attention edges")):
        cells = [getattr(one, field) for one in counted]
        ratio = ratios and getattr(ratios, field)
        counts = ("none" if one is None else _count(one) for one in cells)
        yield [f"published: {name}", *counts, *([f"{ratio:.2f}x"] if ratio else [])]


def _more(folder: Path, count: int) -> list[GivenCircuit | None]:
    files = [folder / f"more-{place + 1}.json" for place in range(count)]
    return [GivenCircuit.model_validate(json.loads(file.read_text())) if file.exists() else None for file in files]


if __name__ == "__main__":
    for name in sys.argv[1:]:
        result = read_record(Path(name))
        print(f"{result.task.name}\n\n{table(result, _more(Path(name), len(result.models)))}\n")
        for reason in result.compare.reasons if result.compare else []:
            print(f"- {reason}")
