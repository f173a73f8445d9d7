"""`attnprune.evaluate`, `circuit`, `diff`, `verify`, `merge` and `push`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnprune.api.console import progress_console
from attnprune.data.given import sources_of
from attnprune.errors import InputError, checked, unpacked
from attnprune.files import check_new_folder, temporary_folder
from attnprune.runs.folder import CHECKPOINTS, MANIFEST_FILE

if TYPE_CHECKING:
    from attnprune.circuit.result import CircuitResult
    from attnprune.measure import Report
    from attnprune.publish.plan import Plan
    from attnprune.publish.push import Pushed
    from attnprune.sidecar.diff import Difference
    from attnprune.sidecar.folder import Sidecar
    from attnprune.sidecar.verify import Level

PROMPTS, QUICK_PROMPTS = 64, 32  # pairs per split of a circuit's prompts


@checked(seq_len=0, tokens=2, batch_size=0)
def evaluate(
    model: Any,
    tokenizer: Any = None,
    *,
    data: Any = None,
    base: str | Path | None = None,
    revision: str | None = None,
    device: str = "cpu",
    seq_len: int = 0,
    tokens: int = 16_384,
    batch_size: int = 0,
    text_field: str = "text",
    allow_base_mismatch: bool = False,
    device_map: str | dict[str, Any] | None = None,
) -> Report | list[Report]:
    """Measure loss, base loss, open-gate control, KL, density and edges per query on text.

    Args:
        model: a sidecar or base model by name; or a model in memory, gated or dense, with its `tokenizer` or as the
            pair that `load` gives, which has no base to be compared with.
        data: as for `sparsify`. Default: the held-out split that a sidecar's result was measured on.
        base: the base of a sidecar that does not name it.
        seq_len: tokens per block; 0: as in training (at most 512 of a base model).
        tokens: at most so many per text; of 'task' always all.
        batch_size: blocks per forward pass; 0: by length.
        device_map: spread the models over devices, as `load` does; instead of `device`.

    Returns:
        A Report; for a tuple of sources a list with one of each.

    Raises:
        InputError: no such model or text, or none named where there is no held-out split.
    """
    from attnprune.sidecar.models import in_memory
    from attnprune.training.evaluation import evaluate_loaded, evaluate_model

    options: dict[str, Any] = {
        "seq_len": seq_len, "tokens": tokens, "batch_size": batch_size, "text_field": text_field,
    }  # fmt: skip
    model, tokenizer = unpacked(model, tokenizer)
    with nullcontext([]) if data is None else sources_of(data, text_field) as sources:
        if isinstance(model, (str, Path)):
            if tokenizer is not None:
                raise InputError("tokenizer: goes with a model in memory; that of a model by name is its own")
            sidecar = sidecar_at(str(model), revision)
            if sidecar is None and not sources:
                raise InputError(f"{model}: say what to measure on", hint="data=FILE")
            reports = evaluate_model(
                str(model), sidecar, sources, base=None if base is None else str(base), revision=revision,
                device=device, allow_base_mismatch=allow_base_mismatch, device_map=device_map, **options,
            )  # fmt: skip
        else:
            elsewhere = None if device == "cpu" else device
            by_name_only = {"base": base, "revision": revision, "device": elsewhere, "device_map": device_map}
            for name in (name for name, value in by_name_only.items() if value is not None):
                raise InputError(f"{name}: is for models given by name")
            _, model, tokenizer, *_ = in_memory(model, tokenizer)
            if not sources:
                raise InputError("evaluate: a model in memory needs data")
            reports = evaluate_loaded(model, tokenizer, sources, **options)
    return reports if isinstance(data, tuple) else reports[0]


def sidecar_at(path: str, revision: str | None = None) -> Sidecar | None:
    """The sidecar in a folder or Hub repository; None where that is another model.

    Raises:
        InputError: a damaged or unfinished one.
    """
    from attnprune.sidecar.folder import open_sidecar
    from attnprune.sidecar.hub import locate_sparse

    folder = locate_sparse(path, revision) or Path(path)
    is_sidecar = (folder / MANIFEST_FILE).exists() or (folder / CHECKPOINTS).is_dir()
    return open_sidecar(folder) if is_sidecar else None


@checked(prompts=0, seed=0, mask_steps=0, deletions=0, searches=1, batch_size=1)
def circuit(
    model: str | Path | None = None,
    task: str | Path | None = None,
    *,
    against: str | Path | None = None,
    base: str | Path | None = None,
    target: float = 0.9,
    prompts: int = 0,
    seed: int = 0,
    quick: bool = False,
    mask_steps: int | None = None,
    deletions: int | None = None,
    ablate: str = "corrupt",
    procedure: str = "exact",
    levels: bool | None = None,
    searches: int = 1,
    controls: bool = True,
    batch_size: int = 32,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    device: str = "auto",
    progress: bool | AbstractContextManager[Any] = True,
    command: str | None = None,
) -> CircuitResult:
    """Find the smallest circuit of a model for a task by exact patching, with controls, and compare two models.

        found = attnprune.circuit("gpt2-sparse", "ioi", against="gpt2", out="ioi")
        found.models[0].counts.edges, found.models[0].reached

    Args:
        model, against: sidecar or merged folder, base model, Hub name, .gguf file or "demo".
        task: "ioi", "greater-than", "sva", ..., or a .csv, .jsonl, .json, .parquet or .arrow file, also of MIB or
            Edge-Pruning.
        target: faithfulness to reach, above 0 and up to 1.
        prompts: pairs per split; 0: 64, or 32 if quick.
        mask_steps, deletions: steps of learning a mask (100, up to three times as many while it shrinks), evaluations
            that delete edges (240); 0 leaves either out.
        ablate: what edges outside a circuit carry: values of the "corrupt" prompt, the "mean" or "zero"; "mixed": a
            third of the prompts each.
        procedure: "exact", or "published": heads and edges counted as published beside it.
        levels: search heads and MLPs, and attention messages, as well as edges. Default: yes, not if quick.
        searches: how many, with seeds from `seed` on; ratios of two models then say how far they agree.
        controls: random circuits, broken models, answers that mean nothing, other ablations.
        out: output folder with the record, page and curve, from which an interrupted search goes on. Default:
            nothing is written.
        resume: the folder of a search that was interrupted, which goes on as it was begun.
        progress: show it, or a context manager that is told (what, done, total).
        command: what the record says began the search.

    Raises:
        InputError: no such task or model, models that cannot be compared, a folder that is not empty.
        AttnPruneError: a model cannot do the task, or cannot be searched.
    """
    from attnprune.circuit.folder import check_folder, read_settings
    from attnprune.circuit.worth import ABLATIONS, PROCEDURES

    folder = resume if resume is not None else out
    if resume is not None:
        given = {"model": model, "task": task, "against": against, "base": base}
        if any(value is not None for value in given.values()):
            names = ", ".join(name for name, value in given.items() if value is not None)
            raise InputError(f"resume: goes on as the search was begun; leave out {names}")
        settings = read_settings(Path(resume))
    else:
        if not isinstance(model, (str, Path)) or not isinstance(task, (str, Path)):
            missing = "task" if isinstance(model, (str, Path)) else "model"
            raise InputError(f"circuit: no {missing} given by name", hint='for example: circuit("demo", "addition")')
        if not 0 < target <= 1:
            raise InputError(f"target {target:g}: is not above 0 and up to 1")
        if ablate not in ABLATIONS:
            raise InputError(f"ablate {ablate}: is none of {', '.join(ABLATIONS)}")
        if procedure not in PROCEDURES:
            raise InputError(f"procedure {procedure}: is none of {', '.join(PROCEDURES)}")
        settings = {
            "model": str(model), "task": str(task), "against": against and str(against), "base": base and str(base),
            "target": float(target), "prompts": prompts or (QUICK_PROMPTS if quick else PROMPTS), "seed": seed,
            "quick": quick, "mask_steps": mask_steps, "deletions": deletions, "ablate": ablate, "procedure": procedure,
            "levels": levels, "searches": searches, "controls": controls, "batch_size": batch_size,
            "command": command or f"attnprune.circuit({str(model)!r}, {str(task)!r}, ...)",
        }  # fmt: skip
        if out is not None:
            check_folder(Path(out))
    from attnprune.circuit.run import run  # with torch, once the options are known to be good
    from attnprune.report.circuit_page import write_pictures
    from attnprune.report.circuits import Watching

    console = progress_console()
    if isinstance(progress, bool):
        progress = Watching(console, live=progress and console.is_terminal, quiet=not progress)
    with temporary_folder() if folder is None else nullcontext(Path(folder)) as place:
        result = run(place, settings, device, is_new=resume is None, watching=progress)
        if folder is not None:
            write_pictures(result, place)
    return result


@checked()
def diff(a: str | Path, b: str | Path, *, base: str | Path | None = None) -> Difference:
    """What differs between two sparse models of one base, or between the base `a` and the sparse model `b`.

    Args:
        base: the base of both, where their weights cannot be compared without it.

    Raises:
        InputError: a damaged input, or two that were not made from one base.
    """
    from attnprune.sidecar.diff import compare
    from attnprune.sidecar.hub import locate_sparse

    return compare(*(str(locate_sparse(path) or path) for path in (a, b)), base=None if base is None else str(base))


@checked()
def verify(
    path: str | Path,
    *,
    base: str | Path | None = None,
    revision: str | None = None,
    on_level: Callable[[Level], None] = lambda level: None,
) -> list[Level]:
    """Check everything that can be checked of a sidecar or merged folder: schema, hashes, tensors, base, stored probe.

    Args:
        on_level: gets each level as it passes.

    Raises:
        AttnPruneError: the first level that does not pass, by name.
    """
    from attnprune.sidecar.hub import locate
    from attnprune.sidecar.verify import climb

    levels: list[Level] = []
    for level in climb(locate(path, revision), None if base is None else str(base)):
        if level.error is not None:
            level.error.message = f"{level.name}: {level.error.message}"
            raise level.error
        levels.append(level)
        on_level(level)
    return levels


@checked()
def merge(
    path: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    allow_base_mismatch: bool = False,
) -> Sidecar:
    """Write a sidecar, merged into its base, as an ordinary transformers folder.

    Args:
        out: a new folder.
        dtype: "float32", "bfloat16" or "float16". Default: that of the base.

    Returns:
        The merged folder, opened.

    Raises:
        InputError: `path` is merged already or damaged; `out` is not empty or cannot be written.
        VerificationError: the stored probe is not reproduced.
    """
    from attnprune.sidecar import loading
    from attnprune.sidecar.folder import open_artefact
    from attnprune.sidecar.hub import locate
    from attnprune.sidecar.merged import write_merged
    from attnprune.sidecar.precision import DTYPES

    check_new_folder(Path(out))
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
    folder = locate(path, revision)
    sidecar = open_artefact(folder)
    if sidecar.manifest.merged is not None:
        raise InputError(f"{path}: is merged already")
    name = None if base is None else str(base)
    loaded, same = loading.load_for_merge(folder, name, dtype=dtype, allow_base_mismatch=allow_base_mismatch)
    write_merged(*loaded, sidecar, Path(out), same_dtype=same)
    return open_artefact(out)


@checked()
def push(
    folder: str | Path,
    repo: str,
    *,
    merged: bool = False,
    base: str | Path | None = None,
    base_model: str | None = None,
    private: bool = False,
    create_pr: bool = False,
    revision: str = "main",
    replace: bool = False,
    on_plan: Callable[[Plan], bool] = lambda plan: True,
) -> Pushed | None:
    """Push a sidecar or merged folder to a Hub repository: a plan, then the listed files only, then a check.

    Args:
        repo: USER/NAME; created if it is not there.
        merged: merge the sidecar into its base (`base`, where it does not name it) and push that.
        base_model: the base's name on the Hub, where it was a local folder or file.
        revision: branch; created if it is not there.
        replace: the repository may hold another run, whose files are replaced, or another model, whose are deleted.
        on_plan: gets the plan before anything is written; False stops there, and the result is None.

    Raises:
        InputError, AttnPruneError: as `attnprune.publish.push.push`.
    """
    from attnprune.publish import push as pushing

    if base is not None and not merged:
        raise InputError("base: goes with merged", hint="the base's name on the Hub is base_model")
    with temporary_folder() as scratch:
        source = _merged(Path(folder), scratch / "merged", base, base_model, repo) if merged else folder
        return pushing.push(
            source, repo, base_model=base_model, private=private, create_pr=create_pr, branch=revision, replace=replace,
            on_plan=on_plan,
        )  # fmt: skip


def _merged(folder: Path, target: Path, base: str | Path | None, base_model: str | None, repo: str) -> Path:
    """The merged form of a sidecar; a merged folder as it is."""
    from attnprune.publish.plan import base_name
    from attnprune.sidecar import remote
    from attnprune.sidecar.folder import is_merged, open_sidecar

    remote.check_repo_id(repo)  # before the minutes that a merge may take
    if is_merged(folder):
        return folder
    sidecar = open_sidecar(folder)
    if base_model is not None:
        base_name(sidecar, base_model)
    merge(folder, target, base=base)
    return target
