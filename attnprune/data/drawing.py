"""Rows of tokens drawn from a model at temperature 1, without a look at the device before a piece is written.

All rows have the same length, so one position serves them all, and the cache is as long as the text from the start.
On CUDA one token for all rows is a CUDA graph that is replayed; the decode kernel reads each key once for all heads of
a group, and only keys that are visible. On a CPU attention gets the filled part of the cache. What a model needs beyond
plain causal attention (`obstacle` names it) is left to transformers' `generate`: the same distribution, but slower.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, GenerationConfig
from transformers.cache_utils import Cache, StaticLayer

from attnprune.attention import ops
from attnprune.attention.dispatch import choose
from attnprune.attention.interface import SUPPORTED_FAMILIES, allowed_difference, dense_attention, gates_of
from attnprune.errors import UnsupportedModelError

STATIC, FILLED = "attnprune_static", "attnprune_filled"  # attention functions, by name
PROBED = 6  # tokens on which the fast way is compared with the model itself

log = logging.getLogger(__name__)


def writer(model: Any, start: int, rows: int, seq_len: int) -> Callable[[int], Tensor]:
    """A function from a seed to new rows: int64 [rows, seq_len] on the CPU, the first token of each is `start`.

    The global random state is left alone. Which way it takes is logged, with the reason if it is the slow one.
    """
    reason = obstacle(model, seq_len) or _difference(model, seq_len)
    if not reason:
        return Writer(model, start, rows, seq_len).write
    log.info("text is written through generate: %s", reason)
    return lambda seed: _generated(model, start, rows, seq_len, seed)


def obstacle(model: Any, seq_len: int) -> str:
    """Why a text of this length is left to `generate`, or nothing."""
    config = model.config
    window = getattr(config, "sliding_window", None)
    rope = getattr(config, "rope_parameters", None) or {}
    angles = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    reasons = {
        "the model has gates": bool(gates_of(model)),
        f"{config.model_type} is not a family whose attention is known": config.model_type not in SUPPORTED_FAMILIES,
        "capped attention scores": getattr(config, "attn_logit_softcapping", None) is not None,
        "attention sinks": any(hasattr(module, "sinks") for module in model.modules()),
        f"a sliding window of {window} tokens, shorter than the text": window is not None and window < seq_len,
        "experts, whose choice is read by the host": getattr(config, "num_local_experts", 0) > 0,
        "rotary angles that depend on the length": bool(angles & {"dynamic", "longrope"}),
        "parts on several devices": len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


@torch.no_grad()
def _difference(model: Any, seq_len: int) -> str:
    """What is wrong with the fast way on a few random tokens, measured against one forward of the model; or nothing."""
    length = min(PROBED, seq_len)
    ids = torch.randint(0, model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    ids = ids.to(model.device)
    own = model(input_ids=ids, use_cache=False).logits.float()
    probe = Writer(model, 0, 2, length)
    with _attention(model, probe.static):
        ours = torch.stack([probe.read(ids[:, place : place + 1], place) for place in range(length)], 1)
    off, allowed = float((ours - own).abs().max()), allowed_difference(own, model)
    return "" if off <= allowed else f"token by token, its logits are off by {off:.2g} (allowed {allowed:.2g})"


class Writer:
    """The state of `rows` rows on the device: their cache, their last tokens, the one position, what is written.

    With `static` every token is the same computation on the same memory, which a CUDA graph needs; without, attention
    is given only as many keys as there are.
    """

    def __init__(self, model: Any, start: int, rows: int, seq_len: int, static: bool | None = None):
        device = model.device
        self.model, self.start, self.seq_len = model, start, seq_len
        self.static = device.type == "cuda" if static is None else static
        layers = model.config.get_text_config().num_hidden_layers
        self.cache = Cache(layers=[StaticLayer(max_cache_len=seq_len) for _ in range(layers)])
        self.places = torch.arange(seq_len, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.token = torch.full((rows, 1), start, device=device)
        self.written = torch.full((rows, seq_len), start, device=device)
        self._replay: Callable[[], None] | None = None

    @torch.no_grad()
    def write(self, seed: int) -> Tensor:
        """New rows, int64 [rows, seq_len] on the CPU: the only moment that waits for the device."""
        with torch.random.fork_rng(devices=_cuda(self.model)), _attention(self.model, self.static):
            if self.static and self._replay is None and self.seq_len > 1:
                self._replay = self.record()
            self.begin()
            torch.manual_seed(seed)
            for place in range(self.seq_len - 1):
                self._replay() if self._replay is not None else self.advance(place)
        return self.written.to("cpu", copy=True)

    def begin(self) -> None:
        """Back to the start token. What the cache holds stays behind: nothing sees it before it is written again."""
        self.token.fill_(self.start)
        self.position.zero_()
        for layer in self.cache.layers:
            if isinstance(layer, StaticLayer):
                layer.cumulative_length.zero_()

    def advance(self, place: int = 0) -> None:
        """Draw the token after `place` for every row. A static step knows its place from the device alone."""
        self.token.copy_(self.draw(self.read(self.token, place)))
        self.written.index_copy_(1, self.position, self.token)

    def read(self, token: Tensor, place: int) -> Tensor:
        """fp32 logits [rows, V] of what follows `token` [rows, 1] at `place`; its keys and values go to the cache."""
        keys = self.seq_len if self.static else place + 1
        logits = self.model(
            input_ids=token,
            attention_mask=(self.places[:keys] <= self.position)[None, None, None],
            position_ids=self.position.expand(len(token), 1),
            past_key_values=self.cache,
            use_cache=True,
        ).logits
        self.position += 1
        return logits[:, -1].float()

    def draw(self, logits: Tensor) -> Tensor:
        """A draw from softmax(logits) per row, [rows, 1]: where p / Exp(1) is largest, in logarithms."""
        return (logits - torch.empty_like(logits).exponential_().log_()).argmax(-1, keepdim=True)

    def record(self) -> Callable[[], None]:
        """One token for every row as a CUDA graph."""
        with torch.cuda.device(self.model.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):  # compiles kernels and allocates the cache
                    self.begin()
                    self.advance()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.advance()
        return graph.replay


def attend_static(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, dropout: float = 0.0,
    scaling: float | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """What transformers calls: one query per row [B, H, 1, D], key and value [B, H_kv, T, D] -> [B, 1, H, D].

    `attention_mask` [1, 1, 1, T] says which places of the cache are filled.
    """
    return _attend(query, key, value, attention_mask, scaling, kwargs), None


def attend_filled(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, dropout: float = 0.0,
    scaling: float | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The same where `attention_mask` [1, 1, 1, K] is as long as the filled part of the cache.

    Measured on one core this beats a mask over the whole cache (by 10 % with a small model) and a cache that grows,
    which is copied for every token; `generate` is 1.2 times as slow with a small model, as fast with SmolLM2.
    """
    keys = attention_mask.shape[-1]
    return _attend(query, key[:, :, :keys], value[:, :, :keys], None, scaling, kwargs), None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, others: dict[str, Any]
) -> Tensor:
    extra = [name for name in ("softcap", "s_aux", "position_bias", "cache") if others.get(name) is not None]
    if extra:
        raise UnsupportedModelError(f"text of this model cannot be drawn token by token: {extra[0]}")
    if mask is not None and _kernels_run(value):
        query, key = query.to(value.dtype), key.to(value.dtype)
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        open_gates = torch.full((query.shape[1],), float("inf"), device=query.device)
        output, _ = ops.decode(query, key, value, open_gates, mask, scaling)
    else:
        output = dense_attention(query, key, value, scaling, attn_mask=mask)
    return output.transpose(1, 2).contiguous()


def _kernels_run(value: Tensor) -> bool:
    return value.is_cuda and choose(value.device, value.dtype, value.shape[-1]).backend == "triton"


AttentionInterface.register(STATIC, attend_static)
AttentionInterface.register(FILLED, attend_filled)


@contextmanager
def _attention(model: Any, static: bool) -> Iterator[None]:
    """The model attends in our way inside the block."""
    before = model.config._attn_implementation or "sdpa"
    model.set_attn_implementation(STATIC if static else FILLED)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _cuda(model: Any) -> list[torch.device]:
    return [model.device] if model.device.type == "cuda" else []


def _generated(model: Any, start: int, rows: int, seq_len: int, seed: int) -> Tensor:
    """Rows as `generate` writes them.

    The checkpoint's own settings (repetition penalty, top-k, ...) would make it another distribution. Without an EOS a
    finished row starts the next document by itself, as in packed text.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=seq_len - 1, pad_token_id=start
    )
    try:
        with torch.random.fork_rng(devices=_cuda(model)), torch.no_grad():
            torch.manual_seed(seed)
            prompt = torch.full((rows, 1), start, device=model.device)
            return model.generate(prompt, attention_mask=torch.ones_like(prompt)).cpu()
    finally:
        model.generation_config = own
