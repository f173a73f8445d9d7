"""`attnprune bench`: real runs on tiny shapes, through the command line and the functions."""

import json
import sys

import pytest
import torch

from attnprune.bench import attention, clock, models, providers
from attnprune.bench.cases import SUITES
from attnprune.bench.providers import GATED, SDPA
from attnprune.bench.record import Record
from attnprune.circuit.folder import read_record
from attnprune.cli import app
from attnprune.errors import InputError
from attnprune.runs.config import build_config
from attnprune.training import recipe
from tests.helpers.bench import CPU, case
from tests.helpers.command import attnprune
from tests.helpers.factory import save_text, save_tiny_llama
from tests.helpers.paths import EXAMPLES, ROOT


def bench(*arguments, cwd=None):
    return attnprune("bench", *arguments, cwd=cwd or ROOT)


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    base, text = save_tiny_llama(folder / "base"), save_text(folder / "text.txt")
    values = {
        "model": {"name": str(base), "device": "cpu"}, "data": {"source": str(text), "seq_len": 16, "eval_tokens": 64},
        "train": {"steps": 2, "batch_size": 2, "scope": "gates"}, "output": {"folder": str(folder / "sparse")},
    }  # fmt: skip
    recipe.sparsify(build_config(values))
    return folder / "sparse", text, base


@pytest.mark.parametrize("suite", SUITES)
def test_the_wanted_density_is_what_is_measured(suite):
    made = case(suite, density=0.05, keys=400)
    assert made.density() == pytest.approx(0.05, abs=0.02)
    assert made.scores == 4 * (400 if suite == "decode" else 400 * 401 // 2)


@pytest.mark.parametrize(("suite", "noise"), [("train", False), ("train", True), ("prefill", False), ("decode", False)])
def test_providers_agree_with_the_definition_and_are_timed_side_by_side(monkeypatch, suite, noise):
    if not torch.cuda.is_available():
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    providers = [*SDPA, *GATED]
    rows = {row.provider: row for row in attention.measure(case(suite, noise=noise), providers, 2)}
    chunked, eager = rows["chunked"], rows["eager"]
    assert chunked.error < 1e-5
    assert rows["sdpa-math"].error < 1e-5
    assert chunked.timing.repeats == 2
    assert chunked.ratio_to_eager == pytest.approx(eager.timing.median_ms / chunked.timing.median_ms)
    fastest = min(row.timing.median_ms for name, row in rows.items() if row.timing and name.startswith("sdpa"))
    assert chunked.ratio_to_sdpa == pytest.approx(fastest / chunked.timing.median_ms)
    if not torch.cuda.is_available():
        assert rows["triton"].status == "could not run"
        assert "no CUDA" in rows["triton"].note
    assert rows["splash"].note == "splash_attention is not installed"


def test_a_wrong_provider_is_found_and_not_timed(monkeypatch):
    def wrong(backend, case):
        return lambda query, key, value, bias: (query * 0.5, None)

    monkeypatch.setattr(providers, "_sdpa", wrong)
    [row] = attention.measure(case("prefill"), ["sdpa-math"], 1)
    assert (row.status, row.timing) == ("wrong", None)
    assert "relative error" in row.note


def test_a_budget_of_nothing_measures_the_first_case_and_names_the_others():
    rows, left_out = attention.run([case, case, case], ["chunked"], 1, 0.0, ["a", "b", "c"])
    assert [row.provider for row in rows] == ["chunked"]
    assert left_out == ["b", "c"]
    with pytest.raises(InputError, match="--providers: magic"):
        attention.run([case], ["magic"], 1, 1.0, ["a"])


def test_peak_memory_sees_a_large_tensor():
    peak = clock.peak_bytes(lambda: torch.ones(64 * 2**20 // 4) + 1, CPU)
    assert peak is None or 2 * 64 * 2**20 * 0.9 < peak < 2 * 64 * 2**20 * 1.3


def test_generation_that_depends_on_the_cache_is_wrong(monkeypatch, sidecar):
    from attnprune.sidecar.loading import load

    model, _ = load(sidecar[0], str(sidecar[2]))
    ids = torch.randint(0, 200, (1, 6))
    assert {row.status for row in models.bench_generate(model, model, ids, 3, 1)} == {"ok"}
    monkeypatch.setattr(models, "_uncached", lambda model, ids, count: torch.zeros(1, count, dtype=torch.long) - 1)
    rows = models.bench_generate(model, model, ids, 3, 1)
    assert [row.status for row in rows] == ["ok", "wrong"] * 2


def test_the_command_writes_a_record_of_the_schema(tmp_path):
    shape = ["--seq-len", "32", "--heads", "2", "--head-dim", "8", "--density", "0.2", "--repeats", "1"]
    done = bench("attention", *shape, "--suite", "prefill", "--out", "made.json", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = Record.model_validate_json((tmp_path / "made.json").read_text())
    assert json.loads(done.stdout) == json.loads((tmp_path / "made.json").read_text())
    assert record.command.startswith("attnprune bench attention --seq-len 32")
    assert {row.suite for row in record.rows} == {"prefill"}
    assert record.machine.versions["torch"] == torch.__version__


def test_models_and_real_scores_through_the_command_line(sidecar):
    folder, text, base = sidecar
    captured = ["--from", str(folder), "--base", str(base), "--data", str(text)]
    real = bench("attention", *captured, "--seq-len", "24", "--suite", "decode", "--repeats", "1", "--json")
    assert real.returncode == 0, real.stderr
    [chunked] = [row for row in json.loads(real.stdout)["rows"] if row["provider"] == "chunked"]
    assert chunked["error"] < 1e-4
    for arguments in (["train", str(folder), "--batch-size", "1"], ["generate", str(folder), "--new-tokens", "3"]):
        done = bench(*arguments, "--base", str(base), "--seq-len", "12", "--repeats", "1", "--json")
        assert done.returncode == 0, done.stderr
        rows = json.loads(done.stdout)["rows"]
        assert rows[0]["provider"] == "dense sdpa"
        assert all(row["tokens_per_second"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attention", "--suite", "sleep"], "--suite: sleep"),
        (["attention", "--heads", "4", "--kv-heads", "3"], "--kv-heads: 4 heads"),
        (["attention", "--provider", "magic", "--seq-len", "4"], "--providers: magic"),
        (["attention", "--from", "somewhere"], "--from: needs --data"),
        (["attention", "--out", "no/such/folder/x.json"], "no such folder"),
        (["train", "demo", "--seq-len", "4096"], "--seq-len: 4096 tokens"),
    ],
)
def test_bad_options_are_refused(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["attnprune", "bench", *arguments])
    assert app.run() == 2
    assert message in capsys.readouterr().err


def test_committed_records_are_of_today_s_schema():
    results = EXAMPLES / "results"
    record = Record.model_validate_json((results / "bench-attention-cpu.json").read_text())
    assert {row.suite for row in record.rows} == {"train", "prefill"}
    circuits = [read_record(folder) for folder in (results / "circuits").iterdir()]
    assert {circuit.task.name for circuit in circuits} == {"addition", "greater-than", "induction", "ioi", "sva"}
    assert all([model.kind for model in circuit.models] == ["sparse", "dense"] for circuit in circuits)
