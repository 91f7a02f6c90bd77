"""Memory of a GPU that another process on it may read: what is sent is where the weights lie, not the weights."""

from __future__ import annotations

import base64
import io
import pickle
from collections.abc import Sequence
from multiprocessing.reduction import ForkingPickler

import torch
from torch import Tensor
from torch.multiprocessing.reductions import init_reductions, reduce_tensor


def of_buffer(buffer: Tensor) -> str:
    """How a stretch of bytes on a GPU is opened by another process: the arguments of `rebuild_cuda_tensor` by the
    GPU's UUID, pickled. The buffer must live until the other has read it."""
    _, arguments = reduce_tensor(buffer)
    uuid = str(torch.cuda.get_device_properties(buffer.device).uuid)
    return base64.b64encode(pickle.dumps({uuid: arguments})).decode()


def of_tensors(bucket: Sequence[tuple[str, Tensor]]) -> str:
    """Named tensors on a GPU as `torch.multiprocessing` hands them over, pickled."""
    init_reductions()
    told = io.BytesIO()
    ForkingPickler(told).dump(list(bucket))
    return base64.b64encode(told.getvalue()).decode()
