"""A model, a tokenizer and texts in memory go to the disk, where a run and whoever loads its result find them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attnprune.data.given import named, save_texts
from attnprune.errors import InputError, unpacked
from attnprune.files import check_new_folder
from attnprune.runs.config import build_config, override
from attnprune.runs.folder import CHECKPOINTS, MANIFEST_FILE, check_output, output_folder

INPUTS = "inputs"  # OUT-inputs holds what a run was given in memory
TEXTS_FILE = "texts.jsonl"


@contextmanager
def on_disk(model: Any, tokenizer: Any, data: Any, given: dict[str, Any], *, is_new: bool) -> Iterator[dict[str, Any]]:
    """`given` with the names of model and data; those in memory are written to OUT-inputs, which stays if a run began.

    Raises:
        InputError: no model, tokenizer or text that could be written, or a folder that cannot be.
    """
    model, tokenizer = unpacked(model, tokenizer)
    sources = None if data is None else named(data)
    is_named = model is None or isinstance(model, (str, Path))
    if is_named and tokenizer is not None:
        raise InputError("tokenizer: goes with a model in memory; that of a model by name is its own")
    name = None if model is None else str(model) if is_named else name_of(model)
    given = override(given, {"model": {"name": name}} if name else {})
    if is_named and (data is None or sources is not None):
        yield override(given, {"data": {"source": sources}} if sources else {})
        return
    if not is_new:
        raise InputError("resume: a run goes on with what it was given; leave out model and data")
    target = output_folder(build_config(override(given, {"data": {"source": sources}} if sources else {})))
    folder = target.with_name(f"{target.name}-{INPUTS}")
    check_output(target)
    check_new_folder(folder)
    given = override(given, {"output": {"folder": str(target)}})
    try:
        folder.mkdir(exist_ok=True)
        if not is_named:
            given = override(given, {"model": {"name": str(_save_model(model, tokenizer, folder / "model"))}})
        if data is not None:
            field = given.get("data", {}).get("text_field")
            written = sources or [str(save_texts(data, folder / TEXTS_FILE, field))]
            given = override(given, {"data": {"source": written}})
        yield given
    finally:
        if not (target / CHECKPOINTS).is_dir() and not (target / MANIFEST_FILE).exists():
            shutil.rmtree(folder, ignore_errors=True)


def name_of(model: Any) -> str:
    """What the default output folder of a model in memory is called after."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "save_pretrained"):
        kind = type(model).__name__
        raise InputError(f"model: not a name, a transformers model or a RunConfig (got {kind})")
    return Path(getattr(config, "_name_or_path", "") or config.model_type).name


def _save_model(model: Any, tokenizer: Any, folder: Path) -> Path:
    from transformers import PreTrainedModel

    from attnprune.attention.interface import check_family, gates_of
    from attnprune.sidecar.quiet import quiet
    from attnprune.sidecar.tokenizer import save_tokenizer

    if not isinstance(model, PreTrainedModel):
        raise InputError(f"model: {type(model).__name__} is not a transformers model", hint="unwrap or merge it first")
    if tokenizer is None:
        raise InputError("tokenizer: a model in memory needs its tokenizer", hint="sparsify(model, tokenizer, ...)")
    if gates_of(model):
        hint = "init=SIDECAR starts from a sparse model, attnprune.detach(model) makes it dense"
        raise InputError("model: has gates already: a run starts from a dense model", hint=hint)
    check_family(model.config)
    with quiet():
        model.save_pretrained(folder)  # refuses a model with gates
    save_tokenizer(tokenizer, folder)
    return folder
