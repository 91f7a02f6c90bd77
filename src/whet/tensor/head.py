"""The language-model head where a loss looks, in chunks: readers take from the logits what they need.

There is never a [T, V] tensor. The backward pass forms the logits of each chunk anew, except those of the last
chunk, of which the last reader keeps what its gradient needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from whet.tensor.logits import CHUNK_MB, Block, HeadSpec, HeadWeights, Logits


class Reader(Protocol):
    """What is read off the logits of M places, block by block, and how gradients go back into them.

    A reader computes with softmax(logits / temperature) over the first `width` words. One object serves one call
    of `read_head` and its backward pass. `space` is memory of the block's size [m, width] that it may fill; it may
    be the block's logits themselves.
    """

    temperature: float
    width: int
    names: tuple[str, ...]
    """Of the outputs."""
    constants: frozenset[str]
    """Outputs that have no gradient."""
    extra_width: int
    """Numbers beside the logits that a row of a chunk takes."""

    def begin(self, logits: Logits) -> tuple[Tensor, ...]:
        """Empty outputs [M, ...]."""
        ...

    def enter(self, span: slice) -> None:
        """The blocks that follow belong to this chunk."""
        ...

    def leave(self) -> None:
        """The pass is over: let go of working memory."""
        ...

    def read(self, block: Block, outputs: Sequence[Tensor], space: Tensor, keep: bool) -> None:
        """Fill in the block's rows of the outputs; if `keep`, leave in `space` what the gradient begins with."""
        ...

    def keeps_enough_for(self, grads: Sequence[Tensor | None]) -> bool:
        """Whether what `read` keeps suffices for these gradients, without the logits."""
        ...

    def differentiate(self, block: Block, space: Tensor, grads: Sequence[Tensor | None], kept: bool) -> None:
        """Write to `space` the gradient of logits / temperature, given those of the block's rows of the outputs.

        If `kept`, `space` holds what `read` left there, and there are no logits.
        """
        ...


def read_head(
    hidden: Tensor, head: HeadWeights, readers: Sequence[Reader], *, chunk_mb: int = CHUNK_MB
) -> list[dict[str, Tensor]]:
    """What each reader reads off the logits of `hidden` [M, H], by the names of its outputs, [M, ...] each.

    The logits are formed once for all of them. Gradients flow to `hidden` and the head. About `chunk_mb` MiB are
    held for logits, whatever M is.
    """
    assert readers, "nobody looks at the logits"
    spec = HeadSpec.of(head, len(head.weight) + sum(r.extra_width for r in readers), chunk_mb)
    values = iter(_ChunkedHead.apply(hidden, head.weight, head.bias, spec, tuple(readers)))
    return [{name: next(values) for name in reader.names} for reader in readers]


class _ChunkedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, spec: HeadSpec, readers: tuple[Reader, ...]):
        logits = Logits(hidden, weight, bias, spec)
        outputs = [reader.begin(logits) for reader in readers]
        # The derivative of a softcap needs the logits themselves, so that nothing else is worth keeping.
        keep = any(ctx.needs_input_grad) and not spec.softcap
        chunk: Tensor | None = None
        for span in logits.spans:
            chunk = logits.chunk(span)
            for reader in readers:
                reader.enter(span)
            for block in logits.blocks(chunk, span):
                for reader, out in zip(readers, outputs, strict=True):
                    last = reader is readers[-1]
                    space = block.z[:, : reader.width] if last else block.space("reader", reader.width)
                    reader.read(block, out, space, keep and last and span is logits.spans[-1])
        for reader in readers:
            reader.leave()
        ctx.save_for_backward(hidden, weight, bias)
        ctx.spec, ctx.readers, ctx.kept = spec, readers, chunk if keep else None
        ctx.set_materialize_grads(False)
        named = [
            (name in reader.constants, value)
            for reader, out in zip(readers, outputs, strict=True)
            for name, value in zip(reader.names, out, strict=True)
        ]
        ctx.mark_non_differentiable(*(value for constant, value in named if constant))
        return tuple(value for _, value in named)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):
        hidden, weight, bias = ctx.saved_tensors
        spec, kept, ctx.kept = ctx.spec, ctx.kept, None
        active = _with_gradients(ctx.readers, grad_outputs, spec)
        if not active:
            return (None,) * 5
        if [reader for reader, _ in active] != [ctx.readers[-1]] or not active[0][0].keeps_enough_for(active[0][1]):
            kept = None
        logits = Logits(hidden, weight, bias, spec)
        grad_hidden, grad_weight, grad_bias = (
            torch.zeros_like(x) if needed else None
            for x, needed in zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
        )
        for span in reversed(logits.spans):
            fresh = kept is None
            grad: Tensor = logits.chunk(span) if kept is None else kept
            kept = None
            for reader, _ in active if fresh else ():
                reader.enter(span)
            for block in logits.blocks(grad, span):
                _to_gradient(block, active, spec.softcap, fresh)
            grad = grad.to(spec.dtype)
            if grad_hidden is not None:
                grad_hidden[span] = grad @ logits.weight
            if grad_weight is not None:
                _add_product(grad_weight, grad, logits.hidden[span])
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            del grad  # so that the kept chunk's memory is free before the next is formed
        for reader, _ in active:
            reader.leave()
        return grad_hidden, grad_weight, grad_bias, None, None


Active = list[tuple[Reader, list[Tensor | None]]]
"""Readers whose outputs have a gradient, with these gradients as seen from hidden @ weight.T + bias."""


def _with_gradients(readers: Sequence[Reader], grads: Sequence[Tensor | None], spec: HeadSpec) -> Active:
    active, given = [], iter(grads)
    for reader in readers:
        own = [next(given) for _ in reader.names]
        if any(g is not None for g in own):
            # The gradient of the logits is linear in these, which are smaller: here the factors cost nothing.
            factor = spec.scale / reader.temperature
            active.append((reader, [None if g is None else g * factor for g in own]))
    return active


def _to_gradient(block: Block, active: Active, softcap: float | None, fresh: bool) -> None:
    """Turn a block of logits (or of what the last reader kept of them) into their gradient, in place."""
    z, slope = block.z, None
    if softcap:  # the derivative of cap * tanh(z / cap) is 1 - tanh(z / cap)^2
        slope = torch.div(z, softcap, out=block.space("softcap", z.shape[1])).square_().neg_().add_(1)
    parts = []
    for reader, grads in active:
        own = reader is active[-1][0]  # the others have read the logits by then
        space = z[:, : reader.width] if own else block.space(("gradient", len(parts)), reader.width)
        reader.differentiate(block, space, [None if g is None else g[block.rows] for g in grads], not fresh)
        parts.append(space)
    z[:, parts[-1].shape[1] :] = 0
    for part in parts[:-1]:
        z[:, : part.shape[1]] += part
    if slope is not None:
        z.mul_(slope)


def _add_product(total: Tensor, grad: Tensor, hidden: Tensor) -> None:
    """total [V, H] += grad [m, V].T @ hidden [m, H], without a second [V, H] tensor where types allow."""
    if total.dtype == grad.dtype:
        total.addmm_(grad.t(), hidden)
    else:
        total += grad.t() @ hidden
