"""`--report-to`: the run's numbers reach a tracker, and a missing one is said before anything is loaded."""

from __future__ import annotations

import sys

import pytest

from attnprune.errors import AttnPruneError
from attnprune.training import recipe
from tests.helpers.recipes import logged, run_config


def test_tensorboard_gets_what_metrics_jsonl_gets(inputs, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = run_config(inputs, tmp_path / "run", output={"folder": str(tmp_path / "run"), "report_to": "tensorboard"})
    recipe.sparsify(config)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    names = events.Tags()["scalars"]
    assert {"train/multiplier", "train/kl", "eval/density", "eval/kl"} <= set(names)
    seen = [event.value for event in events.Scalars("train/kl")]
    assert seen == pytest.approx(logged(tmp_path / "run", "kl"), rel=1e-5)


def test_a_tracker_that_is_not_installed_is_named(inputs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: False)
    config = run_config(inputs, tmp_path / "run", output={"folder": str(tmp_path / "run"), "report_to": "wandb"})
    with pytest.raises(AttnPruneError, match="wandb is not installed") as missing:
        recipe.sparsify(config)
    assert missing.value.hint == "pip install wandb"
    assert not (tmp_path / "run").exists()
