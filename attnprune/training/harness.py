"""The field's own benchmarks through lm-eval (EleutherAI's harness): base, sparse model and open gates side by side."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from attnprune.attention.interface import gates_forced_open
from attnprune.errors import AttnPruneError, InputError, first_line, not_installed
from attnprune.sidecar import bases
from attnprune.sidecar.folder import Sidecar
from attnprune.training.evaluation import load_pair


@dataclass(frozen=True)
class Score:
    """One number of one task: the harness' value and its standard error (None where it states none)."""

    task: str
    metric: str
    value: float
    error: float | None


def evaluate_tasks(
    name: str,
    sidecar: Sidecar | None,
    tasks: list[str],
    *,
    base: str | None = None,
    revision: str | None = None,
    device: str = "cpu",
    limit: int | None = None,
    batch_size: int = 0,
    definitions: Path | None = None,
    allow_base_mismatch: bool = False,
    bars: bool = True,
    on_note: Callable[[str], None] = lambda note: None,
) -> dict[str, list[Score]]:
    """Scores of a base model ("model"), or of a sidecar's "base", "sparse" and "open gates", in the order of the tasks.

    Args:
        tasks: names of lm-eval's tasks or groups.
        limit: only the first documents of each task.
        definitions: folder with further task definitions (YAML).
        bars: let lm-eval show its progress bars.
        on_note: told which token stands for one that lm-eval needs and the tokenizer does not have.

    Raises:
        InputError: lm-eval is not installed, a task that it does not know, a tokenizer without a token that
            could begin or end a text.
        AttnPruneError: a task's data cannot be had.
    """
    manager = _manager(definitions)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise InputError(f"--tasks: lm-eval has no task {unknown[0]!r}", hint="lm-eval ls tasks shows them")

    def scores(model: Any, tokenizer: Any) -> list[Score]:
        with _undisturbed(bars):
            return _scores(model, tokenizer, tasks, manager, limit, batch_size or 8)

    if sidecar is None:
        loaded = bases.load_base(name, revision=revision, device=bases.pick_device(device))
        return {"model": scores(loaded.model, _with_an_end(loaded.tokenizer, on_note))}
    dense, sparse = load_pair(sidecar, base, device, allow_base_mismatch=allow_base_mismatch)
    tokenizer = _with_an_end(dense.tokenizer, on_note)
    found = {"base": scores(dense.model, tokenizer), "sparse": scores(sparse, tokenizer)}
    with gates_forced_open(sparse):
        found["open gates"] = scores(sparse, tokenizer)
    return found


def _manager(definitions: Path | None) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise not_installed("lm-eval", "eval") from None
    if definitions is not None and not definitions.is_dir():
        raise InputError(f"{definitions}: no such folder")
    return TaskManager(include_path=None if definitions is None else str(definitions))


def _with_an_end(tokenizer: Any, on_note: Callable[[str], None]) -> Any:
    """A tokenizer that has an end of text: lm-eval stops at it, and where there is no begin of text it puts it before a
    text without a prompt.

    Raises:
        InputError: no token could stand for it; an ordinary one would be part of a text.
    """
    if tokenizer.eos_token_id is not None:
        return tokenizer
    instead = tokenizer.bos_token or tokenizer.pad_token
    if instead is None:
        raise InputError(
            "--tasks: the tokenizer has no token for the begin or end of a text and none for padding",
            hint="lm-eval puts one before a text without a prompt",
        )
    on_note(f"the tokenizer has no end of text; lm-eval takes {instead!r} for it, and before a text without a prompt")
    ended = copy.deepcopy(tokenizer)
    ended.eos_token = instead
    return ended


@contextmanager
def _undisturbed(bars: bool) -> Iterator[None]:
    """Without lm-eval's question to git, which complains on stderr where the current folder is no repository; and
    without its bars, which heed no TQDM_DISABLE, unless they are wanted."""
    from lm_eval import evaluator

    asked, evaluator.get_git_commit_hash = evaluator.get_git_commit_hash, lambda: None
    try:
        with nullcontext() if bars else redirect_stderr(StringIO()):
            yield
    finally:
        evaluator.get_git_commit_hash = asked


def _scores(
    model: Any, tokenizer: Any, tasks: list[str], manager: Any, limit: int | None, batch_size: int
) -> list[Score]:
    import lm_eval
    from lm_eval.models import huggingface

    harness: Any = huggingface.HFLM  # its signature and that of simple_evaluate come from decorators
    evaluate: Any = lm_eval.simple_evaluate
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        wrapped = harness(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        found = evaluate(wrapped, tasks=list(tasks), task_manager=manager, limit=limit, verbosity="ERROR")
    except (OSError, ValueError, LookupError) as error:  # data that cannot be reached or is not what a task needs
        raise AttnPruneError(f"tasks: {first_line(error)}", hint="their data comes from the Hub") from error
    return [
        Score(task, key.removesuffix(",none"), float(value), _number(numbers.get(_error_key(key))))
        for task, numbers in found["results"].items()
        for key, value in numbers.items()
        if isinstance(value, (int, float)) and "_stderr" not in key and key != "sample_len"
    ]


def _error_key(key: str) -> str:
    """`acc,none` -> `acc_stderr,none`."""
    metric, _, group = key.partition(",")
    return f"{metric}_stderr,{group}"


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None
