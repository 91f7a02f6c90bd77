"""Stand-ins with which Megatron-Core 0.16.1 runs on CPUs over gloo, without transformer-engine: for tests alone.

Megatron asks for a CUDA device in many places. Import this before `megatron`; what it replaces holds for the whole
process. Numbers stay those of Megatron's own code.
"""

from __future__ import annotations

import contextlib
import functools

import torch
import torch.distributed as dist
import torch.utils._device

CPU = torch.device("cpu")


class Stream:
    """A stream on which everything is done at once; an event that has happened."""

    def __init__(self, *args, **options) -> None: ...
    def synchronize(self) -> None: ...
    def wait_stream(self, other) -> None: ...
    def wait_event(self, event) -> None: ...
    def wait(self, *args) -> None: ...
    def record(self, *args) -> None: ...

    def record_event(self, *args) -> Stream:
        return self

    def query(self) -> bool:
        return True


def _of_cpu(device):
    return CPU if device is not None and str(device).startswith("cuda") else device


def _devices() -> None:
    """What is asked of CUDA is answered for the CPU."""
    cuda = torch.cuda
    cuda.current_device = lambda: CPU
    for name in ("set_device", "synchronize", "empty_cache", "manual_seed_all"):
        setattr(cuda, name, lambda *args, **options: None)  # one of its own for each: torch.compile keeps a list
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed))
    cuda.is_current_stream_capturing = lambda: False
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved"):
        setattr(cuda, name, lambda *args, **options: 0)
    cuda.Stream = cuda.Event = Stream
    cuda.current_stream = Stream
    cuda.stream = lambda *args, **options: contextlib.nullcontext()


def _tensors() -> None:
    """Tensors that are to be made on, moved to or named after a CUDA device are the CPU's."""
    torch.utils._device._device_constructors()  # torch.device as a context knows the functions as they are
    torch.Tensor.cuda = lambda self, *args, **options: self
    torch.nn.Module.cuda = lambda self, *args, **options: self
    names = ("tensor", "zeros", "ones", "empty", "full", "rand", "randn", "arange", "as_tensor")
    for name in (*names, "zeros_like", "ones_like", "empty_like", "full_like"):
        setattr(torch, name, _made(getattr(torch, name)))
    move, kind = torch.Tensor.to, torch.Tensor.type

    def to(self, *args, **options):
        if "device" in options:
            options["device"] = _of_cpu(options["device"])
        return move(self, *(_of_cpu(a) if isinstance(a, str | torch.device) else a for a in args), **options)

    def type_(self, *args, **options):
        if args or options:
            return kind(self, *args, **options)
        return kind(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.to, torch.Tensor.type = to, type_


def _made(make):
    @functools.wraps(make)
    def made(*args, **options):
        if "cuda" in str(options.get("device")):
            options["device"] = CPU
        options.pop("pin_memory", None)
        return make(*args, **options)

    return made


def _collectives() -> None:
    """Sizes that stay on the device where there is one go to gloo as numbers."""
    exchange = dist.all_to_all_single

    def all_to_all_single(output, input, output_split_sizes=None, input_split_sizes=None, **options):
        sizes = (x.tolist() if isinstance(x, torch.Tensor) else x for x in (output_split_sizes, input_split_sizes))
        return exchange(output, input, *sizes, **options)

    dist.all_to_all_single = all_to_all_single


def _megatron() -> None:
    """What Megatron leaves undefined without transformer-engine, and its own look at CUDA's random numbers."""
    import megatron.core.tensor_parallel.random as random
    import megatron.core.transformer.moe.moe_utils as experts
    import megatron.core.transformer.multi_latent_attention as latent

    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    experts.te_general_gemm = None
    latent.TELinear = type("TELinear", (), {})


if not torch.cuda.is_available():
    import transformers  # noqa: F401, which looks at torch as it is

    _devices()
    _tensors()
    _collectives()
    _megatron()
