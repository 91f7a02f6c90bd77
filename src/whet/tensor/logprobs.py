"""Logprobs under a language-model head: of given tokens, of given words, and the likeliest words."""

from __future__ import annotations

from collections.abc import Sequence, Set

import torch
from torch import Tensor

from whet.tensor.head import read_head
from whet.tensor.logits import CHUNK_MB, Block, HeadSpec, HeadWeights, Logits

EXTRAS = frozenset({"entropy", "mean_logprobs", "correct", "log_sum_sq_probs"})
"""What can be had beside the logprobs: the entropy of the distribution, the mean logprob over the vocabulary
(label smoothing), whether the token was the likeliest, and the logarithm of the sum of squared probabilities (WPO)."""
CONSTANTS = frozenset({"correct", "log_sum_sq_probs"})
"""Those without gradient."""


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
    Gradients flow through all but `CONSTANTS`. About `chunk_mb` MiB are held for logits, whatever M is.
    """
    reader = Tokens(targets, width=len(head.weight), temperature=temperature, extras=extras)
    return read_head(hidden, head, [reader], chunk_mb=chunk_mb)[0]


def topk_logprobs(
    hidden: Tensor,
    head: HeadWeights,
    ids: Tensor,
    *,
    temperature: float = 1.0,
    vocabulary: int | None = None,
    chunk_mb: int = CHUNK_MB,
) -> Tensor:
    """Logprobs [M, k] of the words `ids` [M, k], under softmax(logits / temperature), with gradient.

    The softmax is over the first `vocabulary` words; None: all. Float32, in nats.
    """
    reader = Words(ids, width=vocabulary or len(head.weight), temperature=temperature)
    return read_head(hidden, head, [reader], chunk_mb=chunk_mb)[0]["topk_logprobs"]


@torch.no_grad()
def top_logprobs(
    hidden: Tensor,
    head: HeadWeights,
    k: int,
    *,
    temperature: float = 1.0,
    vocabulary: int | None = None,
    chunk_mb: int = CHUNK_MB,
) -> tuple[Tensor, Tensor]:
    """The k likeliest words under softmax(logits / temperature) over the first `vocabulary` words, without gradient.

    Returns their ids [M, k] int64 and logprobs [M, k] float32 in nats, the likeliest first.
    """
    width = vocabulary or len(head.weight)
    assert 1 <= k <= width, f"the {k} likeliest of {width} words"
    bias = None if head.bias is None else head.bias[:width]
    logits = Logits(hidden, head.weight[:width], bias, HeadSpec.of(head, width, chunk_mb))
    ids = torch.empty((len(hidden), k), dtype=torch.int64, device=hidden.device)
    logprobs = torch.empty((len(hidden), k), dtype=torch.float32, device=hidden.device)
    for span in logits.spans:
        for block in logits.blocks(logits.chunk(span), span):
            top = block.log_softmax(temperature, width).topk(k, -1)
            logprobs[block.rows], ids[block.rows] = top
    return ids, logprobs


class _Softmax:
    """What readers have in common whose gradient begins with the probabilities."""

    constants: frozenset[str] = frozenset()
    extra_width = 0

    def __init__(self, width: int, temperature: float):
        self.width, self.temperature = width, temperature

    def enter(self, span: slice) -> None:
        pass

    def leave(self) -> None:
        pass


class Tokens(_Softmax):
    """Reads the logprobs of `targets` [M], and `extras`; see `token_logprobs`."""

    constants = CONSTANTS

    def __init__(self, targets: Tensor, *, width: int, temperature: float = 1.0, extras: Set[str] = frozenset()):
        assert extras <= EXTRAS, f"unknown outputs {sorted(extras - EXTRAS)}"
        super().__init__(width, temperature)
        self.targets = targets
        self.names = ("logprobs", *sorted(extras))
        self._entropy: Tensor | None = None

    def begin(self, logits: Logits) -> tuple[Tensor, ...]:
        types = [torch.bool if name == "correct" else None for name in self.names]
        outputs = self._named([logits.like.new_empty(len(self.targets), dtype=dtype) for dtype in types])
        # Detached: what a node of the graph holds must not lead back to its own outputs.
        self._entropy = outputs["entropy"].detach() if "entropy" in outputs else None
        return tuple(outputs.values())

    def read(self, block: Block, outputs: Sequence[Tensor], space: Tensor, keep: bool) -> None:
        logp, targets = block.log_softmax(self.temperature, self.width), self.targets[block.rows]
        out = self._named(outputs)
        out["logprobs"][block.rows] = logp.gather(1, targets[:, None])[:, 0]
        if "correct" in out:  # by index: of likeliest tokens only one is right
            out["correct"][block.rows] = logp.argmax(-1) == targets
        if "mean_logprobs" in out:
            out["mean_logprobs"][block.rows] = logp.mean(-1)
        if keep or out.keys() & {"entropy", "log_sum_sq_probs"}:
            torch.exp(logp, out=space)
        if "entropy" in out:
            product = torch.mul(logp, space, out=block.space("product", self.width))
            out["entropy"][block.rows] = product.sum(-1).neg_()
        if "log_sum_sq_probs" in out:
            squares = torch.square(space, out=block.space("product", self.width))
            out["log_sum_sq_probs"][block.rows] = squares.sum(-1).log_()

    def keeps_enough_for(self, grads: Sequence[Tensor | None]) -> bool:
        return self._named(grads).get("entropy") is None

    def differentiate(self, block: Block, space: Tensor, grads: Sequence[Tensor | None], kept: bool) -> None:
        """With p the probabilities, y the token and H the entropy, the gradient is

        g_logprob (1_y - p) + g_mean (1/V - p) - g_entropy p (log p + H).
        """
        g = {name: grad[:, None] for name, grad in self._named(grads).items() if grad is not None}
        factor = -sum(g[name] for name in ("logprobs", "mean_logprobs") if name in g)
        if "entropy" in g:
            assert self._entropy is not None
            logp = block.log_softmax(self.temperature, self.width)  # before `space`, which may be the logits
            by_word = torch.add(logp, self._entropy[block.rows, None], out=block.space("product", self.width))
            factor = by_word.mul_(-g["entropy"]).add_(factor)
        if not kept:
            block.softmax(self.temperature, self.width, space)
        space.mul_(factor)
        if "mean_logprobs" in g:
            space.add_(g["mean_logprobs"] / self.width)
        if "logprobs" in g:
            space.scatter_add_(1, self.targets[block.rows, None], g["logprobs"])

    def _named(self, values: Sequence) -> dict:
        return dict(zip(self.names, values, strict=True))


class Words(_Softmax):
    """Reads the logprobs of the words `ids` [M, k]; see `topk_logprobs`."""

    names: tuple[str, ...] = ("topk_logprobs",)

    def __init__(self, ids: Tensor, *, width: int, temperature: float = 1.0):
        super().__init__(width, temperature)
        self.ids = ids

    def begin(self, logits: Logits) -> tuple[Tensor, ...]:
        return (logits.like.new_empty(self.ids.shape),)

    def read(self, block: Block, outputs: Sequence[Tensor], space: Tensor, keep: bool) -> None:
        logp = block.log_softmax(self.temperature, self.width)
        outputs[0][block.rows] = logp.gather(1, self.ids[block.rows])
        if keep:
            torch.exp(logp, out=space)

    def keeps_enough_for(self, grads: Sequence[Tensor | None]) -> bool:
        return True

    def differentiate(self, block: Block, space: Tensor, grads: Sequence[Tensor | None], kept: bool) -> None:
        """With p the probabilities it is the sum over the words of g_word (1_word - p)."""
        (g,) = grads
        assert g is not None
        if not kept:
            block.softmax(self.temperature, self.width, space)
        space.mul_(-g.sum(-1, keepdim=True)).scatter_add_(1, self.ids[block.rows], g)
