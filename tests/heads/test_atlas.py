"""Atlases of models whose heads are known, of sparse ones beside their base, and what is refused."""

from __future__ import annotations

import pytest
import torch

from attnprune import atlas, evaluate, trace
from attnprune.attention.interface import gates_of
from attnprune.heads.corpus import is_delimiter
from attnprune.heads.result import KINDS, Atlas, Share, labels
from attnprune.sidecar.edges import open_edges
from attnprune.sidecar.loading import load
from tests.helpers.factory import refused, save_text, save_tiny_llama
from tests.helpers.heads import LENGTH, OFFSET, animal_text, plant_heads
from tests.helpers.sidecars import save_merged, save_sidecar

both_kinds = pytest.mark.parametrize("gated", [False, True], ids=["dense", "gated"])


@pytest.fixture
def animals(tmp_path):
    file = tmp_path / "animals.txt"
    file.write_text(animal_text(10 * LENGTH), "utf-8")
    return file


@both_kinds
@pytest.mark.parametrize("seed", range(3))
def test_planted_heads_are_labelled_and_nothing_else_is(animals, gated, seed):
    planted = plant_heads(gated=gated, seed=seed)
    (model,) = atlas(planted.model, animals, tokenizer=planted.tokenizer, seq_len=LENGTH).models
    assert {(h.layer, h.head): h.mass.labels for h in model.heads if h.mass.labels} == {
        place: [kind] for place, kind in planted.labels.items()
    }
    assert [h.mass.offset for h in model.heads if h.mass.labels == ["offset"]] == [OFFSET]
    if gated:
        assert {(h.layer, h.head): h.edges.labels for h in model.heads if h.edges.labels} == {
            place: [kind] for place, kind in planted.labels.items()
        }
        shares = [h.edges.kinds[planted.labels[h.layer, h.head]].share for h in model.heads if h.edges.labels]
        assert min(shares) == 1
        assert set(map(tuple, model.closed)) == planted.closed
        assert all(not h.examples and h.mass.total == 0 and h.queries == 0 for h in model.heads if h.closed)
    assert model.kind == ("sparse" if gated else "dense")
    assert bool(gates_of(planted.model)) == gated


def test_a_planted_value_is_in_its_directions(animals):
    """The unembedding reads what the previous-token heads write: their directions promote the words."""
    planted = plant_heads(gated=True)
    previous = next(place for place, kind in planted.labels.items() if kind == "previous" and place[0] == 0)
    (model,) = atlas(planted.model, animals, tokenizer=planted.tokenizer, seq_len=LENGTH).models
    head = model.heads[previous[0] * 6 + previous[1]]
    assert [d.share for d in head.directions] == pytest.approx([0.1] * 3, abs=1e-3)  # ten words, one direction each
    for example in head.examples:
        assert example.key == example.query - 1
        (window,) = example.text
        assert window.start <= example.key < window.start + len(window.tokens)


def test_an_atlas_says_what_it_is(animals):
    planted = plant_heads(gated=True)
    found = atlas((planted.model, planted.tokenizer), animals, seq_len=LENGTH)
    (model,) = found.models
    labelled = sum(bool(head.reading.labels) for head in model.heads)
    assert repr(found) == (
        f"Atlas('animals.txt', {10 * LENGTH} tokens, GPT2LMHeadModel: {labelled} of 12 heads labelled, "
        f"{len(model.closed)} closed)"
    )
    assert str(found) == repr(found)
    assert len(repr(model)) < 250
    assert "heads=<12 items>" in repr(model)
    assert max(len(repr(head)) for head in model.heads) < 1000
    html = found._repr_html_()
    assert html.startswith("<pre")
    assert "without a label" in html


def test_the_rule():
    def judged(share, control, edges=100):
        return labels({"self": Share(share=share, control=control)}, edges)

    assert judged(0.5, 0.1) == ["self"]
    assert judged(0.49, 0.01) == []
    assert judged(0.6, 0.21) == []
    assert judged(1, 0.01, 19) == []


@pytest.mark.parametrize("text", [".", "\n", " ,", "...", '."', "\n\n", "=", "$", "—"])
def test_delimiters(text):
    assert is_delimiter(text)


@pytest.mark.parametrize("text", ["", " ", "a.", "1", "�", "🙂", "<eos>", "\x00"])
def test_no_delimiters(text):
    assert not is_delimiter(text)


def test_a_sidecar_beside_its_base(tmp_path):
    base, text = save_tiny_llama(tmp_path / "base"), save_text(tmp_path / "text.txt")
    sidecar = save_sidecar(tmp_path / "sidecar", base, "lora").path
    stages = []
    result = atlas(sidecar, text, base=str(base), tokens=100, watch=lambda *told: stages.append(told))
    assert (result.blocks, result.seq_len, result.tokens) == (3, 32, 96)  # the length that it was measured at
    assert result.offset_edges == [0, 1, 2, 4, 8, 16, 32]
    sparse, dense = result.models
    assert (sparse.name, sparse.kind, dense.name, dense.kind) == (str(sidecar), "sparse", str(base), "dense")
    assert result == Atlas.model_validate_json(result.model_dump_json())
    assert all(0 <= done < of for _, done, of in stages)
    assert [stage for stage, done, _ in stages if done == 0] == [
        "sparse: blocks", "sparse: values", "dense: blocks", "dense: values",
    ]  # fmt: skip
    for head in dense.heads:
        assert head.edges is None
        assert head.mass.total == pytest.approx(96, abs=1e-3)
        assert head.open == head.visible == 3 * 32 * 33 // 2
        assert head.queries == 1
    for model in result.models:
        for head in model.heads:
            for reading in filter(None, (head.edges, head.mass)):
                assert set(reading.kinds) == set(KINDS)
                assert head.closed or sum(reading.distances) == pytest.approx(1)
                assert reading.distances[0] == pytest.approx(reading.kinds["self"].share)
                assert reading.distances[1] == pytest.approx(reading.kinds["previous"].share)
    alone = atlas(sidecar, text, base=str(base), tokens=100, dense=False)
    assert [model.kind for model in alone.models] == ["sparse"]
    assert alone.models[0].heads == sparse.heads


def test_open_edges_are_those_of_inspect(tmp_path):
    base = save_tiny_llama(tmp_path / "base")
    sidecar = save_sidecar(tmp_path / "sidecar", base).path
    text = tmp_path / "text.txt"
    text.write_text("The gate opens when the score of"[:32])
    (model,) = atlas(sidecar, text, base=str(base), tokens=32, dense=False).models
    sparse, tokenizer = load(sidecar, str(base))
    found = open_edges(sparse, tokenizer, text.read_text())
    for head in model.heads:
        mine = [e for e in found.edges if (e.layer, e.head) == (head.layer, head.head)]
        assert len(mine) == head.open
        assert len({e.query for e in mine}) / 32 == pytest.approx(head.queries)
        assert sum(e.weight for e in mine) == pytest.approx(head.mass.total, abs=1e-4)
        for example in head.examples:
            (same,) = [e for e in mine if (e.query, e.key) == (example.query, example.key)]
            assert same.weight == pytest.approx(example.weight, abs=1e-6)


def test_a_merged_folder_names_no_base(tmp_path):
    folder, text = save_merged(tmp_path / "merged"), save_text(tmp_path / "text.txt")
    result = atlas(folder, text, tokens=64)
    assert [model.kind for model in result.models] == ["sparse"]
    assert result.notes == ["the dense base is not beside it: a merged folder does not hold it; name it with --base"]
    both = atlas(folder, (text,), base=str(tmp_path / "merged-base"), tokens=64)
    assert [model.kind for model in both.models] == ["sparse", "dense"]
    assert both.models[0].heads == result.models[0].heads


def test_bad_input_is_one_line(tmp_path):
    base, text = save_tiny_llama(tmp_path / "base"), save_text(tmp_path / "text.txt")
    sidecar = save_sidecar(tmp_path / "sidecar", base).path
    (tmp_path / "blank.txt").write_text(" \n \n")
    (tmp_path / "short.txt").write_text("few")
    other = save_tiny_llama(tmp_path / "other", num_hidden_layers=3)
    merged = save_merged(tmp_path / "merged")
    refused(lambda: atlas(str(base), tmp_path / "blank.txt"), "blank.txt: ")
    refused(
        lambda: atlas(str(base), tmp_path / "short.txt"), "short.txt: the text is shorter than one block of 64 tokens"
    )
    refused(lambda: atlas(str(base), tmp_path / "none.txt"), "none.txt: no such file")
    refused(lambda: atlas(str(base), ()), "data: a tuple names")
    refused(lambda: atlas(str(base), text, seq_len=65), "a block of 65 tokens is more than the model's context of 64")
    refused(lambda: atlas(str(base), text, tokens=0), "tokens 0: ")
    refused(lambda: atlas(str(base), text, tokens=31, seq_len=32), "31 tokens: are fewer than a block of 32")
    second = save_text(tmp_path / "second.txt")
    refused(
        lambda: atlas(str(base), (text, second), tokens=63, seq_len=32), "fewer than a block of 32 of each of 2 texts"
    )
    assert atlas(str(base), (text, second), tokens=64, seq_len=32).tokens == 64
    refused(lambda: atlas(str(base), text, seq_len=1), "a block of 1: needs two tokens")
    refused(lambda: atlas("demo", "task", tokens=9), "9 tokens: are fewer than a block of 10")
    assert atlas("demo", "task", tokens=10).tokens == 10
    refused(lambda: atlas(str(base), text, base=str(other)), "is a dense model itself")
    refused(lambda: atlas(str(base), (text, text)), "named twice")
    refused(lambda: atlas(sidecar, text, base=str(other)))
    refused(lambda: atlas(merged, text, base=str(other), tokens=64), "other: is not the base of ", "(2 layers, 4")
    refused(lambda: atlas(load(sidecar, str(base)).model, text), "needs its tokenizer")
    sparse, tokenizer = load(sidecar, str(base))
    refused(lambda: atlas(sparse, text, tokenizer=tokenizer, base=str(base)), "base: is for models given by name")
    for read in (
        lambda **given: atlas(sparse, text, tokenizer=tokenizer, **given),
        lambda **given: trace(sparse, "few", tokenizer=tokenizer, **given),
        lambda **given: evaluate(sparse, tokenizer, data=text, **given),
    ):
        refused(lambda read=read: read(device="foo"), "device: is for models given by name")
    refused(
        lambda: atlas(sparse, ["few words"], tokenizer=tokenizer, text_field="foo"), "text_field foo: names a column"
    )
    refused(lambda: atlas("no/such/model", text), "no/such/model: ")


def test_a_model_that_is_not_finite(animals):
    planted = plant_heads(gated=True)
    with torch.no_grad():
        planted.model.lm_head.weight.fill_(float("inf"))
    refused(lambda: atlas(planted.model, animals, tokenizer=planted.tokenizer, seq_len=LENGTH), "not finite")
