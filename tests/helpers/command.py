"""The real command line, and other programs, each in a process of its own.

A start of Python that imports torch and transformers takes seconds, and the suite starts a thousand of them. So one
process imports them once and every program runs in a fork of it. What a test changes in the environment that libraries
read when they are imported gets a Python of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "120"}
READ_LATE = {"HF_TOKEN", "NO_COLOR", "COLUMNS", "FORCE_COLOR", "TERM", "PYTEST_CURRENT_TEST"}
PRELOADED = ["torch", "transformers", "transformers.trainer", "datasets", "peft", "pydantic", "rich.console", "typer"]


def attnprune(*arguments, cwd: Path, timeout: float = 120, **environment) -> subprocess.CompletedProcess:
    return python("-m", "attnprune", *arguments, cwd=cwd, env=ENVIRONMENT | environment, timeout=timeout)


def python(
    *arguments: object, cwd: Path, env: Mapping[str, str] = ENVIRONMENT, timeout: float = 120, preexec_fn=None
) -> subprocess.CompletedProcess:
    """As `subprocess.run` of this Python with arguments (-m MODULE, -c PROGRAM or a script first) and no input."""
    line = [str(argument) for argument in arguments]
    changed = {name for name in {*env, *ENVIRONMENT} if env.get(name) != ENVIRONMENT.get(name)}
    if changed - READ_LATE or preexec_fn:
        return subprocess.run(
            [sys.executable, *line], cwd=cwd, env=dict(env), capture_output=True, text=True, timeout=timeout,
            stdin=subprocess.DEVNULL, check=False, preexec_fn=preexec_fn,
        )  # fmt: skip
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        told = [Path(folder) / name for name in ("stdout", "stderr")]
        process = context.Process(target=_become, args=(line, str(cwd), dict(env), *map(str, told)))
        # The server inherits the environment, and libraries have written into this process's.
        with mock.patch.dict(os.environ, ENVIRONMENT, clear=True):
            process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(line, timeout)
        return subprocess.CompletedProcess(line, process.exitcode, *(path.read_text() for path in told))


def _become(line: list[str], cwd: str, env: dict[str, str], stdout: str, stderr: str) -> None:
    """In the fork: what `python LINE` would be."""
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


def listing(folder: Path) -> dict[str, bytes | None]:
    return {str(f.relative_to(folder)): f.read_bytes() if f.is_file() else None for f in folder.rglob("*")}
