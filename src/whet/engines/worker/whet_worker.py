"""An extension of vLLM's workers, which takes in new weights and says what it holds.

It runs in vLLM's own environment and imports nothing of whet's. A server is started with this file's folder on
PYTHONPATH and `--worker-extension-cls whet_worker.Extension`; its methods are called over `/collective_rpc`.
"""

from __future__ import annotations

import base64
import contextlib
import json
import pickle
import zlib
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch
from safetensors import safe_open
from vllm.model_executor.layers import utils as layers

DELTA = "whet.delta"
"""Key of a file's metadata under which it says how its tensors follow from those that came before."""


def _plain(layer: torch.nn.Module, remove_weight: bool = False) -> None:
    """Compute with the weight itself. On a CPU vLLM otherwise packs a copy of it at the start and empties the weight:
    weights that come later are then taken in without an error, and never used."""
    layer.cpu_linear = torch.nn.functional.linear


def _keep_weights_in_place() -> None:
    if hasattr(layers, "dispatch_cpu_unquantized_gemm") and not torch.cuda.is_available():
        layers.dispatch_cpu_unquantized_gemm = _plain


class _Uncut(torch.nn.Module):
    """Samples as vLLM does under top-k and top-p, and tells logprobs as they were before these cut the distribution:
    those that a trainer computes as well."""

    def __init__(self, inner: torch.nn.Module, mode: str) -> None:
        super().__init__()
        self.inner, self.mode = inner, mode

    def forward(self, logits: torch.Tensor, *arguments: Any, **options: Any) -> tuple[torch.Tensor, Any]:
        whole = logits.log_softmax(dim=-1, dtype=torch.float32) if self.mode == "processed_logprobs" else None
        sampled, told = self.inner(logits, *arguments, **options)
        return sampled, told if whole is None else whole


def _tell_uncut_logprobs() -> None:
    from vllm.v1.sample.sampler import Sampler

    before = Sampler.__init__

    def made(self: Any, logprobs_mode: str = "raw_logprobs", *arguments: Any, **options: Any) -> None:
        before(self, logprobs_mode, *arguments, **options)
        self.topk_topp_sampler = _Uncut(self.topk_topp_sampler, logprobs_mode)

    Sampler.__init__ = made


_keep_weights_in_place()
_tell_uncut_logprobs()


class Extension:
    """Methods that every worker of a server gets. `self` is vLLM's worker."""

    def whet_hello(self) -> dict[str, Any]:
        """That the extension is there."""
        return {"rank": self.rank}

    def whet_begin(self) -> dict[str, Any]:
        """Weights are about to come. Returns this worker's rank and device."""
        model = self.model_runner.get_model()
        if (reload := _layerwise(self)) is not None:
            reload[0](model)
        index = self.device.index or 0
        uuid = str(torch.cuda.get_device_properties(index).uuid) if self.device.type == "cuda" else ""
        return {"rank": self.rank, "device": str(self.device), "uuid": uuid}

    def whet_load_files(self, paths: list[str]) -> dict[str, Any]:
        """Take in what safetensors files hold: tensors as they are, or what has changed of them."""
        num_tensors = 0
        for path in paths:
            with safe_open(path, "pt") as file:
                told = (file.metadata() or {}).get(DELTA)
                if told is not None:
                    num_tensors += self._whet_patch(file, json.loads(told))
                else:
                    names = list(file.keys())
                    self._whet_load((name, file.get_tensor(name)) for name in names)
                    num_tensors += len(names)
        return {"num_tensors": num_tensors}

    def whet_join(
        self, address: str, port: int, offset: int, size: int, backend: str, name: str, timeout_s: float
    ) -> None:
        """Join the process group in which rank 0, the trainer, broadcasts weights."""
        from torch.distributed import PrefixStore, TCPStore
        from torch.distributed.distributed_c10d import Backend, _new_process_group_helper, _world

        limit = timedelta(seconds=timeout_s)
        store = TCPStore(address, port, size, is_master=False, timeout=limit)
        prefixed = PrefixStore(name, store)
        group, _ = _new_process_group_helper(
            size, offset + self.rank, [], Backend(backend), prefixed, group_name=name, timeout=limit
        )
        _world.pg_group_ranks[group] = {rank: rank for rank in range(size)}
        self._whet_group = group

    def whet_leave(self) -> None:
        """Leave the process group."""
        self._whet_group = None

    def whet_receive(self, names: list[str], dtypes: list[str], shapes: list[list[int]]) -> dict[str, Any]:
        """Take in a bucket of weights that rank 0 broadcasts as one stretch of bytes."""
        from torch import distributed

        sizes = _sizes(dtypes, shapes)
        device = self.device if self.device.type == "cuda" else torch.device("cpu")
        buffer = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        distributed.broadcast(buffer, src=0, group=self._whet_group)
        self._whet_load(_cut(buffer, names, dtypes, shapes, sizes))
        return {"num_tensors": len(names)}

    def whet_open(self, handles: str, names: list[str], dtypes: list[str], shapes: list[list[int]]) -> dict[str, Any]:
        """Take in a bucket of weights that lies in memory of a GPU which the trainer shares with this worker.

        `handles` holds, pickled, the arguments of `rebuild_cuda_tensor` by the GPU's UUID.
        """
        from torch.multiprocessing.reductions import rebuild_cuda_tensor

        index = self.device.index or 0
        uuid = str(torch.cuda.get_device_properties(index).uuid)
        known = pickle.loads(base64.b64decode(handles))
        if uuid not in known:
            raise ValueError(f"the trainer shares memory of {sorted(known)}, this worker computes on {uuid}")
        arguments = list(known[uuid])
        arguments[6] = index  # the device as this process numbers it
        buffer = rebuild_cuda_tensor(*arguments)
        self._whet_load(_cut(buffer, names, dtypes, shapes, _sizes(dtypes, shapes)))
        torch.cuda.synchronize(index)
        return {"num_tensors": len(names)}

    def whet_finish(self) -> dict[str, Any]:
        """All weights have come: compute with them from now on."""
        model = self.model_runner.get_model()
        base: dict[str, torch.Tensor] | None = getattr(self, "_whet_base", None)
        if base is not None:
            model.load_weights(iter(base.items()))
        if (reload := _layerwise(self)) is not None:
            reload[1](model, self.model_runner.model_config)
        if hasattr(self.model_runner, "reset_lora_state"):
            self.model_runner.reset_lora_state()
        return {"loaded": True}

    def whet_bits(self) -> dict[str, list[int]]:
        """Of every parameter the sum of its elements' bits, read as whole numbers, and the number of elements.

        The sum does not change when tensors are fused, cut up, transposed or padded with zeros: the trainer can form
        it as well.
        """
        dtype = self.model_runner.model_config.dtype  # what is held otherwise was changed after it came
        parameters = self.model_runner.get_model().named_parameters()
        return {name: [_bits(one.detach()), one.numel()] for name, one in parameters if one.dtype == dtype}

    def _whet_load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        base: dict[str, torch.Tensor] | None = getattr(self, "_whet_base", None)
        if base is None:
            self.model_runner.get_model().load_weights(iter(weights))
        else:
            base.update((name, tensor.cpu().clone()) for name, tensor in weights)

    def _whet_patch(self, file: Any, told: dict[str, dict[str, Any]]) -> int:
        """Bring the copy of what came before up to date; `whet_finish` takes it in."""
        if getattr(self, "_whet_base", None) is None:
            self._whet_base: dict[str, torch.Tensor] = {}
        for name, entry in told.items():
            data = bytes(zlib.decompress(file.get_tensor(name).numpy().tobytes()))
            raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            width = entry["width"]
            raw = raw.view(width, -1).t().contiguous().view(-1)  # bytes of equal weight stand together in the file
            if entry["kind"] == "xor":
                before = self._whet_base[name].contiguous().view(-1).view(torch.uint8)
                raw = raw ^ before
            if zlib.crc32(raw.numpy().tobytes()) != entry["crc32"]:
                raise ValueError(f"{name} does not have the checksum it was sent with; publish all weights again")
            self._whet_base[name] = raw.view(getattr(torch, entry["dtype"])).view(entry["shape"])
        return len(told)


def _layerwise(worker: Any) -> tuple[Any, Any] | None:
    """vLLM's own way of taking weights in layer by layer, where layers change them after they are loaded."""
    if worker.device.type != "cuda":
        return None
    with contextlib.suppress(ImportError):
        from vllm.model_executor.model_loader import reload

        return reload.initialize_layerwise_reload, reload.finalize_layerwise_reload
    return None


def _sizes(dtypes: list[str], shapes: list[list[int]]) -> list[int]:
    """Bytes of each tensor."""
    return [
        torch.Size(shape).numel() * getattr(torch, dtype).itemsize for dtype, shape in zip(dtypes, shapes, strict=True)
    ]


def _cut(
    buffer: torch.Tensor, names: list[str], dtypes: list[str], shapes: list[list[int]], sizes: list[int]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that a stretch of bytes holds."""
    for name, dtype, shape, part in zip(names, dtypes, shapes, buffer.split(sizes), strict=True):
        yield name, part.clone().view(getattr(torch, dtype)).view(shape)


def _bits(tensor: torch.Tensor) -> int:
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return int(tensor.contiguous().view(-1).view(kinds[tensor.element_size()]).sum(dtype=torch.int64))
