"""SparsifyTrainer: transformers' Trainer with the constrained loss, through public overrides and callbacks only."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from attnprune.attention.gates import mix_seed
from attnprune.attention.interface import Gate, gates_of
from attnprune.data.blocks import Blocks
from attnprune.errors import AttnPruneError
from attnprune.measure import Reference, Report, kl_divergence, mean_loss, measure, token_losses
from attnprune.runs.config import RunConfig
from attnprune.training.callbacks import DualState, FiniteGradients, Seal
from attnprune.training.constraint import Constraint, Multiplier, lagrangian
from attnprune.training.restoring import BEST_FILE, MODEL_FILE, StrictResume, check_contents, reading

DENSITY_WAY = 0.2  # share of the steps in which the density limit falls to its target
DENSITY_AIM = 0.95  # of the target: held-out text came out up to 7 % denser than the training text that is controlled


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """CPU copies of everything that trains, by parameter name (tied parameters once)."""
    return {n: p.detach().cpu().clone().contiguous() for n, p in model.named_parameters() if p.requires_grad}


class SparsifyTrainer(StrictResume):
    """Minimises edges under the loss constraint (or the loss under a density constraint).

    Args:
        config: the resolved run.
        reference: token ids -> logits of the unchanged base model, without gradient.
        callbacks: progress displays and the like.
        from_sidecar: the model starts sparse: its state is the first candidate for the best one, and the falling limit
            of a density-first run starts at its density instead of 1.
    """

    model: Any

    def __init__(
        self,
        model: nn.Module,
        config: RunConfig,
        train: Blocks,
        held_out: Blocks,
        reference: Reference,
        callbacks: list[TrainerCallback],
        from_sidecar: bool = False,
    ):
        self.config = config
        self.constraint = constraint_of(config)
        self.reference = reference
        self.best_state: dict[str, Tensor] = {}
        c = config.constraint
        multiplier = Multiplier(
            value=c.initial, update=c.update, rate=c.rate, gain=c.gain, smoothing=c.smoothing,
            minimum=c.minimum, maximum=c.maximum, clip=c.clip,
        )  # fmt: skip
        dual = DualState(multiplier.state(), start_density=None if from_sidecar else 1.0)
        super().__init__(
            model=model,
            args=_training_arguments(config, eval_on_start=from_sidecar),
            train_dataset=train,
            eval_dataset=held_out,
            callbacks=[dual, FiniteGradients(), *callbacks, Seal()],
        )
        self.remove_callback(PrinterCallback)  # it prints every log to stdout
        self.model_accepts_loss_kwargs = False
        self.loss_is_scaled_for_ga = False
        # Now, not in the first step, where it would add to the memory of the training graph.
        needed = not (compares_with_base(config) and config.constraint.paired)
        self._mean_base_loss = mean_loss(reference, held_out, self.args.device) if needed else math.nan

    @property
    def dual(self) -> DualState:
        """The current DualState (a resume replaces the object)."""
        return next(c for c in self.callback_handler.callbacks if isinstance(c, DualState))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with three groups: matrices (decayed), vectors, and gate biases with their own learning rate."""
        if self.optimizer is None:
            train = self.config.train
            gate_ids = {id(gate.bias) for gate in gates_of(self.model)}
            weights = [p for p in self.model.parameters() if p.requires_grad and id(p) not in gate_ids]
            groups = [
                {"params": [p for p in weights if p.ndim > 1], "weight_decay": train.weight_decay},
                {"params": [p for p in weights if p.ndim <= 1], "weight_decay": 0.0},
                {
                    "params": [gate.bias for gate in gates_of(self.model)],
                    "weight_decay": 0.0,
                    "lr": train.gate_learning_rate,
                },
            ]
            self.optimizer = _optimizer_class(train.optimizer)(
                [group for group in groups if group["params"]], lr=train.learning_rate, betas=(0.9, train.adam_beta2)
            )
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The Lagrangian of one micro-batch; what it observed moves the multiplier at the end of the step."""
        dual, gates = self.dual, gates_of(model)
        if self.config.gate.estimator == "gumbel":
            seed = mix_seed(self.config.train.seed, self.state.global_step, len(dual.observed))
            for gate in gates:
                gate.noise_seed = seed
        ids, labels = inputs["input_ids"], inputs["labels"]
        # Autocast only here: evaluation is in full precision, like the artefact that is measured in the end.
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.config.train.precision == "bf16"):
            logits = model(input_ids=ids, use_cache=False).logits
            penalty, density = _edges(gates)  # before the reference, which may run the same gates forced open
        log_p, losses = token_losses(logits, labels)
        loss = losses.mean()
        base_loss, kl = self._compare(ids, labels, log_p)
        gap = loss - base_loss
        if dual.start_density is None:
            dual.start_density = float(density)
        constraint = self._current_constraint()
        share = 1.0 if constraint.kind == "kl" else self.config.train.distill
        damage = gap if kl is None else share * kl + (1 - share) * gap
        total = self._lagrangian(penalty, damage, constraint)
        observed = {
            "train_loss": loss.item(),
            "base_loss": base_loss.item(),
            "gap": gap.item(),
            "penalty": penalty.item(),
            "density": float(density),
        }
        if kl is not None:
            observed["kl"] = kl.item()
        value = constraint.value(loss_gap=gap.item(), kl=observed.get("kl", math.nan), density=float(density))
        observed["violation"] = constraint.violation(value)
        for term, number in observed.items():
            if not math.isfinite(number):
                raise AttnPruneError(f"training: non-finite {term} at step {self.state.global_step + 1}")
        dual.observed.append(observed)
        self._latest = {**observed, "multiplier": dual.multiplier.value}
        return (total, None) if return_outputs else total

    def _compare(self, ids: Tensor, labels: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor | None]:
        """The base's loss on a batch, and KL(base || sparse), nats per token.

        A run that needs neither is spared a third of its time and gets the base's mean held-out loss and no KL.
        """
        if not compares_with_base(self.config):
            return torch.tensor(self._mean_base_loss), None
        autocast = torch.autocast(ids.device.type, torch.bfloat16, enabled=self.config.train.precision == "bf16")
        with torch.no_grad(), autocast:
            base_logits = self.reference(ids)
        with torch.no_grad():
            base_log_p, base_losses = token_losses(base_logits, labels)
        kl = kl_divergence(base_log_p, log_p).mean()
        paired = self.config.constraint.paired
        return base_losses.mean() if paired else torch.tensor(self._mean_base_loss), kl

    def _lagrangian(self, penalty: Tensor, damage: Tensor, constraint: Constraint) -> Tensor:
        """Edges and damage against each other; both are relative, so a multiplier of about 1 suits any limit.

        The logarithm asks for the same relative saving at every density: the pressure does not fade with the edges.
        """
        multiplier = self.dual.multiplier.value
        log_edges = penalty.clamp(min=1e-9).log()
        if constraint.kind == "density":
            return lagrangian(damage, log_edges, multiplier * self.config.constraint.tolerance)
        if self.state.global_step >= self._pressure_steps:  # the damage alone: the run ends inside the feasible set
            return damage
        edges = log_edges if self.config.gate.penalty == "log" else penalty
        return lagrangian(edges, damage, multiplier / constraint.limit)

    def _current_constraint(self) -> Constraint:
        """The constraint of this step.

        A density falls geometrically to its target over the first steps, so that the weights can follow. A tolerance
        starts wide and narrows: edges close early, and the weights learn for the rest of the run to do without them.
        """
        done, limit = self.state.global_step, self.constraint.limit
        if self.constraint.kind == "density":
            way = min(1.0, (done + 1) / max(1, DENSITY_WAY * self.config.train.steps))
            aim = limit * DENSITY_AIM if limit < 1 else limit
            start = max(aim, self.dual.start_density or 0.0)
            return replace(self.constraint, limit=start ** (1 - way) * aim**way)
        left = max(0.0, 1 - done / max(1, self._pressure_steps))
        return replace(self.constraint, limit=limit * (1 + (self.config.constraint.start_factor - 1) * left))

    @property
    def _pressure_steps(self) -> int:
        """Steps before the final phase."""
        train = self.config.train
        return train.steps - int(train.steps * train.final_fraction)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the constraint's numbers of the last micro-batch to each training log."""
        if "loss" in logs:
            logs["lagrangian"] = logs.pop("loss")
            logs.update(self._latest)
        super().log(logs, start_time)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Measure on held-out text and remember the state if it is the best one so far."""
        held_out: Any = eval_dataset if eval_dataset is not None else self.eval_dataset
        was_training = self.model.training
        self.model.eval()
        report = measure(self.model, held_out, reference=self.reference)
        self.model.train(was_training)
        self._keep_if_best(report)
        metrics = {
            f"{metric_key_prefix}_{key}": value
            for key, value in asdict(report).items()
            if key not in ("heads", "data", "control_loss") and value is not None
        }
        metrics[f"{metric_key_prefix}_feasible"] = self._feasible(report)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what trains (not the frozen base) and the best state so far."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_file(trainable_state(self.model), folder / MODEL_FILE)
        if self.best_state:
            save_file(self.best_state, folder / BEST_FILE)

    def restore_best(self, checkpoint: Path) -> None:
        """Check a checkpoint and read its best state (before `train(resume_from_checkpoint=...)`).

        Raises:
            InputError: it is not one of this run.
        """
        trains = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        check_contents(checkpoint, trains, {DualState.__name__})
        if (checkpoint / BEST_FILE).exists():
            with reading(checkpoint):
                self.best_state = load_file(checkpoint / BEST_FILE)

    def load_best(self) -> None:
        """Put the best state into the model."""
        self.model.load_state_dict(self.best_state, strict=False)

    def _constrained_value(self, report: Report) -> float:
        assert report.kl is not None
        assert report.density is not None
        return self.constraint.value(loss_gap=report.loss_gap, kl=report.kl, density=report.density)

    def _feasible(self, report: Report) -> bool:
        return self.constraint.feasible(self._constrained_value(report))

    def _keep_if_best(self, report: Report) -> None:
        """Feasible beats infeasible; then fewer edges (or lower loss, density-first); infeasible ones by violation."""
        value, feasible = self._constrained_value(report), self._feasible(report)
        goal = report.loss if self.constraint.kind == "density" else report.density
        rank = [0.0, goal] if feasible else [1.0, value]
        best = self.dual.best
        if best is None or rank < best["rank"]:
            numbers = {k: v for k, v in asdict(report).items() if k != "heads"}
            self.dual.best = {"rank": rank, "step": self.state.global_step, "feasible": feasible, **numbers}
            self.best_state = trainable_state(self.model)


def constraint_of(config: RunConfig) -> Constraint:
    """The constraint of a run."""
    c = config.constraint
    return Constraint(c.kind, c.target_density if c.kind == "density" else c.tolerance)


def compares_with_base(config: RunConfig) -> bool:
    """Whether the base runs at every training step: to be learned from, or as the other side of the constraint."""
    constraint = config.constraint
    return config.train.distill > 0 or constraint.kind == "kl" or (constraint.kind == "loss" and constraint.paired)


def _edges(gates: list[Gate]) -> tuple[Tensor, Tensor]:
    """(smooth, hard) share of open edges of the last forward, over all heads of all layers."""
    counts = [gate.last for gate in gates if gate.last is not None]
    visible = torch.stack([c.visible_edges * len(c.penalty) for c in counts]).sum()
    penalty = torch.stack([c.penalty.sum() for c in counts]).sum() / visible
    density = torch.stack([c.open_edges.sum() for c in counts]).sum() / visible
    if not penalty.requires_grad:  # reentrant activation checkpointing would train without any pressure on the gates
        raise AttnPruneError("training: the edge penalty has no gradient; use non-reentrant activation checkpointing")
    return penalty, density


def _optimizer_class(name: str) -> Callable[..., torch.optim.Optimizer]:
    if name == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit  # pyright: ignore[reportReturnType]
    return torch.optim.AdamW


def _checkpointing(on: bool) -> dict[str, Any]:
    """The training arguments that recompute activations; transformers 5.17 knows them by an older name."""
    known = TrainingArguments.__dataclass_fields__
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return {name: on, f"{name}_kwargs": {"use_reentrant": False} if on else None}


def _training_arguments(config: RunConfig, *, eval_on_start: bool) -> TrainingArguments:
    train = config.train
    assert train.micro_batch_size != "auto"  # the plan has chosen
    micro = train.micro_batch_size or train.batch_size
    on_cpu = config.model.device == "cpu"
    warmup = min(train.warmup_steps, train.steps // 10)
    arguments = TrainingArguments(
        output_dir=config.output.folder,
        max_steps=train.steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=max(1, train.batch_size // micro),
        learning_rate=train.learning_rate,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={
            "num_decay_steps": min(int(train.steps * train.decay_fraction), train.steps - warmup),
            "min_lr_ratio": train.min_lr_ratio,
        },
        warmup_steps=warmup,
        max_grad_norm=train.max_grad_norm,
        logging_steps=max(1, min(10, train.steps // 10)),
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_on_start=eval_on_start,
        eval_steps=train.eval_every,
        save_strategy="steps",
        save_steps=train.save_every,
        save_total_limit=None,  # Seal rotates, after the new checkpoint is sealed
        restore_callback_states_from_checkpoint=True,
        seed=train.seed,
        data_seed=train.seed,
        use_cpu=on_cpu,
        **_checkpointing(train.gradient_checkpointing),
        remove_unused_columns=False,
        dataloader_pin_memory=not on_cpu,
        disable_tqdm=True,
        report_to="none",
    )
    _ = arguments.device  # settles the device, and with it the GPU count
    arguments._n_gpu = 1  # with several GPUs Trainer would choose DataParallel, whose replicas lose the gates' counts
    return arguments
