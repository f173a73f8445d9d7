"""The kernels compiled for real GPUs, on a machine without one: no spills, no more instructions than recorded."""

import json
import os
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT

pytest.importorskip("triton")


RECORD = ROOT / "tests" / "helpers" / "aot.json"


def run_aot(*arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}  # it would replace the compiler
    return subprocess.run(
        [sys.executable, "-m", "tests.helpers.aot", *arguments], cwd=ROOT, env=environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_compiled_kernels_take_no_more_than_recorded():
    done = run_aot()
    assert done.returncode == 0, done.stdout + done.stderr
    recorded = json.loads(RECORD.read_text())["kernels"]
    assert all(line in done.stdout for line in recorded)


def test_a_kernel_that_got_worse_fails_the_gate(tmp_path):
    record = json.loads(RECORD.read_text())
    name = "forward d=64 sm_90"
    record["kernels"] = {name: record["kernels"][name] | {"instructions": 0.1}}
    (tmp_path / "aot.json").write_text(json.dumps(record))
    done = run_aot("--only", name, "--record-file", str(tmp_path / "aot.json"))
    assert done.returncode == 1
    assert "instructions" in done.stdout.splitlines()[-1]
