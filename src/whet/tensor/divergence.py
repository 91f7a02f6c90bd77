"""How far a student's distribution over the vocabulary is from a teacher's, token by token, without [T, V] tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from whet.tensor.head import read_head
from whet.tensor.logits import CHUNK_MB, Block, HeadSpec, HeadWeights, Logits

FAR = 40.0
"""Where log-probabilities differ by more, the smaller probability makes no difference in float32."""


def token_divergence(
    hidden: Tensor,
    head: HeadWeights,
    teacher_hidden: Tensor,
    teacher_head: HeadWeights,
    *,
    beta: float,
    temperature: float = 1.0,
    chunk_mb: int = CHUNK_MB,
) -> Tensor:
    """Generalised Jensen-Shannon divergence per token [M] between teacher T and student S, float32 in nats.

    beta 0: KL(T || S), forward. beta 1: KL(S || T), reverse. Between them, with M = beta T + (1 - beta) S:
    beta KL(T || M) + (1 - beta) KL(S || M); beta 0.5 is the Jensen-Shannon divergence (some texts give beta 1
    that name, wrongly). Both softmaxes are of logits / temperature; the result is not multiplied by temperature²,
    as in TRL's `generalized_jsd_loss`.

    hidden [M, H] and teacher_hidden [M, H'] predict the same tokens. Where the vocabularies differ in size (by
    rows of padding), both distributions are over the words that they share. Gradients flow to `hidden` and `head`,
    never to the teacher.
    Source: arXiv:2306.13649, eq. 1.
    """
    width = min(len(head.weight), len(teacher_head.weight))
    reader = Divergence(teacher_hidden, teacher_head, beta=beta, width=width, temperature=temperature)
    return read_head(hidden, head, [reader], chunk_mb=chunk_mb)[0]["divergence"]


class Divergence:
    """Reads the divergence from a teacher; see `token_divergence`."""

    names: tuple[str, ...] = ("divergence",)
    constants: frozenset[str] = frozenset()

    def __init__(self, hidden: Tensor, head: HeadWeights, *, beta: float, width: int, temperature: float = 1.0):
        assert 0 <= beta <= 1 and temperature > 0, f"beta {beta}, temperature {temperature}"
        self.beta, self.width, self.temperature = beta, width, temperature
        self.extra_width = width
        self._hidden, self._head = hidden.detach(), head
        # Made while autocast is on, so that the backward pass forms the teacher's logits as the forward pass did.
        self._spec = HeadSpec.of(head, width, CHUNK_MB)
        self._teacher: Logits | None = None
        self._chunk: Tensor | None = None

    def begin(self, logits: Logits) -> tuple[Tensor, ...]:
        count = len(logits.hidden)
        assert len(self._hidden) == count, f"{len(self._hidden)} places of the teacher for {count} of the student"
        self._spec = replace(self._spec, rows=logits.spec.rows)
        return (logits.like.new_empty(count),)

    def enter(self, span: slice) -> None:
        if self._teacher is None:
            bias = None if self._head.bias is None else self._head.bias[: self.width]
            self._teacher = Logits(self._hidden, self._head.weight[: self.width], bias, self._spec)
        self._chunk = self._teacher.chunk(span)

    def leave(self) -> None:
        self._teacher = self._chunk = None

    def read(self, block: Block, outputs: Sequence[Tensor], space: Tensor, keep: bool) -> None:
        divergence = self._compare(block, space, value=True, slope=keep)
        assert divergence is not None, "it was asked for"
        outputs[0][block.rows] = divergence

    def keeps_enough_for(self, grads: Sequence[Tensor | None]) -> bool:
        return True

    def differentiate(self, block: Block, space: Tensor, grads: Sequence[Tensor | None], kept: bool) -> None:
        (g,) = grads
        assert g is not None
        if not kept:
            self._compare(block, space, value=False, slope=True)
        space.mul_(g[:, None])

    def _compare(self, block: Block, space: Tensor, *, value: bool, slope: bool) -> Tensor | None:
        """The divergence [m] if `value`; if `slope`, its gradient by logits / temperature in `space`."""
        student = block.log_softmax(self.temperature, self.width)
        teacher = self._teacher_log_softmax(block)
        if self.beta == 0:
            return _forward_kl(block, student, teacher, space, value, slope)
        if self.beta == 1:
            return _reverse_kl(block, student, teacher, space, slope)
        return _mixture(block, student, teacher, space, self.beta, value, slope)

    def _teacher_log_softmax(self, block: Block) -> Tensor:
        """Over the shared words, the teacher's own copy: it may be overwritten."""
        assert self._teacher is not None and self._chunk is not None, "no chunk was entered"
        z = self._chunk[block.local]
        return Block(block.rows, block.local, z, self._teacher.scratch).log_softmax(self.temperature, self.width)


def _forward_kl(
    block: Block, student: Tensor, teacher: Tensor, space: Tensor, value: bool, slope: bool
) -> Tensor | None:
    """Sum of p_T (log p_T - log p_S); its gradient is p_S - p_T."""
    difference = torch.sub(teacher, student, out=block.space("difference", student.shape[1])) if value else None
    p_teacher = teacher.exp_()
    if slope:
        torch.exp(student, out=space).sub_(p_teacher)
    return None if difference is None else difference.mul_(p_teacher).sum(-1)


def _reverse_kl(block: Block, student: Tensor, teacher: Tensor, space: Tensor, slope: bool) -> Tensor:
    """D = sum of p_S (log p_S - log p_T); its gradient is p_S (log p_S - log p_T - D)."""
    difference = torch.sub(student, teacher, out=teacher)
    p_student = torch.exp(student, out=space)
    divergence = torch.mul(p_student, difference, out=block.space("product", student.shape[1])).sum(-1)
    if slope:
        p_student.mul_(difference.sub_(divergence[:, None]))
    return divergence


def _mixture(
    block: Block, student: Tensor, teacher: Tensor, space: Tensor, beta: float, value: bool, slope: bool
) -> Tensor | None:
    """With d = log p_T - log p_S and u = log p_S - log p_M = -log(1 - beta + beta e^d):

    D = beta sum of p_T (d + u) + (1 - beta) sum of p_S u, its gradient (1 - beta) p_S (u - sum of p_S u).
    """
    width = student.shape[1]
    # Beyond FAR one of the terms has reached its limit, and the other its weight of zero.
    d = torch.sub(teacher, student, out=block.space("difference", width)).clamp_(-FAR, FAR)
    u = torch.expm1(d, out=block.space("log ratio", width)).mul_(beta).log1p_().neg_()
    p_student = torch.exp(student, out=space)
    own = torch.mul(p_student, u, out=block.space("product", width)).sum(-1)
    divergence = None
    if value:
        divergence = beta * d.add_(u).mul_(teacher.exp_()).sum(-1) + (1 - beta) * own
    if slope:
        p_student.mul_(u.sub_(own[:, None]).mul_(1 - beta))
    return divergence
