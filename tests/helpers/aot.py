"""Compile the Triton kernels for GPUs without having one, and read registers, spills and instructions from the result.

    python -m tests.helpers.aot            # compare with tests/helpers/aot.json
    python -m tests.helpers.aot --record   # write the installed Triton's part of it anew (after a change of kernel)

The record holds every Triton version that users are likely to have, since each allocates registers in its own way. One
that is not installed is measured from a folder of its own:

    python -m pip install --no-deps --target FOLDER triton==3.6.0
    PYTHONPATH=FOLDER python -m tests.helpers.aot --record

Triton brings the assembler (ptxas) and the disassemblers. Instructions per element are those of the main loop over the
scores of one thread; a kernel that spills or grows past its record is slower on every GPU, which no CPU test shows.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

RECORD = Path(__file__).with_name("aot.json")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SLACK = 1.10  # instructions per element may grow by a tenth before the gate fails
SPILL_SLACK = 64  # bytes per thread: a change that leaves the work as it was moves register allocation by this much
MATRIX = {80: "HMMA", 90: "HGMMA"}


@dataclass(frozen=True)
class Case:
    """One kernel at one head width, compiled for one GPU generation.

    constants: its compile-time arguments; scores: how many a program computes at a time; matrix: the instruction the
    main loop is known by (of matmuls: what they must become); pointers: argument -> element type, for arguments that
    are not bf16; passes: loops over the same scores, whose instructions add up.
    """

    name: str
    kernel: object
    constants: dict
    capability: int
    warps: int
    scores: int
    matrix: str
    pointers: dict
    stages: int = 2
    most_registers: int | None = None
    passes: int = 1


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes: registers per thread, spilled bytes per thread, instructions per score.

    reloads: loads and stores of spilled registers in the main loop, per thread and tile; elsewhere they cost nothing.
    """

    registers: int
    spill: int
    reloads: int
    instructions: float


def compile_case(case: Case) -> Resources:
    """Compile for the case's GPU generation; raises what the compiler raises."""
    arguments = case.kernel.arg_names
    constants = {name: value for name, value in case.constants.items() if name in arguments}
    scalars = dict.fromkeys(("scaling", "inv_temperature", "inv_slope_temperature", "share", "scale", "cap"), "fp32")
    signature, attributes = {}, {}
    for index, name in enumerate(arguments):
        if name in constants:
            signature[name] = "constexpr"
        elif name.isupper():
            signature[name] = "*" + case.pointers.get(name, "bf16")
        else:
            signature[name] = scalars.get(name, "i32")
        if signature[name] not in ("constexpr", "fp32"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(case.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": case.warps, "num_stages": case.stages, "enable_fp_fusion": True}
    if case.most_registers is not None:
        options["maxnreg"] = case.most_registers
    compiled = triton.compile(source, target=GPUTarget("cuda", case.capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        assembly = _tool("nvdisasm", "-c", file.name)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    elements = case.scores / (32 * case.warps)
    loop = main_loop(assembly, case.matrix, case.passes)
    reloads = sum(bool(re.search(r"\b(LDL|STL)\b", line)) for line in loop)
    return Resources(registers, stack, reloads, round(len(loop) / elements, 1))


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def main_loop(assembly: str, matrix: str, passes: int = 1) -> list[str]:
    """The loops with `matrix` that compare the fewest integers (those without a mask), one per pass, as one list."""
    labels, instructions = {}, []
    for line in assembly.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            instructions.append(found[1])
    loops = []
    for position, instruction in enumerate(instructions):
        target = re.search(r"BRA.*`\((\.L_x_\d+)\)", instruction)
        if target and labels.get(target[1], len(instructions)) < position:
            body = instructions[labels[target[1]] : position + 1]
            if any(matrix in line for line in body):
                loops.append((sum("ISETP" in line for line in body), len(body), body))
    if not loops:
        raise ValueError(f"no loop with {matrix}: the matmuls do not use the tensor cores")
    return [line for *_, body in sorted(loops)[:passes] for line in body]


FP32 = ("LSE", "SOFT", "DELTA", "DBIAS", "PRESSURE", "BIAS", "LARGEST", "ACC", "TOTAL")
INT32 = ("ROWS", "COLUMNS", "HARD", "STATE", "OPEN", "ORDER", "LIVE", "COUNT")
POINTERS = {**dict.fromkeys(FP32, "fp32"), **dict.fromkeys(INT32, "i32"), "VISIBLE": "i1", "SEED": "i64"}


def all_cases() -> list[Case]:
    """The kernels at the tiles they are launched with."""
    return training_cases() + runtime_cases() + loss_cases()


def training_cases() -> list[Case]:
    """Forward, dQ, dK/dV and the single pass."""
    from attnprune.attention.kernels import training

    kernels = {
        "forward": training.forward_kernel,
        "dq": training.dq_kernel,
        "dkdv": training.dkdv_kernel,
        "single": training.dkdv_kernel,
    }
    cases = []
    targets = [(90, 64, False), (90, 64, True), (90, 128, False), (90, 128, True), (80, 64, False), (80, 64, True)]
    for capability, width, noise in targets:
        for name, kernel in kernels.items():
            tile = training.TILES[name][width, noise]
            constants = {
                "H": 32,
                "G": 1,
                "D": width,
                "DP": width,
                "BM": tile.queries,
                "BN": tile.keys,
                "NOISE": noise,
                "SHARP_P": 2,
                "SHARP_S": 2,
                "SINGLE": name == "single",
                "FAST": True,
                "PRECISION": "ieee",
            } | ({} if noise else {"SEED": None})  # as it is launched
            label = f"{name} d={width}{' noise' if noise else ''} sm_{capability}"
            pointers = POINTERS | {"DQ": "fp32"} if name == "single" else POINTERS
            scores = tile.queries * tile.keys
            matrix = MATRIX[capability]
            cases.append(
                Case(
                    label,
                    kernel,
                    constants,
                    capability,
                    tile.warps,
                    scores,
                    matrix,
                    pointers,
                    tile.stages,
                    tile.registers,
                )
            )
    return cases


def runtime_cases() -> list[Case]:
    """The passes of prefill, and decode (whose few rows take the older matrix instruction on any GPU)."""
    from attnprune.attention.kernels import decode, prefill

    cases = []
    for capability, width in [(90, 64), (90, 128), (80, 64)]:
        tile = prefill.tile_for(width, torch.bfloat16)
        target = f"d={width} sm_{capability}"
        shape = {"H": 32, "D": width, "DP": width, "PRECISION": "ieee"}
        constants = shape | {"G": 1, "BM": tile.queries, "BN": tile.keys, "BRANCH": tile.branches}
        for name, kernel in (("scan", prefill.scan_kernel), ("attend", prefill.attend_kernel)):
            cases.append(
                Case(
                    f"{name} {target}",
                    kernel,
                    constants,
                    capability,
                    tile.warps,
                    tile.queries * tile.keys,
                    MATRIX[capability],
                    POINTERS,
                    tile.stages,
                    tile.registers,
                )
            )
        keys = decode.keys_per_tile(torch.bfloat16)
        constants = shape | {"G": 4, "BM": 16, "BN": keys, "m_t": 1}
        cases.append(
            Case(
                f"decode {target}",
                decode.decode_kernel,
                constants,
                capability,
                decode.WARPS,
                16 * keys,
                "HMMA",
                POINTERS,
                decode.STAGES,
            )
        )
    return cases


def loss_cases() -> list[Case]:
    """The loss alone and with the gradient, plain and with capped logits."""
    from attnprune.attention.kernels import loss

    cases = []
    for capability in (90, 80):
        for capped in (False, True):
            for gradient in (False, True):
                name = f"loss{' gradient' if gradient else ''}{' capped' if capped else ''} sm_{capability}"
                constants = {"CAPPED": capped, "GRADIENT": gradient, "BLOCK": loss.BLOCK}
                pointers = POINTERS | {"OUT": "fp32", "LABELS": "i64"}
                cases.append(
                    Case(
                        name,
                        loss.distill_kernel,
                        constants,
                        capability,
                        loss.WARPS,
                        loss.BLOCK,
                        "MUFU.EX2",
                        pointers,
                        passes=1 + gradient,
                    )
                )
    return cases


def measure(cases: list[Case]) -> dict[str, dict]:
    """Name -> resources."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip((c.name for c in cases), map(asdict, pool.map(compile_case, cases)), strict=True))


def regressions(measured: dict[str, dict], recorded: dict[str, dict]) -> list[str]:
    """What got worse: more spilled bytes, more than a tenth more instructions, a kernel without a record."""
    worse = []
    for name, now in measured.items():
        before = recorded.get(name)
        if before is None:
            worse.append(f"{name}: not recorded")
        elif now["spill"] > before["spill"] + SPILL_SLACK:
            worse.append(f"{name}: spills {now['spill']} bytes, recorded {before['spill']}")
        elif now["instructions"] > before["instructions"] * SLACK:
            worse.append(f"{name}: {now['instructions']} instructions per score, recorded {before['instructions']}")
    return worse


def main() -> int:
    """0 if nothing got worse than the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--record-file", type=Path, default=RECORD)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    options = parser.parse_args()
    measured = measure([case for case in all_cases() if options.only in case.name])
    for name, now in measured.items():
        resources = f"{now['registers']:4d} registers {now['spill']:5d} B spilled {now['reloads']:4d} reloads"
        print(f"{name:32s} {resources} {now['instructions']:6.1f} instructions / score")
    recorded = json.loads(options.record_file.read_text())
    if options.record:
        recorded[triton.__version__] = measured
        options.record_file.write_text(json.dumps(recorded, indent=1) + "\n")
        return 0
    if triton.__version__ not in recorded:
        print(f"triton {triton.__version__} is not recorded, only {', '.join(recorded)}")
        return 1
    worse = regressions(measured, recorded[triton.__version__])
    print("\n".join(worse))
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
