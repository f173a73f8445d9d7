"""A process that has imported what programs import, and runs each of them in a fork; see `tests.helpers.command`.

In: a line of JSON for each, [arguments of Python, folder, environment, file for stdout, file for stderr]. Out: the
number of the fork's process as soon as it runs, and its exit code when it ends, a line each.
"""

from __future__ import annotations

import gc
import importlib
import json
import multiprocessing
import os
import random
import runpy
import sys

import numpy

PRELOADED = ["torch", "transformers", "transformers.trainer", "datasets", "peft", "pydantic", "rich.console", "typer"]


def serve() -> None:
    for module in PRELOADED:
        importlib.import_module(module)
    gc.freeze()
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for request in requests:
        process = multiprocessing.get_context("fork").Process(target=become, args=json.loads(request))
        process.start()
        print(process.pid, flush=True)
        process.join()
        print(process.exitcode, flush=True)


def become(line: list[str], cwd: str, env: dict[str, str], stdout: str, stderr: str) -> None:
    """In the fork: what `python LINE` would be."""
    random.seed()  # as a new Python's; only its hashes are those of the others
    numpy.random.seed()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number, name in enumerate((os.devnull, stdout, stderr)):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT, 0o600), number)
    first, *rest = line
    if first == "-m":
        sys.argv, sys.path[0] = line[1:], cwd
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv, sys.path[0] = line, os.path.dirname(os.path.abspath(first))
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    serve()
