"""gates.safetensors: names, shapes, values and statistics, each refused by name."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.helpers.factory import refused
from tests.helpers.formats import (
    GATES,
    gates_bytes,
    good_arrays,
    read_all,
    replace_file,
    store_manifest,
    stored_manifest,
)

# The values of the gates


def with_value(name, value, index=0):
    def change(arrays):
        arrays[name].flat[index] = value

    return change


def with_array(name, array):
    def change(arrays):
        arrays[name] = array

    return change


def without(name):
    def change(arrays):
        del arrays[name]

    return change


BIAS = "layers.1.gate.bias"

GATE_CASES = {
    "bias NaN": (with_value(BIAS, math.nan, 2), BIAS),
    "bias infinite": (with_value(BIAS, math.inf), BIAS),
    "bias minus infinite": (with_value(BIAS, -math.inf), BIAS),
    "bias 1e5": (with_value(BIAS, 1e5), BIAS),
    "bias -1e5": (with_value(BIAS, -1e5), BIAS),
    "bias one head short": (with_array(BIAS, np.zeros(2, np.float32)), BIAS),
    "bias of one head": (with_array(BIAS, np.zeros(1, np.float32)), BIAS),
    "bias as a column": (with_array(BIAS, np.zeros((3, 1), np.float32)), BIAS),
    "bias scalar": (with_array(BIAS, np.float32(0).reshape(())), BIAS),
    "bias F64": (with_array(BIAS, np.zeros(3)), BIAS),
    "bias F16": (with_array(BIAS, np.zeros(3, np.float16)), BIAS),
    "bias I64": (with_array(BIAS, np.zeros(3, np.int64)), BIAS),
    "bias BOOL": (with_array(BIAS, np.zeros(3, bool)), BIAS),
    "bias missing": (without(BIAS), f"{BIAS} is missing"),
    "closed missing": (without("layers.0.gate.closed"), "layers.0.gate.closed is missing"),
    "closed 2": (with_value("layers.0.gate.closed", 2), "layers.0.gate.closed"),
    "closed F32": (with_array("layers.0.gate.closed", np.zeros(2, np.float32)), "layers.0.gate.closed"),
    "density 1.5": (with_value("layers.1.stats.density", 1.5), "layers.1.stats.density"),
    "density -0.1": (with_value("layers.1.stats.density", -0.1), "layers.1.stats.density"),
    "density NaN": (with_value("layers.1.stats.density", math.nan), "layers.1.stats.density"),
    "sink 2": (with_value("layers.1.stats.sink", 2), "layers.1.stats.sink"),
    "sink missing": (without("layers.1.stats.sink"), "layers.1.stats.sink is missing"),
    "offsets NaN": (with_value("layers.0.stats.open_by_offset", math.nan), "open_by_offset"),
    "offsets -1": (with_value("layers.0.stats.open_by_offset", -1), "open_by_offset"),
    "offsets of another width": (
        with_array("layers.0.stats.open_by_offset", np.zeros((2, 3), np.float32)),
        "open_by_offset",
    ),
    "edges missing": (without("stats.offset_edges"), "stats.offset_edges is missing"),
    "edges scalar": (with_array("stats.offset_edges", np.int32(3).reshape(())), "stats.offset_edges"),
    "edges in two dimensions": (with_array("stats.offset_edges", np.zeros((3, 2), np.int32)), "stats.offset_edges"),
    "edges F32": (with_array("stats.offset_edges", np.zeros(3, np.float32)), "stats.offset_edges"),
    "extra tensor": (with_array("extra", np.zeros(1, np.float32)), "extra is unexpected"),
    "extra layer": (with_array("layers.2.gate.bias", np.zeros(2, np.float32)), "layers.2.gate.bias is unexpected"),
    "layer 999": (with_array("layers.999.gate.bias", np.zeros(2, np.float32)), "layers.999.gate.bias is unexpected"),
    "layers.01": (with_array("layers.01.gate.bias", np.zeros(2, np.float32)), "layers.01.gate.bias is unexpected"),
}


@pytest.mark.parametrize(("change", "message"), GATE_CASES.values(), ids=GATE_CASES)
def test_bad_gates_are_refused_by_name(folder, change, message):
    arrays = good_arrays()
    change(arrays)
    replace_file(folder, GATES, gates_bytes(arrays))
    refused(lambda: read_all(folder), GATES, message)


@pytest.mark.parametrize("heads", [[2], [2, 3, 4], [3, 2], [2, 2], [1024, 1024]])
def test_gates_of_another_shape_than_the_manifest_says_are_refused(folder, heads):
    values = stored_manifest(folder)
    values["gate"]["heads"] = heads
    store_manifest(folder, values)
    refused(lambda: read_all(folder), GATES)


def test_extreme_but_valid_gates_are_read(folder):
    arrays = good_arrays()
    arrays[BIAS][:] = [1e4, -1e4, 0]
    replace_file(folder, GATES, gates_bytes(arrays))
    assert read_all(folder)[0].biases()[1].tolist() == [1e4, -1e4, 0]
