"""SparsifyTrainer: transformers' Trainer with the constrained loss, through public overrides and callbacks only.

Long because the overrides share the state of one run.
"""

from __future__ import annotations

import gc
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import RandomSampler
from transformers import PrinterCallback, TrainerCallback, TrainerState, TrainingArguments

from attnprune.attention.gates import mix_seed, seed_tensor
from attnprune.data.blocks import AnyBlocks, Blocks
from attnprune.errors import AttnPruneError
from attnprune.measure import Report, mean_loss, measure
from attnprune.runs import processes
from attnprune.runs.config import RunConfig
from attnprune.training.callbacks import BeforeOptimizer, DualState, EndOfStretch, Seal
from attnprune.training.constraint import Constraint, Multiplier, lagrangian_weights
from attnprune.training.gradients import SharedGradients
from attnprune.training.graph import RecordedStep, Step, fastest
from attnprune.training.optimizer import make_optimizer
from attnprune.training.recover import is_state
from attnprune.training.restoring import MODEL_FILE, STATE_FILE, StrictResume, best_file, check_contents, reading
from attnprune.training.schedule import Schedule
from attnprune.training.scope import DenseBase
from attnprune.training.sharding import is_sharded, whole
from attnprune.training.step import TERMS, MicroStep, compares_with_base


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """CPU copies of everything that trains (or is held still), by parameter name (tied parameters once).

    Every process of a run calls this, and process 0 alone gets them.
    """
    state = {}
    for name, parameter in model.named_parameters():
        if is_state(parameter):
            tensor = whole(parameter.detach())
            if processes.is_first():
                state[name] = tensor.cpu().clone().contiguous()
    return state


class SparsifyTrainer(StrictResume):
    """Minimises edges under the loss constraint (or the loss under a density constraint).

    Args:
        config: the resolved run.
        reference: the unchanged base model.
        callbacks: progress displays and the like.
        from_sidecar: the model starts sparse: its state is the first candidate for the best one, and the falling limit
            of a density-first run starts at its density instead of 1.
    """

    model: Any

    def __init__(
        self,
        model: nn.Module,
        config: RunConfig,
        train: AnyBlocks,
        held_out: Blocks,
        reference: DenseBase,
        callbacks: list[TrainerCallback],
        from_sidecar: bool = False,
    ):
        self.config = config
        self.sharded = any(is_sharded(parameter) for parameter in model.parameters())
        self.schedule = Schedule.of(config)
        self.marks = self.schedule.marks
        self.constraint = self.marks[-1]
        self.reference = reference
        self.best_states: dict[Constraint, dict[str, Tensor]] = {}
        c = config.constraint
        multiplier = Multiplier(
            value=c.initial, update=c.update, rate=c.rate, gain=c.gain, smoothing=c.smoothing,
            minimum=c.minimum, maximum=c.maximum, clip=c.clip,
        )  # fmt: skip
        dual = DualState(multiplier.state(), start_density=None if from_sidecar else 1.0)
        super().__init__(
            model=model,
            args=_training_arguments(config, len(train), eval_on_start=from_sidecar),
            train_dataset=train,
            eval_dataset=held_out,
            callbacks=[dual, BeforeOptimizer(self._look), EndOfStretch(self.schedule), *callbacks, Seal()],
        )
        self.remove_callback(PrinterCallback)  # it prints every log to stdout
        # Not to be wrapped: the micro-steps run without the others, and gradients are added once per step.
        model._is_accelerate_prepared = True  # pyright: ignore[reportArgumentType]
        self.model_accepts_loss_kwargs = False
        # Now, not in the first step, where it would add to the memory of the training graph.
        needed = not (compares_with_base(config) and config.constraint.paired)
        mean = mean_loss(reference, held_out, self.args.device) if needed else None
        self._micro_step = MicroStep(model, reference, config, mean)
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._gradients = SharedGradients(self._trained, in_order=config.train.deterministic)
        self._step: Step | None = None  # the fastest way to run it, known after the first batch
        self._seen: list[Tensor] = []  # stats of this step's micro-batches, on the device

    @property
    def dual(self) -> DualState:
        """The current DualState (a resume replaces the object)."""
        return next(c for c in self.callback_handler.callbacks if isinstance(c, DualState))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The run's own optimiser."""
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.model, self.config.train, self.args.device.type)
        return self.optimizer

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """Forward, base, loss and backward of one micro-batch; what it saw stays on the device until the step ends."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        parts = self.current_gradient_accumulation_steps * processes.count()
        coefficients = [weight / parts for weight in self._coefficients()]
        device = inputs["input_ids"].device
        given = (inputs["input_ids"], inputs["labels"], _sent(coefficients, device), self._seed(device))
        if self._step is None:
            self._step = self._fastest(given)
        self._seen.append(self._step(*given))
        if not self.sharded:
            self._gradients.add(last=self.accelerator.sync_gradients)
        return self._seen[-1][0] * processes.count()  # Trainer takes the mean

    def _fastest(self, given: tuple[Tensor | None, ...]) -> Step:
        """The fastest way to run the micro-step here; a resumed run has to go on as it began."""
        step = fastest(self._micro_step, self._trained, given, self.config.train.model_copy(update=self.dual.ways))
        taken = {"compile": self._micro_step.layers is not None, "cuda_graph": isinstance(step, RecordedStep)}
        self.dual.ways = {way: "on" if used else "off" for way, used in taken.items()}
        return step

    def _seed(self, device: torch.device) -> Tensor | None:
        if self.config.gate.estimator != "gumbel":
            return None
        micro = len(self._seen) * processes.count() + processes.rank()  # its number in the whole batch
        return seed_tensor(mix_seed(self.config.train.seed, self.state.global_step, micro), device)

    def _get_train_sampler(self, train_dataset: Any = None) -> RandomSampler:
        """Whole steps only: the last step of an epoch would depend on the number of processes."""
        blocks: Any = self.train_dataset
        batch = self.config.train.batch_size
        return RandomSampler(blocks, num_samples=len(blocks) // batch * batch or len(blocks))

    def _coefficients(self) -> tuple[float, float]:
        """Weights of edges and damage in the Lagrangian. Both terms are relative, so a multiplier of about 1 suits any
        limit; the logarithm of the edges asks for the same relative saving at every density."""
        multiplier = self.dual.multiplier.value
        if self.constraint.kind == "density":
            damage, edges = lagrangian_weights(multiplier * self.config.constraint.tolerance)
        elif self.state.global_step >= self.schedule.pressure_steps:
            damage, edges = 1.0, 0.0  # the run ends inside the feasible set
        else:
            edges, damage = lagrangian_weights(multiplier / self._current_constraint().limit)
        return edges, damage

    def _look(self, norm: Tensor) -> None:
        """Read what the micro-steps saw and check it, in one transfer, before anything reaches the weights.

        Raises:
            AttnPruneError: a number is not finite.
        """
        norm = whole(norm.detach()).float().reshape(1)
        everyone = processes.gather_tensor(torch.cat([*self._seen, norm])).tolist()
        self._seen = []
        terms = len(TERMS)
        batches = [[numbers[n : n + terms] for n in range(0, len(numbers) - 1, terms)] for numbers in everyone]
        # In the order of the whole batch, as one process would have seen them.
        seen = [self._observed(stats) for turn in zip(*batches, strict=True) for stats in turn]
        if self.dual.start_density is None:
            self.dual.start_density = sum(o["density"] for o in seen) / len(seen)
        constraint = self._current_constraint()
        for observed in seen:
            value = constraint.value(
                loss_gap=observed["gap"], kl=observed.get("kl", math.nan), density=observed["density"]
            )
            observed["violation"] = constraint.violation(value)
        mean = {term: sum(o[term] for o in seen) / len(seen) for term in seen[0]}
        number = self.state.global_step + 1
        for term, found in mean.items():
            if not math.isfinite(found):
                raise AttnPruneError(f"training: non-finite {term} at step {number}").of_all()
        if not math.isfinite(everyone[0][-1]):
            raise AttnPruneError(f"training: non-finite gradient at step {number}").of_all()
        self.dual.violation = mean["violation"]
        self._latest = {**mean, "multiplier": self.dual.multiplier.value}

    def _observed(self, stats: list[float]) -> dict[str, float]:
        """One micro-batch's terms by name, those that the run has, and the gap."""
        observed: dict[str, float] = dict(zip(TERMS, stats, strict=True))
        del observed["lagrangian"]  # Trainer logs it
        for term, seen in (("kl", self._micro_step.compares), ("state_error", self._micro_step.match)):
            if not seen:
                del observed[term]
        return {**observed, "gap": observed["train_loss"] - observed["base_loss"]}

    def _current_constraint(self) -> Constraint:
        """The constraint of this step."""
        return self.schedule.constraint(self.state.global_step, self.dual.start_density or 0.0)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the constraint's numbers of the last step to each training log."""
        if "loss" in logs:
            logs["lagrangian"] = logs.pop("loss")
            logs.update(self._latest)
        super().log(logs, start_time)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Measure on held-out text and remember the state if it is the best one so far."""
        held_out: Any = eval_dataset if eval_dataset is not None else self.eval_dataset
        was_training = self.model.training
        self.model.eval()
        report = measure(self.model, held_out, reference=self.reference, shared=True)
        self.model.train(was_training)
        self._keep_if_best(report)
        metrics = {
            f"{metric_key_prefix}_{key}": value
            for key, value in asdict(report).items()
            if key not in ("heads", "data", "control_loss") and value is not None
        }
        feasible = self.constraint.feasible(_constrained_value(self.constraint, report))
        metrics[f"{metric_key_prefix}_feasible"] = feasible
        metrics[f"{metric_key_prefix}_value"] = _constrained_value(self.constraint, report)
        metrics[f"{metric_key_prefix}_limit"] = self._current_constraint().limit  # of this step; see settled
        metrics[f"{metric_key_prefix}_settled"] = self.schedule.settled
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what trains (not the frozen base) and the best state so far."""
        state = trainable_state(self.model)
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_file(state, folder / MODEL_FILE)
        for mark, state in self.best_states.items():
            save_file(state, folder / best_file(self._mark_name(mark)))

    def release(self) -> None:
        """Let go of what only training needs: the recorded step with its memory, gradients, the optimiser."""
        self._step = self.optimizer = None
        del self._micro_step, self._gradients
        self.model.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()  # does nothing where there is no CUDA

    def restore_best(self, checkpoint: Path) -> None:
        """Check a checkpoint and read its best state (before `train(resume_from_checkpoint=...)`).

        Raises:
            InputError: it is not one of this run.
        """
        trains = {name: p for name, p in self.model.named_parameters() if is_state(p)}
        files = {mark: best_file(self._mark_name(mark)) for mark in self.marks}
        check_contents(checkpoint, trains, {DualState.__name__}, list(files.values()))
        for mark, file in files.items():
            if (checkpoint / file).exists():
                with reading(checkpoint):
                    self.best_states[mark] = load_file(checkpoint / file)

    def finish(self, checkpoint: Path) -> None:
        """Measure a checkpoint that `restore_best` has read as if training had ended there."""
        self.state = TrainerState.load_from_json(str(checkpoint / STATE_FILE))
        self._load_from_checkpoint(str(checkpoint))
        self._load_callback_state()
        self.evaluate()

    def load_best(self, mark: Constraint | None = None) -> None:
        """Put the best state into the model: for one of `marks`, or for the run's own constraint."""
        self.model.load_state_dict(self.best_states[mark or self.constraint], strict=False)

    def best_numbers(self, mark: Constraint) -> dict[str, Any]:
        """What the evaluation of the best state for one of `marks` found."""
        return self.dual.best_of(self._mark_name(mark)) or {}

    def _keep_if_best(self, report: Report) -> None:
        """Feasible beats infeasible; then fewer edges (or lower loss, density-first); infeasible ones by violation."""
        state: dict[str, Tensor] | None = None
        for mark in self.marks:
            value = _constrained_value(mark, report)
            feasible = mark.feasible(value)
            goal = report.loss if mark.kind == "density" else report.density
            rank = [0.0, goal] if feasible else [1.0, value]
            best = self.dual.best_of(self._mark_name(mark))
            if best is None or rank < best["rank"]:
                numbers = {k: v for k, v in asdict(report).items() if k != "heads"}
                found = {"rank": rank, "step": self.state.global_step, "feasible": feasible, **numbers}
                self.dual.keep(self._mark_name(mark), found)
                if state is None:
                    state = trainable_state(self.model)
                self.best_states[mark] = state

    def _mark_name(self, mark: Constraint) -> str | None:
        """A density of the frontier as text; None for the run's own constraint."""
        return None if mark is self.constraint else str(mark.limit)


def _constrained_value(constraint: Constraint, report: Report) -> float:
    assert report.kl is not None
    assert report.density is not None
    return constraint.value(loss_gap=report.loss_gap, kl=report.kl, density=report.density)


def _sent(values: list[float], device: torch.device) -> Tensor:
    """Host numbers as fp32 on the device, without waiting for it."""
    return torch.tensor(values, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def _checkpointing(on: bool) -> dict[str, Any]:
    """The training arguments that recompute activations; transformers 5.17 knows them by an older name."""
    known = TrainingArguments.__dataclass_fields__
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return {name: on, f"{name}_kwargs": {"use_reentrant": False} if on else None}


def _training_arguments(config: RunConfig, blocks: int, *, eval_on_start: bool) -> TrainingArguments:
    train = config.train
    assert train.micro_batch_size != "auto"  # the plan has chosen
    share = processes.share(train.batch_size)
    micro = train.micro_batch_size or share
    on_cpu = config.model.device == "cpu"
    warmup = min(train.warmup_steps, train.steps // 10)
    arguments = TrainingArguments(
        output_dir=config.output.folder,
        max_steps=train.steps,
        # Compiled layers and a recorded step have one shape. (An older run that goes on is plain.)
        dataloader_drop_last=train.step == "fast" and blocks >= micro,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=max(1, share // micro),
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
