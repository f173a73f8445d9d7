"""Traces of models whose only route is known, of one that is not, and what is refused."""

from __future__ import annotations

import pytest
import torch

from attnprune import load, open_gates, trace
from attnprune.attention.interface import gates_of
from attnprune.report.trace_page import render_page
from attnprune.report.traces import none_can_go
from attnprune.tracing import run, search
from attnprune.tracing.result import Trace
from tests.helpers.factory import byte_tokenizer, refused, save_tiny_llama
from tests.helpers.families import build
from tests.helpers.routes import plant_route
from tests.helpers.sidecars import save_merged, save_sidecar

TEXT = "b+c=7;Q?"  # bytes that the tiny vocabularies have
both_kinds = pytest.mark.parametrize("gated", [False, True], ids=["dense", "gated"])


def found(model):
    return {(m.layer, m.head, m.query, m.key) for m in model.messages}


@both_kinds
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("seed", range(4))
def test_finds_exactly_the_planted_route(family, gated, seed):
    route = plant_route(family, gated=gated, seed=seed)
    result = trace(route.model, route.text, tokenizer=route.tokenizer)
    (model,) = result.models
    assert found(model) == route.hops
    assert model.kind == ("sparse" if gated else "dense")
    assert model.minimal
    assert model.kept.share > 0.95
    assert model.kept.size == len(model.messages) == 3
    assert abs(model.complement.share) < 0.05
    assert model.random.share_high < 0.1
    assert model.full.share == pytest.approx(1)
    assert model.closed.share == pytest.approx(0, abs=1e-4)
    # without any one hop nothing is left
    assert all(m.exact and m.effect > 0.9 * model.closed.kl for m in model.messages)
    assert model.candidates < model.open <= model.visible == 4 * 4 * 45
    assert bool(gates_of(route.model)) == gated


def test_a_prediction_that_hardly_needs_attention_says_so():
    """The two of docs/traces.md."""
    idle, needed = (trace("demo", text) for text in ("#27+58=", "#27+58=0"))
    assert idle.models[0].closed.kl < 1e-4
    assert ["hardly needs attention: closing every message moves it by 1.9e-05 nats" in n for n in idle.notes] == [True]
    assert needed.notes == []
    [model] = needed.models
    assert (model.predicted.text, len(model.messages), model.open) == ("8", 1, 576)
    assert model.closed.kl == pytest.approx(12, abs=0.5)
    assert model.kept.share == pytest.approx(0.989, abs=0.002)
    assert model.complement.share == pytest.approx(-0.19, abs=0.02)
    assert model.random.share_high == pytest.approx(0.13, abs=0.02)


def test_messages_that_deletion_left_behind_are_dropped(monkeypatch):
    """The first messages by effect that hold are the set, whatever else the search had."""

    def left_behind(messages, kept, *rest):
        every = torch.arange(len(messages))
        return torch.cat([kept, every[~torch.isin(every, kept)][:20]])

    monkeypatch.setattr(search, "_deleted", left_behind)
    route = plant_route(seed=3)
    (model,) = trace(route.model, route.text, tokenizer=route.tokenizer).models
    assert found(model) == route.hops
    assert model.minimal
    assert model.can_go == 0
    monkeypatch.setattr(search, "_fewer", lambda messages, found, allowed: found.kept)
    (model,) = trace(route.model, route.text, tokenizer=route.tokenizer).models
    assert len(model.messages) >= 23
    assert not model.minimal
    assert model.can_go == len(model.messages) - 3
    assert none_can_go(model) == f"no: {model.can_go} could"


def test_effects_that_were_not_measured_are_said_to_be_estimates(monkeypatch):
    route = plant_route(seed=3)
    assert "out one by one" not in " ".join(trace(route.model, route.text, tokenizer=route.tokenizer).notes)
    monkeypatch.setattr(search, "EFFECT_TOKENS", 0)
    found = trace(route.model, route.text, tokenizer=route.tokenizer)
    (model,) = found.models
    assert not any(message.exact for message in model.messages)
    assert f"{len(model.messages)} messages are too many to leave out one by one" in " ".join(found.notes)


def test_a_set_that_predicts_another_token_says_so(monkeypatch):
    """A share of KL may be kept without the prediction."""
    route, measure = plant_route(seed=1), run._measure
    plain = trace(route.model, route.text, tokenizer=route.tokenizer)
    assert plain.notes == []
    assert "alone they predict another token" not in render_page(plain)

    def another(messages, sets, *rest):
        return [m.model_copy(update={"same": chosen is not sets[2]}) for m, chosen in
                zip(measure(messages, sets, *rest), sets, strict=True)]  # fmt: skip

    monkeypatch.setattr(run, "_measure", another)
    other = trace(route.model, route.text, tokenizer=route.tokenizer)
    assert other.notes == ["LlamaForCausalLM: with the kept messages alone another token is the likeliest"]
    assert "alone they predict another token" in render_page(other)


@both_kinds
def test_the_value_of_the_last_hop_is_the_prediction(gated):
    route = plant_route(gated=gated, seed=1)
    (model,) = trace(route.model, route.text, tokenizer=route.tokenizer).models
    last = max(model.messages, key=lambda m: m.layer)
    assert last.raises[0].id == model.predicted.id
    assert [s.logit for s in last.raises] == sorted((s.logit for s in last.raises), reverse=True)
    assert last.weight > 0.99


@both_kinds
def test_messages_are_explained_by_what_wrote_into_query_and_key(gated):
    """The planted hops know tokens, which the embedding writes: without it the score is gone and the gate closed."""
    route = plant_route(gated=gated, seed=2)
    (model,) = trace(route.model, route.text, tokenizer=route.tokenizer, explain=2).models
    assert [m.opened is not None for m in model.messages] == [True, True, False]
    for why in [m.opened for m in model.messages if m.opened]:
        assert why.is_open
        assert (why.bias is None) == (not gated)
        for writers, rest in ((why.by_query, why.query_remainder), (why.by_key, why.key_remainder)):
            assert sum(w.value for w in writers) + rest == pytest.approx(why.score, abs=1e-4)
            assert writers[0].source == "input"
            assert writers[0].value == pytest.approx(why.score, rel=0.05)
            assert writers[0].without < 0.05 * why.score
            assert writers[0].open_without == (False if gated else None)


def test_messages_of_forced_open_gates_are_explained_as_in_a_dense_model():
    route = plant_route(gated=True, seed=2)
    with open_gates(route.model):
        (model,) = trace(route.model, route.text, tokenizer=route.tokenizer, explain=1).models
    (why,) = [m.opened for m in model.messages if m.opened]
    assert why.is_open
    assert why.bias is None


def test_an_earlier_token_is_traced_as_if_the_text_ended_there():
    model = build("llama")
    tokenizer = byte_tokenizer()
    text = TEXT
    whole = trace(model, text, tokenizer=tokenizer, token=3)
    cut = trace(model, text[:4], tokenizer=tokenizer)
    assert (whole.position, len(whole.tokens)) == (3, 4)
    assert found(whole.models[0]) == found(cut.models[0])
    assert trace(model, text, tokenizer=tokenizer, token=-5).models[0].kept == whole.models[0].kept


def test_a_random_model_is_traced_to_any_target():
    model = build("llama")
    text = TEXT
    sizes = []
    for target in (0.5, 0.9, 1.0):
        (traced,) = trace(model, text, tokenizer=byte_tokenizer(), target=target).models
        assert traced.kept.share >= target - 1e-6
        sizes.append(len(traced.messages))
        assert [p.size for p in traced.curve][-1] == len(traced.messages)
        assert traced.curve[-1].share == pytest.approx(traced.kept.share, abs=1e-6)
        assert len({(m.layer, m.head, m.query, m.key) for m in traced.messages}) == len(traced.messages)
        assert all(m.key <= m.query for m in traced.messages)
        assert [m.effect for m in traced.messages] == sorted((m.effect for m in traced.messages), reverse=True)
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1] / 2


def test_effects_are_what_the_set_loses():
    model = build("llama")
    (traced,) = trace(model, TEXT[:4], tokenizer=byte_tokenizer(), target=0.7).models
    assert traced.minimal
    allowed = 0.3 * traced.closed.kl
    assert traced.kept.kl <= allowed
    assert all(traced.kept.kl + m.effect > allowed for m in traced.messages)


def test_a_sidecar_beside_its_base(tmp_path):
    base = save_tiny_llama(tmp_path / "base")
    sidecar = save_sidecar(tmp_path / "sidecar", base, "lora").path
    stages = []
    result = trace(sidecar, "Mary", base=str(base), watch=lambda *told: stages.append(told))
    assert [(model.name, model.kind) for model in result.models] == [(str(sidecar), "sparse"), (str(base), "dense")]
    assert result.models[0].open < result.models[1].open == result.models[1].visible
    assert result == Trace.model_validate_json(result.model_dump_json())
    assert {stage.partition(":")[0] for stage, _, _ in stages} == {"sparse", "dense"}
    assert all(0 <= done < of for _, done, of in stages)
    (alone,) = trace(sidecar, "Mary", base=str(base), dense=False).models
    assert found(alone) == found(result.models[0])
    (loaded,) = trace(load(sidecar, base=str(base)), "Mary").models
    assert found(loaded) == found(alone)


def test_a_merged_folder_names_no_base(tmp_path):
    folder = save_merged(tmp_path / "merged")
    result = trace(folder, "Mary")
    assert [model.kind for model in result.models] == ["sparse"]
    assert result.notes == ["the dense base is not beside it: a merged folder does not hold it; name it with --base"]
    both = trace(folder, "Mary", base=str(tmp_path / "merged-base"))
    assert [model.kind for model in both.models] == ["sparse", "dense"]
    sidecar = trace(tmp_path / "merged-sidecar", "Mary", base=str(tmp_path / "merged-base"), dense=False)
    assert found(sidecar.models[0]) == found(result.models[0])


def test_the_other_token(tmp_path):
    base = str(save_tiny_llama(tmp_path / "base"))
    free = trace(base, "Mary")
    assert not free.given
    (model,) = free.models
    given = trace(base, "Mary", against="A")
    assert given.given
    assert given.models[0].against.text == "A"
    assert found(given.models[0]) == found(model)  # the KL decides, not the difference
    assert model.full.difference > 0


def test_bad_input_is_one_line(tmp_path):
    base = str(save_tiny_llama(tmp_path / "base"))
    route = plant_route()
    refused(lambda: trace(base, ""), "text: is empty")
    refused(lambda: trace(base, "x" * 65), "text: 65 tokens are more than the 64 that can be traced")
    refused(lambda: trace(base, "Mary", token=4), "token 4: the text has 4 tokens, 0 to 3")
    refused(lambda: trace(base, "Mary", token=-5), "token -5: ")
    refused(lambda: trace(base, "Mary", target=0), "target 0: ")
    refused(lambda: trace(base, "Mary", target=float("nan")), "target nan: ")
    refused(lambda: trace(base, "Mary", against="John"), "against 'John': is 4 tokens: 'J' 'o' 'h' 'n', not one")
    refused(lambda: trace(base, "Mary", against=""), "against '': is 0 tokens, not one")
    best = trace(base, "Mary").models[0].predicted.text
    if len(byte_tokenizer()(best)["input_ids"]) == 1:
        refused(lambda: trace(base, "Mary", against=best), "is the predicted token itself")
    refused(lambda: trace(route.model, "w1", tokenizer=None), "needs its tokenizer")
    refused(lambda: trace(route.model, "w1 nothing", tokenizer=route.tokenizer), "does not know 'nothing'")
    refused(lambda: trace(route.model, route.text, tokenizer=route.tokenizer, against="none"), "does not know 'none'")
    refused(lambda: trace("no/such/model", "Mary"), "no/such/model: ")


def test_a_token_that_the_model_does_not_predict():
    route = plant_route()
    with torch.no_grad():
        route.model.lm_head.weight.mul_(20)
    unlikely = trace(route.model, route.text, tokenizer=route.tokenizer).models[0].messages[0].lowers[0].text
    error = refused(
        lambda: trace(route.model, route.text, tokenizer=route.tokenizer, against=unlikely),
        f"against '{unlikely}': the model does not predict it here (probability ",
    )
    assert "likely ones: 'w" in str(error.hint)


def test_attention_that_takes_no_part():
    route = plant_route()
    with torch.no_grad():
        route.model.lm_head.weight.zero_()
        refused(lambda: trace(route.model, route.text, tokenizer=route.tokenizer), "nothing to trace")
