"""Building an index: every open edge of a text, block by block, in pieces that an interruption leaves whole."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnprune.attention.interface import gates_of
from attnprune.circuit.model.adapters import anatomy_of
from attnprune.circuit.search.splits import pattern_visible
from attnprune.data.blocks import Blocks, unknown_notes
from attnprune.data.given import sources_of
from attnprune.errors import InputError, checked
from attnprune.files import check_new_folder, locked
from attnprune.heads import pieces
from attnprune.heads.corpus import Watch, blocks_of, check_sources, delimiters_of
from attnprune.heads.counting import each_block
from attnprune.heads.store import Index, duckdb, open_index
from attnprune.sidecar.identity import config_values, fingerprint_of
from attnprune.sidecar.models import Named, models_of


class _Layer:
    """The open edges of one layer in the latest block."""

    def __init__(self, layer: int):
        self._layer = layer
        self.edges: pieces.Columns = {}

    def add(self, is_open: Tensor, pattern: Tensor, value: Tensor, visible: Tensor, kinds: Tensor, block: int) -> None:
        """Take in a block, see `attnprune.heads.counting.Layer`."""
        head, query, key = is_open.nonzero(as_tuple=True)
        bits = (kinds * 2 ** torch.arange(len(kinds), device=kinds.device)[:, None, None]).sum(0)
        found = {"head": head, "query": query, "key": key, "kinds": bits[query, key],
                 "weight": pattern[head, query, key].float()}  # fmt: skip
        self.edges = {name: column.cpu().numpy().astype(pieces.COLUMNS[name]) for name, column in found.items()}
        for name, number in (("layer", self._layer), ("block", block)):
            self.edges[name] = np.full(len(head), number, pieces.COLUMNS[name])


@checked(tokens=1, seq_len=0)
def index(
    model: Any,
    data: Any,
    *,
    out: str | Path,
    tokenizer: Any = None,
    base: str | Path | None = None,
    tokens: int = 16_384,
    seq_len: int = 0,
    text_field: str = "text",
    device: str = "auto",
    watch: Watch = lambda stage, done, of: None,
    on_note: Callable[[str], object] = warnings.warn,
    command: str = "",
) -> Index:
    """Store every open edge of a text in a folder that can be asked; the same call goes on where one was interrupted.

        index = attnprune.index("SIDECAR", "text.txt", out="INDEX")
        index.heads(key=" Mary", query=" gave")      # which heads link the two
        index.keys(head=(3, 1))                      # where head 3.1 reads
        index.contexts(kind="induction")             # the strongest edges of a kind, with text around

    Args:
        model: sidecar or merged folder, Hub name; or a sparse model in memory, with its `tokenizer` or as the pair that
            `attnprune.load` gives. In a dense model (base model, .gguf file or "demo") every visible pair is an open
            edge.
        data: text files, folders, patterns or Hub data sets by name, a tuple of several, which are read in equal
            parts, or "task" (the bundled model's own); or the text itself: a list of strings or a `datasets.Dataset`.
        out: the folder of the index: a new one, or one of the same model, text and block length.
        base: base of a sidecar or merged folder, where it has to be named.
        tokens: at most this many, in whole blocks.
        seq_len: tokens of a block, at most 1,024; 0: as the sparse model was measured, else 512 or the context.
        text_field: column of the text.
        device: auto, cpu or cuda, for models given by name.
        watch: told the stage and how far it is.
        on_note: told of a text with characters that the tokenizer does not know, which `notes` of the index says too.
            Default: a Python warning.

    Returns:
        The index, opened.

    Raises:
        InputError: `out` holds something else, or an index of another model or text; DuckDB is not installed; no such
            model or text, and what else `attnprune.atlas` refuses.
        UnsupportedModelError: no adapter for the family.
    """
    folder = Path(out)
    duckdb()
    is_new, was_there = not (folder / pieces.RECORD).exists(), folder.exists()
    if is_new:
        check_new_folder(folder)
    with sources_of(data, text_field) as sources:
        check_sources(sources)
        named = next(models_of(model, tokenizer, base, device, dense=False, notes=[]))
        blocks = blocks_of(named, sources, tokens, seq_len, text_field)
    record = _record(named, blocks, command)
    for note in record.notes:
        on_note(note)
    if is_new:
        ids = blocks.input_ids.unique().tolist()
        texts = {token: named.tokenizer.decode([token]) for token in ids}
        pieces.begin(folder, record, blocks.input_ids.numpy(), texts)
    with locked(folder):
        _check_same(folder, record)
        try:
            _go_on(folder, named, blocks, watch)
        except Exception:  # not of an interruption, after which the same call goes on
            if is_new and not pieces.pieces_of(folder):
                pieces.discard(folder, keep_folder=was_there)
            raise
    return open_index(folder)


def _record(named: Named, blocks: Blocks, command: str) -> pieces.Record:
    config = named.model.config
    return pieces.Record(
        command=command, model=named.name, model_sha256=_identity(named.model), data=blocks.name,
        data_sha256=blocks.fingerprint, blocks=len(blocks), seq_len=blocks.seq_len, layers=config.num_hidden_layers,
        heads=config.num_attention_heads, notes=unknown_notes(blocks.sources),
    )  # fmt: skip


def _identity(model: Any) -> str:
    """sha256 of what the model computes with: its tensors, gates among them, by samples, and its configuration; also
    of gates that are forced open and heads that are closed while it is indexed."""
    parts = [*fingerprint_of(dict(model.named_parameters())), config_values(model.config)]
    moved = [[gate.layer, gate.forced_open, sorted(gate.closed)] for gate in gates_of(model)]
    parts += [state for state in moved if any(state[1:])]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _check_same(folder: Path, record: pieces.Record) -> None:
    """Refuse to go on with another model, text, length of it or block length.

    Raises:
        InputError: naming it.
    """
    begun = pieces.read_record(folder)
    tokens = ("number of tokens", f"{begun.blocks * begun.seq_len:,}", "blocks")
    for what, was, field in (
        ("model", begun.model, "model_sha256"), ("block length", begun.seq_len, "seq_len"),
        *([tokens] if begun.data == record.data else []), ("text", begun.data, "data_sha256"),
    ):  # fmt: skip
        if getattr(begun, field) != getattr(record, field):
            raise InputError(f"{folder}: was made with another {what} ({was})", hint="give another folder")


def _go_on(folder: Path, named: Named, blocks: Blocks, watch: Watch) -> None:
    """Add the pieces that are missing."""
    written = pieces.pieces_of(folder)
    first = pieces.end_of(written[-1]) if written else 0
    if first == len(blocks):
        return
    anatomy = anatomy_of(named.model)
    layers = [_Layer(number) for number in range(anatomy.graph.layers)]
    delimiters = delimiters_of(blocks.input_ids, named.tokenizer)
    waiting: list[pieces.Columns] = []
    watch("blocks", first, len(blocks))
    with pattern_visible(anatomy):
        for number in each_block(anatomy, blocks.input_ids, delimiters, layers, first):
            ids = blocks.input_ids[number].numpy()
            for layer in layers:
                edges = layer.edges
                tokens = {"query_token": ids[edges["query"]], "key_token": ids[edges["key"]]}
                waiting.append(edges | {name: column.astype(np.int32) for name, column in tokens.items()})
            if sum(len(edges["block"]) for edges in waiting) >= pieces.PIECE or number + 1 == len(blocks):
                pieces.write_piece(folder, first, number + 1, waiting)
                first, waiting = number + 1, []
            watch("blocks", number + 1, len(blocks))
