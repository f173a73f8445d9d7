"""Every script in examples/ runs, and what it generates has not drifted."""

from __future__ import annotations

import json
import random

import pytest

from attnprune.runs.config import build_config
from attnprune.training import recipe
from examples.write_schema import FORMATS, SCHEMAS, schema_text
from tests.helpers.command import python
from tests.helpers.factory import save_text, save_tiny_llama
from tests.helpers.paths import ROOT
from tests.helpers.sidecars import save_sidecar


def run(*arguments: object) -> str:
    done = python(*arguments, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema_matches_the_models(name):
    assert (FORMATS / name).read_text() == schema_text(SCHEMAS[name])


def test_demo_model_script_trains_and_saves(tmp_path):
    printed = run("examples/train_demo_model.py", "--out", tmp_path / "demo", "--steps", 3)
    assert "exact answers" in printed
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {f.name for f in (tmp_path / "demo").iterdir()}


def test_compare_estimators_script_writes_its_table(tmp_path):
    options = ("--steps", 20, "--seeds", 1, "--temperatures", 4, "--estimators", "threshold")
    run("examples/compare_estimators.py", "--out", tmp_path / "out.json", *options)
    report = json.loads((tmp_path / "out.json").read_text())
    assert [r["seed"] for r in report["runs"]] == [0]
    assert report["table"][2].startswith("| threshold | 4 |")


def test_recipe_file_runs_on_a_tiny_model(tmp_path):
    model, text = save_tiny_llama(tmp_path / "model"), save_text(tmp_path / "text.txt")
    small = ("--seq-len", 16, "--eval-tokens", 160, "--steps", 2, "--device", "cpu", "--tolerance", 5)
    recipe = ("--config", "examples/smollm2-cpu.toml", "--data", text, "--out", tmp_path / "run")
    run("-m", "attnprune", "sparsify", model, *recipe, *small)
    manifest = json.loads((tmp_path / "run" / "attnprune.json").read_text())
    assert manifest["weights"]["kind"] == "lora"


def test_trace_sentences_compares_two_models(tmp_path):
    base = save_tiny_llama(tmp_path / "base", max_position_embeddings=128)
    sidecar = save_sidecar(tmp_path / "sidecar", base).path
    run("examples/trace_sentences.py", sidecar, "--base", base, "--sentences", 2, "--out", tmp_path / "out.json")
    record = json.loads((tmp_path / "out.json").read_text())
    sizes = [(row["dense"]["messages"], row["sparse"]["messages"]) for row in record["traces"]]
    assert len(sizes) == 2
    ratio = record["ratio_dense_sparse"]
    assert ratio["low"] <= ratio["value"] <= ratio["high"]
    (a, b), (c, d) = sizes
    assert ratio["value"] == pytest.approx((a / b * c / d) ** 0.5, abs=1e-3)


def words(count: int, seed: int) -> str:
    names = [
        a + b for a in ("stone", "river", "cloud", "field") for b in ("light", "house", "winds", "bridge", "paths")
    ]
    return " ".join(random.Random(seed).choices(names, k=count))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, its base, a text) of a short run."""
    folder = tmp_path_factory.mktemp("finished")
    model, text = save_tiny_llama(folder / "model", max_position_embeddings=1024), folder / "text.txt"
    text.write_text("\n".join(words(80, n) for n in range(20)))
    values = {
        "model": {"name": str(model), "device": "cpu"},
        "data": {"source": str(text), "seq_len": 64, "eval_tokens": 128},
        "train": {"steps": 2, "batch_size": 2, "scope": "gates"},
        "constraint": {"kind": "density", "frontier": [1.0], "target_density": 0.999},
        "output": {"folder": str(folder / "run")},
    }  # fmt: skip
    recipe.sparsify(build_config(values))
    return folder / "run", model, text


def test_collect_results_gathers_a_run(finished, tmp_path):
    folder, model, text = finished
    options = ("--base", model, "--data", text, "--tokens", 64, "--out", tmp_path / "out.json")
    run("examples/collect_results.py", folder, *options)
    evidence = json.loads((tmp_path / "out.json").read_text())
    assert evidence["other_texts"][0]["data"] == "text.txt"
    assert evidence["curve"][-1]["step"] == 2
    [other] = evidence["frontier"]
    assert other["limit"] == other["result_on_the_held_out_split"]["limit"] == 1
    assert other["other_texts"][0]["tokens"] == evidence["other_texts"][0]["tokens"]


def test_small_lm_and_recipe_search(tmp_path):
    text = tmp_path / "peps.txt"
    text.write_text("\n\n\n".join(f"PEP: {n}\n{words(150, n)}" for n in range(101)))
    model = tmp_path / "lm"
    options = ("--steps", 2, "--batch-size", 2, "--vocabulary", 300)
    assert "held-out" in run("examples/train_small_lm.py", text, "--out", model, *options)
    test, unseen = ((model / f"{name}.jsonl").read_text().splitlines() for name in ("test", "unseen"))
    assert len(test) == 6  # every 20th of 101 documents
    assert unseen == test[1:]
    search = ("--variants", "published", "control", "--steps", 2, "--out", tmp_path / "search.json")
    run("examples/recipe_search.py", model, *search)
    runs = {r["variant"]: r for r in json.loads((tmp_path / "search.json").read_text())["runs"]}
    assert runs["control"]["test"]["density"] == 1
    assert runs["control"]["test"]["loss"] == pytest.approx(runs["control"]["test"]["control_loss"])
    assert runs["control"]["unseen"]["base_loss"] != runs["control"]["test"]["base_loss"]
    assert runs["published"]["settings"]["gate"]["estimator"] == "gumbel"
    assert runs["published"]["tokens"] == 2 * 8 * 256
    assert run("examples/recipe_search.py", model, *search) == ""  # nothing is run twice
    assert list((tmp_path / "search.runs").glob("*/")) == []  # and what was measured is not kept


def test_what_is_lost_compares_two_models(finished, tmp_path):
    folder, model, text = finished
    options = ("--base", model, "--data", text, "--tokens", 256, "--items", 4, "--out", tmp_path / "lost.json")
    run("examples/what_is_lost.py", folder, *options)
    lost = json.loads((tmp_path / "lost.json").read_text())
    measured = lost["texts"]["text.txt"]
    assert list(measured["loss by position"]["base"]) == ["1-15", "16-31", "32-63"]
    assert all(task["items"] == 4 for task in measured["tasks"].values())
    assert 0 < measured["agreement"] <= 1
    assert len(lost["continuations"]) == 4


def test_where_copying_went_names_layers_and_heads(finished, tmp_path):
    folder, model, _ = finished
    options = ("--base", model, "--rows", 2, "--heads", 3, "--out", tmp_path / "copying.json")
    run("examples/where_copying_went.py", folder, *options)
    found = json.loads((tmp_path / "copying.json").read_text())
    assert found["damage"]["data"] == "random tokens, repeated"
    half = found["damage"]["seq_len"] // 2
    assert found["damage"]["tokens"] == 2 * (half - 1)
    assert list(found["copied"]["layers"]) == ["1", "2"]
    assert len(found["heads"]) == 3
    assert all(0 <= share <= 1 for head in found["heads"] for share in head["base"].values())


def test_stores_answer_alike(tmp_path):
    run("-m", "attnprune", "index", "demo", "--data", "task", "--tokens", 100, "-o", tmp_path / "index")
    out = tmp_path / "out.json"
    run("examples/compare_stores.py", tmp_path / "index", "--edges", 10_000, "--draws", 3, "--out", out)
    result = json.loads(out.read_text())
    assert result["edges"] == 10_000  # more than the index has: it is repeated
    assert set(result["sides"]) == {"sqlite", "parquet and duckdb"}
    for side in result["sides"].values():
        assert side["bytes"] > 10_000
        assert len(side["milliseconds"]) == 7
