"""A live view of a run on a terminal, and a plain line per evaluation everywhere else."""

from __future__ import annotations

import time
from collections import deque
from contextlib import ExitStack
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from transformers import TrainerCallback

from attnprune.report.tables import bar
from attnprune.units import duration, percent

WIDE = 130  # columns that a line with speed and time left takes


class Display(TrainerCallback):
    """Shows loss, base, gap, limit, multiplier, density, edges per query, tokens/s and time left while the run goes on.

    Use as a context manager around the run and pass `callback` to it.
    """

    def __init__(self, console: Console, live: bool, quiet: bool, steps: int):
        self.console, self.is_live, self.quiet, self.steps = console, live, quiet, steps
        self.train: dict[str, float] = {}
        self.eval: dict[str, float] = {}
        self.history: deque[tuple[float, int]] = deque(maxlen=20)
        self.tokens_per_step = 0
        self.step = 0
        self._live: Live | None = None
        self._stack = ExitStack()

    @property
    def callback(self) -> Display:
        return self

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def on_train_begin(self, args, state, control, **kwargs):
        dataset = kwargs["train_dataloader"].dataset
        blocks = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.tokens_per_step = blocks * dataset.seq_len
        self.history.append((time.monotonic(), state.global_step))
        if self.is_live:
            self._live = self._stack.enter_context(Live(console=self.console, refresh_per_second=4, transient=True))

    def on_step_end(self, args, state, control, **kwargs):
        self.step = state.global_step
        self.history.append((time.monotonic(), self.step))
        if self._live is not None:
            self._live.update(self._panel())

    def on_log(self, args, state, control, logs: Any = None, **kwargs):
        if "eval_density" in logs:
            self.eval = dict(logs)
            if not self.quiet:
                self.console.print(self._line(state.global_step), highlight=False)
        elif "multiplier" in logs:
            self.train = dict(logs)

    def on_train_end(self, args, state, control, **kwargs):
        self._stack.close()
        self._live = None

    def _speed(self) -> float:
        """Steps per second over the last steps; 0 where nothing has trained yet."""
        if not self.history:
            return 0.0
        (first, from_step), (last, to_step) = self.history[0], self.history[-1]
        return (to_step - from_step) / (last - first) if last > first else 0.0

    def _line(self, step: int) -> str:
        e = self.eval
        speed = self._speed()
        left = f", {duration((self.steps - step) / speed)} left" if speed and step < self.steps else ""
        gap = e["eval_loss"] - e["eval_base_loss"]
        between = "\n" + " " * 13 if self.console.is_terminal and self.console.width < WIDE else "  "
        return (
            f"step {step:>6}  density {percent(e['eval_density']):>7}  loss {e['eval_loss']:.4f}, "
            f"base {e['eval_base_loss']:.4f}, gap {gap:+.4f}  KL {e['eval_kl']:.4f}{between}{self._mark(step)}"
            f"  [dim]{speed * self.tokens_per_step:,.0f} tokens/s{left}[/]"
        )

    def _mark(self, step: int) -> str:
        """Whether the constraint holds, and where it does not, whether that is how the run is meant to go."""
        e = self.eval
        if e["eval_feasible"]:
            return "[green]within the limit[/]"
        if step < e["eval_settled"] and e["eval_value"] <= e["eval_limit"]:
            return f"[yellow]over the limit, as planned until step {e['eval_settled']:,}[/]"
        return "[red]over the limit[/]"

    def _panel(self) -> Table:
        speed = self._speed()
        left = duration((self.steps - self.step) / speed) if speed else "?"
        table = Table.grid(padding=(0, 2))
        table.add_row("step", f"{self.step:,} of {self.steps:,}  [cyan]{bar(self.step / self.steps, 40)}[/]")
        if self.train:
            t = self.train
            table.add_row("loss", f"{t['train_loss']:.4f}, base {t['base_loss']:.4f}, gap {t['gap']:+.4f}")
            table.add_row("multiplier", f"{t['multiplier']:.3g}  (relative violation {t['violation']:+.2f})")
            table.add_row("density", f"{percent(t['density'])} of this batch's edges")
        if self.eval:
            e = self.eval
            held_out = f"density {percent(e['eval_density'])}, {e['eval_edges_per_query']:.3g} edges per query"
            table.add_row("held out", f"{held_out}, {self._mark(self.step)}")
        table.add_row("speed", f"{speed * self.tokens_per_step:,.0f} tokens/s, {left} left")
        return table


def display(console: Console, *, live: bool, quiet: bool, steps: int) -> Display:
    """The display of one run."""
    return Display(console, live, quiet, steps)
