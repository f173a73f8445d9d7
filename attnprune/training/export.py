"""From a trained model to a published sidecar: what is measured is what is on disk."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnprune.attention.interface import GATE_ATTRIBUTE, gates_of
from attnprune.data.blocks import Blocks
from attnprune.errors import AttnPruneError, InputError
from attnprune.files import temporary_folder
from attnprune.measure import GateStatistics, Report, gate_statistics, measure
from attnprune.runs.config import RunConfig
from attnprune.runs.folder import CHECKPOINTS, RUN_FILE
from attnprune.runs.frontier import Point, point_folder, write_frontier
from attnprune.sidecar import bases, format, loading
from attnprune.sidecar.bases import torch_dtype
from attnprune.sidecar.folder import Sidecar, file_entries, open_sidecar, publish, save_files
from attnprune.sidecar.probe import measure_probe, probe_rows
from attnprune.sidecar.quantised import parameter_count
from attnprune.training.machine import free_memory
from attnprune.training.resolve import MOST_FOR_WEIGHTS, load_base
from attnprune.training.schedule import constraint_of
from attnprune.training.scope import attach_gates, make_trainable
from attnprune.training.trainer import SparsifyTrainer, trainable_state


def export_all(
    trainer: SparsifyTrainer,
    config: RunConfig,
    base_entry: dict[str, Any],
    held_out: Blocks,
    folder: Path,
    on_note: Callable[[str], None],
) -> Sidecar:
    """One sidecar for each density of the frontier, and last that of the run, with which it has finished."""
    if trainer.sharded:  # the best states are whole, and go into a model that is
        plain = load_base(config, "cpu").model
        attach_gates(plain, config)
        trainer.model, _ = make_trainable(plain, config)
    if config.model.load_in != "8bit":  # which stays where it was quantised
        trainer.model.cpu()  # makes room on a GPU
    device = _device(trainer.model, config)
    if device != config.model.device:
        on_note("measuring in the host's memory, because the GPU does not hold the base and the artefact")
    base = load_base(config, device, quantised=config.model.keep_quantised)
    full = load_base(config, device, quantised=False) if config.model.keep_quantised else None
    points: list[Point] = []
    for mark in trainer.marks:
        own = mark is trainer.marks[-1]
        place = "." if own else point_folder(mark.limit)
        judged = config.model_copy(deep=True)
        judged.constraint.frontier = []
        if not own:
            on_note(f"exporting {place}")
            judged.constraint.target_density = mark.limit
            (folder / place).mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / RUN_FILE, folder / place / RUN_FILE)  # says what it was measured on
        trainer.load_best(mark)
        with temporary_folder(folder / CHECKPOINTS) as staging:
            made = export(
                trainer.model, base, base_entry, judged, held_out, staging, folder / place,
                full=full, trained=trainer.best_numbers(mark),
            )  # fmt: skip
        points.append(Point(folder=place, limit=mark.limit, **_measured(made)))
        if config.constraint.frontier:
            write_frontier(folder, points)
    return open_sidecar(folder)


def _device(model: Any, config: RunConfig) -> str:
    """Where the base and the artefact beside it are measured: the run's device if it holds both."""
    device = torch.device(config.model.device)
    if device.type == "cpu":
        return "cpu"
    needed = 2 * parameter_count(model) * torch_dtype(config.model.dtype).itemsize
    return device.type if needed <= MOST_FOR_WEIGHTS * (free_memory(device) or 0) else "cpu"


def _measured(sidecar: Sidecar) -> dict[str, Any]:
    """What a sidecar's result says that its place on a frontier says as well."""
    known = Point.model_fields.keys() - {"folder", "limit"}
    return {key: value for key, value in sidecar.manifest.result.model_dump().items() if key in known}


def export(
    model: Any,
    fresh: bases.BaseModel,
    base_entry: dict[str, Any],
    config: RunConfig,
    held_out: Blocks,
    staging: Path,
    folder: Path,
    *,
    full: bases.BaseModel | None = None,
    trained: dict[str, Any],
) -> Sidecar:
    """Put a trained model's state onto a fresh base exactly as `load` will, measure that, publish it in `folder`.

    Args:
        fresh: the base that the sidecar is for.
        base_entry: its identity.
        staging: an empty folder of the same file system.
        full: the base in full precision, where the sidecar is for a quantised one.
        trained: what the state's evaluation in training found.
    """
    biases = [gate.bias.detach().cpu().numpy() for gate in gates_of(model)]
    weights, adapter_config, entry = changed_weights(model, config)
    sparse = copy.deepcopy(fresh.model)
    loading.install(sparse, biases, weights, entry)
    statistics = gate_statistics(sparse, held_out)
    save_files(staging, gate_arrays(biases, statistics), weights, adapter_config)
    report = measure(sparse, held_out, reference=bases.dense(fresh.model), control=True)
    probe = probe_rows(held_out.input_ids, bases.context_length(sparse))
    manifest = {
        "format": format.FORMAT,
        "format_version": format.FORMAT_VERSION,
        "requires": _required(entry, config, base_entry),
        "created_by": f"attnprune {metadata.version('attnprune')}",
        "base": {key: value for key, value in base_entry.items() if value is not None},
        "gate": {"logit": "score+bias", "threshold": 0, "heads": [len(bias) for bias in biases]},
        "weights": entry.model_dump(exclude_none=True),
        "files": file_entries(staging),
        "result": result_entry(report, config, held_out),
        "probe": measure_probe(sparse, *probe).model_dump(),
        "train": _other_numbers(sparse, config, held_out, full, trained),
    }
    staged = Sidecar(staging, format.Manifest.model_validate(manifest))
    _check_written(staged, biases, weights)
    return publish(staging, folder, staged.manifest)


def _other_numbers(
    sparse: Any, config: RunConfig, held_out: Blocks, full: bases.BaseModel | None, trained: dict[str, Any]
) -> dict[str, Any] | None:
    """The manifest's `train`: how far the artefact is from the base in full precision, or the state that trained from
    its quantised base; None for a run whose base was not quantised for it.
    """
    if config.model.load_in == "full":
        return None
    against = "quantised"
    if full is not None:
        against, trained = "full", asdict(measure(sparse, held_out, reference=bases.dense(full.model)))
    numbers = {key: trained[key] for key in ("loss", "base_loss", "kl", "density")}
    return {"load_in": config.model.load_in, "against": against, **numbers}


def _required(entry: format.WeightsEntry, config: RunConfig, base_entry: dict[str, Any]) -> list[str]:
    """The features that a reader has to know."""
    weights = [f"weights:{entry.kind}"] if entry.kind != "none" else []
    anywhere = [format.LORA_ALL] if entry.kind == "lora" and config.train.lora_targets == "all" else []
    quantised = [format.QUANTISED_BASE] if base_entry["quantisation"] is not None else []
    return ["gate:threshold", *weights, *anywhere, *quantised]


def _check_written(staged: Sidecar, biases: list[np.ndarray], weights: dict[str, Tensor]) -> None:
    """Read the staged files back with the strict reader: they must hold exactly what was measured."""
    try:
        read = staged.weights()
        same = read.keys() == weights.keys() and all(torch.equal(read[name], weights[name]) for name in weights)
        same = same and all(np.array_equal(a, b) for a, b in zip(staged.biases(), biases, strict=True))
    except InputError as error:
        raise AttnPruneError(f"the written sidecar does not pass: {error.message}") from error
    if not same:
        raise AttnPruneError(f"{staged.path}: the written files differ from what was measured")


def gate_arrays(biases: list[np.ndarray], statistics: GateStatistics) -> dict[str, np.ndarray]:
    """The tensors of gates.safetensors."""
    arrays = {"stats.offset_edges": statistics.offset_edges.numpy()}
    for layer, bias in enumerate(biases):
        density = statistics.density[layer].float().numpy()
        arrays[f"layers.{layer}.gate.bias"] = bias
        arrays[f"layers.{layer}.gate.closed"] = (density == 0).astype(np.uint8)
        arrays[f"layers.{layer}.stats.density"] = density
        arrays[f"layers.{layer}.stats.open_by_offset"] = statistics.open_by_offset[layer].float().numpy()
        arrays[f"layers.{layer}.stats.sink"] = statistics.sink[layer].float().numpy()
    return arrays


def changed_weights(
    model: Any, config: RunConfig
) -> tuple[dict[str, Tensor], dict[str, Any] | None, format.WeightsEntry]:
    """(tensors, adapter configuration or None, manifest entry) of what training changed besides the gates."""
    scope = config.train.scope
    if scope == "gates":
        return {}, None, format.WeightsEntry(kind="none")
    if scope == "lora":
        from peft import get_peft_model_state_dict

        lora = model.peft_config["default"]
        tensors = {
            name: t.detach().cpu().contiguous()
            for name, t in get_peft_model_state_dict(model, save_embedding_layers=False).items()
            if ".lora_" in name
        }
        adapter = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": None,
            "r": lora.r,
            "lora_alpha": lora.lora_alpha,
            "target_modules": sorted(lora.target_modules),
            "fan_in_fan_out": lora.fan_in_fan_out,
            "bias": "none",
            "inference_mode": True,
        }
        entry = format.WeightsEntry(kind="lora", rank=lora.r, alpha=float(lora.lora_alpha), tensors=len(tensors))
        return tensors, adapter, entry
    state = {n: t for n, t in trainable_state(model).items() if GATE_ATTRIBUTE not in n}
    return state, None, format.WeightsEntry(kind="delta", tensors=len(state))


def result_entry(report: Report, config: RunConfig, held_out: Blocks) -> dict[str, Any]:
    """The manifest's `result` of a measured artefact."""
    constraint = constraint_of(config)
    assert report.kl is not None
    assert report.density is not None
    value = constraint.value(loss_gap=report.loss_gap, kl=report.kl, density=report.density)
    left_out = ("heads", "agreement")
    sources = [{"data": source.name, "tokens": source.tokens} for source in held_out.sources]
    return {key: v for key, v in asdict(report).items() if key not in left_out} | {
        "exact_match": report.exact_match or 0.0,  # the format asks for a number where there was nothing to match
        "data_sha256": held_out.fingerprint,
        **({"sources": sources} if len(sources) > 1 else {}),
        "steps": config.train.steps,
        "seed": config.train.seed,
        "constraint": constraint.kind,
        "limit": constraint.limit,
        "feasible": constraint.feasible(value),
    }
