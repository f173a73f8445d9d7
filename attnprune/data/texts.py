"""The text of a run, whatever its source, as training and held-out blocks; and the bundled addition task."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from attnprune.data.blocks import IGNORED_LABEL, AnyBlocks, Blocks, Source, StoredBlocks, mix, pack, split
from attnprune.data.sampling import cache_folder, self_written
from attnprune.data.sources import check_distinct, documents, is_local, local_files, source_name
from attnprune.data.store import is_large, stored_blocks
from attnprune.data.vocabulary import check_tokens, count_unknown
from attnprune.errors import InputError
from attnprune.runs.config import RunConfig
from attnprune.runs.folder import DEMO

DEFAULT_HUB_DATASET = "HuggingFaceFW/fineweb-edu:sample-10BT:train"


def load_blocks(config: RunConfig, model: Any, tokenizer: Any, model_key: str) -> tuple[AnyBlocks, Blocks]:
    """(train, held-out) blocks of a resolved run; those of several sources are mixed in proportion to their sizes, or
    by the run's weights.

    `model` is the base, dense; `model_key`, its content fingerprint, matters only for the source 'self'.

    Raises:
        InputError: no such text, too little of it, or a token that the model does not have.
    """
    text, train = config.data, config.train
    if ("task" in text.sources) != (config.model.name == DEMO) or ("task" in text.sources and len(text.sources) > 1):
        raise InputError(
            f"{text.described}: the bundled model reads its own task and nothing else", hint="leave out --data"
        )
    if text.sources == ["task"]:
        return addition_task(tokenizer)
    check_distinct(text.sources)
    # Local files are read whole, so that blocks come from all of them; what has no end only as far as the run needs.
    limit = text.train_tokens + text.eval_tokens
    needed = min(text.train_tokens, train.steps * train.batch_size * text.seq_len) + text.eval_tokens
    share = -(-needed // len(text.sources))
    parts: dict[str, AnyBlocks] = {}
    for source in text.sources:
        if source == "self":
            blocks = self_written(model, tokenizer, text.seq_len, share, train.seed, cache_folder(), model_key)
            parts[source] = replace(blocks, sources=(Source("self", blocks.tokens),))
        else:
            tokens = limit if is_local(source) else share
            reading: Any = read_blocks
            if is_large(source, tokenizer, tokens):
                reading = partial(stored_blocks, cache=cache_folder())
            parts[source] = reading(source, text.text_field, tokenizer, text.seq_len, tokens)
    parts = _weighted(parts, text.weights) if text.weights else _cut(parts, limit)
    blocks = mix(list(parts.values()))
    first = 0
    for ids in blocks.chunks() if isinstance(blocks, StoredBlocks) else [blocks.input_ids]:
        check_tokens(ids, tokenizer, model.config.vocab_size, blocks.name, first, len(blocks))
        first += len(ids)
    return split(blocks, text.eval_tokens, train.seed)


def _cut(parts: dict[str, AnyBlocks], limit: int) -> dict[str, AnyBlocks]:
    """The parts, those of local files cut in proportion to their bytes where together they are beyond the limit."""
    sizes = {source: sum(file.stat().st_size for file in local_files(source)) for source in parts if is_local(source)}
    tokens = {source: blocks.tokens for source, blocks in parts.items()}
    room = limit - sum(count for source, count in tokens.items() if source not in sizes)
    if len(parts) == 1 or sum(tokens[source] for source in sizes) <= room:
        return parts
    cut = dict(parts)
    for source, size in sizes.items():
        cut[source] = _first(parts[source], max(1, room * size // sum(sizes.values()) // parts[source].seq_len))
    return cut


def _weighted(parts: dict[str, AnyBlocks], weights: list[float]) -> dict[str, AnyBlocks]:
    """The parts cut so that their sizes are in the proportion of the weights; no text is repeated."""
    share = min(len(blocks) / weight for blocks, weight in zip(parts.values(), weights, strict=True))
    return {
        source: _first(blocks, max(1, int(share * weight)))
        for (source, blocks), weight in zip(parts.items(), weights, strict=True)
    }


def _first(blocks: AnyBlocks, rows: int) -> AnyBlocks:
    """The first rows of one source, and what it says of them."""
    kept = blocks.select(torch.arange(min(rows, len(blocks))))
    [counted] = kept.sources
    return replace(kept, sources=(replace(counted, tokens=kept.tokens),))


def read_blocks(source: str, text_field: str, tokenizer: Any, seq_len: int, max_tokens: int) -> Blocks:
    """Blocks of the text that one source holds, at most `max_tokens`.

    Raises:
        InputError: no such text, none in it, or blocks of less than two tokens.
    """
    if seq_len < 2:
        raise InputError(f"a block of {seq_len}: needs two tokens, one to read and one that reads it")
    texts = documents(source, text_field, tokenizer)
    blocks = pack(texts, tokenizer, seq_len, max_tokens, source_name(source))
    unknown = count_unknown(blocks.input_ids, tokenizer)
    return replace(blocks, sources=(Source(blocks.name, blocks.tokens, texts.empty, texts.conversations, unknown),))


def addition_task(tokenizer: Any) -> tuple[Blocks, Blocks]:
    """The bundled task: all sums `#ab+cd=efg`, 4,096 of the 10,000 held out for evaluation (a fixed choice).

    Only the three answer digits count: their labels are kept, all others are -100. T = 10.
    """
    rows = [f"#{a:02d}+{b:02d}={a + b:03d}" for a in range(100) for b in range(100)]
    ids = torch.tensor(tokenizer(rows, add_special_tokens=False)["input_ids"])
    labels = ids.clone()
    labels[:, :-3] = IGNORED_LABEL
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(20251205))
    everything = Blocks(ids, labels, "two-digit addition")
    return everything.take(order[4096:]), everything.take(order[:4096])
