"""damage.json: where a sparse model lost something, as `attnprune eval DIR --damage` measures it. No torch.

It lies beside a sidecar and is not part of its manifest: nothing that loads a model reads it, and it names by their
hashes the files that it was measured on, so that it cannot be taken for another sidecar's.
"""

from __future__ import annotations

import json
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from attnprune.errors import InputError
from attnprune.files import write_atomic
from attnprune.runs.folder import DAMAGE_FILE
from attnprune.sidecar import format
from attnprune.sidecar.folder import Sidecar

SCHEMA = "attnprune-damage-1"
WORST_SHARE = 0.5  # of the KL that single patched layers win back: what the layers hold that are worth more steps

Error = Annotated[float, Field(ge=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class LayerDamage(_Strict):
    """One layer. An error is the squared error of an attention output over the base's squared norm, over all tokens:
    of a layer after its output projection, of a head what it adds to that through its part of the projection."""

    teacher_error: Error = Field(description="the sparse layer reads the base's hidden states")
    student_error: Error = Field(description="the sparse layer reads what reaches it in the sparse model")
    kl_patched: float = Field(
        description="KL(base || sparse), nats per token, with this layer's attention output replaced by the base's"
    )
    kl_open: float = Field(description="KL with this layer's gates open, its weights as they are")
    loss_open: float = Field(description="loss, nats per token, with this layer's gates open")
    head_teacher_error: list[Error]
    head_student_error: list[Error]
    head_kl_patched: list[float | None] = Field(
        description="KL with what this head adds to the output replaced by what the base's adds; null: not measured"
    )
    head_kl_open: list[float | None] = Field(description="KL with this head's gates open; null: not measured")


class Damage(_Strict):
    """What each layer and head of one sidecar costs on one text, every other gate as it is."""

    schema_id: Literal["attnprune-damage-1"] = SCHEMA
    created_by: str
    files: dict[str, str] = Field(description="sha256 of every file of the sidecar's manifest")
    data: str = Field(description="name of the text")
    data_sha256: str = Field(description="fingerprint of its blocks, as in the manifest's result")
    seq_len: Annotated[int, Field(ge=2)]
    tokens: Annotated[int, Field(ge=1)] = Field(description="counted predictions")
    loss: float = Field(description="of the sparse model, nats per token")
    base_loss: float
    kl: float = Field(description="KL(base || sparse), nats per token")
    layers: Annotated[list[LayerDamage], Field(min_length=1)]

    @model_validator(mode="after")
    def _as_many_of_each(self) -> Self:
        for index, layer in enumerate(self.layers):
            lists = (layer.head_teacher_error, layer.head_student_error, layer.head_kl_patched, layer.head_kl_open)
            if len(set(map(len, lists))) > 1:
                raise ValueError(f"layer {index} has lists of different lengths")
        return self

    def won(self, layer: int) -> float:
        """Nats of KL per token that come back with this layer's attention output patched; negative where it costs."""
        return self.kl - self.layers[layer].kl_patched

    def ranked_layers(self) -> list[int]:
        """All layers, the one that wins most first."""
        return sorted(range(len(self.layers)), key=lambda layer: (-self.won(layer), layer))

    def ranked_heads(self) -> list[tuple[int, int, float]]:
        """(layer, head, KL won back) of every measured head, the one that wins most first."""
        measured = [
            (index, head, self.kl - kl)
            for index, layer in enumerate(self.layers)
            for head, kl in enumerate(layer.head_kl_patched)
            if kl is not None
        ]
        return sorted(measured, key=lambda found: (-found[2], *found[:2]))

    def worst_layers(self, share: float = WORST_SHARE) -> list[int]:
        """The fewest layers that hold this share of what single layers win back, worst first; none if none wins."""
        winning = [layer for layer in self.ranked_layers() if self.won(layer) > 0]
        wanted, held, chosen = share * sum(map(self.won, winning)), 0.0, []
        for layer in winning:
            if held >= wanted:
                break
            held += self.won(layer)
            chosen.append(layer)
        return chosen

    def to_json(self) -> str:
        """One line for a layer, so that a person can read it and a diff shows what changed."""
        values = self.model_dump()
        layers = [f"  {json.dumps(layer)}" for layer in values.pop("layers")]
        lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in values.items()]
        lines.append(' "layers": [\n' + ",\n".join(layers) + "\n ]")
        return "{\n" + ",\n".join(lines) + "\n}\n"


def fingerprints(sidecar: Sidecar) -> dict[str, str]:
    """sha256 of every file of a sidecar by its name."""
    return {name: entry.sha256 for name, entry in sorted(sidecar.manifest.files.items())}


def write_damage(sidecar: Sidecar, damage: Damage) -> None:
    """Put damage.json beside its sidecar, whole or not at all."""
    write_atomic(sidecar.path / DAMAGE_FILE, damage.to_json())


def read_damage(sidecar: Sidecar) -> Damage:
    """The damage.json beside a sidecar.

    Raises:
        InputError: a merged model, no such file, one that is damaged, or one that was measured on another sidecar.
    """
    file = sidecar.path / DAMAGE_FILE
    if sidecar.manifest.merged is not None:
        raise InputError(f"{sidecar.path}: is merged", hint=f"{DAMAGE_FILE} lies beside the sidecar it was made from")
    if not file.exists():
        raise InputError(f"{file}: not measured yet", hint=f"attnprune eval {sidecar.path} --damage")
    raw = format.read_regular(sidecar.path, DAMAGE_FILE, format.MAX_JSON_BYTES)
    try:
        damage = Damage.model_validate(format.parse_json(raw, str(file)))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"{file}: not of {SCHEMA}: {f'{where}: ' if where else ''}{first['msg']}") from None
    heads = [len(layer.head_kl_open) for layer in damage.layers]
    if damage.files != fingerprints(sidecar) or heads != sidecar.manifest.gate.heads:
        raise InputError(f"{file}: is of another sidecar", hint=f"attnprune eval {sidecar.path} --damage")
    return damage
