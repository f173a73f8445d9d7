"""Measuring a sidecar (or a base model) on texts the user names, or on the run's own held-out split."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

from attnprune.attention.interface import gates_of
from attnprune.data.blocks import Blocks, unknown_notes
from attnprune.data.sampling import cache_folder, self_written
from attnprune.data.texts import addition_task, load_blocks, read_blocks
from attnprune.data.vocabulary import check_tokens
from attnprune.errors import InputError
from attnprune.measure import Report, measure
from attnprune.runs.folder import RUN_FILE, load_run_file
from attnprune.sidecar import bases, loading
from attnprune.sidecar.folder import Sidecar
from attnprune.sidecar.identity import model_key
from attnprune.sidecar.spreading import DeviceMap

# Of 32 bits, since a CPU's generator keeps no more (2**32 is its seed 0), and one that no run is given by chance: text
# that the base writes here was not trained on.
SELF_SEED = 0xA77E5EED

OnNote = Callable[[str], object]
"""Told a line about what was read."""


def evaluate_model(
    name: str,
    sidecar: Sidecar | None,
    sources: list[str],
    *,
    base: str | None = None,
    revision: str | None = None,
    device: str = "cpu",
    seq_len: int = 0,
    tokens: int = 16_384,
    batch_size: int = 0,
    text_field: str = "text",
    allow_base_mismatch: bool = False,
    device_map: DeviceMap | None = None,
    on_note: OnNote = warnings.warn,
) -> list[Report]:
    """One Report per text. A sidecar is measured against its base, with the open-gate control.

    `device_map` spreads the models over devices, as `attnprune.load` does; instead of `device`. `on_note` is told of
    texts with characters that the tokenizer does not know.

    Raises:
        InputError: unknown text, or no `sources` and a held-out split that cannot be rebuilt.
    """
    if sidecar is None:
        if base is not None:
            raise InputError(f"--base: {name} is a dense model itself")
        loaded = bases.load_base(name, revision=revision, device=bases.pick_device(device), device_map=device_map)
        return _measured(loaded, sources, seq_len, tokens, batch_size, text_field, on_note)
    dense, sparse = load_pair(sidecar, base, device, allow_base_mismatch=allow_base_mismatch, device_map=device_map)
    length = seq_len or sidecar.manifest.result.seq_len
    texts = [text_blocks(s, text_field, dense, length, tokens) for s in sources] or [held_out_split(sidecar, dense)]
    tell_unknown(texts, on_note)
    reference = bases.dense(dense.model)
    return [measure(sparse, blocks, reference=reference, control=True, batch_size=batch_size) for blocks in texts]


def evaluate_loaded(
    model: Any,
    tokenizer: Any,
    sources: list[str],
    *,
    seq_len: int = 0,
    tokens: int = 16_384,
    batch_size: int = 0,
    text_field: str = "text",
    on_note: OnNote = warnings.warn,
) -> list[Report]:
    """One Report per text of a model in memory; one with gates is also measured with all of them open.

    Raises:
        InputError: unknown text, or text that only a model by name writes.
    """
    if "self" in sources:
        raise InputError("self: is text that a base model by name writes")
    was_training = model.training
    model.eval()
    try:
        loaded = bases.BaseModel(model, tokenizer, "local")
        return _measured(loaded, sources, seq_len, tokens, batch_size, text_field, on_note)
    finally:
        model.train(was_training)


def _measured(
    loaded: bases.BaseModel, sources: list[str], seq_len: int, tokens: int, batch_size: int, text_field: str,
    on_note: OnNote,
) -> list[Report]:  # fmt: skip
    """Reports of a model that has no base to be compared with."""
    model, length = loaded.model, seq_len or min(512, bases.context_length(loaded.model) or 512)
    has_gates = bool(gates_of(model))
    texts = [text_blocks(source, text_field, loaded, length, tokens) for source in sources]
    tell_unknown(texts, on_note)
    return [measure(model, blocks, control=has_gates, batch_size=batch_size) for blocks in texts]


def tell_unknown(texts: list[Blocks], on_note: OnNote) -> None:
    """A note for each text that has characters that the tokenizer does not know."""
    for note in unknown_notes(source for blocks in texts for source in blocks.sources):
        on_note(note)


def load_pair(
    sidecar: Sidecar,
    base: str | None,
    device: str,
    *,
    allow_base_mismatch: bool = False,
    device_map: DeviceMap | None = None,
) -> tuple[bases.BaseModel, Any]:
    """(the base, the sparse model) of a sidecar; `base` None is the one that it names.

    Raises:
        InputError: no base that can be found, or another one than the sidecar was made from.
    """
    if device_map is not None:  # a spread model cannot be copied; the second takes the room that the first leaves
        dense = loading.load_dense(sidecar, base, device_map=device_map)
        options = {"allow_base_mismatch": allow_base_mismatch, "verify": False, "device_map": device_map}
        return dense, loading.load(sidecar.path, base, **options).model
    dense = loading.load_dense(sidecar, base, bases.pick_device(device))
    sparse = copy.deepcopy(dense.model)
    loading.apply_sidecar(sparse, sidecar, allow_base_mismatch=allow_base_mismatch)
    return dense, sparse


def text_blocks(source: str, text_field: str, base: bases.BaseModel, seq_len: int, tokens: int) -> Blocks:
    """Blocks of a text that the user names.

    Raises:
        InputError: unknown or unreadable text, or blocks longer than the context.
    """
    context = bases.context_length(base.model)
    if context is not None and seq_len > context:
        raise InputError(f"--seq-len: {seq_len} is more than the model's context of {context}")
    if source == "self":
        key = model_key(bases.identity(base))
        return self_written(base.model, base.tokenizer, seq_len, tokens, SELF_SEED, cache_folder(), key)
    if source == "task":
        blocks = addition_task(base.tokenizer)[1]
    else:
        blocks = read_blocks(source, text_field, base.tokenizer, seq_len, tokens)
    check_tokens(blocks.input_ids, base.tokenizer, base.model.config.vocab_size, blocks.name)
    return blocks


def held_out_split(sidecar: Sidecar, base: bases.BaseModel) -> Blocks:
    """The evaluation split that the sidecar's result was measured on, rebuilt from run.toml.

    Raises:
        InputError: no run.toml, or the text is not what it was.
    """
    config = load_run_file(sidecar.path / RUN_FILE)
    _, held_out = load_blocks(config, base.model, base.tokenizer, model_key(sidecar.manifest.base.model_dump()))
    if held_out.fingerprint != sidecar.manifest.result.data_sha256:
        raise InputError(f"{config.data.described}: not the text this sidecar was measured on", hint="give --data FILE")
    return held_out
