"""The real command line, and other programs, each in a process of its own.

A start of Python that imports torch and transformers takes seconds, and the suite starts a thousand of them. So one
process imports them once and every program runs in a fork of it. Libraries read the environment when they are imported:
an environment that is seen again and again gets such a process of its own, others get a Python for every program.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "120"}
READ_LATE = {"HF_TOKEN", "NO_COLOR", "COLUMNS", "FORCE_COLOR", "TERM", "PYTEST_CURRENT_TEST"}
WORTH_IT = 3  # programs: the process that forks takes twice as long to start
Imported = frozenset[tuple[str, str]]


def attnprune(*arguments, cwd: Path, timeout: float = 120, **environment) -> subprocess.CompletedProcess:
    return python("-m", "attnprune", *arguments, cwd=cwd, env=ENVIRONMENT | environment, timeout=timeout)


def python(
    *arguments: object, cwd: Path, env: Mapping[str, str] = ENVIRONMENT, timeout: float = 120, preexec_fn=None
) -> subprocess.CompletedProcess:
    """As `subprocess.run` of this Python with arguments (-m MODULE, -c PROGRAM or a script first) and no input."""
    line = [str(argument) for argument in arguments]
    if preexec_fn or not _is_known(imported := _imported(env)):
        return subprocess.run(
            [sys.executable, *line], cwd=cwd, env=dict(env), capture_output=True, text=True, timeout=timeout,
            stdin=subprocess.DEVNULL, check=False, preexec_fn=preexec_fn,
        )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        told = [Path(folder) / name for name in ("stdout", "stderr")]
        code = _Server.of(imported).run([line, str(cwd), dict(env), *map(str, told)], timeout)
        if code is None:
            raise subprocess.TimeoutExpired(line, timeout)
        return subprocess.CompletedProcess(line, code, *(path.read_text() for path in told))


def _imported(env: Mapping[str, str]) -> Imported:
    """What libraries may read of an environment when they are imported."""
    return frozenset((name, value) for name, value in env.items() if name not in READ_LATE)


_SEEN: Counter[Imported] = Counter({_imported(ENVIRONMENT): WORTH_IT})


def _is_known(imported: Imported) -> bool:
    """Whether so many programs have been started with this environment that it pays."""
    _SEEN[imported] += 1
    return _SEEN[imported] > WORTH_IT


class _Server:
    """A process that forks: `tests.helpers.forks`."""

    @staticmethod
    @cache
    def of(imported: Imported) -> _Server:
        return _Server(dict(imported))

    def __init__(self, env: dict[str, str]):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.forks"], cwd=Path(__file__).parents[2], env=env, bufsize=0,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def run(self, request: list, timeout: float) -> int | None:
        """The exit code of a fork, negative for a signal; None if it took too long and was killed."""
        told, answers = self._process.stdin, self._process.stdout
        assert told is not None
        assert answers is not None
        told.write(json.dumps(request).encode() + b"\n")
        fork = int(answers.readline())
        ended, _, _ = select.select([answers], [], [], timeout)
        if not ended:
            with suppress(ProcessLookupError):  # it ended meanwhile
                os.kill(fork, signal.SIGKILL)
        code = int(answers.readline())
        return code if ended else None


def listing(folder: Path) -> dict[str, bytes | None]:
    return {str(f.relative_to(folder)): f.read_bytes() if f.is_file() else None for f in folder.rglob("*")}
