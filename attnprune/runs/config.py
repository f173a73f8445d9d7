"""RunConfig: everything that determines a run, as typed sections that go to and from TOML."""

from __future__ import annotations

import difflib
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from attnprune.errors import InputError
from attnprune.units import seconds

Fraction = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Temperature = Annotated[float, Field(ge=1e-3, le=1e3)]  # beyond, fp32 and the kernels' bounds decide the slope
Count = Annotated[int, Field(ge=1)]
Switch = Literal["auto", "on", "off"]


class Section(BaseModel):
    """A section of the configuration: unknown keys are errors, assignments are checked."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class ModelConfig(Section):
    """Which model, and how it is loaded."""

    name: str = Field(default="", description="Hub id, folder, .gguf file, or 'demo'")
    revision: str | None = Field(default=None, description="Hub branch, tag or commit")
    init: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="sidecar of this model to start from"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: cuda where there is one")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="auto: bfloat16 on CUDA"
    )
    load_in: Literal["full", "4bit", "8bit"] = Field(
        default="full",
        description="the base in training: full, its dtype; or its linear layers in 4 (nf4) or 8 bits (bitsandbytes)",
    )
    keep_quantised: bool = Field(
        default=False, description="the sidecar is for the base as load_in holds it, not for that in full precision"
    )

    @model_validator(mode="after")
    def _something_to_keep(self) -> Self:
        if self.keep_quantised and self.load_in == "full":
            raise ValueError("keep_quantised needs load_in 4bit or 8bit")
        return self


class DataConfig(Section):
    """Which text, and how it is cut into blocks."""

    source: str | list[str] = Field(
        default="auto",
        description="Hub data set [:config[:split]], file, folder or pattern, 'self', 'task', auto; or a list to mix",
    )
    weights: list[Positive] = Field(
        default=[], description="share of each source in the training text, relative; default: by their sizes"
    )
    text_field: str = Field(default="text", description="column of .jsonl, .parquet and Hub data sets")
    seq_len: Annotated[int, Field(ge=0)] = Field(
        default=0, description="tokens per block; 0: the model's context, at most 512"
    )
    train_tokens: Count = Field(default=50_000_000, description="upper limit of training tokens that are read")
    eval_tokens: Count = Field(default=16_384, description="held-out tokens of the evaluation split")

    @field_validator("source", mode="before")
    @classmethod
    def _one_name_stays_a_string(cls, value: Any) -> Any:
        names = value if isinstance(value, list) else [value]
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"a name or a list of names is needed (got {value!r})")
        return names[0] if len(names) == 1 else names

    @model_validator(mode="after")
    def _a_weight_for_each_source(self) -> Self:
        if self.weights and len(self.weights) != len(self.sources):
            raise ValueError(f"weights: {len(self.weights)} for {len(self.sources)} sources")
        return self

    @property
    def sources(self) -> list[str]:
        """All sources, also where there is one."""
        return self.source if isinstance(self.source, list) else [self.source]

    @property
    def described(self) -> str:
        """All sources in one line."""
        return " + ".join(self.sources)


class GateConfig(Section):
    """The gates."""

    estimator: Literal["threshold", "gumbel"] = Field(
        default="threshold", description="gumbel adds logistic noise in training"
    )
    temperature: Temperature = Field(default=0.5, description="penalty temperature T_p")
    slope_temperature: Temperature = Field(default=0.5, description="temperature T_s of the straight-through slope")
    penalty: Literal["log", "mean"] = Field(
        default="log", description="what is minimised: the logarithm of the smooth density, or the density"
    )
    initial_mass: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.99, description="softmax mass that a head's open gates keep at the start; 0: start from bias_init"
    )
    bias_init: float = Field(
        default=4.0, ge=-100, le=100, allow_inf_nan=False, description="initial gate bias (initial_mass 0)"
    )


class ConstraintConfig(Section):
    """The constraint and its multiplier."""

    @model_validator(mode="after")
    def _multiplier_within_bounds(self) -> Self:
        if not self.minimum <= self.initial <= self.maximum:
            raise ValueError(f"initial {self.initial:g} is not within minimum and maximum")
        return self

    @model_validator(mode="after")
    def _frontier_falls(self) -> Self:
        if self.frontier and self.kind != "density":
            raise ValueError("frontier needs kind density")
        if any(above <= below for above, below in pairwise([*self.frontier, self.target_density])):
            raise ValueError("frontier: the densities have to fall, down to target_density")
        return self

    kind: Literal["loss", "kl", "density"] = Field(default="kl", description="what is constrained")
    tolerance: Positive = Field(default=0.05, description="nats per token above the base (kinds loss and kl)")
    start_factor: Annotated[float, Field(ge=1, allow_inf_nan=False)] = Field(
        default=3.0,
        description="how many times wider the tolerance is at the first step; it narrows until the final phase",
    )
    paired: bool = Field(
        default=True,
        description="kind loss: compare with the base on the same tokens; else with its mean held-out loss",
    )
    target_density: Fraction = Field(default=0.01, description="largest density (kind density)")
    frontier: list[Fraction] = Field(
        default=[], description="larger densities on the way to target_density, whose best states are kept as well"
    )
    fall: Fraction = Field(
        default=0.2, description="share of the steps in which the density limit falls (kind density), of each stretch"
    )
    update: Literal["geco", "pi"] = Field(default="geco", description="multiplier update")
    rate: Fraction = Field(default=0.01, description="multiplier step size")
    gain: Annotated[float, Field(ge=0, le=10)] = Field(default=1.0, description="proportional gain")
    clip: Annotated[float, Field(gt=0, le=10)] = Field(
        default=3.0, description="largest violation that one step reports to the multiplier"
    )
    smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.9, description="moving average of the violation")
    initial: Positive = Field(default=1.0, description="initial multiplier")
    minimum: Positive = Field(default=1e-3, description="smallest multiplier")
    maximum: Positive = Field(default=1e4, description="largest multiplier")


class TrainConfig(Section):
    """The optimisation."""

    @model_validator(mode="after")
    def _settings_agree(self) -> Self:
        micro = self.micro_batch_size
        if micro != "auto" and micro and self.batch_size % micro:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of micro_batch_size")
        if self.time is not None and "steps" in self.model_fields_set:
            raise ValueError("time gives the number of steps; leave out steps or time")
        return self

    @field_validator("micro_batch_size", mode="plain")
    @classmethod
    def _a_number_or_auto(cls, value: Any) -> Any:
        text = str(value)
        if isinstance(value, bool) or not (text == "auto" or text.isdecimal()):
            raise ValueError(f"a number of blocks or auto is needed (got {value!r})")
        return "auto" if text == "auto" else int(text)

    @field_validator("time")
    @classmethod
    def _is_a_duration(cls, value: str | None) -> str | None:
        if value is not None:
            seconds(value)
        return value

    scope: Literal["auto", "gates", "lora", "attn", "full"] = Field(default="auto", description="what trains")
    recover: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | Literal["worst"] | None = Field(
        default=None,
        description="layers that alone train, gates held; worst: those that lost most, by damage.json of model.init",
    )
    distill: Annotated[float, Field(ge=0, le=1)] = Field(
        default=1.0, description="share of KL(base || sparse) in what is learned; the rest is the text's own loss"
    )
    time: str | None = Field(
        default=None, description="wall-clock time of the whole run (90s, 10m, 1h30m), which gives the number of steps"
    )
    match: NonNegative = Field(
        default=0.0,
        description="weight of matching the base's hidden states after each layer, beside what distill says",
    )
    steps: Count = Field(default=3000, description="optimiser steps")
    batch_size: Count = Field(default=16, description="blocks per step")
    micro_batch_size: int | Literal["auto"] = Field(
        default="auto", description="blocks per forward pass; auto: as many as fit into memory; 0: all at once"
    )
    learning_rate: Positive = Field(default=3e-4, description="weights")
    rest_learning_rate: Positive | None = Field(
        default=None, description="weights outside of the attention; default: learning_rate"
    )
    gate_learning_rate: Positive = Field(default=2e-2, description="gate biases")
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.98, description="Adam's second-moment decay")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(default=20, description="linear warm-up")
    decay_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.8, description="share of steps with falling rates"
    )
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = Field(default=0.1, description="rates at the end, relative")
    final_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.1, description="last share of steps: no pressure on edges"
    )
    weight_decay: NonNegative = Field(default=0.0, description="on the weights, never on the gates")
    max_grad_norm: Positive = Field(default=1.0, description="gradient clipping")
    lora_rank: Annotated[int, Field(ge=1, le=1024)] = Field(default=16, description="rank of the adapters (scope lora)")
    lora_targets: Literal["attention", "all"] = Field(
        default="attention", description="linear layers with adapters: the attention's, or all of every decoder layer"
    )
    optimizer: Literal["adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit"] = Field(
        default="adamw",
        description="8bit: its state in 8 bits; paged: in memory that moves to the host where a GPU has none left "
        "(bitsandbytes)",
    )
    fsdp: Switch = Field(
        default="auto",
        description="weights sharded over the processes (FSDP2); auto: where training does not fit into one",
    )
    step: Literal["auto", "fast", "plain"] = Field(
        default="auto", description="fast: never waits for the device, no whole logits; plain: any model"
    )
    compile: Switch = Field(default="auto", description="compiled decoder layers; auto: tried on CUDA")
    cuda_graph: Switch = Field(default="auto", description="the step as a CUDA graph; auto: tried on CUDA")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="bf16: autocast; auto: bf16 on CUDA, and on processors that are faster in it"
    )
    gradient_checkpointing: bool = Field(default=False, description="trade time for memory")
    deterministic: bool = Field(
        default=True,
        description="same bits in every run, with any number of processes; false: on CUDA a faster backward pass with "
        "atomic sums, and between processes one sum per step",
    )
    eval_every: Count = Field(default=100, description="steps between evaluations")
    save_every: Count = Field(default=200, description="steps between checkpoints")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(default=0, description="all random choices")


class OutputConfig(Section):
    """Where the result goes."""

    folder: str = Field(default="", description="output folder; default ./MODEL-attnprune")
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = Field(
        default="none", description="experiment tracker that gets the logs as well"
    )


class RunConfig(Section):
    """A whole run. `resolved` fields hold no 'auto' any more; that is what run.toml records.

    Raises:
        InputError: unknown key (with the nearest known one) or a value out of range; one line.
    """

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    gate: GateConfig = GateConfig()
    constraint: ConstraintConfig = ConstraintConfig()
    train: TrainConfig = TrainConfig()
    output: OutputConfig = OutputConfig()

    if not TYPE_CHECKING:  # for type checkers its fields are its arguments

        def __init__(self, **values: Any):
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise InputError(_explain(error.errors()[0])) from None

    def to_toml(self) -> str:
        """The configuration as TOML (keys that are None are left out, and the steps that a time has still to give)."""
        unknown = {"train": {"steps"}} if self.train.time is not None else None
        return tomli_w.dumps(self.model_dump(exclude_none=True, exclude=unknown))


def build_config(values: dict[str, Any]) -> RunConfig:
    """A RunConfig from nested dictionaries.

    Raises:
        InputError: unknown key (with the nearest known one) or a value out of range; one line.
    """
    return RunConfig(**values)


def read_toml(path: Path) -> dict[str, Any]:
    """The raw nested values of a run.toml.

    Raises:
        InputError: the file is missing, not UTF-8 or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, not TOML, or an absurd number
        why = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error
        raise InputError(f"{path}: {error.strerror if isinstance(error, OSError) else why}") from None


def merge(base: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    """`base` with the leaves of `override` on top (new dictionary)."""
    merged = dict(base)
    for key, value in override.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def override(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`merge` of settings, where a number of steps above replaces a time below, and the other way round."""
    train = above.get("train")
    replaced = {"steps": "time", "time": "steps"}
    dropped = {replaced[key] for key in train if key in replaced} if isinstance(train, dict) else set()
    kept = below.get("train")
    if dropped and isinstance(kept, dict):
        below = {**below, "train": {key: value for key, value in kept.items() if key not in dropped}}
    return merge(below, above)


def _explain(problem: Any) -> str:
    place = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "value_error":  # raised by our own validators, about a whole section
        return f"{place}: {problem['ctx']['error']}"
    if problem["type"] != "extra_forbidden":
        return f"{place}: {problem['msg'][0].lower()}{problem['msg'][1:]} (got {problem['input']!r})"
    fields: Any = RunConfig.model_fields
    for part in problem["loc"][:-1]:
        fields = fields[part].annotation.model_fields
    near = difflib.get_close_matches(str(problem["loc"][-1]), list(fields), n=1)
    return f"{place}: unknown option" + (f"; did you mean {near[0]!r}?" if near else "")
