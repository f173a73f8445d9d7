"""A whole atlas: model and text by name, the counts of every head, the dense base beside a sparse model."""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path
from typing import Any

import torch

from attnprune.circuit.model.adapters import Anatomy, anatomy_of
from attnprune.circuit.search.splits import pattern_visible
from attnprune.data.blocks import Blocks, unknown_notes
from attnprune.data.given import sources_of
from attnprune.errors import checked
from attnprune.heads.corpus import Watch, blocks_of, check_sources, delimiters_of
from attnprune.heads.counting import COUNTED, LayerCounts, Strongest, Tally, count
from attnprune.heads.directions import written
from attnprune.heads.result import Atlas, Direction, Example, Head, ModelAtlas, Reading, Share, Text, labels, windows
from attnprune.measure import offset_edges
from attnprune.sidecar.models import Named, models_of

DIRECTIONS, PROMOTED = 3, 6  # of a head; tokens of a direction, on either side


@checked(tokens=1, seq_len=0)
def atlas(
    model: Any,
    data: Any,
    *,
    tokenizer: Any = None,
    base: str | Path | None = None,
    dense: bool = True,
    tokens: int = 16_384,
    seq_len: int = 0,
    text_field: str = "text",
    device: str = "auto",
    watch: Watch = lambda stage, done, of: None,
    command: str = "",
) -> Atlas:
    """Describe every head of a model over a text: how often it opens, how far it reads, what kind of edges it has.

    Args:
        model: sidecar or merged folder, base model, Hub name, .gguf file or "demo"; or a model in memory, sparse or
            dense, with its `tokenizer` or as the pair that `attnprune.load` gives.
        data: text files, folders, patterns or Hub data sets by name, a tuple of several, which are read in equal
            parts, or "task" (the bundled model's own); or the text itself: a list of strings or a `datasets.Dataset`.
        base: base of a sidecar or merged folder, where it has to be named.
        dense: describe the dense base beside a sparse model that is given by name.
        tokens: at most this many, in whole blocks.
        seq_len: tokens of a block, at most 1,024; 0: as the sparse model was measured, else 512 or the context.
        text_field: column of the text.
        device: auto, cpu or cuda, for models given by name.
        watch: told the stage and how far it is.

    Raises:
        InputError: no such model or text, text without content or shorter than a block, a block longer than the
            context, tokens that the model does not have, a base that is not the one.
        UnsupportedModelError: no adapter for the family.
    """
    started = time.monotonic()
    notes: list[str] = []
    blocks, found = None, []
    with sources_of(data, text_field) as sources:
        check_sources(sources)
        for named in models_of(model, tokenizer, base, device, dense, notes):
            if blocks is None:
                blocks = blocks_of(named, sources, tokens, seq_len, text_field)
                notes += unknown_notes(blocks.sources)
            found.append(_model_atlas(named, blocks, watch))
    assert blocks is not None
    return Atlas(
        command=command, data=blocks.name, tokens=blocks.input_ids.numel(), blocks=len(blocks), seq_len=blocks.seq_len,
        offset_edges=offset_edges(blocks.seq_len).tolist(), models=found, notes=notes,
        seconds=time.monotonic() - started,
    )  # fmt: skip


def _model_atlas(named: Named, blocks: Blocks, watch: Watch) -> ModelAtlas:
    started = time.monotonic()
    anatomy = anatomy_of(named.model)
    kind = "sparse" if anatomy.gated else "dense"
    delimiters = delimiters_of(blocks.input_ids, named.tokenizer)
    with pattern_visible(anatomy):
        counts = count(anatomy, blocks.input_ids, delimiters, lambda done, of: watch(f"{kind}: blocks", done, of))
    heads, text = [], cache(lambda token: named.tokenizer.decode([token]))
    for layer, counted in enumerate(counts):
        watch(f"{kind}: values", layer, len(counts))
        heads += _heads(anatomy, layer, counted, blocks, text)
    return ModelAtlas(
        name=named.name, kind=kind, layers=anatomy.graph.layers, heads_per_layer=anatomy.graph.heads, heads=heads,
        closed=[(head.layer, head.head) for head in heads if head.closed], seconds=time.monotonic() - started,
    )  # fmt: skip


def _heads(anatomy: Anatomy, layer: int, counted: LayerCounts, blocks: Blocks, text: Text) -> list[Head]:
    """The dossiers of a layer."""
    visible = int(counted.visible.sum()) * len(blocks)
    queries = blocks.input_ids.numel()
    by_mass = _readings(counted.mass, counted)
    by_edges = _readings(counted.edges, counted) if anatomy.gated else [None] * len(by_mass)
    promoted = written(anatomy, layer, DIRECTIONS, min(PROMOTED, anatomy.model.config.vocab_size))
    return [
        Head(
            layer=layer, head=head, open=count, visible=visible, queries=int(counted.queries[head]) / queries,
            edges_per_query=count / queries, edges=by_edges[head], mass=by_mass[head],
            examples=_examples(counted.strongest, head, blocks, text),
            directions=[
                Direction(
                    share=float(share), raises=list(map(text, up.tolist())), lowers=list(map(text, down.tolist()))
                )
                for share, up, down in zip(*(part[head] for part in promoted), strict=True)
            ],
        )
        for head, count in enumerate(counted.open.tolist())
    ]  # fmt: skip


def _readings(tally: Tally, counted: LayerCounts) -> list[Reading]:
    """Where the edges or the mass of each head of a layer go."""
    length = len(counted.visible)
    edges = offset_edges(length).to(tally.distances.device)
    bucket = torch.bucketize(torch.arange(length, device=edges.device), edges[1:], right=True)
    by_bucket = tally.distances.new_zeros(len(tally.distances), len(edges) - 1).index_add_(1, bucket, tally.distances)
    totals = tally.rows.sum(1)
    readings = []
    for head, total in enumerate(totals.tolist()):
        scale = 1 / total if total else 0.0
        pairs = zip(COUNTED, tally.found[head].tolist(), tally.expected[head].tolist(), strict=True)
        kinds = {name: Share(share=found * scale, control=chance * scale) for name, found, chance in pairs}
        far = tally.distances[head, 2:]
        offset = 2 + int(far.argmax()) if len(far) and float(far.max()) > 0 else 0
        at, chance = (x[head].item() * scale for x in tally.at_distance(offset, counted.visible)) if offset else (0, 0)
        kinds["offset"] = Share(share=at, control=chance)
        readings.append(
            Reading(
                total=total, kinds=kinds, offset=offset, distances=(by_bucket[head] * scale).tolist(),
                labels=labels(kinds, int(counted.open[head])),
            )
        )  # fmt: skip
    return readings


def _examples(strongest: Strongest, head: int, blocks: Blocks, text: Text) -> list[Example]:
    columns = (strongest.strength, strongest.weight, strongest.block, strongest.query, strongest.key)
    return [
        Example(
            block=block, query=query, key=key, weight=weight, strength=strength,
            text=windows(blocks.input_ids[block].tolist(), query, key, text),
        )
        for strength, weight, block, query, key in zip(*(x[head].tolist() for x in columns), strict=True)
        if strength > 0
    ]  # fmt: skip
