"""Functions as users of slime write them."""

from __future__ import annotations

import torch


def check_reward_nonzero_std(args, samples: list, **kwargs):
    rewards = [sample.reward for sample in samples]
    return torch.tensor(rewards, dtype=torch.float).std() > 0.0


def pop_first(args, rollout_id, buffer: list[list], num_samples: int) -> list[list]:
    num_to_pop = min(len(buffer), num_samples)
    samples = buffer[:num_to_pop]
    del buffer[:num_to_pop]
    return samples


def broken(args, samples: list):
    return 1 / 0


async def forgetful(args, samples: list):
    return True


def undecided(args, samples: list):
    return torch.tensor([True, False])


def junk(args, rollout_id, buffer: list[list], num_samples: int):
    return [1]


def without_the_first(args, groups: list[list]):
    for group in groups:
        group[0].remove_sample = True
