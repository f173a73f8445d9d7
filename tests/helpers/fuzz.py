"""Seeded mutations of valid sidecars and merged folders: accepted, or refused with one line, within 2 s and 1 GiB.

A merged folder that is accepted is the same function as before, unless its hashes were redone.
`python -m tests.helpers.fuzz --count 200000 --seed 0 --out FILE.json` runs it on its own, with `--merged` on a merged
folder, and with `--first N` from case N on, so that a long run can be cut in pieces.
"""

import argparse
import copy
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from unittest import mock

import torch

from attnprune.errors import InputError, VerificationError
from attnprune.report.sidecar import summary_data
from attnprune.sidecar import format, merged
from attnprune.sidecar.folder import open_merged, open_sidecar
from attnprune.sidecar.merged import load_merged
from attnprune.sidecar.verify import climb
from tests.helpers.formats import STRANGE, damage, decode, encode, make, swap
from tests.helpers.sidecars import reseal, save_merged

SECONDS, BYTES, CHUNK = 2.0, 1 << 30, 500
KINDS = ("none", "delta", "lora")
TEXT = "The gate opens when the score is above zero.\n"
# What is added beside a merged folder's own files.
BESIDE = [
    "x.py", "custom_generate/generate.py", "custom_generate/x", "adapter_config.json", "a/b.pkl", "x.safetensors",
    "x.json", "additional_chat_templates/x.jinja", "tokenizer.jinja",
    "model.safetensors.index.json", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "README.md", "attnprune.json", "a/config.json", "processor_config.json",
]  # fmt: skip


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


def mutate_merged(files, generator):
    """(mutated files, whether sizes, hashes and fingerprint are to be redone) of a merged folder."""
    files, name, kind = dict(files), generator.choice(sorted(files)), generator.randrange(8)
    if kind <= 1:
        files[name] = damage(files[name], generator)
    elif kind == 2:
        other = generator.choice([*files, *BESIDE])
        if other == name:
            del files[name]
        elif other in files:
            files[name], files[other] = files[other], files[name]
        else:
            content = [files[name], b"", b"{}", json.dumps({"auto_map": {"AutoTokenizer": "x.X"}}).encode()]
            files[other] = generator.choice(content)
    elif kind <= 5:
        files["config.json"] = json.dumps(_other_values(json.loads(files["config.json"]), generator)).encode()
    elif name.endswith(".json"):
        files[name] = json.dumps(_other_values(json.loads(files[name]), generator)).encode()
    else:
        files[name] = (
            _deeper(files[name], generator) if name.endswith(".safetensors") else damage(files[name], generator)
        )
    return files, generator.randrange(6) == 0


def _other_values(values, generator):
    """As `swap`, or other numbers in one of the values at the top, where a model's structure is."""
    if generator.randrange(2):
        return swap(values, generator)
    values = copy.deepcopy(values)
    key = generator.choice(sorted(values))
    old = values[key]
    numbers = [2 * old, old + 1, -old, 10**6, 10**9, float(old)] if isinstance(old, (int, float)) else []
    values[key] = generator.choice([*numbers, *STRANGE])
    return values


def store(folder, files):
    """Make the folder hold exactly these files."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, raw in files.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(raw)


def one(read, damaged):
    """The outcome of one case: accepted, refused, or a failure by name; `read` says whether what it read is damaged."""
    start = time.process_time()
    try:
        is_other = read()
        outcome = "accepted-damage" if damaged or is_other else "accepted"
    except (InputError, VerificationError) as error:
        outcome = "refused" if len(error.message.splitlines()) == 1 else "message"
        outcome = "memory" if "allocate" in error.message else outcome
    except BaseException as error:
        outcome = f"crash-{type(error).__name__}"
    return "slow" if time.process_time() - start > SECONDS else outcome


def sidecar_case(root, case, generator):
    files, corrupt = mutate(root[KINDS[case % len(KINDS)]], generator)
    store(root["folder"], files)
    return one(lambda: read_everything(root["folder"]), corrupt)


def merged_case(root, case, generator):
    files, resealed = mutate_merged(root["merged"], generator)
    store(root["folder"], files)
    if resealed:
        try:
            reseal(root["folder"])
        except (ValueError, LookupError, TypeError, AttributeError, OSError):
            resealed = False  # no manifest is left to be changed

    def read():
        loaded = []  # by the last level, so that the folder need not be loaded twice

        def load(*arguments, **options):
            loaded.append(load_merged(*arguments, **options))
            return loaded[0]

        with mock.patch.object(merged, "load_merged", load):
            error = list(climb(root["folder"]))[-1].error
        if error is not None:
            raise error
        return is_other(function_of(root["folder"], *loaded[0]), root["function"], resealed)

    return one(read, False)


def function_of(folder, model, tokenizer):
    """What a merged folder computes: logits on three rows, gates as `inspect` shows them, tokens and settings."""
    rows = torch.randint(0, 256, (3, 60), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        logits = model(rows).logits
    gates = [layer.tolist() for layer in open_merged(folder).biases()]
    about = tokenizer(TEXT).input_ids, tokenizer.chat_template, model.generation_config.to_dict()
    return logits, gates, about


def is_other(found, wanted, resealed):
    """Whether a folder that was accepted is damaged: another function, or not finite where the hashes were redone."""
    if resealed:
        return not bool(found[0].isfinite().all())
    return not torch.equal(found[0], wanted[0]) or found[1:] != wanted[1:]


def chunk(root, seed, first, count, run):
    """Cases first .. first + count in a forked worker under limits on memory and time: {outcome: count}, failures."""
    reader, writer = os.pipe()
    worker = os.fork()
    if worker == 0:
        os.close(reader)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + BYTES, size + BYTES))
        warnings.simplefilter("ignore")
        outcomes, failures = Counter(), []
        for case in range(first, first + count):
            signal.setitimer(signal.ITIMER_PROF, 10)  # a hang kills the worker
            outcome = run(root, case, random.Random(f"{seed}-{case}"))
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


def bytes_of(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def fuzz(count, seed, first=0, of_merged=False):
    """Run `count` cases; {seed, first, count, outcomes, failures}. The same arguments give the same cases."""
    with tempfile.TemporaryDirectory() as name:
        root = {"folder": Path(name) / "case"}
        if of_merged:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would not survive the fork
            torch.set_num_threads(1)
            folder = save_merged(Path(name) / "merged")
            root |= {"merged": bytes_of(folder), "function": function_of(folder, *load_merged(folder))}
        else:
            for kind in KINDS:
                root[kind] = bytes_of(make(Path(name) / kind, kind))
        outcomes, failures = Counter(), []
        for start in range(first, first + count, CHUNK):
            size = min(CHUNK, first + count - start)
            found, failed = chunk(root, seed, start, size, merged_case if of_merged else sidecar_case)
            outcomes.update(found)
            failures += failed
    return {"seed": seed, "first": first, "count": count, "outcomes": dict(outcomes), "failures": failures}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--merged", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    found = fuzz(arguments.count, arguments.seed, arguments.first, arguments.merged)
    text = json.dumps(found, indent=2, sort_keys=True) + "\n"
    print(text, end="")
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")
