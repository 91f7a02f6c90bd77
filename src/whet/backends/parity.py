"""The check at start-up: does our way through the model give what the model's own forward gives?"""

from __future__ import annotations

import logging
from typing import Literal

import torch
from transformers import PreTrainedModel

from whet.backends.device import Arithmetic
from whet.backends.forward import Forward, Mode, own_logprobs
from whet.batch import Batch, collate
from whet.errors import ModelError
from whet.models.parts import base
from whet.types import Sample, Unit

logger = logging.getLogger(__name__)

MODES: tuple[Mode, ...] = ("tree", "packed", "rows")
TOLERANCE = {None: 2e-3, torch.bfloat16: 0.25, torch.float16: 0.05}
"""Largest difference of a logprob that rounding explains, by arithmetic. A wrong mask or a forgotten scale
is off by far more on most tokens, so the mean must also lie within a tenth of this."""


def choose_mode(
    model: PreTrainedModel,
    wanted: Mode | Literal["auto"],
    arithmetic: Arithmetic,
    *,
    temperature: float = 1.0,
    chunk_mb: int,
) -> Forward:
    """The first of tree, packed, rows (or the wanted one) whose logprobs agree with the model's own forward.

    Says which was taken when it is not the first. Raises ModelError with the difference when none agrees.
    """
    modes = MODES if wanted == "auto" else (wanted,)
    found: list[str] = []
    for mode in modes:
        forward = Forward(model, mode, temperature=temperature, chunk_mb=chunk_mb)
        why = disagreement(forward, arithmetic)
        if why is None:
            if found:
                logger.warning("attention %r is used: %s", mode, "; ".join(found))
            return forward
        found.append(f"{mode!r} {why}")
    raise ModelError(
        f"{type(base(model)).__name__} does not give the logprobs of its own forward: {'; '.join(found)}. "
        "Its head or attention does something that whet does not know; please report the model's name"
    )


@torch.no_grad()
def disagreement(forward: Forward, arithmetic: Arithmetic) -> str | None:
    """How this way differs from the model's own forward on a small made-up batch, or None if it does not."""
    model = forward.model
    batch = _probe(base(model).config.get_text_config().vocab_size, forward.shares_prefixes).to(arithmetic.device)
    training = model.training
    model.eval()
    try:
        with arithmetic.context():
            expected = own_logprobs(model, batch, forward.temperature)
            try:
                with forward.installed():
                    ours = forward(batch, {"logprobs"})["logprobs"]
            except (TypeError, AssertionError, ValueError, RuntimeError, NotImplementedError) as error:
                return f"fails: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    finally:
        model.train(training)
    difference = (ours - expected).abs()[batch.loss_mask]
    limit = TOLERANCE[arithmetic.autocast if base(model).dtype == torch.float32 else base(model).dtype]
    if difference.max() <= limit and difference.mean() <= limit / 10:
        return None
    return f"is off by {difference.max():.2g} (mean {difference.mean():.2g})"


def _probe(vocab_size: int, share: bool) -> Batch:
    """Two units whose rows share prefixes at two depths; all tokens trained."""
    draw = torch.Generator().manual_seed(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(vocab_size, (count,), generator=draw).tolist())

    units = []
    for name in ("a", "b"):
        trunk, branch = tokens(40), tokens(24)
        rows = [trunk + branch + tokens(9), trunk + branch + tokens(17), trunk + tokens(12)]
        units.append(Unit(name, tuple(Sample(row, (True,) * len(row)) for row in rows)))
    return collate(units, share_prefixes=share)
