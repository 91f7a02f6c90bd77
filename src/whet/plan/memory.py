"""The memory of the devices of an arrangement, by what takes it, at each moment of a run."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from whet.check.memory import CUDA_CONTEXT, HEAP_HOLES, PROCESS, Device, Estimate, Held, Moment, estimate, training
from whet.check.rehearsal import Micro, Peaks
from whet.config.run import RunConfig
from whet.hardware import GIB, Machines
from whet.methods import Method
from whet.plan.activations import peaks_of
from whet.plan.arrangement import Arrangement
from whet.plan.division import Divided, divided
from whet.plan.load import Load
from whet.plan.models import Models, Sized, config_of
from whet.plan.serving import ASLEEP, server_parts

COLLECTIVES = 1.0 * GIB
"""Buffers of NCCL's process groups, and workspace of matrix products."""
USABLE = 0.95
"""Share of a GPU's memory that a plan may fill: a run that fills it to the brim fails at the first odd batch."""
SLACK = 0.08
"""Of what comes and goes, the share that PyTorch's caching allocator holds beyond it, in blocks of other sizes."""


def of_training(
    config: RunConfig, method: Method, models: Models, how: Arrangement, load: Load, machines: Machines | None
) -> Estimate:
    """The moments of a device that trains; of a process on this machine's CPU where there are no `machines`."""
    available = None if machines is None else int(machines.gpu.memory * USABLE)
    half = in_half(config, on_gpu=machines is not None)
    if how.backend == "local":
        return _of_one(config, method, models, how, load, available, half)
    static = {"process": float(PROCESS)} if machines is None else {"driver, kernels": CUDA_CONTEXT + COLLECTIVES}
    policy = divided(models.policy, how, half)
    static |= {
        **{"weights": policy.weights, "gathered weights": policy.gathered * (1 + SLACK), "optimizer": policy.optimizer},
        "frozen models": sum(divided(one, how, half).weights for one in models.frozen),
        "reward models": sum(one.held.weights for one in models.rewards),
        "publishing": config.engine.publish.bucket_mb * 2.0**20 if how.engines else 0.0,
    }
    trained = {"": (models.policy, policy)}
    if models.critic is not None:
        critic = divided(models.critic, how, half)
        static["critic"] = critic.weights + critic.optimizer + critic.gathered * (1 + SLACK)
        trained["critic: "] = (models.critic, critic)
    micro = load.micro(config, data=how.data, context=how.context)
    moments = [
        Moment(prefix + one.name, one.parts)
        for prefix, (model, parts) in trained.items()
        for one in _moments(model, parts, static, how, micro, half, config.backend.head_chunk_mb)
    ]
    if how.colocate and machines is not None:
        engine = server_parts(config, models.policy, how, load, machines)
        asleep = {"engine": ASLEEP if how.sleep else sum(engine.values())}
        moments = [Moment(one.name, {**one.parts, **asleep}) for one in moments]
        kept = {name: size for name, size in static.items() if name != "gathered weights"}
        moments.append(Moment("sampling", {**kept, **engine}))
    return Estimate("cpu" if machines is None else "cuda", tuple(moments), available)


def of_sampling(config: RunConfig, models: Models, how: Arrangement, load: Load, machines: Machines) -> Estimate:
    """The moment of a device that only samples."""
    parts = server_parts(config, models.policy, how, load, machines)
    moment = Moment("sampling", {"driver, kernels": float(CUDA_CONTEXT), **parts})
    return Estimate("cuda", (moment,), int(machines.gpu.memory * USABLE))


def in_half(config: RunConfig, *, on_gpu: bool) -> bool:
    """Whether products are made in 16 bits."""
    precision = config.backend.precision
    return on_gpu if precision == "auto" else precision != "float32"


def _of_one(
    config: RunConfig,
    method: Method,
    models: Models,
    how: Arrangement,
    load: Load,
    available: int | None,
    half: bool,
) -> Estimate:
    """One device without division: what `whet check` estimates."""
    autocast = {"fp16": torch.float16}.get(config.backend.precision, torch.bfloat16) if half else None
    device = Device("cpu" if available is None else "cuda", autocast, available)
    backend = config.backend.model_copy(update={"activation_checkpointing": how.checkpointing})
    work = load.work(config, samples=load.samples and how.engine == "local")
    found = estimate(config.model_copy(update={"backend": backend}), method, work, device, config_of)
    rewards = sum(one.held.weights for one in models.rewards)
    moments = tuple(Moment(one.name, {**one.parts, "reward models": rewards}) for one in found.moments)
    return Estimate(found.device, moments, found.available)


def _moments(
    model: Sized, parts: Divided, static: Mapping[str, float], how: Arrangement, micro: Micro, half: bool, chunk_mb: int
) -> list[Moment]:
    """The two moments of training, with this device's part of the gradients and of a micro-batch."""
    found = peaks_of(model, how, micro, half=half, chunk_mb=chunk_mb)
    kept, loose = found.activations * (1 + SLACK), found.top - found.activations
    before = parts.gradients if micro.again else 0.0
    shown = Peaks(kept, found.small, kept + loose + before, found.rest * (1 + SLACK) + parts.gradients)
    holes = {"heap": HEAP_HOLES * found.small} if "process" in static else {}
    return list(training({**static, **holes}, Held(parts.weights, parts.gradients), shown, again=micro.again))
