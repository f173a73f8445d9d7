"""The micro-step: forward, base, loss and backward of one micro-batch as one function of tensors.

What changes from step to step goes in as tensors (tokens, two coefficients, the noise's seed) and what the constraint
wants to know comes out as one, so that the host never waits for the device and a CUDA graph can hold all of it. The
logits of the whole batch never exist. A model that cannot have this (see `whole_logits`) trains with whole logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from attnprune.attention.interface import Gate, allowed_difference, gates_of
from attnprune.attention.spans import KnownMask
from attnprune.data.blocks import IGNORED_LABEL
from attnprune.errors import AttnPruneError, InputError
from attnprune.measure import kl_divergence, token_losses
from attnprune.runs.config import RunConfig
from attnprune.training.compiled import CompiledLayers, decoder_layers
from attnprune.training.loss import Distilled, Head, distill
from attnprune.training.matching import layer_outputs, relative_error
from attnprune.training.scope import DenseBase, causal_lm

TERMS = ("lagrangian", "train_loss", "base_loss", "penalty", "density", "kl", "state_error")


class MicroStep:
    """Adds the gradients of one micro-batch; `(ids, labels, coefficients, seed) -> stats`.

    Args:
        mean_base_loss: stands for the base's loss on a batch where the two are not paired.

    Args of a call:
        ids, labels: int64 [B, T].
        coefficients: fp32 [2], of the edges and of the damage in what is minimised.
        seed: int64 scalar, of the `gumbel` estimator's noise; None without noise.

    A call returns fp32 [7]: the `TERMS` of this batch. The KL is 0 where the base does not run, and the error of the
    hidden states where they are not matched.
    """

    def __init__(self, model: Any, base: DenseBase, config: RunConfig, mean_base_loss: float | None = None):
        self.base = base
        self.mean_base_loss = mean_base_loss
        self.core = causal_lm(model)
        self.gates = gates_of(model)
        self.compares = compares_with_base(config)
        self.share = 1.0 if config.constraint.kind == "kl" else config.train.distill
        self.match = config.train.match
        self.takes_log = config.constraint.kind == "density" or config.gate.penalty == "log"
        self.amp = torch.bfloat16 if config.train.precision == "bf16" else None
        self.head = head_of(self.core, self.amp) if config.train.step == "fast" else None
        self.layers: CompiledLayers | None = None
        self._masks: dict[torch.Size, list[KnownMask]] = {}

    def __call__(self, ids: Tensor, labels: Tensor, coefficients: Tensor, seed: Tensor | None = None) -> Tensor:
        for gate in self.gates:
            gate.noise_seed = seed
        with self._known_masks(ids):
            sparse, states = self._run(self.core, ids)
            penalty, density = _edges(self.gates)  # before the base, which may run the same gates forced open
            dense, base_states = None, []
            if self.compares:
                with self.base.active():
                    dense, base_states = self._run(self.base.model, ids)
        damage, kl, loss, base_loss = self._compare(sparse, dense, labels)
        error = torch.zeros_like(loss)
        if self.match:
            error = relative_error(states, base_states)
            damage = damage + self.match * error
        if self.mean_base_loss is not None:
            mean = torch.full_like(base_loss, self.mean_base_loss)
            damage, base_loss = damage + (1 - self.share) * (base_loss - mean), mean
        edges = penalty.clamp(min=1e-9).log() if self.takes_log else penalty
        total = coefficients[0] * edges + coefficients[1] * damage
        total.backward()
        for gate in self.gates:
            gate.last = None  # it holds the graph, whose nodes would outlive the step
        return torch.stack([term.detach().float() for term in (total, loss, base_loss, penalty, density, kl, error)])

    def _run(self, model: Any, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Last hidden states [B, T, D], or logits [B, T, V] of a model that trains with whole logits; and those after
        each layer, where they are matched.

        Autocast only here: evaluation is in full precision, like the artefact that is measured in the end.
        """
        recorded = layer_outputs(model) if self.match else nullcontext([])
        with torch.autocast(ids.device.type, self.amp, enabled=self.amp is not None), recorded as states:
            if self.head is None:
                return model(input_ids=ids, use_cache=False).logits, states
            # A mask of ones hides nothing; without one transformers asks the device whether the text is packed.
            with self.layers.active(model) if self.layers else nullcontext():
                return last_hidden_states(model, ids), states

    def _compare(self, sparse: Tensor, dense: Tensor | None, labels: Tensor) -> Distilled:
        if self.head is not None:
            following = torch.full_like(labels, IGNORED_LABEL)
            following[:, :-1] = labels[:, 1:]
            dense = None if dense is None else dense.flatten(0, 1)
            return distill(sparse.flatten(0, 1), dense, self.head, following.flatten(), self.share)
        log_p, losses = token_losses(sparse, labels)
        loss = losses.mean()
        kl = base_loss = losses.new_zeros(())
        if dense is not None:
            with torch.no_grad():
                base_log_p, base_losses = token_losses(dense, labels)
            kl, base_loss = kl_divergence(base_log_p, log_p).mean(), base_losses.mean()
        return Distilled(self.share * kl + (1 - self.share) * (loss - base_loss), kl, loss, base_loss)

    @contextmanager
    def _known_masks(self, ids: Tensor) -> Iterator[None]:
        """Tell the gates their masks: they are the same for every batch of a shape."""
        if self.head is None:
            yield
            return
        if ids.shape not in self._masks:
            self._masks[ids.shape] = _masks_of(self.core, self.gates, ids)
        for gate, mask in zip(self.gates, self._masks[ids.shape], strict=True):
            gate.mask = mask
        try:
            yield
        finally:
            for gate in self.gates:
                gate.mask = None


def compares_with_base(config: RunConfig) -> bool:
    """Whether the base runs at every training step: to be learned from, or as the other side of the constraint."""
    constraint = config.constraint
    learns = config.train.distill > 0 or config.train.match > 0
    return learns or constraint.kind == "kl" or (constraint.kind == "loss" and constraint.paired)


def settle_step(model: Any, config: RunConfig) -> list[str]:
    """Decide how the run's micro-steps are computed, in `config.train.step`; returns the plan's notes.

    Raises:
        InputError: a way was asked for that this model or device cannot have.
    """
    train = config.train
    if train.match:
        try:
            decoder_layers(causal_lm(model))
        except LookupError as error:
            raise InputError(f"train.match: {error}") from None
    obstacle = "its weights are sharded" if train.fsdp == "on" else whole_logits(model)
    if train.step == "fast" and obstacle:
        raise InputError(f"train.step: fast is not possible: {obstacle}", hint="leave it at auto")
    notes = []
    if train.step == "auto":
        train.step = "plain" if obstacle else "fast"
        notes.append(f"step: {train.step}" + (f", with whole logits, because {obstacle}" if obstacle else ""))
    for name, setting in (("compile", train.compile), ("cuda_graph", train.cuda_graph)):
        if setting == "on" and (train.step == "plain" or train.gradient_checkpointing):
            raise InputError(f"train.{name}: needs the fast step, and no gradient_checkpointing")
    if train.cuda_graph == "on" and config.model.device != "cuda":
        raise InputError("train.cuda_graph: there is no CUDA device")
    return notes


def last_hidden_states(model: Any, ids: Tensor) -> Tensor:
    """What the output layer of a causal LM reads, [B, T, D]."""
    return model.get_decoder()(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state


def whole_logits(model: Any) -> str | None:
    """Why a model trains with whole logits; None if its output layer can be taken in chunks of tokens."""
    core = causal_lm(model)
    layer = core.get_output_embeddings()
    if layer is None or not isinstance(layer, torch.nn.Linear):
        return "its output layer is not a linear one"
    if any(parameter.requires_grad for parameter in layer.parameters()):
        return "its output layer trains"
    device = layer.weight.device
    config = core.config.get_text_config()
    length = min(8, getattr(config, "max_position_embeddings", 8))
    ids = torch.arange(length, device=device)[None] % config.vocab_size
    with torch.no_grad():
        logits = core(input_ids=ids, use_cache=False).logits
        rebuilt = head_of(core, None).logits(last_hidden_states(core, ids))
    if not (rebuilt - logits).abs().max().item() <= allowed_difference(logits, core):
        return "its logits are more than an output layer's"
    return None


def head_of(model: Any, dtype: torch.dtype | None) -> Head:
    """The output layer with its scale and soft-cap, as the configuration names them; cast once to `dtype`."""
    layer, config = model.get_output_embeddings(), model.config.get_text_config()
    dtype = dtype or layer.weight.dtype
    bias = getattr(layer, "bias", None)
    return Head(
        layer.weight.detach().to(dtype),
        None if bias is None else bias.detach().to(dtype),
        getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0),
        getattr(config, "final_logit_softcapping", None),
    )


def _masks_of(model: Any, gates: list[Gate], ids: Tensor) -> list[KnownMask]:
    """What each layer's mask is for a batch of this shape: one row is run, and looked at."""
    seen: dict[Gate, Tensor] = {}

    def see(gate: Any, args: tuple[Any, ...]) -> None:
        seen[gate] = args[3]

    handles = [gate.register_forward_pre_hook(see) for gate in gates]
    try:
        with torch.no_grad():
            last_hidden_states(model, ids[:1])
    finally:
        for handle in handles:
            handle.remove()
    known = {id(mask): KnownMask.of(mask, len(ids)) for mask in seen.values()}
    return [known[id(seen[gate])] for gate in gates]


def _edges(gates: list[Gate]) -> tuple[Tensor, Tensor]:
    """(smooth, hard) share of open edges of the last forward, over all heads of all layers."""
    counts = [gate.last for gate in gates if gate.last is not None]
    if len(counts) != len(gates):
        raise AttnPruneError("training: a layer's attention did not run")
    visible = torch.stack([c.visible_edges * len(c.penalty) for c in counts]).sum()
    penalty = torch.cat([c.penalty for c in counts]).sum() / visible
    density = torch.cat([c.open_edges for c in counts]).sum() / visible
    if not penalty.requires_grad:  # reentrant activation checkpointing would train without any pressure on the gates
        raise AttnPruneError("training: the edge penalty has no gradient; use non-reentrant activation checkpointing")
    return penalty, density
