"""The merged form: measured on its own files, loaded in every documented way, refused in every other.

Long because its merged folders take seconds to make, and every way of loading is tried on the same ones.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import attnprune
from attnprune.attention.interface import gates_of
from attnprune.errors import InputError, VerificationError
from attnprune.sidecar import format, loading, merged
from attnprune.sidecar.folder import open_merged
from attnprune.sidecar.probe import measure_again
from tests.helpers.command import python
from tests.helpers.factory import save_tiny_llama
from tests.helpers.paths import ROOT
from tests.helpers.sidecars import reseal, save_sidecar, save_tiny_gpt2

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


def command(*arguments, cwd):
    done = python("-m", "attnprune", *arguments, cwd=cwd, timeout=1200)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Merged folders `demo` (through the command line), `llama` and `gpt2`, and the sidecars they came from."""
    folder = tmp_path_factory.mktemp("merged")
    command("sparsify", "demo", "--steps", 2, "--tolerance", "9", "--out", "demo-sidecar", "-q", cwd=folder)
    facts = json.loads(command("apply", "demo-sidecar", "--merge", "demo", "--json", cwd=folder))
    assert facts["probe_open_edges"] == open_merged(folder / "demo").manifest.probe.open_edges
    for name, make, kind in (("llama", save_tiny_llama, "lora"), ("gpt2", save_tiny_gpt2, "delta")):
        base = make(folder / f"{name}-base")
        sidecar = save_sidecar(folder / f"{name}-sidecar", base, kind)
        model, tokenizer = loading.load(sidecar.path, str(base))
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer.chat_template = CHAT
        merged.write_merged(model, tokenizer, sidecar, folder / name, same_dtype=True)
    return folder


every = pytest.mark.parametrize("name", ["demo", "llama", "gpt2"])


def portable(path):
    """(model, tokenizer) as a user of transformers gets them after `import attnprune`: no flag."""
    return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path, padding_side="left")


def batch_of(name, tokenizer):
    texts = ["12+34=", "1+2="] if name == "demo" else ["The gate opens", "A row"]
    return tokenizer(texts, return_tensors="pt", padding=True)


@pytest.fixture
def copy(place, tmp_path):
    """A copy of the merged llama that a test may damage."""
    return shutil.copytree(place / "llama", tmp_path / "copy")


def damage(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


# --- what is written


@every
def test_block_is_a_manifest_measured_on_the_files(place, name):
    manifest = open_merged(place / name).manifest
    sidecar = attnprune.open_sidecar(place / f"{name}-sidecar")
    assert manifest.result == sidecar.manifest.result
    assert manifest.weights.kind == "none"
    assert manifest.merged is not None
    assert manifest.merged.weights == sidecar.manifest.weights
    model = loading.load(place / name).model
    assert measure_again(model, manifest.probe) == manifest.probe
    assert set(manifest.files) == {file.name for file in (place / name).iterdir()} - {"config.json"}
    assert {"gates.safetensors", "model.safetensors", "modeling_attnprune.py", "tokenizer.json"} <= set(manifest.files)
    assert manifest.merged.config == format.config_fingerprint(json.loads((place / name / "config.json").read_text()))
    for file, entry in manifest.files.items():
        assert (place / name / file).stat().st_size == entry.size
    assert attnprune.Sidecar(place / name, manifest).gates.keys() == sidecar.gates.keys()  # hash and values checked
    names = {file.name for file in (place / name).iterdir()}
    assert not names & {"attnprune.json", "adapter_config.json", "adapter"}
    assert {file.stat().st_mode & 0o444 for file in (place / name).iterdir()} == {0o444}


@every
def test_load_gives_the_sidecars_model(place, name):
    base = None if name == "demo" else str(place / f"{name}-base")
    ours, theirs = loading.load(place / name), loading.load(place / f"{name}-sidecar", base)
    ids = torch.tensor([open_merged(place / name).manifest.probe.input_ids])
    with torch.no_grad():
        assert torch.equal(ours.model(ids).logits, theirs.model(ids).logits)
    for mine, other in zip(gates_of(ours.model), gates_of(theirs.model), strict=True):
        assert torch.equal(mine.bias, other.bias)
    assert ours.model.generation_config.to_dict() == theirs.model.generation_config.to_dict()
    assert ours.model.config.tie_word_embeddings == theirs.model.config.tie_word_embeddings
    tied = ours.model.get_input_embeddings().weight is ours.model.get_output_embeddings().weight
    assert tied == ours.model.config.tie_word_embeddings


def test_bf16_folder_has_its_own_probe(place, tmp_path):
    sidecar = attnprune.open_sidecar(place / "llama-sidecar")
    model, tokenizer = loading.load(sidecar.path, str(place / "llama-base"))
    half = merged.write_merged(model.to(torch.bfloat16), tokenizer, sidecar, tmp_path / "half", same_dtype=False)
    assert half.probe.loss != sidecar.manifest.probe.loss
    assert half.probe.tolerance == 2e-2
    assert half.model_dump()["merged"] == {
        "dtype": "bfloat16",
        "config": format.config_fingerprint(json.loads((tmp_path / "half" / "config.json").read_text())),
        "weights": sidecar.manifest.weights.model_dump(exclude_none=True),
        "probe": sidecar.manifest.probe.model_dump(),
    }
    dtypes = {n: t.dtype for n, t in load_file(tmp_path / "half" / "model.safetensors").items()}
    assert {d for n, d in dtypes.items() if n.endswith("attnprune_gate.bias")} == {torch.float32}
    assert {d for n, d in dtypes.items() if "attnprune_gate" not in n} == {torch.bfloat16}
    loaded = loading.load(tmp_path / "half").model
    assert loaded.dtype == torch.bfloat16
    assert gates_of(loaded)[0].bias.dtype == torch.float32
    assert loading.load(tmp_path / "half", dtype=torch.float32).model.dtype == torch.float32


def test_a_failed_write_leaves_nothing(place, tmp_path):
    sidecar = attnprune.open_sidecar(place / "llama-sidecar")
    model, tokenizer = loading.load(sidecar.path, str(place / "llama-base"))
    with torch.no_grad():
        model.lm_head.weight.mul_(3)  # not the model that the sidecar was measured with
    with pytest.raises(VerificationError):
        merged.write_merged(model, tokenizer, sidecar, tmp_path / "out", same_dtype=True)
    assert list(tmp_path.iterdir()) == []


# --- damaged folders


def test_changed_weights_fail_the_probe(copy):
    damage(copy, lambda tensors: tensors["model.norm.weight"].mul_(3))
    with pytest.raises(InputError, match=r"model\.safetensors: is damaged"):
        loading.load(copy, verify=False)
    reseal(copy)
    with pytest.raises(VerificationError):
        loading.load(copy)
    loading.load(copy, verify=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("model.layers.1.self_attn.attnprune_gate.bias"),
            r"layers\.1\.self_attn\.attnprune_gate\.bias|layer 1 has none",
        ),
        (
            lambda t: t.update({"model.layers.1.self_attn.q_norm.weight": torch.ones(8)}),
            r"q_norm\.weight",
        ),
        (lambda t: t.pop("model.norm.weight"), r"norm\.weight"),
        (lambda t: t["model.layers.1.self_attn.attnprune_gate.bias"].fill_(float("nan")), "finite|differs from gates"),
    ],
)
def test_tensors_that_do_not_fit_and_nan_gates_are_refused(copy, change, message):
    damage(copy, change)
    with pytest.raises(ValueError, match=message):
        portable(copy)
    reseal(copy)
    with pytest.raises(InputError, match=message):
        loading.load(copy)


def test_root_adapter_is_refused(copy, place):
    """With peft installed, transformers would put the adapter on the sparse weights."""
    adapter = place / "llama-sidecar" / "adapter"
    for file in adapter.iterdir():
        shutil.copy(file, copy / file.name)
    with pytest.raises(ValueError, match="adapter_config"):
        portable(copy)
    with pytest.raises(InputError, match="adapter_config"):
        loading.load(copy)


def test_no_block_is_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    del config["attnprune"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="no attnprune block"):
        loading.load(copy)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_another_attention_in_the_config_is_refused(copy, implementation):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"attn_implementation": implementation}))
    with pytest.raises(ValueError, match="only with its own attention"):
        portable(copy)


# --- the ordinary uses of a transformers model


@every
def test_left_padded_batch_generates_what_each_row_does(place, name):
    model, tokenizer = portable(place / name)
    batch = batch_of(name, tokenizer)
    together = model.generate(**batch, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    for row in range(2):
        real = batch["attention_mask"][row].bool()
        alone = model.generate(
            input_ids=batch["input_ids"][row, real][None], max_new_tokens=3, min_new_tokens=3, do_sample=False
        )
        assert torch.equal(together[row, -3:], alone[0, -3:])


@every
@pytest.mark.parametrize(
    "options", [{"cache_implementation": "static"}, {"num_beams": 3}, {"use_cache": False}], ids=str
)
def test_caches_and_beams_agree_with_attnprune_load(place, name, options):
    model, tokenizer = portable(place / name)
    ours = loading.load(place / name).model
    batch = batch_of(name, tokenizer)
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    found = model.generate(**batch, **settings, **options)
    beams = {key: value for key, value in options.items() if key == "num_beams"}
    assert torch.equal(found, ours.generate(**batch, **settings, **beams))


@every
def test_pipeline_and_chat_template(place, name):
    model, tokenizer = portable(place / name)
    chat = pipeline("text-generation", model=str(place / name), tokenizer=tokenizer, device="cpu")
    text = "12+34=" if name == "demo" else "The gate"
    expected = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=2, do_sample=False)
    found = chat(text, max_new_tokens=2, do_sample=False, return_tensors=True)[0]["generated_token_ids"]
    assert found == expected[0].tolist()
    if name != "demo":  # the addition model has no chat
        turns = [{"role": "user", "content": "hello"}]
        ids = tokenizer.apply_chat_template(turns, return_tensors="pt", add_generation_prompt=True, return_dict=True)
        assert tokenizer.decode(ids["input_ids"][0]) == "user: hello\nassistant:"
        reply = model.generate(**ids, max_new_tokens=2, do_sample=False)
        answer = chat(turns, max_new_tokens=2, do_sample=False)[0]["generated_text"][-1]
        assert answer["role"] == "assistant"
        prompt = ids["input_ids"].shape[1]
        assert answer["content"] == tokenizer.decode(reply[0, prompt:], skip_special_tokens=True)


@every
@pytest.mark.parametrize("options", [{"device_map": "cpu"}, {"device_map": "auto"}, {"dtype": "bfloat16"}], ids=str)
def test_device_map_bf16_and_saving_again(place, name, tmp_path, options):
    if options == {"device_map": "auto"} and torch.cuda.is_available():
        pytest.skip("says what happens on CPU")
    model = AutoModelForCausalLM.from_pretrained(place / name, **options)
    gates = {key: value for key, value in model.state_dict().items() if "attnprune_gate" in key}
    assert {value.dtype for value in gates.values()} == {torch.float32}
    assert model.dtype == (torch.bfloat16 if "dtype" in options else torch.float32)
    ids = torch.tensor([open_merged(place / name).manifest.probe.input_ids])
    with torch.no_grad():
        logits = model(ids).logits
        model.save_pretrained(tmp_path / "again")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="auto")
        assert torch.equal(again(ids).logits, logits)
    for key, value in gates.items():
        assert torch.equal(again.state_dict()[key], value)
    if "dtype" not in options:
        plain = AutoModelForCausalLM.from_pretrained(place / name)
        with torch.no_grad():
            assert torch.equal(plain(ids).logits, logits)


# --- other processes


STRANGER = """
import json, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
path, ids, prompt, out = {arguments!r}
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
with torch.no_grad():
    result = model(torch.tensor([ids]), output_attentions=True)
text = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=6, do_sample=False)
open_edges = sum(int((a > 0).sum()) for a in result.attentions)
torch.save({{"logits": result.logits, "open_edges": open_edges, "text": text, "class": type(model).__name__}}, out)
"""


def same_in_a_stranger(stranger, path, prompt, tmp_path, model, tokenizer):
    """Largest logit difference; edges and generated tokens must be equal."""
    manifest = open_merged(path).manifest
    ids = manifest.probe.input_ids
    stranger(STRANGER.format(arguments=(str(path), ids, prompt, str(tmp_path / "out.pt"))), timeout=600)
    found = torch.load(tmp_path / "out.pt")
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits
        text = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=6, do_sample=False)
    assert found["class"].startswith("AttnPrune")
    assert found["open_edges"] == manifest.probe.open_edges
    assert torch.equal(found["text"], text)
    return (found["logits"] - logits).abs().max().item()


@pytest.mark.parametrize(("name", "prompt"), [("demo", "12+3"), ("llama", "The gate")])
def test_same_model_without_attnprune(place, stranger, tmp_path, name, prompt):
    base = None if name == "demo" else str(place / f"{name}-base")
    model, tokenizer = loading.load(place / f"{name}-sidecar", base)
    assert same_in_a_stranger(stranger, place / name, prompt, tmp_path, model, tokenizer) <= 1e-5


WRONG_WAYS = """
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2LMHeadModel
path = {path!r}
trusted = {{"trust_remote_code": True}}
ways = {{
    "no flag": lambda: AutoModelForCausalLM.from_pretrained(path),
    "stock class": lambda: GPT2LMHeadModel.from_pretrained(path),
    "sdpa": lambda: AutoModelForCausalLM.from_pretrained(path, attn_implementation="sdpa", **trusted),
    "eager": lambda: AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", **trusted),
    "no head": lambda: AutoModel.from_pretrained(path, **trusted),
    "other head": lambda: AutoModelForSequenceClassification.from_pretrained(path, **trusted),
    "stock class, eager": lambda: GPT2LMHeadModel.from_pretrained(path, attn_implementation="eager"),
    "stock class, sdpa": lambda: GPT2LMHeadModel.from_pretrained(path, attn_implementation="sdpa"),
    "switched": lambda: AutoModelForCausalLM.from_pretrained(path, **trusted).set_attn_implementation("sdpa"),
}}
for way, load in ways.items():
    try:
        load()
    except Exception as error:
        print("raised:", way, type(error).__name__)
    else:
        raise SystemExit(f"{{way}}: loaded")
"""


def test_wrong_ways_raise_without_attnprune(place, stranger):
    lines = stranger(WRONG_WAYS.format(path=str(place / "demo"))).splitlines()
    errors = dict.fromkeys(("no flag", "stock class", "sdpa", "eager", "no head", "other head"), "ValueError")
    errors |= {"stock class, eager": "RuntimeError", "stock class, sdpa": "RuntimeError", "switched": "ValueError"}
    # transformers prints its own question about the flag on stdout, without a newline
    assert [line[line.index("raised:") :] for line in lines if "raised:" in line] == [
        f"raised: {way} {error}" for way, error in errors.items()
    ]


@pytest.mark.parametrize("way", ["AutoModel", "AutoModelForSequenceClassification"])
def test_auto_classes_without_a_language_model_head_raise(place, way):
    import transformers

    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        getattr(transformers, way).from_pretrained(place / "llama")


@pytest.mark.parametrize(
    "imports",
    ["import attnprune\nfrom transformers import AutoModelForCausalLM, AutoTokenizer",
     "from transformers import AutoModelForCausalLM, AutoTokenizer\nimport attnprune"],
    ids=["attnprune first", "transformers first"],
)  # fmt: skip
def test_no_flag_is_needed_after_the_import(place, imports):
    program = f"""
{imports}
import sys
assert "torch" not in sys.modules or "transformers" in sys.modules
tokenizer = AutoTokenizer.from_pretrained({str(place / "demo")!r})
model = AutoModelForCausalLM.from_pretrained({str(place / "demo")!r})
print(type(model).__module__, type(model).__name__, len(tokenizer))
"""
    line = [sys.executable, "-c", program]
    done = subprocess.run(
        line, cwd=ROOT, env=ENVIRONMENT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["attnprune.sidecar.modeling_attnprune", "AttnPruneGPT2LMHeadModel", "14"]


def test_import_attnprune_imports_neither_torch_nor_transformers():
    program = "import sys, attnprune; sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0
