"""A whole search in a folder: models and prompts by name, the search of each model, the record and its exports."""

from __future__ import annotations

import json
import time
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from attnprune.circuit import mib
from attnprune.circuit.analysis import analyse, search_again
from attnprune.circuit.compare import result_of, task_facts
from attnprune.circuit.exchange import graph_json, graph_pt
from attnprune.circuit.explained import ExplainedEdge, explain_edge
from attnprune.circuit.folder import CACHE_FOLDER, RECORD_FILE, SETTINGS_FILE, check_folder
from attnprune.circuit.given import GivenCircuit, GivenCircuits, evaluate_given
from attnprune.circuit.model.adapters import graph_of
from attnprune.circuit.result import CircuitResult
from attnprune.circuit.search.cache import Cache
from attnprune.circuit.search.splits import QUICK, Settings, Watch
from attnprune.circuit.search.subject import Subject
from attnprune.circuit.tasks import Task, load_task, task_names
from attnprune.circuit.tasks.tables import is_table
from attnprune.errors import InputError
from attnprune.files import locked, write_atomic
from attnprune.sidecar.models import by_name, check_base

MASK_PROMPTS = 2048  # train prompts that a mask is learned on, or as many as a task has


def run(
    folder: Path, settings: dict[str, Any], device: str, *, is_new: bool, watching: AbstractContextManager[Watch]
) -> CircuitResult:
    """Search one or two models and write the record and its exports into `folder`.

    Args:
        settings: as `folder.read_settings` gives them; those of a new search have no fingerprint yet.
        watching: entered while the search runs; what it gives is told how far the search is.

    Raises:
        InputError: another search in this folder, no such task, models that cannot be compared, or other prompts than
            the search was begun with.
        AttnPruneError: a model cannot do the task, or cannot be searched.
    """
    with locked(folder):
        if is_new:
            check_folder(folder)  # again: another search may have begun and ended meanwhile
        return _run(folder, settings, device, is_new=is_new, watching=watching)


def _run(
    folder: Path, settings: dict[str, Any], device: str, *, is_new: bool, watching: AbstractContextManager[Watch]
) -> CircuitResult:
    """`run` with the folder held."""
    started = time.monotonic()
    if not is_table(settings["task"]) and settings["task"] not in task_names():  # before any weights
        raise InputError(f"{settings['task']}: no such task", hint=", ".join(task_names()))
    check_base(settings["base"], *filter(None, (settings["model"], settings["against"])))
    model, tokenizer = _load(settings["model"], settings, device)
    models = {"model": (settings["model"], model)}
    how = _thoroughness(settings)
    more = MASK_PROMPTS if how.mask_steps else 0
    if settings["against"] is not None:
        other, other_tokenizer = _load(settings["against"], settings, device)
        _check_pair(model, tokenizer, other, other_tokenizer, settings["against"])
        models["against"] = (settings["against"], other)
    tasks = [_task(settings, seed, tokenizer, models, more) for seed in _seeds(settings)]
    task = tasks[0]
    (folder / CACHE_FOLDER).mkdir(parents=True, exist_ok=True)
    if is_new:
        stored = settings | {"fingerprint": task.fingerprint}
        write_atomic(folder / CACHE_FOLDER / SETTINGS_FILE, json.dumps(stored, indent=1) + "\n")
    elif settings["fingerprint"] != task.fingerprint:
        raise InputError(f"{settings['task']}: not the prompts that this search was begun with")
    cache = Cache(folder / CACHE_FOLDER)
    with watching as watch:
        analyses = [
            analyse(one, name, task, how, with_controls=settings["controls"], label=label, watch=watch, cache=cache)
            for label, (name, one) in models.items()
        ]
        for again in range(1, len(tasks)):
            other_how = replace(how, seed=_seeds(settings)[again])
            for place, (label, (name, _)) in enumerate(models.items()):
                key = f"{label} search {again + 1}"
                subject = Subject(analyses[place].anatomy, tasks[again], key, other_how, watch, cache)
                analyses[place] = analyses[place].with_search(search_again(subject, name))
        facts = task_facts(task, tokenizer, settings["seed"])
        exports = {}
        places = [mib.folder_name(settings["task"], name) for name, _ in models.values()]
        for analysis, name, place in zip(analyses, ("eap-ig", "eap-ig-against"), places, strict=False):
            whole = (analysis.anatomy.graph, analysis.anatomy.width, analysis.edges, analysis.scores)
            exports |= {f"{name}.json": json.dumps(graph_json(*whole)), f"{name}.pt": graph_pt(*whole)}
            place = f"{place}-against" if f"mib/{place}/{mib.IMPORTANCES}" in exports else place
            exports[f"mib/{place}/{mib.IMPORTANCES}"] = mib.importances(*whole)
        result = result_of(
            analyses, facts, how, command=settings["command"], quick=settings["quick"],
            seconds=time.monotonic() - started, notes=list(task.notes),
        )  # fmt: skip
    for name, data in exports.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / name, data)
    write_atomic(folder / RECORD_FILE, result.model_dump_json(indent=1) + "\n")
    return result


def evaluate_file(
    file: Path, settings: dict[str, Any], device: str, watching: AbstractContextManager[Watch]
) -> GivenCircuit | GivenCircuits:
    """Evaluate the circuit in a file, or those of a submission to MIB; settings as those of a search.

    Raises what `given.evaluate_given` raises.
    """
    check_base(settings["base"], settings["model"])
    model, tokenizer = _load(settings["model"], settings, device)
    task = _task(settings, settings["seed"], tokenizer, {"model": (settings["model"], model)}, 0)
    with watching as watch:
        return evaluate_given(model, settings["model"], task, file, _thoroughness(settings), watch)


def explain(edge: str, settings: dict[str, Any], device: str) -> ExplainedEdge:
    """Explain an attention edge; settings as those of a search. Raises what `explained.explain_edge` raises."""
    check_base(settings["base"], settings["model"])
    model, tokenizer = _load(settings["model"], settings, device)
    task = _task(settings, settings["seed"], tokenizer, {"model": (settings["model"], model)}, 0)
    return explain_edge(model, tokenizer, settings["model"], task, edge)


def _seeds(settings: dict[str, Any]) -> list[int]:
    """The seed of every search, of its prompts too."""
    return [settings["seed"] + search for search in range(settings["searches"])]


def _task(settings: dict[str, Any], seed: int, tokenizer: Any, models: dict[str, tuple[str, Any]], more: int) -> Task:
    vocabulary = min(model.config.vocab_size for _, model in models.values())
    return load_task(
        settings["task"], tokenizer, vocabulary=vocabulary, count=settings["prompts"], more=more, seed=seed
    )


def _thoroughness(settings: dict[str, Any]) -> Settings:
    chosen: dict[str, Any] = dict(QUICK) if settings["quick"] else {}
    chosen |= {name: settings[name] for name in ("mask_steps", "deletions", "levels") if settings[name] is not None}
    return Settings(
        **chosen,
        ablate=settings["ablate"],
        procedure=settings["procedure"],
        target=settings["target"],
        batch_size=settings["batch_size"],
        seed=settings["seed"],
    )


def _load(name: str, settings: dict[str, Any], device: str) -> tuple[Any, Any]:
    """(model, tokenizer); the base is that of whichever model is sparse."""
    found = by_name(name, settings["base"], device)
    return found.model, found.tokenizer


def _check_pair(model: Any, tokenizer: Any, other: Any, other_tokenizer: Any, name: str) -> None:
    """Two models are compared edge by edge on the same tokens."""
    if graph_of(model.config) != graph_of(other.config):
        raise InputError(f"--against {name}: has other layers or heads")
    if tokenizer.get_vocab() != other_tokenizer.get_vocab():
        raise InputError(f"--against {name}: has another tokenizer")
