"""The text of a run, whatever its source, as training and held-out blocks; and the bundled addition task."""

from __future__ import annotations

from typing import Any

import torch

from attnprune.data.blocks import IGNORED_LABEL, Blocks, pack, split
from attnprune.data.sampling import cache_folder, self_written
from attnprune.data.sources import documents, source_name
from attnprune.data.vocabulary import check_tokens
from attnprune.errors import InputError
from attnprune.runs.config import RunConfig
from attnprune.runs.folder import DEMO

DEFAULT_HUB_DATASET = "HuggingFaceFW/fineweb-edu:sample-10BT:train"


def load_blocks(config: RunConfig, model: Any, tokenizer: Any, model_key: str) -> tuple[Blocks, Blocks]:
    """(train, held-out) blocks of a resolved run.

    `model` is the base, dense; `model_key`, its content fingerprint, matters only for the source 'self'.

    Raises:
        InputError: no such text, too little of it, or a token that the model does not have.
    """
    text, train = config.data, config.train
    if (text.source == "task") != (config.model.name == DEMO):
        raise InputError(
            f"{text.source}: the bundled model reads its own task and nothing else", hint="leave out --data"
        )
    if text.source == "task":
        return addition_task(tokenizer)
    if text.source == "self":
        wanted = min(text.train_tokens, train.steps * train.batch_size * text.seq_len) + text.eval_tokens
        blocks = self_written(model, tokenizer, text.seq_len, wanted, train.seed, cache_folder(), model_key)
    else:
        # A local file is read whole, so that blocks come from all of it; a stream only as far as the run needs.
        streamed = source_name(text.source) == text.source
        wanted = train.steps * train.batch_size * text.seq_len if streamed else text.train_tokens
        limit = min(text.train_tokens, wanted) + text.eval_tokens
        texts = documents(text.source, text.text_field)
        blocks = pack(texts, tokenizer, text.seq_len, limit, source_name(text.source))
    check_tokens(blocks.input_ids, tokenizer, model.config.vocab_size, blocks.name)
    return split(blocks, text.eval_tokens, train.seed)


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
