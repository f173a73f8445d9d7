"""Seeded mutations of manifests and tensor files: opened or refused in one line, never a crash."""

from __future__ import annotations

import random
import time

import pytest

from attnprune.errors import InputError
from tests.helpers.factory import refused
from tests.helpers.formats import (
    DELTA,
    GATES,
    MANIFEST,
    damage,
    decode,
    encode,
    make,
    read_all,
    replace_file,
    store_manifest,
    stored_manifest,
    swap,
)

# Fuzzing: success or InputError, nothing else


def fuzz(folder, cases, seed, mutate):
    """Let `mutate(generator, case)` change the folder again and again; only success and InputError are fine."""
    generator, opened, failures = random.Random(seed), 0, {}
    for case in range(cases):
        mutate(generator, case)
        start = time.process_time()
        try:
            read_all(folder)
            opened += 1
        except InputError as error:
            if error.exit_code != 2 or len(error.message.splitlines()) != 1:
                failures["message"] = (case, error.message[:200])
        except Exception as error:
            failures[type(error).__name__] = (case, str(error)[:200])
        if time.process_time() - start > 2:
            failures["slow"] = case
    assert not failures
    assert 0 < opened < cases


def test_fuzzed_manifests_open_or_are_refused(folder):
    good = (folder / MANIFEST).read_bytes()
    fuzz(folder, 150, 20251205, lambda generator, _: (folder / MANIFEST).write_bytes(damage(good, generator)))


def test_manifests_with_swapped_values_open_or_are_refused(folder):
    good = stored_manifest(folder)
    fuzz(folder, 250, 20251206, lambda generator, _: store_manifest(folder, swap(good, generator)))


def test_no_mutated_hashed_byte_is_accepted(folder):
    generator = random.Random(20251207)
    good = (folder / GATES).read_bytes()
    for _ in range(100):
        bad = damage(good, generator)
        if bad != good:
            (folder / GATES).write_bytes(bad)
            refused(lambda: read_all(folder), "is damaged")


@pytest.mark.parametrize("name", [GATES, DELTA])
def test_fuzzed_tensor_files_with_a_matching_hash_are_read_or_refused(tmp_path, name):
    folder = make(tmp_path / "sidecar", "delta")
    good = (folder / name).read_bytes()
    header, data = decode(good)

    def mutate(generator, case):
        bad = damage(good, generator) if case % 3 == 0 else encode(swap(header, generator), data)
        replace_file(folder, name, bad)

    fuzz(folder, 300, 20251208, mutate)
