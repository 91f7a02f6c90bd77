"""Logprobs under a language-model head whose words are divided over ranks: no rank ever sees the logits of all."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from whet.tensor.logits import CHUNK_MB, even_spans
from whet.tensor.logprobs import CONSTANTS, EXTRAS


def divided_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    group: ProcessGroup,
    *,
    width: int,
    temperature: float = 1.0,
    extras: Set[str] = frozenset(),
    chunk_mb: int = CHUNK_MB,
) -> dict[str, Tensor]:
    """Logprobs of `targets` [M] given `hidden` [M, H], the same on every rank of the group; see `token_logprobs`.

    `weight` [V, H] are this rank's words, as many as on each other rank and in their order; those from `width` on do
    not exist. Returns `logprobs` and those of `EXTRAS` that are asked for, [M] each, the same on every rank. The
    gradient of `hidden` is summed over the ranks, so that it is whole on each.
    """
    assert extras <= EXTRAS, f"unknown outputs {sorted(extras - EXTRAS)}"
    names = ("logprobs", *sorted(extras))
    rows = max(1, chunk_mb * 2**20 // (4 * len(weight)))
    spec = _Spec(group, width, temperature, names, rows)
    return dict(zip(names, _Divided.apply(hidden, weight, targets, spec), strict=True))


@dataclass(frozen=True)
class _Spec:
    group: ProcessGroup
    width: int
    temperature: float
    names: tuple[str, ...]
    rows: int

    def first(self, weight: Tensor) -> int:
        """The first of this rank's words."""
        return self.group.rank() * len(weight)

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """[m, V] divided by the temperature, in float32 or wider; minus infinity for words that do not exist."""
        z = hidden.to(weight.dtype) @ weight.t()
        z = z.to(torch.promote_types(z.dtype, torch.float32)).div_(self.temperature)
        beyond = self.first(weight) + len(weight) - self.width
        if beyond > 0:
            z[:, max(0, len(weight) - beyond) :] = -torch.inf
        return z

    def reduce(self, values: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        if self.group.size() > 1:
            dist.all_reduce(values, op, group=self.group)
        return values

    def of_own(self, targets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Which targets [m] are words of this rank, and the places of all among its words (0 for others)."""
        local = targets - self.first(weight)
        own = (local >= 0) & (local < len(weight))
        return own, torch.where(own, local, 0)


class _Divided(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, spec: _Spec):
        found: dict[str, list[Tensor]] = {name: [] for name in (*spec.names, "lse", "entropy")}
        for span in even_spans(len(hidden), spec.rows):
            for name, values in _read(spec.logits(hidden[span], weight), targets[span], weight, spec).items():
                if name in found:
                    found[name].append(values)
        empty = hidden.new_empty(0, dtype=torch.promote_types(hidden.dtype, torch.float32))
        outputs = {name: torch.cat(values) if values else empty.clone() for name, values in found.items()}
        lse, entropy = outputs["lse"], outputs["entropy"].clone()
        ctx.save_for_backward(hidden, weight, targets, lse, entropy)
        ctx.spec = spec
        ctx.set_materialize_grads(False)
        results = tuple(outputs[name] for name in spec.names)
        pairs = zip(spec.names, results, strict=True)
        ctx.mark_non_differentiable(*(value for name, value in pairs if name in CONSTANTS))
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        hidden, weight, targets, lse, entropy = ctx.saved_tensors
        spec: _Spec = ctx.spec
        given = {name: grad for name, grad in zip(spec.names, grads, strict=True) if grad is not None}
        given = {name: grad for name, grad in given.items() if name not in CONSTANTS}
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for span in even_spans(len(hidden), spec.rows) if given else ():
            logp = spec.logits(hidden[span], weight) - lse[span, None]
            grad = _gradient(logp, entropy[span], {name: g[span, None] for name, g in given.items()}, spec)
            if "logprobs" in given:
                own, local = spec.of_own(targets[span], weight)
                grad.scatter_add_(1, local[:, None], (given["logprobs"][span] * own)[:, None])
            grad = grad.div_(spec.temperature).to(weight.dtype)
            grad_hidden[span] = (grad @ weight).to(hidden.dtype)
            if grad_weight is not None:
                grad_weight.addmm_(grad.t(), hidden[span].to(weight.dtype))
        return spec.reduce(grad_hidden, dist.ReduceOp.SUM), grad_weight, None, None


def _read(z: Tensor, targets: Tensor, weight: Tensor, spec: _Spec) -> dict[str, Tensor]:
    """What the logits [m, V] of all ranks say of the targets; sums of all ranks go together."""
    top = z.max(-1)
    most = spec.reduce(top.values.clone(), dist.ReduceOp.MAX)
    p = torch.exp(z - most[:, None])
    exists = torch.where(torch.isinf(z), 0, z)
    own, local = spec.of_own(targets, weight)
    at_target = torch.where(own, exists.gather(1, local[:, None])[:, 0], 0)
    sums = torch.stack([p.sum(-1), at_target, (p * exists).sum(-1), exists.sum(-1), p.square().sum(-1)])
    total, target, product, plain, squares = spec.reduce(sums, dist.ReduceOp.SUM)
    lse = most + total.log()
    found = {"lse": lse, "logprobs": target - lse, "entropy": lse - product / total}
    if "mean_logprobs" in spec.names:
        found["mean_logprobs"] = plain / spec.width - lse
    if "log_sum_sq_probs" in spec.names:
        found["log_sum_sq_probs"] = squares.log() - 2 * total.log()
    if "correct" in spec.names:  # of likeliest words the first is right
        index = torch.where(top.values == most, top.indices + spec.first(weight), spec.width)
        found["correct"] = spec.reduce(index, dist.ReduceOp.MIN) == targets
    return found


def _gradient(logp: Tensor, entropy: Tensor, g: dict[str, Tensor], spec: _Spec) -> Tensor:
    """With p the probabilities and H the entropy, the gradient of this rank's logits, but for the targets' own:

    - g_logprob p + g_mean (1/V - p) - g_entropy p (log p + H).
    """
    p = logp.exp()
    factor = torch.zeros_like(logp)
    for name in ("logprobs", "mean_logprobs"):
        if name in g:
            factor -= g[name]
    if "entropy" in g:
        factor -= g["entropy"] * (torch.where(torch.isinf(logp), 0, logp) + entropy[:, None])
    grad = p.mul_(factor)
    if "mean_logprobs" in g:
        grad += torch.where(torch.isinf(logp), 0, g["mean_logprobs"] / spec.width)
    return grad
