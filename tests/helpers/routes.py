"""Models whose only route from a token to the prediction is known: hops from token to token, a head each.

Tokens are one-hot directions and carry a random content. A hop's query knows one token and its key another, so that its
head moves what lies at the one to the other, and hardly anything anywhere else: the first hop the content, each later
one what the hop before has written. The unembedding reads what the last hop wrote and nothing else. All other heads and
the MLPs read and write noise, which acts through the norms alone; a constant makes these almost linear.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from attnprune.attention.interface import attach
from attnprune.circuit.model.adapters import anatomy_of, weight_of

VOCABULARY, HEADS, SLOT, NOISE, SIZE, SCORE = 24, 4, 16, 24, 1000.0, 12.0


@dataclass(frozen=True)
class Route:
    """`hops`: the messages (layer, head, query, key) of the route. Tokens are w0, w1, ... of `text`."""

    model: Any
    tokenizer: Any
    text: str
    hops: set[tuple[int, int, int, int]]


def plant_route(family: str = "llama", *, hops: int = 3, length: int = 9, gated: bool = False, seed: int = 0) -> Route:
    """A model with one layer more than hops; with gates, only those of the hops and of the noise are open."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    def some(among: int, count: int) -> list[int]:
        return sorted(torch.randperm(among, generator=generator)[:count].tolist())

    words = torch.randperm(VOCABULARY, generator=generator)[:length].tolist()
    stops = [*some(length - 1, hops), length - 1]
    where = [(layer, int(torch.randint(HEADS, (), generator=generator))) for layer in some(hops + 1, hops)]
    width = -(-(VOCABULARY + 2 + SLOT * (hops + 1) + NOISE) // 8) * 8
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = _model(family, hops + 1, width, length)
    basis = torch.linalg.qr(torch.cat([torch.ones(width, 1), draw(width, width - 1)], 1)).Q[:, 1:]
    names, constant, rest = basis[:, :VOCABULARY], basis[:, VOCABULARY : VOCABULARY + 1], basis[:, VOCABULARY + 1 :]
    slots = [rest[:, SLOT * i : SLOT * (i + 1)] for i in range(hops + 1)]
    noise, gain = rest[:, SLOT * (hops + 1) :], SIZE / width**0.5
    anatomy = anatomy_of(model)
    with torch.no_grad():
        embedding = names.t() + draw(VOCABULARY, SLOT) @ slots[0].t() + draw(VOCABULARY, noise.shape[1]) @ noise.t()
        model.get_input_embeddings().weight.copy_(embedding + SIZE * constant.t())
        model.lm_head.weight.copy_(gain * draw(VOCABULARY, SLOT) @ slots[-1].t())
        if family == "gpt2":
            model.transformer.wpe.weight.zero_()
        for block in anatomy.blocks:
            for projection in block.projections.values():
                for weight in projection.weight:
                    weight.copy_(gain * noise @ draw(noise.shape[1], weight.shape[1]) / noise.shape[1] ** 0.5)
            for weight in block.output_weight(HEADS):
                weight.copy_(0.2 * draw(len(weight), noise.shape[1]) @ noise.t() / len(weight) ** 0.5)
            *inner, outer = [module for module in block.mlp.children() if hasattr(module, "weight")]
            for module in inner:
                size = weight_of(module).shape[1]
                weight_of(module).copy_(gain * noise @ draw(noise.shape[1], size) / noise.shape[1] ** 0.5)
            weight_of(outer).copy_(0.2 * draw(len(weight_of(outer)), noise.shape[1]) @ noise.t() / width**0.5)
        for hop, (layer, head) in enumerate(where):
            block = anatomy.blocks[layer]
            group = head // (HEADS // anatomy.graph.kv_heads)
            query, key, value = (block.projections[kind].weight for kind in ("q", "k", "v"))
            size = query.shape[2]
            query[head].zero_()[:, -1] = gain * SCORE * size**0.5 * names[:, words[stops[hop + 1]]]
            key[group].zero_()[:, -1] = gain * names[:, words[stops[hop]]]
            value[group].zero_()[:, :SLOT] = gain * slots[hop]
            block.output_weight(HEADS)[head].zero_()[:SLOT] = slots[hop + 1].t()
    if gated:
        bias = torch.full((hops + 1, HEADS), 50.0)
        bias[tuple(torch.tensor(where).t())] = -SCORE / 2
        attach(model, bias)
    route = {(*place, stops[hop + 1], stops[hop]) for hop, place in enumerate(where)}
    return Route(model, word_tokenizer(), " ".join(f"w{word}" for word in words), route)


def _model(family: str, layers: int, width: int, length: int) -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": HEADS,
        "max_position_embeddings": length, "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(**sizes, n_inner=width, attn_pdrop=0.0)).eval()
    # The last pair of a head's dimensions hardly turns with the position: the hops have their scores there.
    rope = {"rope_type": "default", "rope_theta": 1e12}
    heads: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 2 * SLOT, "rope_parameters": rope}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, intermediate_size=width)).eval()


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words w0, w1, ... between spaces, and <unk>."""
    words = {f"w{i}": i for i in range(VOCABULARY)} | {"<unk>": VOCABULARY}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
