"""Experiment trackers through transformers' own callbacks."""

from __future__ import annotations

from pathlib import Path

from transformers import TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks

from attnprune.errors import AttnPruneError


def tracker(name: str, folder: Path) -> list[TrainerCallback]:
    """The callback that sends a run's logs to a tracker; none for "none". TensorBoard's files go to OUT/tensorboard.

    Raises:
        AttnPruneError: the tracker is not installed.
    """
    if name == "none":
        return []
    [kind] = get_reporting_integration_callbacks([name])
    try:
        made = kind()
    except (ImportError, RuntimeError):
        raise AttnPruneError(f"output.report_to: {name} is not installed", hint=f"pip install {name}") from None
    if name == "tensorboard":
        made.logging_dir = str(folder / "tensorboard")
    return [made]
