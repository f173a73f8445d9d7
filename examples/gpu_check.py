"""Everything that only a GPU can tell, in ten minutes: correctness first, then speed; one JSON line each, at once.

    python examples/gpu_check.py peps.txt rust_rfcs.txt --out gpu.jsonl
    python examples/gpu_check.py --tiny --out tiny.jsonl      # all of it on a CPU, in about a minute

Parts: `same` (a recorded and a compiled step against the eager one: what they saw and the weights after 12 steps, on
the bytes of the texts), `step` (`attnprune bench step` at 16 and 64 blocks), `train`, `prefill`, `decode` (`attnprune
bench attention`), `sampling` (self-written text). A part has its own time and its own failure; the others still run.
The last line names what failed, and so does the exit code.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from attnprune.attention.interface import GATE_ATTRIBUTE
from attnprune.bench import attention, clock, step
from attnprune.bench.record import Row, first_sentence
from attnprune.bench.setup import gaussian_cases
from attnprune.data import drawing
from attnprune.data.sampling import rows_that_fit
from attnprune.training.trainer import trainable_state

STEPS = 12
# Of what a step saw, and of the way the weights went. A graph replays the same kernels. Compiled layers round
# elsewhere, an edge at its threshold then opens or closes, and Adam's first steps follow the sign of a gradient.
ALLOWED = {"graph": (1e-2, 5e-2), "compiled": (0.15, 0.7)}
Emit = Callable[..., None]


@dataclass(frozen=True)
class Sizes:
    """What is run: a training step, one layer of attention, rows of text."""

    setting: step.Setting
    blocks: tuple[int, ...]
    repeats: int
    layer: dict[str, Any]
    widths: tuple[int, ...]
    keys: tuple[int, int]  # of training and prefill, of decode
    providers: tuple[str, ...]
    rows: tuple[int, ...]  # 0: as many as fit
    seq_len: int


def sizes(tiny: bool) -> Sizes:
    """SmolLM2-135M on CUDA, or a toy on a CPU."""
    device = torch.device("cpu" if tiny else "cuda")
    layer = {"device": device, "dtype": torch.float32 if tiny else torch.bfloat16, "seed": 0}
    if tiny:
        toy = step.Setting(device, shape=step.Shape(2, 192, 256), blocks=2, seq_len=32, lora_rank=4)
        layer |= {"batch": 1, "heads": 2, "kv_heads": 2}
        return Sizes(toy, (2, 3), 2, layer, (16,), (48, 64), ("sdpa-math", "chunked"), (0, 4), 12)
    layer |= {"batch": 4, "heads": 16, "kv_heads": 16}
    providers = ("sdpa-flash", "sdpa-cudnn", "triton")
    return Sizes(step.Setting(device), (16, 64), 10, layer, (64, 128), (4096, 8192), providers, (0, 1024), 512)


class Seen(TrainerCallback):
    """What the steps saw, and where the weights started."""

    def __init__(self) -> None:
        self.stats: list[list[float]] = []
        self.start: dict[str, Tensor] = {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.start = trainable_state(model)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "base_loss" in logs:
            self.stats.append([logs[name] for name in ("train_loss", "base_loss", "penalty", "density", "kl")])


def same(given: Sizes, texts: list[Path], emit: Emit) -> None:
    """Recorded and compiled steps against the eager one."""
    setting = given.setting
    ids = bytes_of(texts, setting.blocks * STEPS, setting.seq_len) if texts else None

    def trained(mode: str) -> tuple[Tensor, dict[str, Tensor]]:
        seen = Seen()
        model = step.train(setting, mode, STEPS, [seen], ids).model
        assert len(seen.stats) == STEPS, "a step was not logged"
        moved: dict[str, list[Tensor]] = {"gates": [], "weights": []}  # gates learn faster and would hide the weights
        for name, after in trainable_state(model).items():
            kind = "gates" if GATE_ATTRIBUTE in name else "weights"
            moved[kind].append((after - seen.start[name]).flatten().double())
        return torch.tensor(seen.stats), {kind: torch.cat(parts) for kind, parts in moved.items()}

    stats, way = trained("fast")
    moved = {kind: float(part.norm()) for kind, part in way.items()}
    emit("fast", ok=bool(stats.isfinite().all()), stats=stats[-1].tolist(), moved=moved)
    for mode, (allowed_stats, allowed_way) in ALLOWED.items():
        try:
            found, went = trained(mode)
        except TimeoutError:
            raise
        except Exception as problem:
            emit(mode, ok=may_be_missing(setting), could_not_run=first_sentence(problem))
            continue
        finally:
            torch.compiler.reset()
        off = float(((found - stats).abs() / stats.abs().clamp(min=1e-3)).max())
        apart = {f"{kind}_off": float((went[kind] - part).norm() / part.norm()) for kind, part in way.items()}
        right = off <= allowed_stats and max(apart.values()) <= allowed_way
        emit(mode, ok=right, stats=found[-1].tolist(), stats_off=off, **apart)


def may_be_missing(setting: step.Setting) -> bool:
    """Whether a way of training may be one that cannot run: there are no graphs on a CPU."""
    return setting.device.type == "cpu"


def bytes_of(texts: list[Path], rows: int, seq_len: int) -> Tensor:
    """int64 [rows, seq_len]: the bytes of the texts as tokens, from the start of each in turn."""
    parts = [torch.frombuffer(bytearray(text.read_bytes()), dtype=torch.uint8) for text in texts]
    need = -(-rows * seq_len // len(parts))
    ids = torch.cat([part[:need] for part in parts])[: rows * seq_len]
    if len(ids) < rows * seq_len:
        raise ValueError(f"the texts are shorter than {rows * seq_len:,} bytes")
    return ids.view(rows, seq_len).long()


def steps(given: Sizes, budget: float, emit: Emit, blocks: int) -> None:
    """`attnprune bench step`, all modes."""
    setting = replace(given.setting, blocks=blocks)

    def show(row: Row) -> None:
        emit_row(emit, row, row.status == "ok" or may_be_missing(setting))

    _, left_out = step.run(setting, list(step.MODES), given.repeats, budget, show)
    if left_out:
        emit("left out", modes=left_out)


def layer(given: Sizes, budget: float, emit: Emit, suite: str, density: float, noises: tuple[bool, ...]) -> None:
    """One layer of attention against SDPA."""
    keys = given.keys[suite == "decode"]
    cases = [
        case
        for width in given.widths
        for noise in noises
        for case in gaussian_cases([suite], [keys], [density], noise=noise, width=width, **given.layer)
    ]
    names, makes = zip(*cases, strict=True)
    providers, show = list(given.providers), lambda rows: [emit_row(emit, r, r.status != "wrong") for r in rows]
    _, left_out = attention.run(list(makes), providers, given.repeats, budget, list(names), show)
    if left_out:
        emit("left out", cases=left_out)


def emit_row(emit: Emit, row: Row, ok: bool) -> None:
    emit(row.provider, ok=ok, **row.model_dump(exclude={"provider"}, exclude_none=True))


def sampling(given: Sizes, emit: Emit) -> None:
    """Tokens per second of self-written text, token by token and through `generate`."""
    setting = given.setting
    model = setting.build(setting.config("fast", 1, Path()))
    reason = drawing.obstacle(model, given.seq_len) or drawing._difference(model, given.seq_len)
    emit("way", ok=not reason, reason=reason)
    for rows in (rows or rows_that_fit(model, given.seq_len) for rows in given.rows):
        write = drawing.writer(model, 0, rows, given.seq_len)
        write(0)  # compiles and records
        emit("token by token", **timed(lambda write=write: write(1)))
        del write
    short, rows = max(2, given.seq_len // 8), given.rows[-1]
    emit("generate", **timed(lambda: drawing._generated(model, 0, rows, short, 0)))


def timed(write: Callable[[], Tensor]) -> dict[str, Any]:
    """The speed of writing rows, which end on the host."""
    start = time.perf_counter()
    written = write()
    seconds = time.perf_counter() - start
    return {"rows": len(written), "seq_len": written.shape[1], "tokens_per_second": written.numel() / seconds}


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """TimeoutError after this time, and again every few seconds: code that tries something catches what it raises."""

    def ring(number: int, frame: Any) -> None:
        raise TimeoutError(f"took longer than {seconds:.0f} s")

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(0.1, seconds), 5.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", type=Path, nargs="*", help="two text files to train on; without them random tokens")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines; what is there already stays")
    parser.add_argument("--seconds", type=float, default=570.0, help="for all parts together")
    parser.add_argument("--part", action="append", default=[], help="only parts whose name starts so (repeatable)")
    parser.add_argument("--tiny", action="store_true", help="a toy, on a CPU")
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available():
        parser.error("no CUDA device; --tiny runs a toy on a CPU")
    given = sizes(args.tiny)
    parts: dict[str, tuple[float, Callable[[float, Emit], None]]] = {  # seconds, what is run
        "same": (130, lambda budget, emit: same(given, args.texts, emit)),
        "sampling": (60, lambda budget, emit: sampling(given, emit)),
        f"step {given.blocks[0]}": (130, lambda budget, emit: steps(given, budget, emit, given.blocks[0])),
        "train": (70, lambda budget, emit: layer(given, budget, emit, "train", 0.01, (False, True))),
        "prefill": (30, lambda budget, emit: layer(given, budget, emit, "prefill", 0.003, (False,))),
        "decode": (30, lambda budget, emit: layer(given, budget, emit, "decode", 0.01, (False,))),
        f"step {given.blocks[1]}": (120, lambda budget, emit: steps(given, budget, emit, given.blocks[1])),
    }
    begin, failed = time.perf_counter(), []
    with args.out.open("a", encoding="utf-8") as out:

        def write(part: str, name: str, **facts: Any) -> None:
            line = {"part": part, "name": name, "at": round(time.perf_counter() - begin, 1), **facts}
            out.write(json.dumps(line) + "\n")
            out.flush()
            print(json.dumps(line), flush=True)
            if facts.get("ok") is False:
                failed.append(f"{part}: {name}")

        write("machine", "machine", **clock.machine(given.setting.device).model_dump(), command=sys.argv[1:])
        for part, (seconds, run) in parts.items():
            if args.part and not part.startswith(tuple(args.part)):
                continue
            left = min(seconds, args.seconds - (time.perf_counter() - begin))
            try:
                with at_most(left):
                    run(left, lambda name, part=part, **facts: write(part, name, **facts))
            except Exception as problem:
                write(part, "failed", ok=False, why=f"{type(problem).__name__}: {first_sentence(problem)}")
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        write("end", "end", failed=failed.copy())
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
