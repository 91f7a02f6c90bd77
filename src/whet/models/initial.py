"""Adapters that begin as a part of the weights, without taking that part out of the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from whet.errors import ModelError

Factors = tuple[Tensor, Tensor]
"""A [rank, in] and B [out, rank]: their product B @ A is an update of the weights [out, in]."""


class Anchored(nn.Module):
    """One factor of an adapter of twice the rank: a trained half, and a half that stays what the first began as.

    PiSSA and OLoRA train B A on top of W - B0 A0. The same sum is W + [B, -B0] [A; A0]: the weights stay as they
    are, so that the adapter switched off is the original model, quantised weights will do, and what is saved is a
    plain LoRA of twice the rank. In `state_dict` the two halves are one `weight`.
    """

    def __init__(self, start: Tensor, *, dim: int, sign: float):
        super().__init__()
        self.dim = dim
        # Singular vectors lie across memory; a fused optimizer's moments come back from disk laid out plainly.
        start = start.contiguous()
        self.trained = nn.Parameter(start.clone())
        self.fixed: Tensor
        self.register_buffer("fixed", sign * start)

    @property
    def weight(self) -> Tensor:
        return torch.cat([self.trained, self.fixed], self.dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        weight = self.weight
        destination[prefix + "weight"] = weight if keep_vars else weight.detach()

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
        key = prefix + "weight"
        if key not in state_dict:
            missing.append(key)
        elif state_dict[key].shape != self.weight.shape:
            errors.append(f"{key} is {list(state_dict[key].shape)}, expected {list(self.weight.shape)}")
        else:
            with torch.no_grad():
                for half, value in zip((self.trained, self.fixed), state_dict[key].chunk(2, self.dim), strict=True):
                    half.copy_(value)


def begins_as_weights(init: str) -> bool:
    """Whether an adapter with this `init` begins as a part of the weights."""
    return init.startswith("pissa") or init == "olora"


def check_rank(model: nn.Module, init: str, rank: int) -> None:
    """Raises ModelError where an adapted layer is too small to give so many singular vectors, or is no linear layer.

    `model` has a peft adapter already; its weights need not be there.
    """
    for name, layer in _adapted(model):
        if "default" not in layer.lora_A:
            raise ModelError(
                f"model.adapter.init is {init!r}, which begins as a part of a linear layer's weights, but {name} is "
                "none; leave it out of model.adapter.target_modules, or use init default"
            )
        smaller = min(layer.in_features, layer.out_features)
        if rank > smaller:
            raise ModelError(
                f"model.adapter.rank is {rank}, but {name} is {layer.out_features} x {layer.in_features} and has only "
                f"{smaller} directions for init {init!r} to begin with; lower the rank, or use init default"
            )


@torch.no_grad()
def begin_as_weights(model: nn.Module, init: str) -> None:
    """Let the adapter of a model, which has twice the rank to be trained, begin as a part of the weights.

    The model computes what it did before, up to rounding. Approximate singular vectors (`pissa_niter_N`) take
    torch's random numbers.
    """
    from peft.utils.integrations import dequantize_module_weight

    for _, layer in _adapted(model):
        weight = dequantize_module_weight(layer.get_base_layer()).detach().float()
        weight = weight.T if layer.fan_in_fan_out else weight
        a, b = _factors(weight, init, layer.r["default"] // 2, layer.scaling["default"])
        layer.lora_A["default"] = Anchored(a, dim=0, sign=1.0)
        layer.lora_B["default"] = Anchored(b, dim=1, sign=-1.0)


def _factors(weight: Tensor, init: str, rank: int, scale: float) -> Factors:
    """What training begins with, for weights [out, in] and an update scale * B @ A.

    Source: PiSSA, Meng et al. 2024 (arXiv:2404.02948), eq. 2 and 3; OLoRA, Büyükakyüz 2024 (arXiv:2406.01775), where
    the scale is not divided out, as in peft.
    """
    if init == "olora":
        q, r = torch.linalg.qr(weight)
        return r[:rank].contiguous(), q[:, :rank].contiguous()
    if init == "pissa":
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(weight, rank, niter=int(init.removeprefix("pissa_niter_")))
        vh = v.T
    root = (s[:rank] / scale).sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root


def _adapted(model: nn.Module) -> list[tuple[str, Any]]:
    """Every layer that carries an adapter, with its name."""
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "lora_A")]
