"""Sanity: what must be so before the first update, since the policy has not moved yet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

TOLERANCE = 1e-6
"""In nats: beyond what float32 rounds a mean over tokens by."""


def moved_before_the_first_update(metrics: Mapping[str, float], *, is_new: bool) -> Iterator[str]:
    """Warnings about metrics of a first minibatch, computed in float32 by an engine in the same process.

    `is_new`: whether no update has been made at all, and the reference is what the run began with.
    """
    if abs(metrics.get("ppo_kl", 0.0)) > TOLERANCE:
        yield (
            f"before the first update the policy's logprobs differ from its own of a moment ago: ppo_kl is "
            f"{metrics['ppo_kl']:.3g}, expected below {TOLERANCE:g}. Does the model have dropout, or routing or "
            "normalisation that depends on the rest of the batch?"
        )
    if is_new and abs(metrics.get("kl", 0.0)) > TOLERANCE:
        yield (
            f"before the first update the policy already differs from the reference: kl is {metrics['kl']:.3g}, "
            f"expected below {TOLERANCE:g}. Is the adapter other than zero at the start (model.adapter.init), or is "
            "the reference loaded in another type or from other files?"
        )
