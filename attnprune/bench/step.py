"""`attnprune bench step`: one optimiser step of a run, by every way the trainer has, against transformers' Trainer.

Each way trains a fresh copy of the same model on the same random tokens. `trainer` is what post-training costs without
this package: the same adapters on the dense model, its language-model loss, transformers' Trainer as it is.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from attnprune.attention.interface import detach
from attnprune.bench import clock
from attnprune.bench.counts import Kernels, MatmulBound, Operators, Product
from attnprune.bench.record import Row, first_sentence
from attnprune.bench.setup import random_tokens
from attnprune.data.blocks import Blocks
from attnprune.errors import InputError
from attnprune.runs.config import RunConfig, build_config
from attnprune.sidecar.quiet import quiet
from attnprune.training.machine import PeakMemory
from attnprune.training.resolve import load_base, load_dtype
from attnprune.training.scope import attach_gates, make_trainable
from attnprune.training.step import settle_step
from attnprune.training.trainer import SparsifyTrainer

TRAINER = "trainer"
MODES: dict[str, dict[str, str]] = {
    TRAINER: {},
    "plain": {"step": "plain", "compile": "off", "cuda_graph": "off"},
    "fast": {"step": "fast", "compile": "off", "cuda_graph": "off"},
    "graph": {"step": "fast", "compile": "off", "cuda_graph": "on"},
    "compiled": {"step": "fast", "compile": "on", "cuda_graph": "on"},
}
HEAD_WIDTH = 64
WARM_UP = 3  # steps: the first one compiles, records and tries
TARGET_DENSITY = 0.0045


@dataclass(frozen=True)
class Shape:
    """A random llama; the defaults are SmolLM2-135M's."""

    layers: int = 30
    width: int = 576
    vocabulary: int = 49_152

    def make(self, seq_len: int) -> Any:
        """The model, in fp32: heads of 64, three to a key/value head where they divide so, an MLP of 8/3 the width.

        Raises:
            InputError: the width is no multiple of 64.
        """
        if self.width % HEAD_WIDTH:
            raise InputError(f"--width: {self.width} is no multiple of {HEAD_WIDTH}, the width of a head")
        heads = self.width // HEAD_WIDTH
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=self.vocabulary, hidden_size=self.width, intermediate_size=8 * self.width // 3,
                num_hidden_layers=self.layers, num_attention_heads=heads,
                num_key_value_heads=heads // 3 if heads % 3 == 0 else heads, max_position_embeddings=max(2048, seq_len),
                tie_word_embeddings=True,
            )
        )  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What all ways train: `model` by name, or `shape` at random; `blocks` of `seq_len` tokens in a step."""

    device: torch.device
    model: str | None = None
    shape: Shape = Shape()
    blocks: int = 16
    seq_len: int = 512
    scope: str = "lora"
    lora_rank: int = 64
    precision: str = "auto"
    seed: int = 0

    @property
    def name(self) -> str:
        precision = self.config(TRAINER, 1, Path()).train.precision
        named = f"{self.shape.layers} layers of {self.shape.width}" if self.model is None else Path(self.model).name
        return f"{named}, {self.scope}, {precision}, {self.blocks} x {self.seq_len} tokens"

    def config(self, mode: str, steps: int, folder: Path) -> RunConfig:
        """The run of a mode; nothing in it is 'auto'.

        Raises:
            InputError: an unknown scope or precision.
        """
        on_cuda = self.device.type == "cuda"
        precision = ("bf16" if on_cuda else "fp32") if self.precision == "auto" else self.precision
        ways = dict(MODES[mode])
        if mode == "compiled" and not on_cuda:
            ways["cuda_graph"] = "off"  # compiled layers alone
        train = {
            "scope": self.scope, "lora_rank": self.lora_rank, "precision": precision, "seed": self.seed, "steps": steps,
            "batch_size": self.blocks, "micro_batch_size": 0, "eval_every": steps + 1, "save_every": steps + 1,
        }  # fmt: skip
        return build_config({
            "model": {"name": self.model or "random", "device": self.device.type},
            "data": {"seq_len": self.seq_len},
            "gate": {"initial_mass": 0, "bias_init": 0},
            "constraint": {"kind": "density", "target_density": TARGET_DENSITY},
            "train": train | ways, "output": {"folder": str(folder)},
        })  # fmt: skip

    def check(self) -> None:
        """Build the model once, before minutes are spent.

        Raises:
            InputError: an option that no mode can have, no such model, or blocks longer than its context.
        """
        random_tokens(self.build(self.config(TRAINER, 1, Path())), 1, self.seq_len, self.seed, self.device)

    def build(self, config: RunConfig) -> Any:
        """A fresh dense model on the device, the same each time."""
        if self.model is not None:
            return load_base(config).model
        torch.manual_seed(self.seed)
        return self.shape.make(self.seq_len).eval().to(self.device, load_dtype(config))


class OnlyTrain(TrainerCallback):
    """No evaluation and no checkpoint, also not at the end."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_evaluate = control.should_save = False


def train(
    setting: Setting, mode: str, steps: int, callbacks: list[TrainerCallback], ids: Tensor | None = None
) -> Trainer:
    """Train for some steps by one of the MODES; returns the trainer, with its model.

    `ids` [blocks x steps, T] on the CPU are the text; without them it is random.

    Raises:
        InputError, AttnPruneError: the mode cannot run this model on this device.
    """
    with tempfile.TemporaryDirectory() as folder, quiet():
        config = setting.config(mode, steps, Path(folder))
        model = setting.build(config)
        if ids is None:
            ids = random_tokens(model, setting.blocks * steps, setting.seq_len, setting.seed, torch.device("cpu"))
        blocks = Blocks(ids, ids.clone(), "ids")
        attach_gates(model, config)
        model, base = make_trainable(model, config)
        callbacks = [OnlyTrain(), *callbacks]
        if mode == TRAINER:
            trainer = _plain_trainer(model, config, blocks, callbacks)
        else:
            settle_step(model, config)
            trainer = SparsifyTrainer(model, config, blocks, blocks.take(torch.arange(1)), base, callbacks)
        trainer.train()
    return trainer


def _plain_trainer(model: Any, config: RunConfig, blocks: Blocks, callbacks: list[TrainerCallback]) -> Trainer:
    """transformers' Trainer on the same model without gates, for the language-model loss."""
    detach(model)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(f"scope {config.train.scope}: without gates nothing trains")
    train = config.train
    arguments = TrainingArguments(
        output_dir=config.output.folder, max_steps=train.steps, per_device_train_batch_size=train.batch_size,
        learning_rate=train.learning_rate, max_grad_norm=train.max_grad_norm, bf16=train.precision == "bf16",
        use_cpu=config.model.device == "cpu", dataloader_pin_memory=config.model.device != "cpu",
        logging_strategy="no", save_strategy="no", remove_unused_columns=False, disable_tqdm=True, report_to="none",
        seed=train.seed,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=blocks, callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)
    return trainer


class Watch(TrainerCallback):
    """Times `repeats` steps after the warm-up, then counts one, and on CUDA profiles one more."""

    def __init__(self, repeats: int, device: torch.device):
        self.device, self.last_timed = device, WARM_UP + repeats
        self.steps = self.last_timed + (2 if device.type == "cuda" else 1)
        self.memory = PeakMemory(device)
        self.peak: int | None = None
        self.operators, self.kernels = Operators(device), None
        self.marks: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == WARM_UP:
            self.memory.restart()
            self.marks = [self._now()]
        if state.global_step == self.last_timed:
            self.peak = self.memory.peak()
            self.operators.__enter__()
        if state.global_step == self.last_timed + 1:
            self.kernels = Kernels()
            self.kernels.start()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.operators.paused = self.device.type == "cpu"

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.operators.paused = False

    def on_step_end(self, args, state, control, **kwargs):
        if WARM_UP < state.global_step <= self.last_timed:
            self.marks.append(self._now())
        if state.global_step == self.last_timed + 1:
            self.operators.__exit__(None, None, None)
        if state.global_step == self.last_timed + 2 and self.kernels is not None:
            self.kernels.stop()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return 1000 * time.perf_counter()


def measure(setting: Setting, mode: str, repeats: int, bound: MatmulBound, products: Counter[Product]) -> Row:
    """One mode as a row. `products` are those of the last step of ours that dispatched them all: a graph dispatches
    none, a compiled layer not all."""
    row = Row(suite="step", provider=mode, configuration=setting.name, status="ok")
    try:
        watch = Watch(repeats, setting.device)
        trainer = train(setting, mode, watch.steps, [watch])
    except TimeoutError:  # a caller's, for all modes together
        raise
    except Exception as problem:  # whatever a mode raises is the answer to whether it runs here
        row.status, row.note = "could not run", first_sentence(problem)
        return row
    finally:
        torch.compiler.reset()
    del trainer
    gc.collect()
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
    counted = watch.operators
    if mode in ("plain", "fast"):
        products.clear()
        products.update(counted.products)
    elif mode == TRAINER:
        products = counted.products
    row.timing = clock.timing_of([after - before for before, after in zip(watch.marks, watch.marks[1:], strict=False)])
    row.tokens_per_second = 1000 * setting.blocks * setting.seq_len / row.timing.median_ms
    row.peak_bytes, row.operators, row.waits = watch.peak, counted.operators, counted.waits
    if watch.kernels is not None:
        row.kernels, row.launches = watch.kernels.kernels, watch.kernels.launches
    if products:
        row.matmul_flops = sum(count * product.flops for product, count in products.items())
        row.matmul_share = bound.milliseconds(products) / row.timing.median_ms
    return row


def run(
    setting: Setting, modes: list[str], repeats: int, budget: float, on_row: Callable[[Row], None] = lambda row: None
) -> tuple[list[Row], list[str]]:
    """Measure modes in order until `budget` seconds are over; returns the rows and the modes left out.

    Raises:
        InputError: a mode that is none, or an option that no mode can have.
    """
    for mode in modes:
        if mode not in MODES:
            raise InputError(f"--mode: {mode} is not one of {', '.join(MODES)}")
    setting.check()
    start, rows = time.perf_counter(), []
    bound, products = MatmulBound(setting.device), Counter[Product]()
    for position, mode in enumerate(modes):
        if position and time.perf_counter() - start > budget:
            return rows, modes[position:]
        rows.append(measure(setting, mode, repeats, bound, products))
        first = rows[0].timing if rows[0].provider == TRAINER else None
        taken = rows[-1].timing
        rows[-1].ratio_to_trainer = first.median_ms / taken.median_ms if first and taken else None
        on_row(rows[-1])
    return rows, []
