"""The other functions of the API: the numbers of the commands, and results that draw themselves."""

from __future__ import annotations

import json

import pytest
from transformers import AutoModelForCausalLM

import attnprune as ap
from attnprune.errors import VerificationError
from attnprune.sidecar.diff import Difference
from tests.helpers.command import attnprune
from tests.helpers.factory import left, refused, save_tiny_llama


def test_evaluate_is_what_the_command_measures(place):
    data = json.loads(attnprune("eval", "sparse", "--data", "text.txt", "--json", cwd=place).stdout)
    report = ap.evaluate(place / "sparse", data=place / "text.txt")
    for key in ("loss", "base_loss", "control_loss", "kl", "density", "open_edges", "seq_len", "data"):
        assert getattr(report, key) == data["reports"][0][key]
    assert report.exact_match is None
    assert "exact_match" not in data["reports"][0]
    both = ap.evaluate(place / "sparse", data=(place / "text.txt", place / "text.txt"))
    assert both == [report, report]


def test_evaluate_measures_models_in_memory(place):
    report = ap.evaluate(place / "sparse", data=place / "text.txt", seq_len=16)
    model, tokenizer = ap.load(place / "sparse")
    loaded = ap.evaluate(model, tokenizer, data=place / "text.txt", seq_len=16)
    assert (loaded.loss, loaded.open_edges, loaded.control_loss) == (
        report.loss,
        report.open_edges,
        report.control_loss,
    )
    assert loaded.base_loss is None
    base = AutoModelForCausalLM.from_pretrained(place / "model").train()
    dense = ap.evaluate(base, tokenizer, data=place / "text.txt", seq_len=16)
    assert dense.loss == pytest.approx(report.base_loss, abs=1e-6)
    assert dense.density is None
    assert base.training
    texts = [(place / "text.txt").read_text()]
    assert ap.evaluate(model, tokenizer, data=texts, seq_len=16).loss == loaded.loss
    refused(lambda: ap.evaluate(model, data=texts), "needs its tokenizer")
    refused(lambda: ap.evaluate(model, tokenizer, data="self"), "self")
    refused(lambda: ap.evaluate(place / "model"), "say what to measure on")
    refused(lambda: ap.evaluate(place / "sparse", tokenizer, data=texts), "goes with a model in memory")


def test_a_local_base_is_remembered_until_it_moves(place, tmp_path):
    base = save_tiny_llama(tmp_path / "base", seed=3)
    options = {"seq_len": 16, "eval_tokens": 160, "batch_size": 4, "scope": "gates", "device": "cpu", "steps": 2}
    ap.sparsify(base, data=place / "text.txt", out=tmp_path / "run", progress=False, **options)
    ap.load(tmp_path / "run")
    assert attnprune("verify", tmp_path / "run", cwd=place).returncode == 0
    base.rename(tmp_path / "moved")
    error = refused(
        lambda: ap.load(tmp_path / "run"), "made from a local folder", f"{base}, which is not there", "name it"
    )
    assert "--base" in error.hint
    ap.load(tmp_path / "run", base=str(tmp_path / "moved"))
    save_tiny_llama(base, seed=4)  # another model in its place
    refused(lambda: ap.load(tmp_path / "run"), "not the weights")


def test_diff_verify_and_merge(place, tmp_path):
    found = ap.diff(place / "model", place / "sparse")
    assert isinstance(found, Difference)
    assert found.density_b == ap.open_sidecar(place / "sparse").manifest.result.density
    seen = []
    levels = ap.verify(place / "sparse", on_level=seen.append)
    assert [level.name for level in levels] == ["schema", "files", "tensors", "base", "probe"]
    assert seen == levels
    merged = ap.merge(place / "sparse", tmp_path / "merged")
    assert merged.manifest.merged is not None
    assert ap.evaluate(*ap.load(merged.path), data=place / "text.txt").loss == pytest.approx(
        ap.evaluate(*ap.load(place / "sparse"), data=place / "text.txt").loss, abs=1e-6
    )
    refused(lambda: ap.merge(merged.path, tmp_path / "again"), "is merged already")
    refused(lambda: ap.merge(place / "sparse", tmp_path / "merged"), "is not empty")
    refused(lambda: ap.merge(place / "sparse", tmp_path / "x", dtype="int8"), "dtype: 'int8'")
    assert left(tmp_path) == ["merged"]


def test_verify_raises_what_fails_by_name(place, tmp_path):
    import shutil

    folder = shutil.copytree(place / "sparse", tmp_path / "copy")
    manifest = json.loads((folder / "attnprune.json").read_text())
    manifest["probe"]["loss"] += 1.0
    (folder / "attnprune.json").write_text(json.dumps(manifest))
    with pytest.raises(VerificationError, match=r"^probe: "):
        ap.verify(folder)
    assert issubclass(VerificationError, ap.AttnPruneError)


def test_push_refuses_as_the_command_does(place):
    refused(lambda: ap.push(place / "sparse", "a/b/c"), "bad repo id")
    refused(lambda: ap.push(place / "sparse", "a/b", base=place / "model"), "goes with merged")


def test_circuit_is_searched_by_keywords(tmp_path, monkeypatch):
    how = {"quick": True, "prompts": 20, "controls": False, "progress": False}
    found = ap.circuit("demo", "addition", out=tmp_path / "found", **how)
    assert left(tmp_path / "found")[:2] == ["cache", "circuit.html"]
    stored = json.loads((tmp_path / "found" / "circuit.json").read_text())
    assert stored["models"][0]["counts"]["edges"] == found.models[0].counts.edges
    assert stored["command"] == "attnprune.circuit('demo', 'addition', ...)"
    assert repr(found).startswith("CircuitResult(addition, demo: ")
    assert len(repr(found)) < 200
    assert str(found) == repr(found)
    assert "Smallest circuit found" in found._repr_html_()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    unwritten = ap.circuit("demo", "addition", **how)
    assert unwritten.models[0].counts == found.models[0].counts
    assert left(tmp_path / "here") == []
    refused(lambda: ap.circuit("demo", "addition", out=tmp_path / "found"), "is not empty")
    refused(lambda: ap.circuit("demo"), "no task given")
    refused(lambda: ap.circuit("demo", "addition", target=2.0), "target 2")
    refused(lambda: ap.circuit("demo", "adition", out=tmp_path / "x", progress=False), "no such task")


def test_results_draw_themselves(place):
    sidecar = ap.open_sidecar(place / "sparse")
    things = [sidecar, ap.evaluate(place / "sparse"), ap.diff(place / "model", place / "sparse")]
    for thing, part in zip(
        things, ("density of each head", "open-gate control", "heads that changed most"), strict=True
    ):
        html = thing._repr_html_()
        assert html.startswith("<pre")
        assert part in html
        assert len(repr(thing)) < 250
        assert "\n" not in repr(thing)
        assert str(thing) == repr(thing)
    assert "of the edges open at T = 16" in repr(sidecar)


def test_a_loaded_model_says_what_it_is(place):
    loaded = ap.load(place / "sparse")
    count = sum(parameter.numel() for parameter in loaded.model.parameters())
    assert repr(loaded) == (
        f"LoadedModel(LlamaForCausalLM: 2 layers of 4 heads, {count:,} parameters, torch.float32 on cpu; "
        f"{type(loaded.tokenizer).__name__})"
    )


def test_names_in_a_drawing_are_escaped(place):
    from dataclasses import replace

    html = replace(ap.evaluate(place / "sparse"), data="<script>[red]x")._repr_html_()
    assert "<script>" not in html
    assert "&lt;script&gt;[red]x" in html
