"""`attnprune.sparsify` by keywords: by name as the command does it, and with model and text in memory."""

from __future__ import annotations

import json
import shutil
import tomllib

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import attnprune as ap
from tests.helpers.command import attnprune
from tests.helpers.factory import left, refused

TEXTS = [f"{line}: the gate of a head opens when score and bias are above zero." for line in range(90)]


@pytest.fixture
def loaded(place):
    """(model, tokenizer) in memory."""
    return AutoModelForCausalLM.from_pretrained(place / "model"), AutoTokenizer.from_pretrained(place / "model")


def settings(folder):
    stored = tomllib.loads((folder / "run.toml").read_text())
    return {key: stored[key] for key in ("gate", "constraint", "train")}


def test_keywords_are_the_options_of_the_command(place, tmp_path):
    options = [f"--{name.replace('_', '-')}={value}" for name, value in (
        ("seq_len", 16), ("eval_tokens", 160), ("batch_size", 4), ("eval_every", 4), ("save_every", 4),
        ("scope", "attn"), ("tolerance", 0.5), ("device", "cpu"), ("steps", 8),
    )]  # fmt: skip
    done = attnprune("sparsify", "model", "--data", "text.txt", "--out", tmp_path / "run", *options, cwd=place)
    assert done.returncode == 0, done.stderr
    assert settings(place / "sparse") == settings(tmp_path / "run")
    theirs, ours = ap.open_sidecar(tmp_path / "run"), ap.open_sidecar(place / "sparse")
    assert theirs.manifest.result == ours.manifest.result


def test_a_model_and_texts_in_memory_give_what_files_give(place, tmp_path, tiny, loaded):
    found = ap.sparsify(*loaded, data=TEXTS, out=tmp_path / "run", progress=False, **tiny)
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    named = ap.sparsify(place / "model", data=file, out=tmp_path / "named", progress=False, **tiny)
    assert found.manifest.result == named.manifest.result
    assert found.manifest.base == named.manifest.base
    assert left(tmp_path / "run-inputs") == ["model", "texts.jsonl"]
    model, tokenizer = ap.load(found.path)  # the base is found where it was written
    ids = tokenizer("the gate", return_tensors="pt").input_ids
    assert torch.equal(model(ids).logits, ap.load(named.path).model(ids).logits)
    assert ap.evaluate(found.path).loss == found.manifest.result.loss


def test_a_dataset_gives_its_column(place, tmp_path, tiny):
    rows = Dataset.from_dict({"text": TEXTS, "n": list(range(len(TEXTS)))})
    other = rows.rename_column("text", "body")
    one = ap.sparsify(place / "model", data=rows, out=tmp_path / "one", progress=False, **tiny)
    two = ap.sparsify(place / "model", data=other, text_field="body", out=tmp_path / "two", progress=False, **tiny)
    listed = ap.sparsify(place / "model", data=TEXTS, out=tmp_path / "three", progress=False, **tiny)
    assert one.manifest.result == two.manifest.result == listed.manifest.result
    refused(lambda: ap.sparsify(place / "model", data=other, out=tmp_path / "x", **tiny), "no column 'text'", "body, n")
    assert left(tmp_path) == ["one", "one-inputs", "three", "three-inputs", "two", "two-inputs"]


def test_several_sources_are_a_tuple(place, tmp_path, tiny):
    (tmp_path / "more.txt").write_text("\n".join(TEXTS))
    found = ap.sparsify(
        place / "model", data=(place / "text.txt", tmp_path / "more.txt"), out=tmp_path / "run", progress=False, **tiny
    )
    assert [source.data for source in found.manifest.result.sources] == ["text.txt", "more.txt"]


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"stps": 5}, ["unknown option 'stps'", "'steps'"]),
        ({"tolerance": -1.0}, ["constraint.tolerance"]),
        ({"data": 5}, ["data: int is not text"]),
        ({"data": ()}, ["data: a tuple names"]),
        ({"data": "missing.txt"}, ["missing.txt: no such file"]),
        ({"data": "one.pdf"}, ["one.pdf: no such file"]),
        ({"data": {"train": 1}}, ["data: dict is not text"]),
        ({"steps": 8, "time": "1m"}, ["leave out steps or time"]),
        ({"tokenizer": 1}, ["goes with a model in memory"]),
        ({"resume": True, "data": None}, ["name the folder"]),
        ({"resume": "nowhere", "data": None}, ["nothing to resume"]),
    ],
    ids=str,
)
def test_what_is_wrong_is_refused_and_nothing_is_left(place, tmp_path, monkeypatch, options, parts):
    monkeypatch.chdir(tmp_path)
    refused(lambda: ap.sparsify(place / "model", **{"data": TEXTS} | options), *parts)
    assert left(tmp_path) == []


def test_models_that_cannot_be_are_refused_and_nothing_is_left(place, tmp_path, tiny, loaded):
    model, tokenizer = loaded
    out = {"data": TEXTS, "out": tmp_path / "run", "progress": False, **tiny}
    refused(lambda: ap.sparsify(model, **out), "needs its tokenizer")
    refused(lambda: ap.sparsify(None, **out), "no model given")
    refused(lambda: ap.sparsify(torch.nn.Linear(2, 2), tokenizer, **out), "model: not a name")
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(place / "model"), LoraConfig(target_modules=["q_proj"])
    )
    refused(lambda: ap.sparsify(adapted, tokenizer, **out), "is not a transformers model")
    ap.attach(model)
    for given in ((model, tokenizer), ((model, tokenizer),)):
        error = refused(lambda given=given: ap.sparsify(*given, **out), "model: has gates already")
        assert "init=SIDECAR" in error.hint
    refused(lambda: ap.sparsify(place / "model", data=[str(place / "text.txt")], out=tmp_path / "run"), "is a file")
    refused(
        lambda: ap.sparsify(place / "model", data=["short"], out=tmp_path / "run", **tiny), "shorter than one block"
    )
    (tmp_path / "run-inputs").mkdir()
    (tmp_path / "run-inputs" / "mine").touch()
    refused(lambda: ap.sparsify(place / "model", data=TEXTS, out=tmp_path / "run", **tiny), "is not empty")
    assert left(tmp_path) == ["run-inputs"]


def test_an_interrupted_run_goes_on_from_its_folder(place, tmp_path, tiny, loaded):
    class StopError(Exception):
        pass

    from transformers import TrainerCallback

    class AfterFive(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise StopError

    out = tmp_path / "run"
    with pytest.raises(StopError):
        ap.sparsify(*loaded, data=TEXTS, out=out, progress=False, callbacks=[AfterFive()], **tiny)
    assert left(tmp_path / "run-inputs") == ["model", "texts.jsonl"]
    refused(lambda: ap.sparsify(*loaded, data=TEXTS, resume=out), "leave out model and data")
    refused(lambda: ap.sparsify(*loaded, data=TEXTS, finish=out), "leave out model and data")
    copy = shutil.copytree(out, tmp_path / "copy")
    ended = ap.sparsify(finish=copy, progress=False)
    assert ended.manifest.result.steps == 4  # the last checkpoint
    refused(lambda: ap.sparsify(finish=copy), "this run has finished")
    refused(lambda: ap.sparsify(finish=out, resume=True), "finish: leave out resume")
    resumed = ap.sparsify(resume=out, progress=False)
    whole = ap.sparsify(*loaded, data=TEXTS, out=tmp_path / "whole", progress=False, **tiny)
    assert resumed.manifest.result == whole.manifest.result


def test_progress_says_what_happens_on_stderr(place, tmp_path, tiny, capsys):
    assert ap.sparsify(place / "model", data=place / "text.txt", out=tmp_path / "run", dry_run=True, **tiny) is None
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Plan" in shown.err
    assert left(tmp_path) == []
    tiny["tolerance"] = 1e-6
    ap.sparsify(place / "model", data=place / "text.txt", out=tmp_path / "run", **tiny)
    shown = capsys.readouterr()
    assert "gap" in shown.err
    assert "NOT MET: fewest edges with KL" in shown.err
    assert shown.out == ""
