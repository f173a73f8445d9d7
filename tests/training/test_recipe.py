"""The whole flow on tiny models: export equals what loads, scopes, settings, refusals."""

from __future__ import annotations

import io
import itertools
import json
import shutil
import sys
import tomllib

import pytest
import torch
from rich.console import Console

import attnprune
from attnprune.cli.app import run
from attnprune.data.sampling import sample
from attnprune.errors import InputError
from attnprune.files import locked
from attnprune.report.plan import plan_data, plan_table
from attnprune.sidecar import bases, loading
from attnprune.sidecar.folder import open_sidecar
from attnprune.training import recipe
from attnprune.training.evaluation import SELF_SEED, evaluate_model
from attnprune.training.resolve import load_base, resolve
from tests.helpers.factory import save_tiny_llama
from tests.helpers.recipes import run_config


@pytest.mark.parametrize(("capability", "precision", "told"), [
    ("AVX2", "bf16", True), ("AVX2", "fp32", False), ("AVX512", "bf16", False),
])  # fmt: skip
def test_bf16_on_a_processor_without_it_is_told(inputs, tmp_path, monkeypatch, capability, precision, told):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    config = run_config(inputs, tmp_path / "run", train={"precision": precision})
    _, notes = resolve(config, load_base(config))
    assert any("no bf16 instructions" in note for note in notes) == told


def test_result_is_reproduced_by_loading_the_sidecar(uninterrupted, inputs):
    [report] = evaluate_model(str(uninterrupted.path), uninterrupted, [], base=str(inputs[0]))
    result = uninterrupted.manifest.result
    assert (report.loss, report.open_edges) == (result.loss, result.open_edges)
    assert (report.base_loss, report.kl, report.control_loss) == (result.base_loss, result.kl, result.control_loss)


def test_finished_run_leaves_a_sidecar_and_no_checkpoints(uninterrupted):
    names = {file.name for file in uninterrupted.path.iterdir()}
    assert names == {"attnprune.json", "gates.safetensors", "delta.safetensors", "run.toml", "metrics.jsonl"}


def test_metrics_hold_the_constraint_numbers(uninterrupted):
    lines = [json.loads(line) for line in (uninterrupted.path / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if "eval_density" in line]
    assert [line["step"] for line in evaluations] == [4, 8, 12]
    assert all({"multiplier", "gap", "density", "violation"} <= set(line) for line in lines if "multiplier" in line)


@pytest.mark.parametrize(("scope", "kind"), [("gates", "none"), ("lora", "lora"), ("attn", "delta"), ("full", "delta")])
def test_every_scope_loads_back_and_moves_only_its_weights(inputs, tmp_path, scope, kind):
    sidecar = recipe.sparsify(run_config(inputs, tmp_path / "run", train={"scope": scope, "steps": 8}))
    assert sidecar.manifest.weights.kind == kind
    base = dict(bases.load_base(str(inputs[0])).model.named_parameters())
    sparse = attnprune.load(sidecar.path, base=str(inputs[0])).model
    moved = {n for n, p in sparse.named_parameters() if n in base and not torch.equal(p, base[n])}
    attention = {n for n in base if "self_attn" in n}
    assert moved == {"gates": set(), "lora": attention, "attn": attention, "full": set(base)}[scope]
    loading.verify_probe(sparse, sidecar.manifest)


def test_gates_start_with_the_asked_share_of_the_softmax_mass(inputs, tmp_path):
    """One step that moves nothing: the smaller share starts sparser."""
    density = {}
    for mass in (0.5, 0.9):
        overrides = {
            "gate": {"initial_mass": mass},
            "train": {"scope": "gates", "steps": 1, "gate_learning_rate": 1e-9},
        }
        sidecar = recipe.sparsify(run_config(inputs, tmp_path / f"run-{mass}", **overrides))
        density[mass] = sidecar.manifest.result.density
    assert 0 < density[0.5] < density[0.9] < 1


def test_eval_on_text_that_the_base_writes(uninterrupted, inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    [report] = evaluate_model(str(uninterrupted.path), uninterrupted, ["self"], base=str(inputs[0]), tokens=64)
    assert (report.data, report.seq_len) == ("self", 16)
    assert report.kl > 0


def test_text_to_measure_on_is_not_that_of_a_runs_seed(inputs):
    base = bases.load_base(str(inputs[0]))
    seeds = (0, 1, 2**32 - 1, SELF_SEED)
    drawn = [sample(base.model, base.tokenizer, 4, 16, seed) for seed in seeds]
    assert all(not torch.equal(one, other) for one, other in itertools.combinations(drawn, 2))


def test_plan_can_stop_the_run_and_leaves_nothing(inputs, tmp_path):
    plans = []
    assert recipe.sparsify(run_config(inputs, tmp_path / "run"), on_plan=lambda plan: bool(plans.append(plan))) is None
    assert not (tmp_path / "run").exists()
    assert plans[0].trainable == plans[0].total
    assert plans[0].seconds_per_1000_steps > 0


def planned(inputs, out, **overrides):
    """The plan of a run that stops there."""
    plans = []
    recipe.sparsify(run_config(inputs, out, **overrides), on_plan=lambda plan: bool(plans.append(plan)))
    return plans[0]


@pytest.mark.parametrize(("steps", "warned"), [(12, False), (2500, True)])
def test_more_than_twenty_passes_are_told(inputs, tmp_path, steps, warned):
    plan = planned(inputs, tmp_path / "run", train={"steps": steps})
    assert (plan.passes > 20) == warned
    warnings = [note for note in plan.notes if note.startswith("warning: ")]
    assert len(warnings) == warned
    assert all(f"{plan.passes:.0f} passes over the text" in note for note in warnings)


def test_the_plan_says_what_each_source_gave(inputs, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["word " * 300, None, "", "more " * 100]))
    plan = planned(inputs, tmp_path / "run", data={"source": [str(inputs[1]), str(rows)]})
    assert [source.name for source in plan.sources] == ["text.txt", "rows.jsonl"]
    assert plan.sources[1].tokens == 2000 // 16 * 16
    assert sum(source.tokens for source in plan.sources) == plan.train_tokens + plan.eval_tokens
    assert "data: rows.jsonl: 2 empty rows skipped" in plan.notes
    assert [source["empty_rows"] for source in plan_data(plan)["sources"]] == [0, 2]
    console = Console(width=1000, record=True, file=io.StringIO())
    console.print(plan_table(plan))
    shown = console.export_text()
    assert f"{inputs[1]} + {rows}: " in shown
    assert "rows.jsonl: 2,000 tokens" in shown


def test_a_run_on_two_texts_records_both_and_is_measured_again(inputs, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("another text, a line of it\n" * 200)
    overrides = {"data": {"source": [str(inputs[1]), str(other)]}, "train": {"scope": "gates", "steps": 4}}
    sidecar = recipe.sparsify(run_config(inputs, tmp_path / "run", **overrides))
    result = sidecar.manifest.result
    assert result.data == "text.txt + other.txt"
    assert [(source.data, source.tokens) for source in result.sources] == [
        ("text.txt", inputs[1].stat().st_size // 16 * 16), ("other.txt", 5392)
    ]  # fmt: skip
    stored = tomllib.loads((sidecar.path / "run.toml").read_text())
    assert stored["data"]["source"] == [str(inputs[1]), str(other)]
    [report] = evaluate_model(str(sidecar.path), sidecar, [], base=str(inputs[0]))
    assert (report.loss, report.data) == (result.loss, result.data)


def test_data_can_be_given_several_times(inputs, tmp_path, capsys, monkeypatch):
    """On the command line; `--data A --data B` once kept only B."""
    for name in ("a.txt", "b.TXT"):
        (tmp_path / name).write_text(f"a line of {name}\n" * 100)
    command = ["sparsify", str(inputs[0]), "--out", str(tmp_path / "run"), "--steps", "2", "--scope", "gates"]
    command += ["--data", str(tmp_path / "a.txt"), "--data", str(tmp_path / "b.TXT"), "--seq-len", "16"]
    monkeypatch.setattr(sys, "argv", ["attnprune", *command, "--device", "cpu", "--dry-run", "--json"])
    assert run() == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["config"]["data"]["source"] == [str(tmp_path / "a.txt"), str(tmp_path / "b.TXT")]
    assert [source["name"] for source in plan["sources"]] == ["a.txt", "b.TXT"]
    assert not (tmp_path / "run").exists()


def test_output_folder_in_use_is_refused(inputs, tmp_path):
    with locked(tmp_path / "run"), pytest.raises(InputError, match="in use by another run"):
        recipe.sparsify(run_config(inputs, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_other_base_is_refused(uninterrupted, tmp_path):
    other = save_tiny_llama(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match="not the weights"):
        attnprune.load(uninterrupted.path, base=str(other))
    wider = save_tiny_llama(tmp_path / "wider", num_attention_heads=8)
    with pytest.raises(InputError, match="wrong base"):
        attnprune.load(uninterrupted.path, base=str(wider))
    assert attnprune.load(uninterrupted.path, base=str(other), allow_base_mismatch=True)


def test_unnamed_local_base_asks_for_base(uninterrupted, tmp_path):
    """Its run.toml remembers it; what was copied without that file does not."""
    attnprune.load(open_sidecar(uninterrupted.path).path)
    bare = shutil.copytree(uninterrupted.path, tmp_path / "bare")
    (bare / "run.toml").unlink()
    with pytest.raises(InputError, match="name it"):
        attnprune.load(bare)
