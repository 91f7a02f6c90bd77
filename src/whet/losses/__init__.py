"""Losses: one value per token, sequence or pair; the batch holds the weights."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

from whet.losses.base import Loss, Metrics, Outputs, loss, needed
from whet.losses.distill import gkd, gkd_topk
from whet.losses.policy import cispo, entropy_bonus, gspo, kl, ppo_clip, reinforce, sapo
from whet.losses.preference import (
    apo_down,
    apo_zero,
    bco_pair,
    discopop,
    exo_pair,
    hinge,
    ipo,
    nca_pair,
    robust,
    sigmoid,
    sigmoid_norm,
    sppo_hard,
)
from whet.losses.reference_free import cpo, orpo, simpo
from whet.losses.reward import bradley_terry
from whet.losses.sft import dft, nll, sft
from whet.losses.transport import aot, aot_unpaired
from whet.losses.unpaired import apo_zero_unpaired, bco, kto
from whet.losses.value import value

__all__ = ["LOSSES", "Loss", "Metrics", "Outputs", "create_loss", "loss"]

LOSSES: dict[str, Loss] = {
    "sft": sft,
    "dft": dft,
    "nll": nll,
    "ppo_clip": ppo_clip,
    "gspo": gspo,
    "cispo": cispo,
    "sapo": sapo,
    "reinforce": reinforce,
    "kl": kl,
    "entropy_bonus": entropy_bonus,
    "value": value,
    "bradley_terry": bradley_terry,
    "sigmoid": sigmoid,
    "sigmoid_norm": sigmoid_norm,
    "robust": robust,
    "hinge": hinge,
    "ipo": ipo,
    "exo_pair": exo_pair,
    "discopop": discopop,
    "nca_pair": nca_pair,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "simpo": simpo,
    "cpo": cpo,
    "orpo": orpo,
    "kto": kto,
    "apo_zero_unpaired": apo_zero_unpaired,
    "bco": bco,
    "gkd": gkd,
    "gkd_topk": gkd_topk,
}
"""Built-in losses by the name that a configuration uses."""

_KINDS = {"pairwise": "bradley_terry", "policy": "ppo_clip", "kd": "gkd"}


def create_loss(kind: str, **options) -> Loss:
    """A loss with its options bound, by name or by kind (`sft`, `pairwise`, `policy`, `value`, `kd`).

    Call it as `loss(out, batch)`, or hand it to `SFTrainer(config, loss=…)`. The losses of distillation need a
    teacher's columns in the batch; a trainer whose configuration names no teacher refuses them.
    Raises ValueError for an unknown name or option.
    """
    name = _KINDS.get(kind, kind)
    if name not in LOSSES:
        raise ValueError(f"create_loss({kind!r}): unknown loss; choose one of {sorted({*LOSSES, *_KINDS})}")
    function = LOSSES[name]
    known = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"create_loss({kind!r}): unknown options {unknown}; {name} has {known or 'none'}")
    bound: Any = partial(function, **options)
    for attribute in ("outputs_if", "reads", "per"):
        setattr(bound, attribute, getattr(function, attribute))
    bound.requests = lambda more: function.requests({**options, **more})
    bound.outputs = needed(function, options)
    return bound
