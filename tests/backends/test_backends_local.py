"""The local backend: what it reports, what it refuses, and how it steps."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from whet.backends.device import Arithmetic
from whet.backends.local import LocalBackend
from whet.backends.protocol import Backend
from whet.batch import collate
from whet.config.backend import BackendConfig
from whet.config.model import AdapterConfig, FreezeConfig
from whet.config.optim import OptimConfig
from whet.credit import CREDITS
from whet.errors import ConfigError, TrainingError
from whet.losses import LOSSES, loss
from whet.methods import Term
from whet.models.adapters import add_adapter, freeze
from whet.types import Sample, Unit

SFT = [Term("sft", LOSSES["sft"], "token")]
BF16 = Arithmetic(torch.device("cpu"), torch.bfloat16, "highest")


def batch_of(units: list[Unit]):
    return collate(units).weighed(["token", "sequence", "row"])


def weights_of(model) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def gradient(model) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()


def nothing_trained() -> list[Unit]:
    return [Unit("masked", (Sample([1, 2, 3], [False] * 3), Sample([4, 5], [False] * 2)))]


def test_it_is_a_backend(model, backend_of):
    assert isinstance(backend_of(model), Backend)


def test_bf16_autocast_runs_and_is_close(model, units, backend_of):
    batch = batch_of(units)
    loss = backend_of(model).forward_backward(batch, SFT)["loss"]
    right = gradient(model)
    model.zero_grad()
    backend = backend_of(model, arithmetic=BF16)
    assert backend.compute.mode == "tree"
    assert backend.forward_backward(batch, SFT)["loss"] == pytest.approx(loss, abs=2e-3)
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
    assert (gradient(model) - right).norm() < 0.02 * right.norm()
    logprobs = backend.forward(batch, {"logprobs"})["logprobs"]
    assert logprobs.dtype == torch.float32 and logprobs.isfinite().all()


def test_bf16_weights_train_without_autocast(model, units, backend_of):
    backend = backend_of(model.bfloat16())
    metrics = backend.forward_backward(batch_of(units), SFT) | backend.optim_step(1e-3)
    assert math.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_fp16_scales_the_loss_and_steps_by_the_true_gradient(model, units, backend_of):
    # fp16 arithmetic needs a GPU; the scaler's way through the step does not.
    batch = batch_of(units)
    plain = backend_of(copy.deepcopy(model))
    scaled = backend_of(model)
    assert not plain.scaler.is_enabled()
    scaled.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for backend in (plain, scaled):
        backend.forward_backward(batch, SFT)
    assert gradient(scaled.model).norm() == pytest.approx(2**10 * gradient(plain.model).norm().item(), rel=1e-4)
    norms = [backend.optim_step(1e-3)["grad_norm"] for backend in (plain, scaled)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    for p, q in zip(plain.model.parameters(), scaled.model.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-5)


def test_fp16_leaves_the_weights_alone_when_the_gradient_overflowed(model, units, backend_of):
    backend = backend_of(model)
    backend.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    backend.forward_backward(batch_of(units), SFT)
    next(model.parameters()).grad[0, 0] = math.inf
    before = weights_of(model)
    backend.optim_step(1e-3)
    assert all(map(torch.equal, before, weights_of(model)))
    assert backend.scaler.get_scale() == 2.0**9


def test_the_scaler_is_on_for_fp16_only(model, tiny_qwen):
    config, device = BackendConfig(), torch.device("cpu")
    for autocast, enabled in ((None, False), (torch.bfloat16, False), (torch.float16, True)):
        arithmetic = Arithmetic(device, autocast, "highest")
        fresh = AutoModelForCausalLM.from_pretrained(tiny_qwen)
        assert LocalBackend(fresh, None, config, arithmetic, optim=OptimConfig()).scaler.is_enabled() is enabled


@loss(reads=())
def broken(out, batch):
    """Minus infinity on the trained tokens of a micro-batch in which there is a token 7."""
    bad = batch.loss_mask & (batch.tokens == 7).any()
    return out["logprobs"] + torch.where(bad, -torch.inf, 0.0), {}


def test_a_loss_that_is_not_finite_names_the_unit_and_leaves_the_weights_alone(model, backend_of):
    backend = backend_of(model, micro_batch_size=1)
    rows = {"gsm8k:1": [1, 2, 3], "gsm8k:2": [7, 8, 9], "gsm8k:3": [4, 5, 6]}
    batch = batch_of([Unit(name, (Sample(tokens, [True] * 3),)) for name, tokens in rows.items()])
    before = weights_of(model)
    with pytest.raises(TrainingError, match=r"the loss is -inf in the micro-batch of gsm8k:2; nothing was"):
        backend.forward_backward(batch, [Term("broken", broken, "token")])
    assert all(map(torch.equal, before, weights_of(model)))


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_weights_change(model, units, backend_of):
    backend = backend_of(model)
    backend.forward_backward(batch_of(units), SFT)
    next(model.parameters()).grad[0, 0] = math.nan
    before = weights_of(model)
    with pytest.raises(TrainingError, match="the gradient norm is nan, although the loss is finite"):
        backend.optim_step(1e-3)
    assert all(map(torch.equal, before, weights_of(model)))


def test_a_batch_in_which_nothing_is_trained_changes_no_weight(model, backend_of):
    backend = backend_of(model, micro_batch_size=1)
    batch = batch_of(nothing_trained())
    assert backend.forward(batch, {"logprobs", "entropy"})["logprobs"].tolist() == [0] * 5
    before = weights_of(model)
    for _ in range(2):
        metrics = backend.forward_backward(batch, SFT) | backend.optim_step(1e-3)
        assert metrics["loss"] == 0 and metrics["grad_norm"] == 0
        assert all(map(torch.equal, before, weights_of(model)))


def test_the_same_with_a_scaler(model, backend_of):
    backend = backend_of(model)
    backend.scaler = torch.amp.GradScaler("cpu")
    backend.forward_backward(batch_of(nothing_trained()), SFT)
    assert backend.optim_step(1e-3)["grad_norm"] == 0


def test_maxima_are_over_what_is_trained_and_never_infinite(model, units, backend_of):
    policy = [Term("ppo_clip", LOSSES["ppo_clip"], "sequence")]
    backend = backend_of(model, micro_batch_size=1)
    batch = CREDITS["grpo"](batch_of(units))
    metrics = backend.forward_backward(batch, policy)
    assert metrics["importance_weight_max"] == pytest.approx(1.0)
    logprobs = backend.forward(batch, {"logprobs"})["logprobs"]
    difference = (logprobs - batch["sampler_logprobs"]).abs()[batch.loss_mask]
    assert metrics["train_rollout_logprob_abs_diff"] == pytest.approx(difference.mean().item(), rel=1e-4)
    assert metrics["train_rollout_logprob_abs_diff_max"] == pytest.approx(difference.max().item(), rel=1e-4)
    empty = CREDITS["grpo"](batch_of([Unit("m", (Sample([1, 2], [False] * 2, [0.0] * 2, 1.0),))]))
    assert all(math.isfinite(value) for value in backend.forward_backward(empty, policy).values())


@loss()
def reports_extremes(out, batch):
    """Logprobs, which are 0, more than any trained token's, where nothing is trained."""
    return out["logprobs"], {"logprob_max": out["logprobs"].detach()}


@pytest.mark.parametrize("settings", [{}, {"micro_batch_size": 1}])
def test_a_maximum_does_not_see_untrained_tokens(settings: dict, model, units, backend_of):
    backend, batch = backend_of(model, **settings), batch_of(units)
    found = backend.forward_backward(batch, [Term("x", reports_extremes, "token")])["logprob_max"]
    assert found == pytest.approx(backend.forward(batch, {"logprobs"})["logprobs"][batch.loss_mask].max().item())
    assert found < 0


def test_metrics_are_means_over_the_global_batch(model, units, backend_of):
    whole = backend_of(model).forward_backward(batch_of(units), SFT)
    parts = backend_of(model, micro_batch_size=1).forward_backward(batch_of(units), SFT)
    assert set(whole) == {"loss", "mean_token_accuracy", "entropy"}
    assert whole == pytest.approx(parts, rel=1e-5)
    assert whole["entropy"] == pytest.approx(math.log(260), abs=0.1)


def test_terms_add_up_with_their_coefficients(model, units, backend_of):
    first, second = Term("sft", LOSSES["sft"], "token"), Term("bonus", LOSSES["entropy_bonus"], "sequence")
    alone = [backend_of(model).forward_backward(batch_of(units), [term])["loss"] for term in (first, second)]
    both = [Term("sft", first.loss, "token", coef=2.0), Term("bonus", second.loss, "sequence", coef=0.5)]
    metrics = backend_of(model).forward_backward(batch_of(units), both)
    assert metrics["loss"] == pytest.approx(2 * alone[0] + 0.5 * alone[1], rel=1e-5)
    assert (metrics["sft_loss"], metrics["bonus_loss"]) == pytest.approx(tuple(alone), rel=1e-5)


def test_the_gradient_norm_is_reported_before_it_is_clipped(model, units, backend_of):
    clipped = backend_of(model, optim=OptimConfig(max_grad_norm=0.01))
    clipped.forward_backward(batch_of(units), SFT)
    norm = gradient(model).norm().item()
    assert norm > 0.01
    seen = []
    clipped.optimizer.register_step_pre_hook(lambda *_: seen.append(gradient(model).norm().item()))
    assert clipped.optim_step(1e-3)["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert seen == [pytest.approx(0.01, rel=1e-3)]
    assert all(p.grad is None for p in model.parameters())


def test_one_step_is_adamw_at_the_given_rate(model, units, backend_of):
    reference = copy.deepcopy(model)
    optim = OptimConfig(lr=1.0, weight_decay=0.1, max_grad_norm=0)
    backend = backend_of(model, optim=optim)
    backend.forward_backward(batch_of(units), SFT)
    gradients = {name: p.grad.double() for name, p in model.named_parameters()}
    backend.optim_step(0.01)
    for (name, after), before in zip(model.named_parameters(), reference.parameters(), strict=True):
        # The first moments, corrected, are the gradient and its square: w - lr (decay w + g / (|g| + eps)).
        decay = 0.1 if before.dim() >= 2 else 0.0
        g = gradients[name]
        right = before.double() * (1 - 0.01 * decay) - 0.01 * g / (g.abs() + 1e-8)
        assert torch.allclose(after.double(), right, atol=1e-6), name


def test_sft_learns_a_row_by_heart(model, backend_of):
    backend = backend_of(model)
    row = [1, 5, 9, 33, 200, 8, 17, 64, 2, 90]
    batch = batch_of([Unit("a", (Sample(row, [True] * 10),))])
    for _ in range(60):
        metrics = backend.forward_backward(batch, SFT)
        backend.optim_step(3e-3)
    assert metrics["loss"] < 0.05 and metrics["mean_token_accuracy"] == 1.0


@pytest.mark.parametrize("which", ["adapter", "frozen layer", "frozen embeddings"])
def test_what_is_frozen_stays_and_masked_micro_batches_do_not_stop_the_rest(which: str, model, units, backend_of):
    if which == "adapter":
        model = add_adapter(model, AdapterConfig(rank=4))
    else:
        freeze(model, FreezeConfig(layers=1) if which == "frozen layer" else FreezeConfig(embeddings=True))
    backend = backend_of(model, micro_batch_size=1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    metrics = backend.forward_backward(batch_of(units), SFT) | backend.optim_step(1e-2)
    assert metrics["grad_norm"] > 0
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert moved and moved <= trainable < set(before)


def test_gradients_under_an_adapter_do_not_depend_on_micro_batches(model, units, backend_of):
    model = add_adapter(model, AdapterConfig(rank=4))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(0))
    found = []
    for settings in ({}, {"micro_batch_size": 1}, {"activation_checkpointing": True}):
        model.zero_grad(set_to_none=True)
        backend_of(model, **settings).forward_backward(batch_of(units), SFT)
        found.append(gradient(model))
    for other in found[1:]:
        assert (other - found[0]).norm() <= 1e-5 * found[0].norm()


def test_nothing_to_train_is_said_at_once(model, backend_of):
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="no weight is trainable"):
        backend_of(model)


def test_a_backend_without_optimizer_only_computes(model, units, tiny_qwen):
    frozen = LocalBackend(model, None, BackendConfig(), BF16)
    assert frozen.optimizer is None
    assert frozen.forward(batch_of(units), {"logprobs"})["logprobs"].isfinite().all()


def test_forward_puts_every_value_at_its_place_whatever_the_micro_batches(model, units, backend_of):
    batch = batch_of(units)
    whole = backend_of(model).forward(batch, {"logprobs", "entropy"})
    for settings in ({"micro_batch_size": 1}, {"max_tokens_per_device": 100}):
        parts = backend_of(model, **settings).forward(batch, {"logprobs", "entropy"})
        for name in whole:
            assert torch.allclose(parts[name], whole[name], atol=1e-5), name


def test_it_says_what_it_chose(model, backend_of):
    said = backend_of(model).describe()
    assert (said["device"], said["precision"], said["attention"]) == ("cpu", "float32", "tree")
    assert said["parameters"] == said["trainable"] == sum(p.numel() for p in model.parameters())
    assert backend_of(model, arithmetic=BF16).describe()["precision"] == "bfloat16"


def test_offload_and_onload_keep_everything(model, units, backend_of):
    backend = backend_of(model)
    backend.forward_backward(batch_of(units), SFT)
    backend.optim_step(1e-3)
    before = weights_of(model)
    backend.offload()
    backend.onload()
    assert all(map(torch.equal, before, weights_of(model)))
    backend.forward_backward(batch_of(units), SFT)
    backend.optim_step(1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_a_gpu_gives_the_gradient_of_the_cpu(autocast, model, units, backend_of):
    batch = batch_of(units)
    loss = backend_of(copy.deepcopy(model), micro_batch_size=2).forward_backward(batch, SFT)["loss"]
    on_cpu = copy.deepcopy(model)
    backend_of(on_cpu).forward_backward(batch, SFT)
    backend = backend_of(model, arithmetic=Arithmetic(torch.device("cuda"), autocast, "highest"))
    assert backend.compute.mode == "tree"
    assert backend.forward_backward(batch, SFT)["loss"] == pytest.approx(loss, rel=1e-2 if autocast else 1e-4)
    backend.scaler.unscale_(backend.optimizer)
    found, right = gradient(model).cpu(), gradient(on_cpu)
    assert (found - right).norm() < (0.03 if autocast else 1e-4) * right.norm()


@pytest.mark.gpu
def test_offload_frees_the_gpu(model, units, backend_of):
    backend = backend_of(model, arithmetic=Arithmetic(torch.device("cuda"), torch.bfloat16, "highest"))
    backend.forward_backward(batch_of(units), SFT)
    backend.optim_step(1e-3)
    backend.offload()
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    backend.onload()
    backend.forward_backward(batch_of(units), SFT)
    backend.optim_step(1e-3)
