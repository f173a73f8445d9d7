"""The command line: registers the commands and turns every exception into one line and an exit code."""

from __future__ import annotations

import errno
import logging
import os
import sys
import warnings
from typing import Annotated

import typer

import attnprune
from attnprune.cli import apply as apply_command
from attnprune.cli import atlas as atlas_command
from attnprune.cli import bench as bench_commands
from attnprune.cli import circuit as circuit_command
from attnprune.cli import diff as diff_command
from attnprune.cli import edges as edges_command
from attnprune.cli import evaluate as evaluate_command
from attnprune.cli import index as index_command
from attnprune.cli import inspect as inspect_command
from attnprune.cli import push as push_command
from attnprune.cli import sparsify as sparsify_command
from attnprune.cli import trace as trace_command
from attnprune.cli import verify as verify_command
from attnprune.cli.output import debugging, out
from attnprune.cli.signals import EndedBySignal, ending_on_signals
from attnprune.errors import AttnPruneError, is_fault
from attnprune.runs import processes

app = typer.Typer(
    name="attnprune",
    help="Post-train a language model so that its attention keeps few of its edges at the original loss.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
app.command("sparsify")(sparsify_command.sparsify)
app.command("inspect")(inspect_command.inspect)
app.command("apply")(apply_command.apply)
app.command("push")(push_command.push)
app.command("verify")(verify_command.verify)
app.command("diff")(diff_command.diff)
app.command("eval")(evaluate_command.evaluate)
app.command("circuit")(circuit_command.circuit)
app.command("trace")(trace_command.trace)
app.command("atlas")(atlas_command.atlas)
app.command("index")(index_command.index)
app.command("edges")(edges_command.edges)
app.add_typer(bench_commands.app)


def _version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"attnprune {attnprune.__version__}\n")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the `attnprune` script."""
    sys.exit(run())


def run() -> int:
    """Run the command line; return the exit code."""
    _quiet_libraries()
    try:
        with ending_on_signals():
            code = app(prog_name="attnprune", standalone_mode=False)
            sys.stdout.flush()
        if code == 130:  # Typer caught Ctrl-C itself
            raise KeyboardInterrupt
    except AttnPruneError as error:
        return _fail(error, error.message, error.hint, error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # keep the interpreter's last flush quiet
        return 141
    except (KeyboardInterrupt, typer.Abort) as error:
        return _fail(error, "interrupted", None, 130)
    except EndedBySignal as error:
        return _fail(error, "interrupted", None, 128 + error.number)
    except MemoryError as error:
        return _fail(error, "out of memory", "use a smaller --batch-size or --micro-batch-size", 1)
    except BaseException as error:
        if not is_fault(error):
            raise
        explain = getattr(error, "format_message", None)
        if explain is not None:  # a usage error of Typer's command-line parser, whose class is private
            return _fail(error, f"usage: {explain() or 'no command given'}", "attnprune --help", 2)
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:  # any look at a path raises it
            return _fail(error, f"file name too long: {error.filename}", None, 2)
        if isinstance(error, OSError) and error.strerror:  # a full disk, a folder that is not ours, ...
            return _fail(error, f"{error.filename or 'cannot write'}: {error.strerror.lower()}", None, 1)
        if type(error).__name__ == "OutOfMemoryError":
            return _fail(error, "out of GPU memory", "use a smaller --batch-size or --micro-batch-size", 1)
        return _fail(error, f"internal error: {type(error).__name__}: {error}", "ATTNPRUNE_DEBUG=1 shows where", 1)
    return code if isinstance(code, int) else 0


def _quiet_libraries() -> None:
    """Keep other libraries' log lines out of our stderr; what matters reaches the user as an exception."""
    if debugging():
        return
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY", "DATASETS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ["RUST_BACKTRACE"] = "0"  # of tokenizers, which writes its panics to stderr itself
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)


def _fail(error: BaseException, message: str, hint: str | None, code: int) -> int:
    if debugging():
        import traceback

        traceback.print_exception(error)
    if processes.tells(error):
        out.error(message, hint, code)
    # torchrun makes 1 and a traceback of any code; a run that has finished is no failure there, and its JSON says more.
    return 0 if code == 3 and processes.count() > 1 and not processes.launched() else code
