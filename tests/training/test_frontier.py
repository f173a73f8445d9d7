"""One run, several densities: a sidecar for each, and the curve; stopping early keeps what there is."""

from __future__ import annotations

import json
import signal

import pytest

from attnprune.errors import AttnPruneError, InputError, InterruptedRunError
from attnprune.runs.folder import CHECKPOINTS, read_resumed
from attnprune.runs.frontier import FRONTIER_FILE, read_frontier
from attnprune.sidecar.folder import open_sidecar
from attnprune.training import evaluation, recipe
from tests.helpers.recipes import _SignalAt, artefact, run_config

MARKS = [0.25, 0.1, 0.06]
RUN = {
    "constraint": {"kind": "density", "frontier": MARKS[:-1], "target_density": MARKS[-1], "rate": 0.1},
    "train": {"steps": 60, "eval_every": 60, "save_every": 15, "gate_learning_rate": 0.05, "learning_rate": 3e-3},
    "gate": {"initial_mass": 0.0, "bias_init": 1.0},
}
FOLDERS = ["frontier/25", "frontier/10", "."]


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    return recipe.sparsify(run_config(inputs, tmp_path_factory.mktemp("frontier") / "run", **RUN))


def test_each_density_has_a_sidecar_that_holds_it(finished, inputs):
    points, place = read_frontier(finished.path)
    assert place == 2
    assert [point.folder for point in points] == FOLDERS
    assert [point.limit for point in points] == MARKS
    for number, point in enumerate(points):
        sidecar = open_sidecar(finished.path / point.folder)
        result = sidecar.manifest.result
        assert (result.constraint, result.limit, result.feasible) == ("density", point.limit, True)
        assert result.density == point.density <= point.limit
        assert read_frontier(sidecar.path) == (points, number)
        [report] = evaluation.evaluate_model("", sidecar, [], base=str(inputs[0]))  # on the run's own held-out text
        assert (report.loss, report.kl, report.density) == (point.loss, point.kl, point.density)
    assert points[2].density < points[0].density


def test_it_is_the_best_state_within_each_density(finished):
    lines = [json.loads(line) for line in (finished.path / "metrics.jsonl").read_text().splitlines()]
    measured = [line for line in lines if "eval_density" in line]
    assert [line["step"] for line in measured] == [20, 40, 60]  # the end of each stretch
    for point in read_frontier(finished.path)[0]:
        within = [line["eval_loss"] for line in measured if line["eval_density"] <= point.limit]
        assert point.loss == pytest.approx(min(within), abs=1e-6)


def test_a_run_that_was_interrupted_ends_in_the_same_frontier(finished, inputs, tmp_path):
    config = run_config(inputs, tmp_path / "run", **RUN)
    with pytest.raises(InterruptedRunError, match="interrupted"):
        recipe.sparsify(config, callbacks=[_SignalAt(47, signal.SIGTERM)])
    resumed = recipe.sparsify(read_resumed(tmp_path / "run", {}), resume=True)
    assert (resumed.path / FRONTIER_FILE).read_bytes() == (finished.path / FRONTIER_FILE).read_bytes()
    for folder in FOLDERS:
        assert artefact(resumed.path / folder) == artefact(finished.path / folder)


def test_finish_exports_the_best_state_so_far(inputs, tmp_path):
    config = run_config(inputs, tmp_path / "run", **RUN)
    with pytest.raises(InterruptedRunError, match="interrupted") as stopped:
        recipe.sparsify(config, callbacks=[_SignalAt(47, signal.SIGTERM)])
    assert "--finish" in stopped.value.hint
    notes = []
    sidecar = recipe.sparsify(read_resumed(tmp_path / "run", {}), finish=True, on_note=notes.append)
    assert "ended at step 48 of 60" in notes
    assert not (tmp_path / "run" / CHECKPOINTS).exists()
    points, _ = read_frontier(sidecar.path)
    assert [point.feasible for point in points[:2]] == [True, True]
    assert sidecar.manifest.result.steps == 48
    lines = [json.loads(line) for line in (sidecar.path / "metrics.jsonl").read_text().splitlines()]
    measured = {line["step"]: line for line in lines if "eval_density" in line}
    assert list(measured) == [20, 40, 48]  # what had been trained since the last evaluation is measured
    assert points[1].loss == pytest.approx(
        min(line["eval_loss"] for line in measured.values() if line["eval_density"] <= MARKS[1]), abs=1e-6
    )


def test_finish_needs_a_checkpoint(inputs, tmp_path):
    def stop(*args, **kwargs):
        raise AttnPruneError("stopped")

    config = run_config(inputs, tmp_path / "run", **RUN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "_train", stop)
        with pytest.raises(AttnPruneError, match="stopped"):
            recipe.sparsify(config)
    with pytest.raises(InputError, match="no checkpoint to finish from"):
        recipe.sparsify(read_resumed(tmp_path / "run", {}), finish=True)


def test_a_damaged_frontier_is_told_in_one_line(finished, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / FRONTIER_FILE).write_text('[{"folder": "."}]')
    with pytest.raises(InputError, match=r"frontier\.json: is damaged"):
        read_frontier(folder)
