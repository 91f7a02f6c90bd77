"""Logprobs under a head whose words are divided over ranks, against the head as a whole."""

from __future__ import annotations

import itertools
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from whet.tensor.logprobs import EXTRAS
from whet.tensor.vocabulary import divided_logprobs

WORDS, RANKS = 37, 2


def case() -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(23, 8, generator=draw)
    return hidden, torch.randn(WORDS, 8, generator=draw), torch.randint(WORDS, (23,), generator=draw)


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> dict[str, Tensor]:
    logp = (hidden @ weight.T / temperature).log_softmax(-1)
    return {
        "logprobs": logp.gather(1, targets[:, None])[:, 0],
        "entropy": -(logp.exp() * logp).sum(-1),
        "mean_logprobs": logp.mean(-1),
        "correct": logp.argmax(-1) == targets,
        "log_sum_sq_probs": logp.exp().square().sum(-1).log(),
    }


def loss(found: dict[str, Tensor]) -> Tensor:
    """Something that looks at each output differently in each place."""
    places = torch.arange(23.0)
    names = ("logprobs", "entropy", "mean_logprobs")
    return sum((found[name] * torch.cos(places + i)).sum() for i, name in enumerate(names))


def on_rank(rank: int, ranks: int, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    own = -(-WORDS // ranks)
    for temperature, chunk_mb in itertools.product((1.0, 0.7), (1, 128)):
        hidden, whole, targets = case()
        expected_hidden, expected_weight = (x.clone().requires_grad_() for x in (hidden, whole))
        expected = plain(expected_hidden, expected_weight, targets, temperature)
        loss(expected).backward()
        hidden = hidden.requires_grad_()
        # Words that pad the last rank's part are never likely, whatever their weights.
        padded = torch.cat([whole, torch.full((own * ranks - WORDS, 8), 50.0)])
        weight = padded[rank * own : (rank + 1) * own].clone().requires_grad_()
        options = {"width": WORDS, "temperature": temperature, "chunk_mb": chunk_mb}
        found = divided_logprobs(hidden, weight, targets, dist.group.WORLD, extras=EXTRAS, **options)
        loss(found).backward()
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            torch.testing.assert_close(found[name], values.detach() if name != "correct" else values)
        torch.testing.assert_close(hidden.grad, expected_hidden.grad)
        theirs = torch.cat([expected_weight.grad, torch.zeros(own * ranks - WORDS, 8)])
        torch.testing.assert_close(weight.grad, theirs[rank * own : (rank + 1) * own])
        nothing = divided_logprobs(hidden[:0], weight, targets[:0], dist.group.WORLD, **options)["logprobs"]
        nothing.sum().backward()
        assert nothing.shape == (0,)
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [1, RANKS])
def test_outputs_and_gradients_are_those_of_the_whole_head(ranks: int):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(on_rank, args=(ranks, port), nprocs=ranks, join=True)
