"""Several losses under one `loss`: `{use: [sigmoid, sft], coef: [0.8, 1.0], beta: 0.1}` becomes terms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from whet.config.names import any_of, show

_PAIR = {"beta", "ld_alpha", "wpo"}
_DIVERGENCE = {"f_divergence", "f_alpha"}
_SIDES = {"beta", "desirable_weight", "undesirable_weight"}

OPTIONS: Mapping[str, frozenset[str]] = {
    name: frozenset(options)
    for name, options in {
        "sft": {"label_smoothing"},
        "dft": set(),
        "nll": set(),
        "bradley_terry": {"centering"},
        "sigmoid": _PAIR | _DIVERGENCE | {"label_smoothing"},
        "sigmoid_norm": _PAIR | _DIVERGENCE,
        "robust": _PAIR | _DIVERGENCE | {"label_smoothing"},
        "hinge": _PAIR | _DIVERGENCE,
        "ipo": _PAIR | _DIVERGENCE,
        "exo_pair": _PAIR | _DIVERGENCE | {"label_smoothing"},
        "discopop": _PAIR | _DIVERGENCE | {"tau"},
        "nca_pair": _PAIR,
        "bco_pair": _PAIR | {"running_mean"},
        "sppo_hard": _PAIR,
        "apo_zero": _PAIR,
        "apo_down": _PAIR,
        "aot": {"beta", "ld_alpha", "label_smoothing"},
        "aot_unpaired": {"beta", "ld_alpha", "label_smoothing"},
        "simpo": {"beta", "gamma", "gamma_ratio", "label_smoothing"},
        "cpo": {"beta", "label_smoothing"},
        "orpo": {"beta"},
        "kto": _SIDES,
        "apo_zero_unpaired": _SIDES,
        "bco": _SIDES,
        "gkd": {"beta", "temperature", "hard"},
        "gkd_topk": {"beta", "temperature", "hard"},
        "ppo_clip": {"clip_low", "clip_high", "dual_clip"},
        "reinforce": set(),
        "gspo": {"clip_low", "clip_high", "dual_clip"},
        "cispo": {"clip_high"},
        "sapo": {"tau_positive", "tau_negative"},
    }.items()
}
"""The options of the losses that can be named, as their own parameters have them; here torch is not imported."""

OWN: Mapping[str, str] = {
    **{"sft": "sft", "reward": "bradley_terry", "dpo": "sigmoid", "apo": "apo_zero", "simpo": "simpo", "cpo": "cpo"},
    **{"cpo-simpo": "simpo", "orpo": "orpo", "kto": "kto", "bco": "bco", "gkd": "gkd", "distill": "gkd"},
    **dict.fromkeys(("grpo", "dr-grpo", "dapo", "reinforce++", "reinforce++-baseline", "ppo", "opd"), "ppo_clip"),
    **{"rloo": "reinforce", "remax": "reinforce", "gspo": "gspo", "cispo": "cispo", "sapo": "sapo"},
}
"""The loss that each method has of its own."""

_OF_TERMS = {"use", "coef", "weight", "on"}
NLL = ("sft", "nll")
"""Names under which a mixture of preference losses holds the cross-entropy of the chosen completions."""


def expand(values: dict[str, Any]) -> list[str]:
    """Turn a list under `loss.use` into `terms`, and the cross-entropy in it into `nll_coef`.

    `coef` may be a list of the same length; an option goes to those losses that have it. `values` is changed in
    place where there is nothing wrong with it; returns what is wrong.
    """
    loss = values.get("loss")
    if not isinstance(loss, dict) or not (isinstance(loss.get("use"), list) or isinstance(loss.get("coef"), list)):
        return []
    uses = loss["use"] if isinstance(loss.get("use"), list) else [loss.get("use")]
    coefs = loss.get("coef", 1.0)
    coefs = coefs if isinstance(coefs, list) else [coefs] * len(uses)
    if problems := _problems(values, loss, uses, coefs):
        return problems
    if len(uses) == 1:
        values["loss"] = {**loss, "use": uses[0], "coef": coefs[0]}
        if uses[0] is None:
            del values["loss"]["use"]
        return []
    shared = {name: value for name, value in loss.items() if name not in ("use", "coef")}
    nll = [coef for use, coef in zip(uses, coefs, strict=True) if use in NLL]
    values["terms"] = [
        {"use": use, "coef": coef, **{name: value for name, value in shared.items() if _has(str(use), name)}}
        for use, coef in zip(uses, coefs, strict=True)
        if use not in NLL
    ]
    if nll:
        values["nll_coef"] = sum(nll)
    del values["loss"]
    return []


def strangers(loss: Mapping[str, Any], method: str) -> list[str]:
    """The options under `loss` that none of its losses has; a loss of the user's own may have any."""
    use = loss.get("use", OWN.get(method))
    uses = [one for one in (use if isinstance(use, list) else [use]) if one not in NLL or not isinstance(use, list)]
    return [name for name in loss if not any(_has(str(one), name) for one in uses)]


def _problems(values: Mapping[str, Any], loss: Mapping[str, Any], uses: list[Any], coefs: list[Any]) -> list[str]:
    if not all(isinstance(use, str) for use in uses) and len(uses) > 1:
        return [f"loss.use is {show(uses)}, but a mixture is a list of names of losses"]
    if len(uses) != len(coefs):
        return [f"loss.coef is {show(coefs)}, but there are {len(uses)} losses ({show(uses)}); give one for each"]
    if wrong := [coef for coef in coefs if isinstance(coef, bool) or not isinstance(coef, int | float)]:
        return [f"loss.coef is {show(coefs)}, but {show(wrong[0])} is not a number"]
    if len(uses) == 1:
        return []
    if not uses or all(use in NLL for use in uses):
        return [f"loss.use is {show(uses)}, which names no preference loss; use method sft, or add one"]
    found = []
    if any(use in NLL for use in uses) and values.get("nll_coef"):
        found.append("nll_coef and a mixture that holds sft say the same; keep one")
    if values.get("terms"):
        found.append("terms and a list under loss.use are both given; keep one")
    for name in loss.keys() - _OF_TERMS:
        if not any(_has(use, name) for use in uses if use not in NLL):
            found.append(f"loss.{name} is {show(loss[name])}, but {any_of(uses)} has no such option; remove it")
    return sorted(found)


def _has(use: str, option: str) -> bool:
    """Whether an option goes to a loss; one of the user's own is asked later, by its signature."""
    return option in _OF_TERMS or option in OPTIONS.get(use, {option})
