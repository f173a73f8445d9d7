"""How much memory a training step needs, estimated from the model's shape before anything is allocated.

For blocks of T tokens, with width d, MLP width f, query width q and key width k (heads x head size), V words, and
e = 4 bytes per number, or 2 under bf16 autocast:

- weights: every parameter; the frozen copy of scopes attn and full once more;
  Quantised weights are their codes and scales (4 bits: about 0.52 bytes per number, 8 bits: 1);
- optimiser: gradients, AdamW's two moments (8 bytes per number; with adamw8bit 2 and two scales per 256 numbers, and
  still 8 for tensors below 4,096 numbers) and, on a CPU, the best state, of what trains;
- casts (bf16 from fp32 weights): 2 bytes per parameter, kept from forward to backward; of quantised weights the largest
  matrix, which is turned back while it multiplies;
- several processes: gradients are exchanged whole (their sum, one's own, and where they are added in order one from
  every process). FSDP2 divides weights, copy and optimiser by the number of processes, and holds embeddings and head
  whole, and two layers;
- activations per token and layer, what autograd keeps: e (3 f + 2 q + 2 k) + 8 d for MLP, attention and the two norms
  (in fp32); + 2 e d where the attention's matrices train; + e (f + d) where the MLP's train as well, + 8 d where
  everything trains. With checkpointing 4 d, and all of it for one layer. + (4 + e) d where hidden states are matched;
- attention's own: one bool per pair of the mask, and on a CPU the chunk of scores that is worked on;
- logits per token: 28 V bytes with a base to compare with (logits, log-probabilities and gradients of both models),
  20 V without. A step that computes them in chunks holds one chunk's.

The coefficients are what `torch.autograd.graph.saved_tensors_hooks` counted on a Llama (within 15 %); those of the
logits give the 29 GiB that an H200 took for 32 blocks of 512 tokens. One measured step then corrects what a step takes
(on a CPU by 1.3 for SmolLM2-135M, the same for 1, 2 and 4 blocks of 256: what is freed is not all used again).

An evaluation holds no graph but the logits of BATCH_TOKENS tokens, five fp32 arrays of them for two models
(log-probabilities of both, and the terms of their KL). Export holds the base and the artefact in full precision beside
them, and on a CPU the model that trained.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import Any

import torch

from attnprune.attention.chunked import CHUNK_ELEMENTS
from attnprune.measure import BATCH_TOKENS
from attnprune.runs.config import TrainConfig
from attnprune.sidecar.quantised import features, held_bytes, is_quantised, parameter_count, quantised_layers
from attnprune.training.compiled import decoder_layers
from attnprune.training.scope import causal_lm

LOGIT_BYTES = {True: 28, False: 20}  # per token and word; True: the base runs as well
EVALUATED_BYTES = 20  # per token and word of an evaluation
BLOCK, SMALL = 256, 4096  # bitsandbytes' optimisers: numbers that share a scale; tensors below this keep fp32 moments
WORKING_COPIES = 8  # fp32 arrays of one chunk of scores, on a CPU
MOST_BLOCKS = 1 << 16


@dataclass(frozen=True)
class Shape:
    """What the formulas need to know of a model.

    Attributes:
        layers, width, mlp, heads, query, key, vocabulary: sizes; `query` and `key` are heads x head size.
        weights: bytes of all parameters.
        parameters, trainable: numbers of parameters, in all and of those that train.
        sizes: of each parameter that trains; empty: one of them.
        outside: bytes of what belongs to no layer (embeddings, last norm, head).
        full: bytes of the base in full precision, where its layers are quantised; 0: they are not.
        largest: bytes of the largest quantised matrix once it is turned back.
    """

    layers: int
    width: int
    mlp: int
    heads: int
    query: int
    key: int
    vocabulary: int
    weights: int
    parameters: int
    trainable: int
    sizes: tuple[int, ...] = ()
    outside: int = 0
    full: int = 0
    largest: int = 0

    def moments(self, optimizer: str) -> int:
        """Bytes of an optimiser's state."""
        if "8bit" not in optimizer:
            return 8 * self.trainable
        sizes = self.sizes or (self.trainable,)
        return sum(8 * n if n < SMALL else 2 * n + 8 * -(-n // BLOCK) for n in sizes)


@dataclass(frozen=True)
class Memory:
    """Bytes of one training step by what they are for; `process`: libraries, text, and the device's context."""

    weights: float
    copied: float
    optimizer: float
    casts: float
    activations: float
    attention: float
    logits: float
    process: float = 0.0

    @property
    def step(self) -> float:
        """What comes and goes with a step, beside the gradients."""
        return self.casts + self.activations + self.attention + self.logits

    @property
    def total(self) -> float:
        return self.weights + self.copied + self.optimizer + self.step + self.process


@dataclass(frozen=True)
class Estimator:
    """The formulas with everything but the number of blocks filled in.

    Attributes:
        on_cpu: chunked attention, and the best state beside the model.
        bf16: computing under autocast.
        compares: the base runs at every step.
        chunk: tokens whose logits exist at once; None: all.
        process: bytes that are neither weights nor the step's.
        processes, sharded: how many share each batch, and whether by FSDP2.
        correction: a measured step relative to these formulas.
    """

    shape: Shape
    train: TrainConfig
    seq_len: int
    on_cpu: bool
    bf16: bool
    compares: bool
    chunk: int | None = None
    process: float = 0.0
    correction: float = 1.0
    processes: int = 1
    sharded: bool = False

    def of(self, blocks: int) -> Memory:
        """The memory of a step with this many blocks at once."""
        s, train, tokens = self.shape, self.train, blocks * self.seq_len
        counted = tokens if self.chunk is None else min(tokens, self.chunk)
        layer = self._activations()
        kept = 4 * s.width * s.layers + layer if train.gradient_checkpointing else layer * s.layers
        if train.match:  # the base's states, and the differences
            kept += (4 + (2 if self.bf16 else 4)) * s.width * s.layers
        scores = min(CHUNK_ELEMENTS, tokens * self.seq_len * s.heads)
        working = 4 * WORKING_COPIES * scores if self.on_cpu else 0
        return Memory(
            weights=self._held(s.weights),
            copied=self._held(s.weights) if train.scope in ("attn", "full") else 0,
            optimizer=self._optimizer(),
            casts=self.correction * self._casts(),
            activations=self.correction * tokens * kept,
            attention=self.correction * (working + tokens * self.seq_len),
            logits=self.correction * counted * s.vocabulary * LOGIT_BYTES[self.compares],
            process=self.process,
        )

    def evaluation(self) -> float:
        """Bytes in all while the held-out text is measured in training."""
        s, train = self.shape, self.train
        copied = s.weights if train.scope in ("attn", "full") else 0
        state = s.moments(train.optimizer) + self._best()
        shared = self.processes if self.sharded else 1
        return self._held(s.weights) + self._held(copied) + state / shared + self._measuring() + self.process

    def export(self, keeps_quantised: bool = False) -> float:
        """Bytes in all while the artefact is measured; with several processes the first one does that alone."""
        s = self.shape
        base = s.full or s.weights
        models = 2 * s.weights + base if keeps_quantised else 2 * base
        trained = s.weights + self._best() if self.on_cpu else 0
        return models + trained + self._measuring() + self.process

    def _measuring(self) -> float:
        tokens = max(BATCH_TOKENS, self.seq_len)
        scores = 4 * WORKING_COPIES * min(CHUNK_ELEMENTS, tokens * self.seq_len * self.shape.heads)
        return EVALUATED_BYTES * tokens * self.shape.vocabulary + (scores if self.on_cpu else 0)

    def _best(self) -> int:
        """The best state so far lies on the host."""
        return 4 * self.shape.trainable if self.on_cpu else 0

    def _held(self, count: float) -> float:
        """Bytes of weights that one process holds at once."""
        if not (self.sharded and count):
            return count
        outside = self.shape.outside
        return count / self.processes + outside + 2 * (count - outside) / self.shape.layers

    def _optimizer(self) -> float:
        s, train = self.shape, self.train
        own = 4 * s.trainable + s.moments(train.optimizer) + self._best()
        if self.processes == 1:
            return own
        if self.sharded:
            return own / self.processes
        exchanged = 2 + self.processes if train.deterministic else 2
        return own + 4 * s.trainable * exchanged

    def _casts(self) -> float:
        s = self.shape
        return s.largest if s.full else 2 * s.parameters if self.bf16 and s.weights > 3 * s.parameters else 0

    def _activations(self) -> float:
        """Bytes per token that one layer keeps for its backward pass."""
        s, e = self.shape, 2 if self.bf16 else 4
        kept = e * (3 * s.mlp + 2 * s.query + 2 * s.key) + 8 * s.width
        if self.train.scope != "gates":
            kept += 2 * e * s.width
        if self.train.scope == "full" or (self.train.scope == "lora" and self.train.lora_targets == "all"):
            kept += e * (s.mlp + s.width)
        if self.train.scope == "full":
            kept += 8 * s.width
        return kept

    def fits(self, available: float) -> int:
        """The most blocks at once within `available` bytes; 0 if not even one."""
        return bisect_right(range(1, MOST_BLOCKS), available, key=lambda blocks: self.of(blocks).total)

    def corrected(self, blocks: int, measured: float) -> Estimator:
        """With the correction that a measured step asks for: bytes above what was held, gradients included."""
        ratio = measured / (self.of(blocks).step + 4 * self.shape.trainable)
        # Resident memory of small tensors says too little: it may raise an estimate, not lower it.
        return replace(self, correction=max(1.0, ratio) if self.on_cpu else ratio)


def shape_of(model: Any) -> Shape:
    """The shape of a gated model, with adapters or without."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    sizes = tuple(p.numel() for p in model.parameters() if p.requires_grad)
    own = torch.empty((), dtype=causal_lm(model).dtype).element_size()
    mlp = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
    return Shape(
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        mlp=mlp,
        heads=heads,
        query=heads * head,
        key=(getattr(config, "num_key_value_heads", None) or heads) * head,
        vocabulary=config.vocab_size,
        weights=held_bytes(model),
        parameters=parameter_count(model),
        trainable=sum(sizes),
        sizes=sizes,
        outside=_bytes_outside(model),
        full=parameter_count(model) * own if is_quantised(model) else 0,
        largest=own * max((math.prod(features(layer)) for _, layer in quantised_layers(model)), default=0),
    )


def _bytes_outside(model: Any) -> int:
    """Bytes of the parameters that belong to no decoder layer, a tied one once."""
    inside = {id(parameter) for layer in decoder_layers(model) for parameter in layer.parameters()}
    return sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in inside)


def largest_divisor(count: int, limit: int) -> int:
    """The largest divisor of `count` that is at most `limit`, and at least 1."""
    return max(n for n in range(1, max(1, min(count, limit)) + 1) if count % n == 0)
