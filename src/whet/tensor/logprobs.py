"""The language-model head where a loss looks, in chunks: logprobs of given tokens without a [T, V] tensor.

From the logits on, everything is float32. The backward pass forms the logits of each chunk anew, except
those of the last chunk, whose probabilities are still there when the backward pass begins with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_MB = 128
BLOCK_ELEMENTS = 2**19
"""Logits that are worked on at a time: 2 MiB stay in a core's cache between one operation and the next."""

EXTRAS = frozenset({"entropy", "mean_logprobs", "correct"})
"""What can be had beside the logprobs: the entropy of the distribution, the mean logprob over the vocabulary
(label smoothing), and whether the token was the likeliest."""


class HeadWeights(Protocol):
    """logits = softcap(scale * (hidden @ weight.T + bias)), weight [V, H], bias [V] or None.

    `softcap(z) = cap * tanh(z / cap)`, left out when softcap is None.
    """

    @property
    def weight(self) -> Tensor: ...
    @property
    def bias(self) -> Tensor | None: ...
    @property
    def scale(self) -> float: ...
    @property
    def softcap(self) -> float | None: ...


def token_logprobs(
    hidden: Tensor,
    head: HeadWeights,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    extras: Set[str] = frozenset(),
    chunk_mb: int = CHUNK_MB,
) -> dict[str, Tensor]:
    """Logprobs of `targets` [M] given `hidden` [M, H], under softmax(logits / temperature).

    Returns `logprobs` and those of `EXTRAS` that are asked for, [M] each: float32 in nats, `correct` bool.
    Gradients flow through all but `correct`. About `chunk_mb` MiB are held for logits, whatever M is.
    """
    assert extras <= EXTRAS, f"unknown outputs {sorted(extras - EXTRAS)}"
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
    rows = max(1, chunk_mb * 2**20 // (4 * len(head.weight)))
    spec = _Spec(head.scale, head.softcap, temperature, dtype, rows, frozenset(extras))
    values = _ChunkedHead.apply(hidden, head.weight, head.bias, targets, spec)
    names = ("logprobs", "entropy", "mean_logprobs", "correct")
    return {name: value for name, value in zip(names, values, strict=True) if value is not None}


@dataclass(frozen=True)
class _Spec:
    scale: float
    softcap: float | None
    temperature: float
    dtype: torch.dtype
    rows: int
    extras: frozenset[str]


class _ChunkedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, spec: _Spec):
        logits = _Logits(hidden, weight, bias, spec)
        logprobs = hidden.new_empty(len(hidden), dtype=torch.float32)
        entropy, mean = (torch.empty_like(logprobs) if e in spec.extras else None for e in ("entropy", "mean_logprobs"))
        correct = torch.empty_like(logprobs, dtype=torch.bool) if "correct" in spec.extras else None
        keep = any(ctx.needs_input_grad)
        chunk: Tensor | None = None
        for span in logits.spans:
            chunk = logits.chunk(span)
            kept = keep and span is logits.spans[-1]
            for rows, z in logits.blocks(chunk, span):
                logp = logits.log_softmax(z)
                logprobs[rows] = logp.gather(1, targets[rows, None])[:, 0]
                if correct is not None:
                    correct[rows] = logp.argmax(-1) == targets[rows]  # by index: of likeliest tokens only one is right
                if mean is not None:
                    mean[rows] = logp.mean(-1)
                if entropy is not None or kept:
                    probabilities = torch.exp(logp, out=z)
                    if entropy is not None:
                        entropy[rows] = logp.mul_(probabilities).sum(-1).neg_()
        ctx.save_for_backward(hidden, weight, bias, targets, entropy)
        ctx.spec, ctx.kept = spec, chunk if keep else None
        ctx.set_materialize_grads(False)
        if correct is not None:
            ctx.mark_non_differentiable(correct)
        return logprobs, entropy, mean, correct

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):
        hidden, weight, bias, targets, entropy = ctx.saved_tensors
        spec, kept, ctx.kept = ctx.spec, ctx.kept, None
        logits = _Logits(hidden, weight, bias, spec)
        grad_hidden, grad_weight, grad_bias = (
            torch.zeros_like(x) if needed else None
            for x, needed in zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
        )
        with_entropy = grad_outputs[1] is not None
        for span in reversed(logits.spans):
            fresh = kept is None or with_entropy
            grad = logits.chunk(span) if fresh else kept
            kept = None
            for rows, z in logits.blocks(grad, span):
                logp = logits.to_probabilities(z, with_logp=with_entropy) if fresh else None
                upstream = [None if g is None else g[rows, None] for g in grad_outputs[:3]]
                _to_logit_gradient(z, logp, entropy, targets, rows, *upstream)
            grad = logits.gradient_before_temperature(grad, span).to(spec.dtype)
            if grad_hidden is not None:
                grad_hidden[span] = grad @ logits.weight
            if grad_weight is not None:
                _add_product(grad_weight, grad, logits.hidden[span])
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            del grad  # so that the kept chunk's memory is free before the next is formed
        return grad_hidden, grad_weight, grad_bias, None, None


def _to_logit_gradient(p, logp, entropy, targets, rows, g_logprob, g_entropy, g_mean) -> None:
    """Turn probabilities p [m, V] into the gradient of the logits, in place.

    With y the token and H the entropy it is g_logprob (1_y - p) + g_mean (1/V - p) - g_entropy p (log p + H).
    """
    factor = -sum(g for g in (g_logprob, g_mean) if g is not None)
    if g_entropy is not None:
        factor = logp.add_(entropy[rows, None]).mul_(-g_entropy).add_(factor)
    p.mul_(factor)
    if g_mean is not None:
        p.add_(g_mean / p.shape[1])
    if g_logprob is not None:
        p.scatter_add_(1, targets[rows, None], g_logprob)


def _add_product(total: Tensor, grad: Tensor, hidden: Tensor) -> None:
    """total [V, H] += grad [m, V].T @ hidden [m, H], without a second [V, H] tensor where types allow."""
    if total.dtype == grad.dtype:
        total.addmm_(grad.t(), hidden)
    else:
        total += grad.t() @ hidden


def _even_spans(count: int, most: int) -> list[slice]:
    """As few spans of at most `most` as can be, all about as long: the last, which is kept, should not be a rest."""
    parts = -(-count // most)
    return [slice(count * i // parts, count * (i + 1) // parts) for i in range(parts)]


class _Logits:
    """Logits chunk by chunk in one buffer that is used over and over, worked on in blocks that fit a cache."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, spec: _Spec):
        self.hidden, self.weight, self.bias, self.spec = hidden.to(spec.dtype), weight.to(spec.dtype), bias, spec
        self.spans = _even_spans(len(hidden), spec.rows)
        on_cpu = hidden.device.type == "cpu"
        longest = max((s.stop - s.start for s in self.spans), default=1)
        # A GPU would rather have few large operations.
        self._block_rows = min(longest, max(1, BLOCK_ELEMENTS // len(weight))) if on_cpu else longest
        self._buffer: Tensor | None = None
        self._scratch = hidden.new_empty((self._block_rows, len(weight)), dtype=torch.float32)

    def chunk(self, span: slice) -> Tensor:
        """Scaled logits [m, V] of this span, soft-capped, before temperature, float32; overwrites the last chunk."""
        z = self._raw(span)
        return z.div_(self.spec.softcap).tanh_().mul_(self.spec.softcap) if self.spec.softcap else z

    def blocks(self, chunk: Tensor, span: slice) -> Iterator[tuple[slice, Tensor]]:
        """(rows of the whole, their part of the chunk), a few rows at a time."""
        for start in range(0, len(chunk), self._block_rows):
            part = chunk[start : start + self._block_rows]
            yield slice(span.start + start, span.start + start + len(part)), part

    def log_softmax(self, z: Tensor) -> Tensor:
        """log softmax(logits / temperature) of a block, in the scratch buffer."""
        if self.spec.temperature != 1:
            z.div_(self.spec.temperature)
        return torch.ops.aten._log_softmax.out(z, -1, False, out=self._scratch[: len(z)])

    def to_probabilities(self, z: Tensor, *, with_logp: bool) -> Tensor | None:
        """Turn a block of logits into probabilities, in place; returns their logarithms if asked to."""
        if with_logp:
            logp = self.log_softmax(z)
            torch.exp(logp, out=z)
            return logp
        if self.spec.temperature != 1:
            z.div_(self.spec.temperature)
        z.copy_(torch.ops.aten._softmax.out(z, -1, False, out=self._scratch[: len(z)]))
        return None

    def gradient_before_temperature(self, grad: Tensor, span: slice) -> Tensor:
        """Gradient of hidden @ weight.T + bias, given that of the final logits; in place."""
        if self.spec.softcap:  # the derivative of cap * tanh(z / cap) is 1 - tanh(z / cap)^2
            kept = grad.clone()
            capped = self._raw(span).div_(self.spec.softcap).tanh_()
            grad = kept.mul_(1 - capped.square_())
        factor = self.spec.scale / self.spec.temperature
        return grad.mul_(factor) if factor != 1 else grad

    def _raw(self, span: slice) -> Tensor:
        """Scaled logits [m, V] before softcap and temperature, in the buffer."""
        if self._buffer is None:
            longest = max(s.stop - s.start for s in self.spans)
            self._buffer = self.hidden.new_empty((longest, len(self.weight)), dtype=torch.float32)
        out = self._buffer[: span.stop - span.start]
        if self.spec.dtype == torch.float32:
            torch.mm(self.hidden[span], self.weight.t(), out=out)
        else:
            out.copy_(self.hidden[span] @ self.weight.t())
        if self.bias is not None:
            out += self.bias
        return out.mul_(self.spec.scale) if self.spec.scale != 1 else out
