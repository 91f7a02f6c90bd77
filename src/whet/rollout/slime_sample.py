"""What a generate function written for slime leaves in a sample, read back and checked; sampling under its names."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from whet.rollout.slime import SlimeSample, Status
from whet.types import Episode, Sampling, VersionSpan

IDLE = {"skip_special_tokens", "no_stop_trim", "spaces_between_special_tokens"}
"""Sampling parameters about text: an engine of ours gives tokens."""
RENAMED = {"max_new_tokens": "max_tokens", "sampling_seed": "seed"}
KNOWN = ("temperature", "top_p", "top_k", "stop", "stop_token_ids", "ignore_eos", *RENAMED)


class Unusable(ValueError):
    """What a function returned cannot be trained on; the text says why."""


def sampling_params(sampling: Sampling) -> dict[str, Any]:
    """How to sample, as slime passes it."""
    return {
        **{"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k or -1},
        **{"max_new_tokens": sampling.max_tokens, "sampling_seed": sampling.seed},
        **{"stop": list(sampling.stop) or None, "stop_token_ids": list(sampling.stop_token_ids) or None},
        **{"ignore_eos": sampling.ignore_eos},
        **{"skip_special_tokens": False, "no_stop_trim": True, "spaces_between_special_tokens": False},
    }


def sampling_from(params: Mapping[str, Any], base: Sampling) -> Sampling:
    """The way back; what `params` leaves out is as in `base`. Raises ValueError for a parameter that is not known."""
    if unknown := sorted(params.keys() - {*KNOWN, *IDLE}):
        raise ValueError(f"there is no sampling parameter {unknown[0]!r}; there are {', '.join(KNOWN)}")
    given = {RENAMED.get(name, name): value for name, value in params.items() if name not in IDLE}
    stop = given.get("stop", base.stop) or ()
    given["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    given["stop_token_ids"] = tuple(given.get("stop_token_ids", base.stop_token_ids) or ())
    given["top_k"] = max(0, given.get("top_k", base.top_k))
    return replace(base, **given)


def read_sample(sample: Any, episode: Episode, version: int) -> Episode:
    """The episode that a sample has become, its tokens sampled by no policy older than `version`.

    Raises Unusable where tokens, mask and logprobs do not fit together, or it is not told how it ended.
    """
    if not isinstance(sample, SlimeSample):
        raise Unusable(f"a {type(sample).__name__}, expected the sample, or a list of samples")
    tokens, length = list(sample.tokens), sample.response_length
    begin = len(tokens) - length
    if not 0 <= length < len(tokens):
        raise Unusable(
            f"a sample of {len(tokens)} tokens with response_length {length}; tokens hold the prompt, then the response"
        )
    # slime's own default: without a mask the whole response is trained.
    mask = [bool(one) for one in _per_token("loss_mask", sample.loss_mask or [1] * length, length)]
    logprobs = list(sample.rollout_log_probs or ([] if any(mask) else [0.0] * length))
    _per_token("rollout_log_probs", logprobs, length)
    if not all(math.isfinite(logprob) for logprob in logprobs):
        raise Unusable("a sample with a logprob in rollout_log_probs that is not finite")
    prompt = replace(episode.prompt, tokens=tuple(tokens[:begin]), metadata=dict(sample.metadata or {}))
    return Episode(
        prompt,
        episode.group,
        episode.index,
        tokens=tokens,
        loss_mask=[False] * begin + mask,
        sampler_logprobs=[0.0] * begin + [logprob if one else 0.0 for logprob, one in zip(logprobs, mask, strict=True)],
        versions=[VersionSpan(version, begin, len(tokens))] if any(mask) else [],
        response=sample.response,
        reward=_reward(sample.reward),
        status=_status(sample.status),
    )


def _per_token(name: str, values: Sequence[Any], length: int) -> Sequence[Any]:
    if len(values) != length:
        raise Unusable(f"a sample with {len(values)} {name} for a response of {length} tokens; each token needs one")
    return values


def _reward(reward: Any) -> float | None:
    if reward is None:
        return None
    if not hasattr(reward, "__float__"):
        raise Unusable(f"a sample with the reward {reward!r:.80}, expected a number or None")
    return float(reward)


def _status(status: Any) -> Any:
    """How a sample ended; slime's own status, or its value."""
    value = getattr(status, "value", status)
    if value not in {one.value for one in Status} - {"pending"}:
        raise Unusable(f"a sample with status {value!r}; set it, as in sample.status = Sample.Status.COMPLETED")
    return value
