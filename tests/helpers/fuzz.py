"""Seeded mutations of valid sidecars: the reader accepts or raises InputError, within 2 s and 1 GiB, nothing else.

`python -m tests.helpers.fuzz --count 200000 --seed 0 --out FILE.json` runs it on its own.
"""

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

from attnprune.errors import InputError
from attnprune.report.sidecar import summary_data
from attnprune.sidecar import format
from attnprune.sidecar.folder import open_sidecar
from tests.helpers.formats import damage, decode, encode, make, swap

SECONDS, BYTES, CHUNK = 2.0, 1 << 30, 1000
KINDS = ("none", "delta", "lora")


def read_everything(folder):
    """What `inspect` and the first three levels of `verify` read."""
    opened = open_sidecar(folder)
    summary_data(opened)
    opened.weight_bytes()
    for name in opened.manifest.files:
        opened.read(name)


def mutate(files, generator):
    """(mutated files, whether a hashed byte changed without its hash) of a sidecar held as {name: bytes}."""
    files = dict(files)
    name = generator.choice(sorted(files))
    kind = generator.randrange(6)
    if kind == 0:  # damage under the old hash
        before = files[name]
        files[name] = damage(before, generator)
        return files, name != format.MANIFEST_FILE and files[name] != before
    if kind == 1:  # files swapped, renamed or deleted
        other = generator.choice(sorted(files))
        if other == name:
            files[generator.choice(["x", "x.py", "adapter_config.json", name + ".pt"])] = files.pop(name)
        else:
            files[name], files[other] = files[other], files[name]
        return files, False
    if kind == 2:  # the manifest's values
        values = swap(json.loads(files[format.MANIFEST_FILE]), generator)
        files[format.MANIFEST_FILE] = json.dumps(values).encode()
        return files, False
    if name == format.MANIFEST_FILE:
        files[name] = damage(files[name], generator)
        return files, False
    files[name] = _deeper(files[name], generator)  # under a matching hash, so that the deeper checks are reached
    values = json.loads(files[format.MANIFEST_FILE])
    values["files"][name] = {"size": len(files[name]), "sha256": hashlib.sha256(files[name]).hexdigest()}
    files[format.MANIFEST_FILE] = json.dumps(values).encode()
    return files, False


def _deeper(raw, generator):
    if generator.randrange(3) == 0:
        return damage(raw, generator)
    if raw[:1] == b"{":
        return json.dumps(swap(json.loads(raw), generator)).encode()
    header, data = decode(raw)
    return encode(swap(header, generator), data)


def store(folder, files):
    """Make the folder hold exactly these files."""
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        path.unlink()
    for name, raw in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(raw)


def one(folder, files, corrupt):
    """The outcome of one case: accepted, refused, or a failure by name."""
    store(folder, files)
    start = time.process_time()
    try:
        read_everything(folder)
        outcome = "accepted-corruption" if corrupt else "accepted"
    except InputError as error:
        outcome = "refused" if len(error.message.splitlines()) == 1 else "message"
    except BaseException as error:
        outcome = f"crash-{type(error).__name__}"
    return "slow" if time.process_time() - start > SECONDS else outcome


def chunk(root, seed, first, count):
    """Cases first .. first + count in a forked worker under limits on memory and time: {outcome: count}, failures."""
    reader, writer = os.pipe()
    worker = os.fork()
    if worker == 0:
        os.close(reader)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + BYTES, size + BYTES))
        outcomes, failures = Counter(), []
        for case in range(first, first + count):
            generator = random.Random(f"{seed}-{case}")
            kind = KINDS[case % len(KINDS)]
            good = root[kind]
            signal.alarm(10)  # a hang kills the worker
            files, corrupt = mutate(good, generator)
            outcome = one(root["folder"], files, corrupt)
            outcomes[outcome] += 1
            if outcome not in ("accepted", "refused"):
                failures.append([case, outcome])
        os.write(writer, json.dumps([outcomes, failures[:50]]).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.waitpid(worker, 0)
    return json.loads(text) if text else ({"killed": 1}, [[first, "killed"]])


def fuzz(count, seed):
    """Run `count` cases; {seed, count, outcomes, failures}. The same seed and count give the same cases."""
    with tempfile.TemporaryDirectory() as name:
        root = {}
        for kind in KINDS:
            good = make(Path(name) / kind, kind)
            root[kind] = {p.relative_to(good).as_posix(): p.read_bytes() for p in good.rglob("*") if p.is_file()}
            shutil.rmtree(good)
        root["folder"] = Path(name) / "case"
        root["folder"].mkdir()
        outcomes, failures = Counter(), []
        for first in range(0, count, CHUNK):
            found, failed = chunk(root, seed, first, min(CHUNK, count - first))
            outcomes.update(found)
            failures += failed
    return {"seed": seed, "count": count, "outcomes": dict(outcomes), "failures": failures}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    text = json.dumps(fuzz(arguments.count, arguments.seed), indent=2, sort_keys=True) + "\n"
    print(text, end="")
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")
