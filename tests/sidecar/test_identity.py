"""Which base a sidecar belongs to: structure, weights, and what the fingerprints do not depend on."""

from __future__ import annotations

import pytest
import torch

from attnprune.sidecar import bases, format
from attnprune.sidecar.identity import base_tensors, check_base, content_fingerprint, structure_fingerprint
from tests.helpers.factory import refused
from tests.helpers.formats import good_manifest

# The base model's fingerprints


class Base(torch.nn.Module):
    def __init__(self, width=4):
        super().__init__()
        torch.manual_seed(0)
        self.inner = torch.nn.Linear(width, 3)
        self.register_parameter("attnprune_gate_bias", torch.nn.Parameter(torch.zeros(2)))


def manifest_for(model):
    values = good_manifest()
    tensors = base_tensors(model)
    values["base"]["structure"] = structure_fingerprint(tensors)
    values["base"]["content"] = content_fingerprint(tensors)
    return format.Manifest.model_validate(values)


def test_the_base_itself_passes_whatever_its_gates_are():
    manifest, model = manifest_for(Base()), Base()
    torch.nn.init.ones_(model.attnprune_gate_bias)
    check_base(manifest, model)


def test_another_structure_is_refused_always():
    manifest = manifest_for(Base())
    refused(lambda: check_base(manifest, Base(width=5)), "some/model", "2 layers", "2 heads")
    refused(lambda: check_base(manifest, Base(width=5), True), "wrong base model")
    refused(lambda: check_base(manifest, Base().double(), True), "wrong base model")


def test_other_weights_are_refused_unless_allowed():
    manifest, model = manifest_for(Base()), Base()
    with torch.no_grad():
        model.inner.weight[0, 0] += 1e-3
    error = refused(lambda: check_base(manifest, model), "not the weights")
    assert "--allow-base-mismatch" in error.hint
    check_base(manifest, model, allow_mismatch=True)


def test_fingerprints_do_not_depend_on_the_order_or_layout_of_the_tensors():
    first = {"a": torch.arange(1000.0).reshape(10, 100), "b": torch.ones(3)}
    second = {"b": torch.ones(3), "a": torch.arange(1000.0).reshape(10, 100).t().contiguous().t()}
    assert structure_fingerprint(first) == structure_fingerprint(second)
    assert content_fingerprint(first) == content_fingerprint(second)
    renamed = {"c": first["a"], "b": first["b"]}
    assert structure_fingerprint(renamed) != structure_fingerprint(first)
    assert content_fingerprint(renamed) != content_fingerprint(first)


@pytest.mark.parametrize("name", ["m.gguf", "M.GGUF", "M.Gguf"])
def test_a_gguf_file_is_known_by_its_suffix_in_any_case(tmp_path, name):
    refused(lambda: bases._locate(str(tmp_path / name), None), "no such file")
    (tmp_path / name).touch()
    assert bases._locate(str(tmp_path / name), None) == ("gguf", str(tmp_path), {"gguf_file": name})
