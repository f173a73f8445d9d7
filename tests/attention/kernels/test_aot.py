"""The kernels compiled for real GPUs, on a machine without one: no spills, no more instructions than recorded."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT

triton = pytest.importorskip("triton")

RECORD = ROOT / "tests" / "helpers" / "aot.json"


def run_aot(*arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}  # it would replace the compiler
    return subprocess.run(
        [sys.executable, "-m", "tests.helpers.aot", *arguments], cwd=ROOT, env=environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip


def recorded_kernels():
    """The installed Triton's part of the record."""
    recorded = json.loads(RECORD.read_text())
    if triton.__version__ not in recorded:
        pytest.skip(f"triton {triton.__version__} is not recorded, only {', '.join(recorded)}")
    return recorded[triton.__version__]


def test_the_record_is_of_the_pinned_triton_and_of_the_one_that_gpus_had():
    recorded = json.loads(RECORD.read_text())
    pinned = re.search(r"^triton==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert set(recorded) == {pinned[1], "3.6.0"}
    assert len({tuple(kernels) for kernels in recorded.values()}) == 1  # none was measured before a kernel was added


@pytest.mark.slow
def test_compiled_kernels_take_no_more_than_recorded():
    recorded = recorded_kernels()
    done = run_aot()
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(line in done.stdout for line in recorded)


def test_a_kernel_that_got_worse_fails_the_gate(tmp_path):
    name = "forward d=64 sm_90"
    record = {triton.__version__: {name: recorded_kernels()[name] | {"instructions": 0.1}}}
    (tmp_path / "aot.json").write_text(json.dumps(record))
    done = run_aot("--only", name, "--record-file", str(tmp_path / "aot.json"))
    assert done.returncode == 1
    assert "instructions" in done.stdout.splitlines()[-1]
