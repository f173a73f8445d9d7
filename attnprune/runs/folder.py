"""The run folder: its files, and the checks before anything heavy is imported. No torch.

OUT/run.toml  metrics.jsonl  checkpoints/checkpoint-N/  when the run has finished the sidecar's files; damage.json
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from attnprune.errors import InputError
from attnprune.files import check_writable, unusable
from attnprune.runs.config import RunConfig, build_config, merge, override, read_toml

RUN_FILE = "run.toml"
METRICS_FILE = "metrics.jsonl"
DAMAGE_FILE = "damage.json"  # by `attnprune eval --damage`, after the run
CHECKPOINTS = "checkpoints"
MANIFEST_FILE = "attnprune.json"  # written last: with it the folder is a sidecar and the run has finished
DEMO = "demo"

# The bundled model: small, exact, ten tokens of context; the constraint is the loss itself.
DEMO_DEFAULTS: dict[str, Any] = {
    "data": {"source": "task", "seq_len": 10},
    "constraint": {"kind": "loss", "tolerance": 0.01, "start_factor": 10.0},
    "train": {"batch_size": 128, "scope": "full", "steps": 2000, "eval_every": 50},
}


def defaults_for(model: str) -> dict[str, Any]:
    """Settings that suit this model better than the general defaults."""
    return DEMO_DEFAULTS if model == DEMO else {}


def output_folder(config: RunConfig) -> Path:
    """Where the run writes: `--out`, or ./MODEL-attnprune."""
    if config.output.folder:
        return Path(os.path.normpath(config.output.folder))
    name = Path(config.model.name)
    return Path(f"{name.stem if name.suffix.lower() == '.gguf' else name.name}-attnprune")


def check_output(folder: Path) -> None:
    """Refuse an output folder that is a file, not writable, or not empty.

    Raises:
        InputError
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder}: is a file, not a folder")
        if (folder / CHECKPOINTS).is_dir() and not (folder / MANIFEST_FILE).exists():
            raise InputError(
                f"{folder}: holds an unfinished run",
                hint=f"continue it with: attnprune sparsify --resume {folder}, or choose another --out",
            )
        if folder.exists() and any(folder.iterdir()):
            raise InputError(f"{folder}: exists and is not empty", hint="choose another folder with --out")
        parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    except OSError as error:
        raise unusable(folder, error) from None
    if not parent.is_dir():
        raise InputError(f"{folder}: not writable")
    check_writable(parent)


def load_run_file(file: Path) -> RunConfig:
    """The resolved configuration a run wrote.

    Raises:
        InputError: missing or damaged.
    """
    return build_config(read_toml(file))


def without_local_paths(config: RunConfig) -> RunConfig:
    """The configuration as others may see it: of local files and folders only the last part of the name."""

    def last(name: str) -> str:
        return os.path.basename(os.path.normpath(name)) if os.path.exists(name) or os.path.isabs(name) else name

    sources = [last(source) for source in config.data.sources]
    return config.model_copy(
        update={
            "model": config.model.model_copy(
                update={"name": last(config.model.name), "init": config.model.init and last(config.model.init)}
            ),
            "data": config.data.model_copy(update={"source": sources if len(sources) > 1 else sources[0]}),
            "output": config.output.model_copy(update={"folder": ""}),
        }
    )


def read_resumed(folder: Path, given: dict[str, Any]) -> RunConfig:
    """The configuration of the unfinished run in `folder`; settings given again must agree with it.

    Raises:
        InputError: no run there, it has finished, or a setting differs.
    """
    if (folder / MANIFEST_FILE).exists():
        raise InputError(f"{folder}: this run has finished", hint=f"attnprune inspect {folder}")
    if not (folder / RUN_FILE).exists() or not (folder / CHECKPOINTS).is_dir():
        raise InputError(f"{folder}: nothing to resume")
    unnamed = {"train": {"step": "plain"}}  # what a run of a release without the other one goes on with
    stored = merge(merge(unnamed, read_toml(folder / RUN_FILE)), {"output": {"folder": str(folder)}})
    config = build_config(stored)
    for section, values in build_config(override(stored, given)).model_dump().items():
        for key, value in values.items():
            before = getattr(getattr(config, section), key)
            if value != before:
                raise InputError(f"{section}.{key}: {value!r} differs from the run's {before!r}")
    return config


def remembered_model(folder: Path) -> Path | None:
    """The local model that the run in `folder` was made from; None without run.toml, or with one that says less.

    What was pushed to the Hub names no folders.
    """
    try:
        name = read_toml(folder / RUN_FILE)["model"]["name"]
    except (InputError, LookupError, TypeError):
        return None
    return Path(name) if isinstance(name, str) and os.path.isabs(name) else None
