"""`sparsify --processes` and torchrun: one talks, exit codes, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from attnprune.runs.folder import CHECKPOINTS
from attnprune.training import checkpoints
from tests.helpers.command import ENVIRONMENT
from tests.helpers.recipes import sidecar_files

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])

DEMO = ["sparsify", "demo", "--steps", "20", "--batch-size", "32", "--eval-every", "10", "--save-every", "5"]


def run(command, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)


def test_torchrun_and_processes_write_the_same_demo(tmp_path):
    ours = [sys.executable, "-m", "attnprune", *DEMO]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "attnprune", *DEMO]
    one = run([*ours, "--micro-batch-size", "16", "--out", "one"], tmp_path)
    two = run([*torchrun, "--out", "two", "--json"], tmp_path)
    three = run([*ours, "--processes", "2", "--out", "three"], tmp_path)
    assert (one.returncode, two.returncode, three.returncode) == (3, 0, 3), two.stderr  # torchrun would make 1 of 3
    assert sidecar_files(tmp_path / "one") == sidecar_files(tmp_path / "two") == sidecar_files(tmp_path / "three")
    assert json.loads(two.stdout)["manifest"]["result"]["feasible"] is False
    for found in (two, three):
        assert found.stderr.count("does not hold") == 1
        assert found.stderr.count("Plan\n") == 1
        assert "Traceback" not in found.stderr


@pytest.mark.parametrize(("option", "message"), [("2", "batch_size: 15 is not a multiple"), ("0", "is less than 1")])
def test_bad_input_is_said_once_with_exit_code_2(tmp_path, option, message):
    command = [sys.executable, "-m", "attnprune", *DEMO, "--batch-size", "15", "--processes", option, "--out", "run"]
    found = run(command, tmp_path)
    assert found.returncode == 2
    assert found.stderr.count("attnprune:") == 1
    assert message in found.stderr
    assert not (tmp_path / "run").exists()


def test_ctrl_c_stops_all_processes_and_is_said_once(tmp_path):
    command = [sys.executable, "-m", "attnprune", *DEMO, "--steps", "4000", "--processes", "2", "--out", "run"]
    child = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, process_group=0)
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("run/checkpoints/*/attnprune_seal.json")):
        assert time.monotonic() < deadline
        assert child.poll() is None
        time.sleep(0.2)
    os.killpg(child.pid, signal.SIGINT)
    _, stderr = child.communicate(timeout=100)
    assert child.returncode == 130
    assert stderr.count("interrupted: saved checkpoint-") == 1
    assert "Traceback" not in stderr
    assert checkpoints.last_good(tmp_path / "run" / CHECKPOINTS)[0] is not None
