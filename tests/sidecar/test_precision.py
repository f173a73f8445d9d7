"""Casts to a narrower dtype: a value that would become infinite is refused by the name of its tensor."""

from __future__ import annotations

import json

import click
import pytest
import torch
import typer
from safetensors.torch import load_file, save_file

from attnprune.attention.interface import gates_of
from attnprune.cli.apply import apply
from attnprune.runs.config import build_config
from attnprune.sidecar import bases, merged
from attnprune.sidecar.folder import open_sidecar
from attnprune.sidecar.loading import load
from attnprune.sidecar.merged import load_merged, write_merged
from attnprune.sidecar.precision import cast
from attnprune.training.resolve import load_base
from tests.helpers.factory import refused, save_tiny_llama
from tests.helpers.sidecars import save_sidecar

NAME = "model.layers.1.mlp.up_proj.weight"
TOO_LARGE = f"{NAME}: a value of 1e+05 is too large for float16 (at most 6.55e+04)"
ALREADY = f"{NAME}: holds an infinite value or NaN already"


def edit(folder, value, name=NAME, dtype=torch.float32):
    """Put a value into the stored weights of a model folder."""
    file = folder / "model.safetensors"
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(file).items()}
    tensors[name].view(-1)[3] = value
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base with a weight that half precision cannot hold, where it does no harm, and a sidecar of it."""
    folder = tmp_path_factory.mktemp("precision")
    base = edit(save_tiny_llama(folder / "base"), 1e5)
    save_sidecar(folder / "sidecar", base)
    return folder


@pytest.fixture
def loaded(place):
    return load(place / "sidecar", str(place / "base"))


def test_load_refuses_a_dtype_that_does_not_hold_the_weights(place):
    for dtype in (torch.bfloat16, torch.float64):
        model, _ = load(place / "sidecar", str(place / "base"), dtype=dtype)
        assert model.dtype == dtype
    refused(lambda: load(place / "sidecar", str(place / "base"), dtype=torch.float16), TOO_LARGE)
    refused(lambda: load(place / "sidecar", str(place / "base"), dtype=torch.int8), "dtype: torch.int8 is not one of")


def test_a_merged_model_is_not_cast_beyond_its_dtype(place, loaded, tmp_path):
    write_merged(*loaded, open_sidecar(place / "sidecar"), tmp_path / "merged", same_dtype=True)
    refused(lambda: load(tmp_path / "merged", dtype=torch.float16), TOO_LARGE)
    values = json.loads((tmp_path / "merged" / "config.json").read_bytes())
    (tmp_path / "merged" / "config.json").write_text(json.dumps(values | {"dtype": "float16"}))
    refused(lambda: load_merged(tmp_path / "merged"), "config.json")
    with pytest.raises(ValueError, match=f"{NAME} is not finite"):  # were its fingerprint redone
        merged._read(tmp_path / "merged")


def test_apply_writes_no_infinite_weight(place, tmp_path):
    context, paths = typer.Context(click.Command("apply")), [str(place / "base"), str(place / "sidecar")]
    refused(lambda: apply(context, paths, merge=tmp_path / "merged", dtype="float16"), TOO_LARGE)
    assert not list(tmp_path.iterdir())
    apply(context, paths, merge=tmp_path / "merged", dtype="bfloat16", quiet=True)
    assert load_merged(tmp_path / "merged")[0].dtype == torch.bfloat16


def test_a_model_that_is_infinite_already_is_not_written(place, loaded, tmp_path):
    loaded.model.half()
    sidecar = open_sidecar(place / "sidecar")
    refused(lambda: write_merged(*loaded, sidecar, tmp_path / "out", same_dtype=False), ALREADY)
    assert not list(tmp_path.iterdir())


def test_a_base_is_read_in_a_dtype_that_holds_it(place, tmp_path):
    assert bases.load_base(str(place / "base")).model.dtype == torch.float32
    refused(lambda: bases.load_base(str(place / "base"), dtype=torch.float16), f"base: {TOO_LARGE}")
    config = build_config({"model": {"name": str(place / "base"), "dtype": "float16"}})
    refused(lambda: load_base(config), TOO_LARGE)
    wide = edit(save_tiny_llama(tmp_path / "wide"), 1e300, dtype=torch.float64)
    refused(lambda: bases.load_base(str(wide)), f"{NAME}: a value of 1e+300 is too large for float32")


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_values_that_were_infinite_before_are_said_to_be_so(tmp_path, value, dtype):
    base = edit(save_tiny_llama(tmp_path / "base"), value)
    refused(lambda: bases.load_base(str(base), dtype=dtype), f"base: {ALREADY}")


@pytest.mark.parametrize(
    ("dtype", "largest", "first_too_large"),
    [
        (torch.float16, 65519.0, 65520.0),  # half way to the next value rounds to infinity
        (torch.bfloat16, 3.3895e38, 3.4e38),
    ],
)
def test_the_limit_is_where_rounding_gives_infinity(tiny_llama, dtype, largest, first_too_large):
    for value, fits in ((largest, True), (first_too_large, False), (-first_too_large, False)):
        model = tiny_llama()
        model.lm_head.weight.data[5, 5] = value
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        if fits:
            assert cast(model, dtype).lm_head.weight[5, 5].isfinite()
            continue
        refused(lambda model=model: cast(model, dtype), "lm_head.weight: a value of")
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_cast_model_is_the_one_that_would_be_read_in_that_dtype(tmp_path):
    base = save_tiny_llama(tmp_path / "base", tie_word_embeddings=True)
    save_sidecar(tmp_path / "sidecar", base)
    model, _ = load(tmp_path / "sidecar", str(base), dtype=torch.bfloat16)
    read = bases.load_base(str(base), dtype=torch.bfloat16).model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(gate.bias.dtype == torch.float32 for gate in gates_of(model))
    ours = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in {**dict(read.named_parameters()), **dict(read.named_buffers())}.items():
        assert torch.equal(tensor, ours[name]), name  # rotary frequencies too, which stay fp32
        assert tensor.dtype == ours[name].dtype
