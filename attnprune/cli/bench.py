"""attnprune bench attention | train | step | generate"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnprune.cli.given import refuse
from attnprune.cli.options import Base, Device, Json, Quiet
from attnprune.cli.output import command_line, out

if TYPE_CHECKING:
    from attnprune.bench.record import Record, Row

app = typer.Typer(
    name="bench", help="Time the attention or a model, implementations side by side.", no_args_is_help=True
)
Out = Annotated[Path | None, typer.Option("--out", help="Also write the record to this JSON file. Default: none.")]
Repeats = Annotated[int, typer.Option("--repeats", help="Timed runs of each.", min=1)]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the random inputs.", min=0)]
Budget = Annotated[float, typer.Option("--time-budget", help="Seconds; what is left out is listed.")]
Batch = Annotated[int, typer.Option("--batch-size", help="Sequences.", min=1)]


@app.command("attention")
def attention(
    context: typer.Context,
    suite: Annotated[list[str], typer.Option("--suite", help="train, prefill or decode (repeatable).")] = [  # noqa: B006
        "train",
        "prefill",
        "decode",
    ],
    seq_len: Annotated[list[int], typer.Option("--seq-len", help="Tokens (repeatable).", min=2)] = [1024],  # noqa: B006
    density: Annotated[
        list[float], typer.Option("--density", help="Share of open edges (repeatable).", min=1e-6, max=1.0)
    ] = [0.01],  # noqa: B006
    batch_size: Batch = 1,
    heads: Annotated[int, typer.Option("--heads", min=1)] = 8,
    kv_heads: Annotated[int, typer.Option("--kv-heads", help="0: as many as heads.", min=0)] = 0,
    head_dim: Annotated[int, typer.Option("--head-dim", min=1)] = 64,
    dtype: Annotated[
        str, typer.Option("--dtype", help="float32, bfloat16 or float16; auto: bfloat16 on CUDA.")
    ] = "auto",
    noise: Annotated[bool, typer.Option("--noise", help="Train with the gumbel estimator's noise.")] = False,
    provider: Annotated[
        list[str] | None, typer.Option("--provider", help="Only these (repeatable). Default: all that can run here.")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option("--from", help="Take q, k, v and biases from this sparse model, with --data. Default: none."),
    ] = None,
    data: Annotated[Path | None, typer.Option("--data", help="With --from: the text. Default: none.")] = None,
    layer: Annotated[int, typer.Option("--layer", help="With --from: the layer.", min=0)] = 0,
    base: Base = None,
    repeats: Repeats = 10,
    time_budget: Budget = 600.0,
    seed: Seed = 0,
    device: Device = "auto",
    out_file: Out = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """One attention layer: SDPA, FlexAttention, eager PyTorch and ours; checked against the definition, then timed."""
    out.configure(json=as_json, quiet=quiet)
    if source is None:
        refuse(context, "without --from", "data", "layer", "base")
    else:
        shape = ("density", "batch_size", "heads", "kv_heads", "head_dim", "noise", "seed")
        refuse(context, "with --from", *shape)
    _check_out(out_file)
    from attnprune.bench import attention, setup
    from attnprune.bench.providers import GATED, SDPA
    from attnprune.errors import InputError

    suites = setup.suites_named(suite)
    if kv_heads and heads % kv_heads:
        raise InputError(f"--kv-heads: {heads} heads are no multiple of {kv_heads}")
    if source is not None and data is None:
        raise InputError("--from: needs --data FILE.txt")
    where = setup.device_named(device)
    kind = setup.dtype_named(dtype, where)
    if source is not None and data is not None:
        cases = setup.captured_cases(source, base, data, layer, suites, seq_len, where, kind)
    else:
        cases = setup.gaussian_cases(
            suites, seq_len, density, noise=noise, batch=batch_size, heads=heads, kv_heads=kv_heads or heads,
            width=head_dim, dtype=kind, device=where, seed=seed,
        )  # fmt: skip
    flex = ("flex",) if where.type == "cuda" else ()  # on a CPU it compiles for a minute and has no backward pass
    if not provider and not flex:
        out.note("flex: left out on a CPU, where it has no backward pass; --provider flex asks for it")
    providers = provider or [*SDPA, *flex, *GATED]
    rows, left_out = attention.run(
        [make for _, make in cases],
        providers,
        repeats,
        time_budget,
        [name for name, _ in cases],
        lambda made: out.note(f"{made[0].suite}: {made[0].configuration}"),
    )
    _finish(rows, left_out, where, seed, out_file)


@app.command("train")
def train(
    model: Annotated[str, typer.Argument(metavar="MODEL_OR_SIDECAR")],
    batch_size: Batch = 4,
    seq_len: Annotated[int, typer.Option("--seq-len", min=2)] = 512,
    base: Base = None,
    repeats: Repeats = 5,
    seed: Seed = 0,
    device: Device = "auto",
    out_file: Out = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Whole training steps: the model with gates against itself without, on random tokens."""
    out.configure(json=as_json, quiet=quiet)
    _check_out(out_file)
    from attnprune.bench.models import bench_train
    from attnprune.bench.setup import pair, random_tokens

    dense, gated, where = pair(model, base, device)
    ids = random_tokens(dense, batch_size, seq_len, seed, where)
    _finish(bench_train(dense, gated, ids, repeats), [], where, seed, out_file)


@app.command("step")
def step(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option("--model", help="Hub id, folder or .gguf file. Default: random, of the shape below.")
    ] = None,
    layers: Annotated[int, typer.Option("--layers", help="Without --model.", min=1)] = 30,
    width: Annotated[int, typer.Option("--width", help="Without --model: a multiple of 64.", min=64)] = 576,
    vocabulary: Annotated[int, typer.Option("--vocabulary", help="Without --model.", min=2)] = 49_152,
    blocks: Annotated[int, typer.Option("--blocks", help="Blocks of a step.", min=1)] = 16,
    seq_len: Annotated[int, typer.Option("--seq-len", help="Tokens of a block.", min=2)] = 512,
    scope: Annotated[str, typer.Option("--scope", help="gates, lora, attn or full.")] = "lora",
    lora_rank: Annotated[int, typer.Option("--lora-rank", min=1)] = 64,
    precision: Annotated[str, typer.Option("--precision", help="fp32 or bf16; auto: bf16 on CUDA.")] = "auto",
    mode: Annotated[
        list[str] | None,
        typer.Option("--mode", help="Only these (repeatable): trainer, plain, fast, graph, compiled. Default: all."),
    ] = None,
    repeats: Repeats = 10,
    time_budget: Budget = 600.0,
    seed: Seed = 0,
    device: Device = "auto",
    out_file: Out = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """An optimiser step of sparsify, by each way it has, against transformers' Trainer without gates."""
    out.configure(json=as_json, quiet=quiet)
    if model is not None:
        refuse(context, "with --model", "layers", "width", "vocabulary")
    if scope != "lora":
        refuse(context, f"with --scope {scope}", "lora_rank")
    _check_out(out_file)
    from attnprune.bench import step as bench
    from attnprune.bench.setup import device_named
    from attnprune.report import benchmark

    where = device_named(device)
    shape = bench.Shape(layers, width, vocabulary)
    setting = bench.Setting(where, model, shape, blocks, seq_len, scope, lora_rank, precision, seed)
    done: list[Row] = []

    def on_row(row: Row) -> None:
        done.append(row)
        out.note(benchmark.line(row))
        _write(done, [], where, seed, out_file)  # a run that is cut short keeps what it measured

    rows, left_out = bench.run(setting, mode or list(bench.MODES), repeats, time_budget, on_row)
    _finish(rows, left_out, where, seed, out_file)


@app.command("generate")
def generate(
    model: Annotated[str, typer.Argument(metavar="SIDECAR")],
    batch_size: Batch = 1,
    seq_len: Annotated[int, typer.Option("--seq-len", help="Tokens of the prompt.", min=1)] = 512,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=2)] = 32,
    base: Base = None,
    repeats: Repeats = 5,
    seed: Seed = 0,
    device: Device = "auto",
    out_file: Out = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Prefill and greedy decoding: a sparse model against its dense base, on random tokens."""
    out.configure(json=as_json, quiet=quiet)
    _check_out(out_file)
    from attnprune.bench.models import bench_generate
    from attnprune.bench.setup import pair, random_tokens

    dense, sparse, where = pair(model, base, device)
    ids = random_tokens(dense, batch_size, seq_len, seed, where, spare=new_tokens)
    _finish(bench_generate(dense, sparse, ids, new_tokens, repeats), [], where, seed, out_file)


def _check_out(file: Path | None) -> None:
    """Refuse a target that cannot be written before minutes are spent."""
    if file is None:
        return
    from attnprune.errors import InputError
    from attnprune.files import check_writable

    if file.exists() and not file.is_file():  # a device too, which a rename would replace
        raise InputError(f"--out {file}: {'is a folder' if file.is_dir() else 'is not a file'}")
    check_writable(file.parent)


def _write(rows: list[Row], left_out: list[str], device: Any, seed: int, file: Path | None) -> Record:
    """The record of these rows, written if there is a file for it."""
    from attnprune.bench.clock import machine
    from attnprune.bench.record import Record
    from attnprune.files import write_atomic

    record = Record(command=command_line(), seed=seed, machine=machine(device), rows=rows, left_out=left_out)
    if file is not None:
        write_atomic(file, record.model_dump_json(indent=1) + "\n")
    return record


def _finish(rows: list[Row], left_out: list[str], device: Any, seed: int, file: Path | None) -> None:
    """Print and write the record; exit code 4 if an implementation computed something else."""
    from attnprune.report import benchmark

    record = _write(rows, left_out, device, seed, file)
    out.result(record.model_dump(mode="json"), *benchmark.render(record))
    if any(row.status == "wrong" for row in rows):
        from attnprune.errors import VerificationError

        wrong = next(row for row in rows if row.status == "wrong")
        raise VerificationError(f"{wrong.provider} ({wrong.configuration}): {wrong.note}")
