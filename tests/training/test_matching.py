"""Hidden states of the sparse model against the base's: the error, where it is taken, and that it is learned from."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attnprune.attention.interface import SUPPORTED_FAMILIES
from attnprune.errors import InputError
from attnprune.training import graph, recipe
from attnprune.training.matching import FARTHEST, layer_outputs, relative_error
from attnprune.training.scope import make_trainable
from attnprune.training.step import TERMS
from tests.helpers.families import build
from tests.helpers.recipes import run_config
from tests.helpers.steps import inputs_of, micro_steps, run

ERROR = TERMS.index("state_error")
WAYS = {
    "plain": {"step": "plain"}, "fast": {}, "compiled": {"compile": "on"},
    "recomputed": {"gradient_checkpointing": True},
}  # fmt: skip


def test_the_error_is_relative_per_token_and_bounded():
    generator = np.random.default_rng(0)
    ours, base = generator.normal(size=(2, 3, 2, 5, 4))
    base[1, 0, 0] = 1e-3  # a token whose base state is nearly nothing
    expected = np.minimum(((ours - base) ** 2).sum(-1) / (base**2).sum(-1), FARTHEST).mean()
    states, base_states = ([torch.tensor(layer) for layer in model] for model in (ours, base))
    assert relative_error(states, base_states).item() == pytest.approx(expected, rel=1e-5)
    assert (((ours - base) ** 2).sum(-1) / (base**2).sum(-1)).max() > FARTHEST


@pytest.mark.parametrize("family", sorted(SUPPORTED_FAMILIES))
def test_the_states_are_those_that_transformers_returns(family):
    model = build(family).eval()
    ids = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        hidden = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states  # leaves hooks behind
        before = sum(len(layer._forward_hooks) for layer in model.modules())
        with layer_outputs(model) as states:
            model(input_ids=ids, use_cache=False)
    assert len(states) == len(hidden) - 1
    for ours, theirs in zip(states[:-1], hidden[1:-1], strict=True):  # the last of theirs is normalised
        assert torch.equal(ours, theirs)
    assert sum(len(layer._forward_hooks) for layer in model.modules()) == before


def test_its_gradient_is_the_error_s_own():
    """What `match` adds to a step is `match` times the gradient of the error by itself."""
    gradients = {}
    for match in (0.0, 2.0):
        trained, [step], ids = micro_steps("llama", "fast", train={"match": match})
        found = graph.trace(step, trained, inputs_of(ids))
        gradients[match] = found.gradients
    with layer_outputs(step.core) as states:
        step.core(input_ids=ids, use_cache=False)
    with step.base.active(), layer_outputs(step.base.model) as base_states:
        step.base.model(input_ids=ids, use_cache=False)
    error = relative_error(states, base_states)
    assert found.stats[ERROR].item() == pytest.approx(error.item(), rel=1e-5)
    assert error.item() > 0.01
    alone = torch.autograd.grad(error, trained, allow_unused=True)
    weight = inputs_of(ids)[2][1].item()  # of the damage
    for plain, matched, own in zip(gradients[0.0], gradients[2.0], alone, strict=True):
        expected = plain + weight * 2.0 * (torch.zeros_like(plain) if own is None else own)
        assert torch.allclose(matched, expected, rtol=1e-4, atol=1e-6)


def test_it_is_the_same_each_way(inputs, tmp_path):
    train = {"scope": "lora", "match": 5.0, "steps": 12, "eval_every": 12}
    runs = {}
    for name, way in WAYS.items():
        runs[name] = run(inputs, tmp_path / name, train=train | way, constraint={"kind": "density"})
    lines, weights = runs["plain"]
    for name in WAYS:
        for before, after in zip(lines, runs[name][0], strict=True):
            assert after["state_error"] == pytest.approx(before["state_error"], rel=1e-4)
        for key, weight in weights.items():
            assert torch.allclose(runs[name][1][key], weight, rtol=1e-4, atol=1e-4), (name, key)


def test_a_model_without_a_list_of_layers_is_refused(inputs, tmp_path, monkeypatch):
    def gone(model, config):
        model, base = make_trainable(model, config)
        model.config.num_hidden_layers = 7
        return model, base

    monkeypatch.setattr(recipe, "make_trainable", gone)
    with pytest.raises(InputError, match=r"train\.match: this model has no list of decoder layers"):
        recipe.sparsify(run_config(inputs, tmp_path / "run", train={"match": 1.0}))
