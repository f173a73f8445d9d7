"""Measuring a sidecar (or a base model) on texts the user names, or on the run's own held-out split."""

from __future__ import annotations

import copy

from attnprune import data, runtime
from attnprune.data import Blocks
from attnprune.errors import InputError
from attnprune.measure import Report, measure
from attnprune.runs import RUN_FILE, load_run_file
from attnprune.sidecar import Sidecar

# Of 32 bits, since a CPU's generator keeps no more (2**32 is its seed 0), and one that no run is given by chance: text
# that the base writes here was not trained on.
SELF_SEED = 0xA77E5EED


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
) -> list[Report]:
    """One Report per text. A sidecar is measured against its base, with the open-gate control.

    Raises:
        InputError: unknown text, or no `sources` and a held-out split that cannot be rebuilt.
    """
    device = runtime.pick_device(device)
    if sidecar is None:
        model = runtime.load_base(name, revision=revision, device=device)
        length = seq_len or min(512, runtime.context_length(model.model) or 512)
        return [
            measure(model.model, _blocks(s, text_field, model, length, tokens), batch_size=batch_size) for s in sources
        ]
    base_name, base_revision = (base, None) if base is not None else runtime.default_base(sidecar)
    dtype = runtime.torch_dtype(sidecar.manifest.base.dtype)
    dense = runtime.load_base(base_name, revision=base_revision, device=device, dtype=dtype)
    length = seq_len or sidecar.manifest.result.seq_len
    texts = [_blocks(s, text_field, dense, length, tokens) for s in sources] or [held_out_split(sidecar, dense)]
    sparse = copy.deepcopy(dense.model)
    runtime.apply_sidecar(sparse, sidecar, allow_base_mismatch=allow_base_mismatch)
    reference = runtime.dense(dense.model)
    return [measure(sparse, blocks, reference=reference, control=True, batch_size=batch_size) for blocks in texts]


def _blocks(source: str, text_field: str, base: runtime.BaseModel, seq_len: int, tokens: int) -> Blocks:
    context = runtime.context_length(base.model)
    if context is not None and seq_len > context:
        raise InputError(f"--seq-len: {seq_len} is more than the model's context of {context}")
    if source == "task":
        return data.addition_task(base.tokenizer)[1]
    if source == "self":
        key = runtime.identity(base)["content"]
        return data.self_written(base.model, base.tokenizer, seq_len, tokens, SELF_SEED, data.cache_folder(), key)
    return data.pack(data.documents(source, text_field), base.tokenizer, seq_len, tokens, data.source_name(source))


def held_out_split(sidecar: Sidecar, base: runtime.BaseModel) -> Blocks:
    """The evaluation split that the sidecar's result was measured on, rebuilt from run.toml.

    Raises:
        InputError: no run.toml, or the text is not what it was.
    """
    config = load_run_file(sidecar.path / RUN_FILE)
    _, held_out = data.load(config, base.model, base.tokenizer, sidecar.manifest.base.content)
    if held_out.fingerprint != sidecar.manifest.result.data_sha256:
        raise InputError(f"{config.data.source}: not the text this sidecar was measured on", hint="give --data FILE")
    return held_out
