"""Estimates of the Kullback-Leibler divergence from sampled tokens."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

KLType = Literal["k1", "k2", "k3", "low_var_kl"]


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: KLType) -> Tensor:
    """KL(policy || reference) per token, from tokens sampled by the policy; any shape.

    With x = logprob - reference logprob: k1 = x, k2 = x²/2, k3 = exp(-x) - 1 + x, low_var_kl = k3 clamped to
    [-10, 10]. Source: http://joschu.net/blog/kl-approx.html.
    """
    x = logprobs - ref_logprobs
    if kind == "k1":
        return x
    if kind == "k2":
        return x.square() / 2
    k3 = (-x).exp() - 1 + x
    return k3.clamp(-10, 10) if kind == "low_var_kl" else k3
