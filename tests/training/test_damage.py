"""Where the damage is: a planted head is found, errors are what the definition says, recovery trains there."""

from __future__ import annotations

import json
import signal

import pytest
import torch

from attnprune.attention.interface import SUPPORTED_FAMILIES, attach, gates_of, heads_forced_open
from attnprune.data.blocks import Blocks
from attnprune.errors import InterruptedRunError
from attnprune.measure import measure
from attnprune.runs.folder import read_resumed
from attnprune.sidecar import bases, loading
from attnprune.sidecar.damage import Damage, read_damage, write_damage
from attnprune.training import recipe
from attnprune.training.damage import measure_damage, sidecar_damage
from attnprune.training.evaluation import text_blocks
from tests.helpers.factory import refused
from tests.helpers.families import build
from tests.helpers.recipes import _SignalAt, run_config
from tests.helpers.sidecars import save_sidecar

OPEN, CLOSED = 100.0, -100.0
LAYER, HEAD = 1, 2
QUICK = {"steps": 6, "eval_every": 2, "save_every": 2, "distill": 0.0, "learning_rate": 1e-2}


def planted(layers=2, heads=4, layer=LAYER, head=HEAD) -> list[list[float]]:
    """Biases with which every gate is open, but for those of one head."""
    return [[CLOSED if (i, h) == (layer, head) else OPEN for h in range(heads)] for i in range(layers)]


@pytest.fixture(scope="module")
def closed(inputs, tmp_path_factory):
    """A sidecar of gates alone in which one head was closed by hand."""
    return save_sidecar(tmp_path_factory.mktemp("closed") / "sidecar", inputs[0], biases=planted())


def damage_of(sidecar, inputs, tokens=640, **options) -> Damage:
    return sidecar_damage(sidecar, str(inputs[1]), base=str(inputs[0]), tokens=tokens, **options)


def test_a_head_closed_by_hand_is_found_and_opening_it_leaves_nothing(closed, inputs):
    damage = damage_of(closed, inputs)
    assert damage.kl > 1e-3
    assert damage.worst_layers() == [LAYER]
    assert damage.ranked_layers()[0] == LAYER
    layer, other = damage.layers[LAYER], damage.layers[1 - LAYER]
    assert (layer.kl_patched, layer.kl_open, layer.loss_open) == (0.0, 0.0, damage.base_loss)
    assert other.kl_patched == other.kl_open == damage.kl
    assert damage.ranked_heads()[0] == pytest.approx((LAYER, HEAD, damage.kl), abs=1e-6)
    assert layer.head_kl_open[HEAD] == 0.0
    assert len(damage.ranked_heads()) == 8
    assert other.teacher_error == other.student_error == 0.0
    expected = [float(head == HEAD) for head in range(4)]  # a closed head puts out nothing
    assert layer.head_teacher_error == layer.head_student_error == expected
    assert 0 < layer.teacher_error == layer.student_error


@pytest.mark.parametrize("family", sorted(SUPPORTED_FAMILIES))
def test_every_family_has_its_layers_and_projections(family):
    sparse, base = build(family), build(family)
    attach(sparse, bias=torch.tensor(planted(layers=4)))
    ids = torch.randint(1, 97, (3, 12))
    damage = measure_damage(sparse, base, Blocks(ids, ids.clone(), "ids"), {})
    assert damage.worst_layers()[0] == LAYER
    worst = damage.layers[LAYER]
    assert worst.kl_patched == worst.kl_open == worst.head_kl_open[HEAD] == 0.0
    assert worst.head_kl_patched[HEAD] == pytest.approx(0, abs=1e-6)
    assert [damage.layers[i].kl_open for i in (0, 2, 3)] == [damage.kl] * 3
    assert damage.layers[0].kl_patched == damage.kl
    assert damage.layers[0].student_error == 0 < damage.layers[2].student_error
    assert [layer.teacher_error > 0 for layer in damage.layers] == [i == LAYER for i in range(4)]


@pytest.mark.parametrize("kind", ["none", "delta", "lora"])
def test_numbers_are_those_of_plain_forward_passes(inputs, tmp_path, kind):
    sidecar = save_sidecar(tmp_path / "sidecar", inputs[0], kind)
    damage = damage_of(sidecar, inputs, seq_len=16, tokens=160, heads=3)
    dense = bases.load_base(str(inputs[0]))
    blocks = text_blocks(str(inputs[1]), "text", dense, 16, 160)
    assert (damage.data_sha256, damage.tokens) == (blocks.fingerprint, 150)
    sparse = loading.load(sidecar.path, str(inputs[0])).model
    reference = bases.dense(dense.model)
    plain = measure(sparse, blocks, reference=reference)
    assert (damage.kl, damage.loss) == pytest.approx((plain.kl, plain.loss), rel=1e-4)
    for index, gate in enumerate(gates_of(sparse)):
        with heads_forced_open(gate):
            opened = measure(sparse, blocks, reference=reference)
        assert damage.layers[index].kl_open == pytest.approx(opened.kl, rel=1e-4)
        assert damage.layers[index].loss_open == pytest.approx(opened.loss, rel=1e-4)
    assert len(damage.ranked_heads()) == 3
    for layer, head, _ in damage.ranked_heads():
        with heads_forced_open(gates_of(sparse)[layer], head):
            assert damage.layers[layer].head_kl_open[head] == pytest.approx(
                measure(sparse, blocks, reference=reference).kl, rel=1e-4
            )
    assert [gate.bias.tolist() for gate in gates_of(sparse)] == [bias.tolist() for bias in sidecar.biases()]
    with torch.no_grad():
        wanted, given = _outputs(dense.model, blocks.input_ids, None)
        own, _ = _outputs(sparse, blocks.input_ids, None)
        taught, _ = _outputs(sparse, blocks.input_ids, given)
    for index, layer in enumerate(damage.layers):
        projection = sparse.model.layers[index].self_attn.o_proj
        hook = projection.register_forward_hook(lambda module, args, output, right=wanted[index]: right)
        patched = measure(sparse, blocks, reference=reference, batch_size=len(blocks))
        hook.remove()
        assert layer.kl_patched == pytest.approx(patched.kl, rel=1e-4)
        for outputs, error in ((own, layer.student_error), (taught, layer.teacher_error)):
            squares = (outputs[index] - wanted[index]).square().sum() / wanted[index].square().sum()
            assert error == pytest.approx(squares.item(), rel=1e-3)


def _outputs(model, ids, given):
    """(output of every attention, hidden states into every layer) of a llama, layer by layer by its own modules."""
    core = model.model
    hidden, found, entered = core.embed_tokens(ids), [], []
    angles = core.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
    mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()[None, None]
    for index, layer in enumerate(core.layers):
        entered.append(hidden)
        hidden = hidden if given is None else given[index]
        output = layer.self_attn(layer.input_layernorm(hidden), position_embeddings=angles, attention_mask=mask)[0]
        found.append(output)
        middle = hidden + output
        hidden = middle + layer.mlp(layer.post_attention_layernorm(middle))
    return found, entered


def test_the_record_comes_back_and_another_sidecars_is_refused(closed, inputs, tmp_path):
    damage = damage_of(closed, inputs, heads=0)
    sidecar = save_sidecar(tmp_path / "sidecar", inputs[0], biases=planted())
    refused(lambda: read_damage(sidecar), "damage.json: not measured yet")
    write_damage(sidecar, damage)
    assert read_damage(sidecar) == damage
    assert [path.name for path in sidecar.path.iterdir() if path.name.startswith(".")] == []
    other = save_sidecar(tmp_path / "other", inputs[0], biases=planted(head=0))
    (other.path / "damage.json").write_text(damage.to_json())
    refused(lambda: read_damage(other), "damage.json: is of another sidecar")
    file = sidecar.path / "damage.json"
    good = json.loads(damage.to_json())
    for change, part in (
        ({"schema_id": "attnprune-damage-9"}, "not of attnprune-damage-1: schema_id"),
        ({"kl": "much"}, "not of attnprune-damage-1: kl"),
        ({"layers": [good["layers"][0] | {"head_kl_open": []}]}, "layer 0 has lists of different lengths"),
        ({"layers": good["layers"][:1]}, "is of another sidecar"),
        ({"more": 1}, "not of attnprune-damage-1: more"),
    ):
        file.write_text(json.dumps(good | change))
        refused(lambda: read_damage(sidecar), "damage.json", part)
    for raw in ("", "{", "[]", '{"kl": NaN}', "[" * 9999):
        file.write_text(raw)
        refused(lambda: read_damage(sidecar), "damage.json")


def test_worst_layers_hold_half_of_what_is_won():
    def record(*patched):
        layer = {"teacher_error": 0, "student_error": 0, "loss_open": 0, "kl_open": 0}
        heads = {
            "head_teacher_error": [0],
            "head_student_error": [0],
            "head_kl_patched": [None],
            "head_kl_open": [None],
        }
        layers = [layer | heads | {"kl_patched": kl} for kl in patched]
        facts = {"created_by": "", "files": {}, "data": "", "data_sha256": "", "seq_len": 2, "tokens": 1}
        return Damage.model_validate(facts | {"loss": 2, "base_loss": 1, "kl": 1, "layers": layers})

    assert record(0.9, 0.5, 0.8).worst_layers() == [1]
    assert record(0.7, 0.9, 0.7, 0.9).worst_layers() == [0, 2]
    assert record(1.1, 1.2, 1.0).worst_layers() == []
    assert record(1.1, 0.99).ranked_layers() == [1, 0]


@pytest.mark.parametrize(("kind", "scope"), [("none", "attn"), ("delta", "attn"), ("lora", "lora"), ("none", "lora")])
def test_recovery_trains_the_worst_layers_alone(inputs, tmp_path, kind, scope):
    first = save_sidecar(tmp_path / "first", inputs[0], kind, biases=planted())
    write_damage(first, replace_layers(damage_of(first, inputs, heads=0)))
    overrides = {
        "model": {"init": str(first.path)},
        "train": {"scope": scope, "recover": "worst", "lora_rank": 4, **QUICK},
        "constraint": {"kind": "density", "target_density": 1.0},
    }
    plans = []
    config = run_config(inputs, tmp_path / "whole", **overrides)
    whole = recipe.sparsify(config, on_plan=lambda plan: plans.append(plan) or True)
    assert whole is not None
    assert any("only layers 1 of 2 train" in note for note in plans[0].notes)
    assert any("100 % of the KL" in note and "damage.json" in note for note in plans[0].notes)
    assert all((a == b).all() for a, b in zip(first.biases(), whole.biases(), strict=True))
    before, after = _weights(first, inputs), _weights(whole, inputs)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".layers.1." in name for name in changed)
    with pytest.raises(InterruptedRunError):
        recipe.sparsify(run_config(inputs, tmp_path / "cut", **overrides), callbacks=[_SignalAt(3, signal.SIGTERM)])
    resumed = read_resumed(tmp_path / "cut", {})
    assert resumed.train.recover == [1]
    again = recipe.sparsify(resumed, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(_weights(again, inputs).values(), after.values(), strict=True))
    assert artefact_of(again) == artefact_of(whole)


def replace_layers(damage: Damage) -> Damage:
    """With layer 1 as the only one that wins, also where random weights would have it otherwise."""
    layers = [
        layer.model_copy(update={"kl_patched": damage.kl if index == 0 else 0.0})
        for index, layer in enumerate(damage.layers)
    ]
    return damage.model_copy(update={"layers": layers})


def artefact_of(sidecar) -> dict[str, str]:
    return {name: entry.sha256 for name, entry in sidecar.manifest.files.items()}


def _weights(sidecar, inputs):
    """All weights of the loaded sparse model but the gates."""
    model = loading.load(sidecar.path, str(inputs[0])).model
    return {name: p.detach() for name, p in model.named_parameters() if "gate" not in name or "proj" in name}


def test_recovery_measures_first_where_nothing_was_measured(closed, inputs, tmp_path):
    overrides = {
        "model": {"init": str(closed.path)},
        "train": {"scope": "attn", "recover": "worst"},
        "constraint": {"kind": "density"},
    }
    plans, notes = [], []
    stopped = recipe.sparsify(
        run_config(inputs, tmp_path / "run", **overrides),
        on_plan=lambda plan: bool(plans.append(plan)),
        on_note=notes.append,
    )
    assert stopped is None
    assert plans[0].config.train.recover == [LAYER]
    assert plans[0].config.constraint.target_density == closed.manifest.result.density
    assert any("has no damage.json" in note for note in notes)
    assert any("measured on 150 held-out tokens" in note for note in plans[0].notes)
    assert not (closed.path / "damage.json").exists()


def test_what_recovery_cannot_do_is_refused(closed, inputs, tmp_path):
    def recovering(**overrides):
        overrides.setdefault("model", {"init": str(closed.path)})
        return lambda: recipe.sparsify(run_config(inputs, tmp_path / "run", **overrides))

    refused(recovering(model={}, train={"recover": "worst"}), "train.recover: needs a finished run to start from")
    refused(recovering(train={"recover": "worst", "scope": "gates"}), "scope gates trains nothing else")
    refused(recovering(train={"recover": [2]}), "layer 2 is not within 0 and 1")
    whole = save_sidecar(tmp_path / "whole", inputs[0], biases=planted(layer=7))
    init = {"init": str(whole.path)}
    refused(recovering(model=init, train={"recover": "worst"}), "putting no single layer right wins KL back")
    (whole.path / "damage.json").write_text("{")
    refused(recovering(model=init, train={"recover": "worst"}), "damage.json: not valid JSON")
    refused(lambda: run_config(inputs, tmp_path / "run", train={"recover": []}), "train.recover")
    refused(lambda: run_config(inputs, tmp_path / "run", train={"recover": "best"}), "train.recover")
    assert not (tmp_path / "run").exists()
