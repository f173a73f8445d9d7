"""Experiment trackers through transformers' own callbacks."""

from __future__ import annotations

from pathlib import Path

from transformers import TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks

from attnprune.errors import not_installed


def tracker(name: str, folder: Path) -> list[TrainerCallback]:
    """The callback that sends a run's logs to a tracker; none for "none". TensorBoard's files go to OUT/tensorboard.

    Raises:
        InputError: the tracker is not installed.
    """
    if name == "none":
        return []
    [kind] = get_reporting_integration_callbacks([name])
    try:
        made = kind()
    except (ImportError, RuntimeError):
        raise not_installed(name) from None
    if name == "tensorboard":
        made.logging_dir = str(folder / "tensorboard")
    return [made]
