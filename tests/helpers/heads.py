"""Models whose heads do one known thing each: previous token, same token, induction and the other kinds of an atlas.

Tokens and positions are one-hot directions. A head's query and key read them so that a pair of its kind has the score
SCORE and every other pair 0. The previous-token head of the first layer writes what it reads into its own directions,
where the keys of the induction head find the token before theirs. A constant makes the norms almost linear.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from attnprune.attention.interface import attach
from attnprune.circuit.model.adapters import anatomy_of, weight_of

WORDS = ("ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen", ".", ",")
DELIMITERS = (8, 9)
LENGTH, HEADS, NOISE, SIZE, SCORE, OFFSET = 32, 6, 24, 1000.0, 12.0, 4
FIRST = ("previous", "same", "first", "self", "noise", "closed")
SECOND = ("induction", "delimiter", "offset", "previous", "noise", "same")


@dataclass(frozen=True)
class PlantedHeads:
    """`labels`: the kind of each (layer, head); `closed`: those without an open edge, if there are gates."""

    model: Any
    tokenizer: Any
    labels: dict[tuple[int, int], str]
    closed: set[tuple[int, int]]


def plant_heads(*, gated: bool, seed: int = 0) -> PlantedHeads:
    """Two layers of six heads in a random order; "noise" has random scores (with gates: half of them open)."""
    generator = torch.Generator().manual_seed(seed)
    words = len(WORDS)
    wide = HEADS * (words + LENGTH)
    orders = [[kinds[i] for i in torch.randperm(HEADS, generator=generator).tolist()] for kinds in (FIRST, SECOND)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = GPT2LMHeadModel(GPT2Config(
            vocab_size=words, n_embd=wide, n_head=HEADS, n_layer=2, n_positions=LENGTH, n_inner=wide, attn_pdrop=0.0,
            tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
        )).eval()  # fmt: skip
    basis = torch.randn(wide, wide - 1, generator=generator)
    basis = torch.linalg.qr(torch.cat([torch.ones(wide, 1), basis], 1)).Q[:, 1:]
    constant, names, places, before, noise = basis.split([1, words, LENGTH, words, wide - 2 - 2 * words - LENGTH], 1)
    noise, gain = noise[:, :NOISE], SIZE / wide**0.5
    anatomy = anatomy_of(model)
    with torch.no_grad():
        tokens = names.t() + torch.randn(words, NOISE, generator=generator) @ noise.t()
        model.get_input_embeddings().weight.copy_(tokens + SIZE * constant.t())
        model.transformer.wpe.weight.copy_(places.t())
        for block, kinds in zip(anatomy.blocks, orders, strict=True):
            for head, kind in enumerate(kinds):
                query, key, value = (block.projections[name].weight[head] for name in ("q", "k", "v"))
                reads, sees = _reads(kind, names, places, before, noise, generator)
                query.zero_()[:, : reads.shape[1]] = gain * SCORE * (words + LENGTH) ** 0.5 * reads
                key.zero_()[:, : sees.shape[1]] = gain * sees
                value.zero_()[:, :words] = gain * names
                written = before if kind == "previous" else noise[:, :words]
                block.output_weight(HEADS)[head].zero_()[:words] = written.t()
            weight_of(block.mlp.c_proj).zero_()
    where = {(layer, head): kind for layer, kinds in enumerate(orders) for head, kind in enumerate(kinds)}
    if gated:
        bias = {"noise": 0.0, "closed": -100.0}
        attach(model, torch.tensor([[bias.get(kind, -SCORE / 2) for kind in kinds] for kinds in orders]))
    known = {place: kind for place, kind in where.items() if kind not in ("noise", "closed")}
    return PlantedHeads(model, animal_tokenizer(), known, {p for p, kind in where.items() if kind == "closed"})


def _reads(kind: str, names: Any, places: Any, before: Any, noise: Any, generator: Any) -> tuple[Any, Any]:
    """What a head's query and key read of the stream, [D, n] each: their products are 1 for pairs of its kind."""
    nowhere = torch.cat([-places, places], 1).chunk(2, 1)  # a key is not its query
    every = places.sum(1, keepdim=True)
    match kind:
        case "self":
            return places, places
        case "first":
            return every - places[:, :1], places[:, :1]
        case "previous":
            return places[:, 1:], places[:, :-1]
        case "offset":
            return places[:, OFFSET:], places[:, :-OFFSET]
        case "same":
            return torch.cat([names, nowhere[0]], 1), torch.cat([names, nowhere[1]], 1)
        case "induction":
            return torch.cat([names, nowhere[0]], 1), torch.cat([before, nowhere[1]], 1)
        case "delimiter":
            marks = names[:, list(DELIMITERS)].sum(1, keepdim=True)
            return torch.cat([every, nowhere[0]], 1), torch.cat([marks, nowhere[1]], 1)
    mixed = torch.randn(2, NOISE, NOISE, generator=generator) / NOISE
    return noise @ mixed[0], noise @ mixed[1]


def animal_tokenizer() -> PreTrainedTokenizerFast:
    """Words and two delimiters, with spaces between them; <unk> is beyond the models' vocabulary."""
    vocabulary = {word: index for index, word in enumerate((*WORDS, "<unk>"))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def animal_text(tokens: int, seed: int = 0) -> str:
    """Random words and delimiters."""
    drawn = torch.randint(len(WORDS), (tokens,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[index] for index in drawn.tolist())
