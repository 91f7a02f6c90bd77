"""Whether two folders hold the same model: by the checksum of every tensor, and by what it computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from whet.errors import ModelError
from whet.weights.arguments import config_of
from whet.weights.names import skeleton
from whet.weights.stored import Stored, noting

PROBE_TOKENS = 32


@dataclass(frozen=True)
class Compared:
    """What a model in two folders computes on a probe."""

    difference: float
    """Largest absolute difference of a logit."""
    largest: float
    """Largest absolute logit."""


def check_digests(written: Stored, expected: Mapping[str, str], where: str) -> None:
    """Raises ModelError unless every tensor that was read is in what was written, bit for bit."""
    found: dict[str, str] = {}
    for _ in noting(written, found).read():
        pass
    wrong = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
    if wrong:
        raise ModelError(
            f"{where} does not hold what was read: {len(wrong)} tensors differ ({wrong[0]} …); the disk, or the "
            "memory, is not sound. Nothing was left there"
        )


def compare_logits(left: Stored, right: Stored, *, memory_bytes: int | None) -> Compared:
    """What the models compute on the same tokens, held in memory one after the other, each in its own type.

    Raises ModelError, before anything is read, where one of them does not fit into `memory_bytes` (None: unknown).
    """
    check_room(left, memory_bytes)
    check_room(right, memory_bytes)
    before, after = logits_of(left), logits_of(right)
    return Compared(float((before - after).abs().max()), float(before.abs().max()))


def check_room(stored: Stored, memory_bytes: int | None) -> None:
    """Raises ModelError where the whole model does not fit into memory."""
    if memory_bytes is not None and stored.nbytes > memory_bytes:
        raise ModelError(
            f"--verify logits loads the whole model, {stored.nbytes / 1e9:.1f} GB, and {memory_bytes / 1e9:.1f} GB of "
            "memory are free; leave it at --verify checksum, or convert on a larger machine"
        )


@torch.no_grad()
def logits_of(stored: Stored) -> Tensor:
    """Logits [tokens, V] in float32 on a probe. Raises ModelError where tensors do not make the model."""
    empty = skeleton(config_of(stored.arguments))
    state = {name: tensor.clone() for name, tensor in stored.read()}
    model, report = type(empty).from_pretrained(
        None, config=empty.config, state_dict=state, dtype="auto", output_loading_info=True
    )
    if missing := sorted(report["missing_keys"]):
        raise ModelError(f"the tensors lack {len(missing)} of the model's weights ({missing[0]} …)")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    # A stride that is no divisor of common vocabulary sizes: tokens from all over it.
    tokens = torch.arange(PROBE_TOKENS)[None] * 7919 % vocabulary
    return model.eval()(input_ids=tokens, use_cache=False).logits[0].float()
