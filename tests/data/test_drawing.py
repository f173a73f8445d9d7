"""Rows drawn token by token: what the model itself would write, from its own distribution, without a wait."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig

from attnprune.attention.interface import SUPPORTED_FAMILIES, attach
from attnprune.data import drawing
from attnprune.data.drawing import Writer, obstacle
from attnprune.data.sampling import sample
from tests.helpers import families
from tests.helpers.texts import StartTokens

BEYOND = families.WINDOW + 18  # tokens, more than the sliding windows of the tiny models
LEFT_TO_GENERATE = {"gemma2": "capped", "gpt_oss": "sinks", "mixtral": "experts"}
WAITS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero"}  # operators that read device memory on the host


class Recomputed(Writer):
    """A static writer without a GPU: where a graph would be replayed, the recorded step runs again."""

    def __init__(self, *arguments):
        super().__init__(*arguments, static=True)

    def record(self):
        self.begin()
        self.advance()  # as the warm-up of a capture, it leaves its traces in cache and random state
        return self.advance


def greedy(kind, *arguments):
    made = kind(*arguments)
    made.draw = lambda logits: logits.argmax(-1, keepdim=True)
    return made


def generated(model, rows, length):
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=length - 1, pad_token_id=1)
    prompt = torch.ones(rows, 1, dtype=torch.long)
    return model.generate(prompt, attention_mask=torch.ones_like(prompt))


@pytest.mark.parametrize("kind", [Writer, Recomputed])
@pytest.mark.parametrize("family", sorted(SUPPORTED_FAMILIES - set(LEFT_TO_GENERATE)))
def test_the_likeliest_tokens_are_those_of_generate(family, kind):
    model = families.build(family)
    length = families.WINDOW if obstacle(model, BEYOND) else BEYOND
    writer, expected = greedy(kind, model, 1, 3, length), generated(model, 3, length)
    for _ in range(2):  # the second piece reuses the memory of the first
        assert torch.equal(writer.write(0), expected)
    assert not drawing._difference(model, length)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", sorted(SUPPORTED_FAMILIES))
def test_what_needs_more_than_plain_attention_is_left_to_generate(family, monkeypatch):
    model, asked = families.build(family), []
    reason = obstacle(model, BEYOND)
    windowed = getattr(model.config, "sliding_window", None) is not None
    assert (LEFT_TO_GENERATE.get(family, "sliding window") in reason) == (family in LEFT_TO_GENERATE or windowed) or (
        family == "mixtral" and "sliding window" in reason
    )
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda *args, **options: asked.append(1) or generate(*args, **options))
    assert sample(model, StartTokens(1), 3, BEYOND, 0).shape == (3, BEYOND)
    assert bool(asked) == bool(reason)


def test_other_obstacles_are_named(tiny_llama):
    model = tiny_llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    assert "rotary" in obstacle(model, 8)
    model = tiny_llama()
    assert obstacle(model, 8) == ""
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": "cpu"}
    assert "devices" in obstacle(model, 8)
    model = tiny_llama()
    attach(model)
    assert "gates" in obstacle(model, 8)
    model = tiny_llama()
    model.config.model_type = "unheard_of"
    assert "unheard_of" in obstacle(model, 8)


def test_a_model_that_the_fast_way_would_bend_is_left_to_generate(tiny_llama, monkeypatch, caplog):
    """Attention that does something of its own besides what is passed to the attention function."""
    model = tiny_llama()
    own = drawing._attend
    monkeypatch.setattr(drawing, "_attend", lambda *arguments: 1.01 * own(*arguments))
    with caplog.at_level("INFO", logger=drawing.__name__):
        sample(model, StartTokens(1), 2, 8, 0)
    assert "its logits are off" in caplog.text
    monkeypatch.setattr(model, "generate", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sample(model, StartTokens(1), 2, 8, 0)


def test_attention_with_more_in_it_is_refused_rather_than_computed_without():
    query = torch.zeros(1, 2, 1, 4)
    with pytest.raises(drawing.UnsupportedModelError, match="softcap"):
        drawing.attend_static(torch.nn.Identity(), query, query, query, torch.ones(1, 1, 1, 1).bool(), softcap=2.0)


@pytest.mark.parametrize("kind", [Writer, Recomputed])
def test_draws_are_from_the_softmax(tiny_llama, kind):
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight *= 3  # a range of probabilities
        p = model(input_ids=torch.tensor([[1]])).logits[0, -1].softmax(-1).double()
    drawn = kind(model, 1, 20_000, 2).write(0)[:, 1]
    expected = 20_000 * p
    chi2 = float(((torch.bincount(drawn, minlength=97) - expected) ** 2 / expected).sum())
    assert 50 < chi2 < 150  # 96 degrees of freedom: 96 +- 14
    assert p.max() > 20 * p.min()


class Dispatched(TorchDispatchMode):
    """Counts operators."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kernels", [False, True])
def test_no_token_waits_for_the_device(tiny_llama, kernels, monkeypatch):
    model = tiny_llama()
    monkeypatch.setattr(drawing, "_kernels_run", lambda value: kernels)
    writer = Recomputed(model, 1, 3, 9)
    with torch.no_grad(), drawing._attention(model, True):
        writer.advance()
        with Dispatched() as seen:
            writer.advance()
    assert not WAITS & set(seen.count), seen.count
    assert seen.count["decode"] == (3 if kernels else 0)
    assert seen.count["mm"] + seen.count["addmm"] + seen.count["bmm"] > 20
    assert seen.count["cat"] == 2 * 3 + 1  # the rotary embedding's; the cache is never copied
    with Dispatched() as seen:
        writer.position.item()
    assert WAITS & set(seen.count)  # they would have been seen


def test_the_decode_kernel_draws_what_attention_without_it_draws(tiny_llama, monkeypatch):
    model = tiny_llama()
    expected = Recomputed(model, 1, 3, 12).write(0)
    monkeypatch.setattr(drawing, "_kernels_run", lambda value: True)
    assert torch.equal(Recomputed(model, 1, 3, 12).write(0), expected)


@pytest.mark.parametrize("kind", [Writer, Recomputed])
def test_a_seed_draws_the_same_whatever_came_before(tiny_llama, kind):
    model = tiny_llama()
    writer = kind(model, 1, 4, 12)
    first, second = writer.write(3), writer.write(4)
    before = torch.get_rng_state()
    assert torch.equal(writer.write(3), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(kind(model, 1, 4, 12).write(4), second)
    assert not torch.equal(first, second)


def test_half_precision_and_a_single_token(tiny_llama):
    model = tiny_llama().to(torch.bfloat16)
    assert not drawing._difference(model, 12)
    assert sample(model, StartTokens(1), 3, 12, 0).shape == (3, 12)
    assert sample(model, StartTokens(1), 3, 1, 0).tolist() == [[1]] * 3
