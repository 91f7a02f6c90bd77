"""Sampling of one token per row: distributions, cuts, logprobs, random numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from whet.engines.local.sampler import Draws, sample, stream_key, uniforms

ROWS = 4000


def draws(rows: int, *, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, seed: int = 0) -> Draws:
    uniform = np.random.default_rng(seed).random(rows)
    return Draws(np.full(rows, temperature, np.float32), np.full(rows, top_p), np.full(rows, top_k), uniform)


def at(*uniform: float, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0) -> Draws:
    rows = len(uniform)
    filled = np.full(rows, temperature, np.float32), np.full(rows, top_p), np.full(rows, top_k)
    return Draws(*filled, np.array(uniform))


def logits_of(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities).log()


def frequencies(logits: torch.Tensor, how: Draws) -> torch.Tensor:
    tokens, _ = sample(logits.expand(len(how.uniform), -1).clone(), how)
    return torch.bincount(tokens, minlength=logits.shape[-1]) / len(tokens)


def test_a_random_number_picks_the_token_whose_share_of_the_unit_interval_holds_it():
    # Shares: token 0 [0, .5), 1 [.5, .75), 2 [.75, .75), 3 [.75, 1).
    logits = logits_of(0.5, 0.25, 0.0, 0.25).expand(6, -1).clone()
    tokens, _ = sample(logits, at(0.0, 0.49, 0.51, 0.74, 0.76, 1 - 2**-53))
    assert tokens.tolist() == [0, 0, 1, 1, 3, 3]


@pytest.mark.parametrize("place", [3, 150])
def test_no_random_number_picks_a_token_without_probability(place):
    logits = torch.full((2, 200), float("-inf"))
    logits[:, place] = 0.0
    tokens, logprobs = sample(logits, at(0.0, 1 - 2**-53))
    assert tokens.tolist() == [place, place]
    assert logprobs.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("vocabulary", [5, 64, 100, 1000])
def test_frequencies_follow_the_softmax_whatever_the_block_borders(vocabulary):
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(1)) * 2
    found, expected = frequencies(logits, draws(ROWS)), logits.softmax(-1)
    error = (expected * (1 - expected) / ROWS).sqrt()
    assert ((found - expected).abs() <= 5 * error + 1e-3).all()


def test_temperature_sharpens_the_distribution_and_the_logprobs_are_those_of_the_sharpened_one():
    logits = logits_of(0.6, 0.3, 0.1)
    # Temperature 0.5 squares: .36, .09, .01 of .46.
    assert frequencies(logits, draws(ROWS, temperature=0.5))[0] == pytest.approx(0.36 / 0.46, abs=0.03)
    tokens, logprobs = sample(logits[None].clone(), at(0.0, temperature=0.5))
    assert tokens.tolist() == [0]
    assert logprobs.item() == pytest.approx(np.log(0.36 / 0.46), abs=1e-6)


def test_temperature_zero_takes_the_likeliest_with_its_logprob_at_temperature_one():
    tokens, logprobs = sample(logits_of(0.3, 0.6, 0.1)[None].clone(), at(0.99, temperature=0.0))
    assert tokens.tolist() == [1]
    assert logprobs.item() == pytest.approx(np.log(0.6), abs=1e-6)


def test_greedy_sees_differences_that_vanish_in_the_exponential():
    logits = torch.tensor([[0.125, 0.125 + 2**-26, 0.0]])
    assert logits[0, 1] > logits[0, 0]
    assert sample(logits, at(0.0, temperature=0.0))[0].tolist() == [1]


def test_top_k_keeps_the_k_likeliest_and_logprobs_stay_those_of_the_whole_vocabulary():
    logits = logits_of(0.1, 0.4, 0.2, 0.3)
    found = frequencies(logits, draws(ROWS, top_k=2))
    # Kept: .4 and .3 of .7.
    assert found[0] == found[2] == 0
    assert found[1] == pytest.approx(4 / 7, abs=0.04)
    tokens, logprobs = sample(logits[None].clone(), at(0.0, top_k=2))
    assert tokens.tolist() == [1]
    assert logprobs.item() == pytest.approx(np.log(0.4), abs=1e-6)


def test_top_p_keeps_the_smallest_set_that_holds_it():
    logits = logits_of(0.05, 0.5, 0.15, 0.3)
    # .5 + .3 = .8 reaches .75: two tokens.
    found = frequencies(logits, draws(ROWS, top_p=0.75))
    assert found[0] == found[2] == 0
    assert found[1] == pytest.approx(5 / 8, abs=0.04)
    # .5 does not reach .51, so the second comes in too; .5 alone holds .49.
    assert frequencies(logits, draws(ROWS, top_p=0.51))[3] > 0
    assert frequencies(logits, draws(ROWS, top_p=0.49))[1] == 1


def test_top_p_applies_to_what_top_k_leaves():
    logits = logits_of(0.4, 0.3, 0.2, 0.1)
    # top_k 2 leaves 4/7 and 3/7; 4/7 reaches .55, though .4 of the whole does not.
    assert frequencies(logits, draws(ROWS, top_k=2, top_p=0.55))[0] == 1


def test_a_nucleus_wider_than_the_first_look_is_found():
    # A thousand equally likely tokens: half of them hold .5.
    logits = torch.zeros(1000) + torch.linspace(0, 1e-3, 1000)
    found = frequencies(logits, draws(ROWS, top_p=0.5))
    assert 480 <= int((found > 0).sum()) <= 501
    assert found[:498].sum() == 0


def test_rows_draw_each_by_their_own_settings():
    logits = logits_of(0.4, 0.3, 0.2, 0.1).expand(4, -1).clone()
    how = Draws(
        temperature=np.array([0, 1, 1, 1], np.float32),
        top_p=np.array([1, 1, 0.5, 1]),
        top_k=np.array([0, 1, 0, 0]),
        uniform=np.full(4, 0.95),
    )
    assert sample(logits, how)[0].tolist() == [0, 0, 1, 3]


def test_logprobs_agree_with_a_softmax_in_float64():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 5000, generator=generator) * 6
    expected = (logits.double() / np.float32(0.7)).log_softmax(-1)
    tokens, logprobs = sample(logits.clone(), draws(50, temperature=0.7))
    assert (logprobs - expected.gather(1, tokens[:, None])[:, 0]).abs().max() < 2e-6


def test_logits_that_are_not_finite_give_logprobs_that_say_so():
    _, logprobs = sample(torch.full((2, 100), float("nan")), at(0.3, 0.6, top_p=0.5))
    assert logprobs.isnan().all()


def test_random_numbers_depend_on_seed_and_index_alone_and_are_uniform():
    keys = np.array([stream_key(seed) for seed in range(200)])
    table = np.stack([uniforms(keys, np.full(200, i)) for i in range(100)], 1)
    assert table[7, 31] == uniforms(keys[7:8], np.array([31]))[0]
    assert table.min() >= 0
    assert table.max() < 1
    counts = np.bincount((table.ravel() * 20).astype(int), minlength=20)
    # 20,000 numbers in 20 bins; chi-square with 19 degrees of freedom stays below 43.8 (p = .001).
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8
    assert abs(np.corrcoef(table[:-1].ravel(), table[1:].ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(table[:, :-1].ravel(), table[:, 1:].ravel())[0, 1]) < 0.03


def test_no_seed_continues_the_numbers_of_another():
    keys = np.array([stream_key(5), stream_key(5 + 0x9E3779B97F4A7C15)])
    table = [uniforms(keys, np.full(2, i)) for i in range(3)]
    assert table[1][0] != table[0][1]
    assert table[2][0] != table[1][1]


@pytest.mark.parametrize("seed", [0, -1, 2**63, 2**64 + 5])
def test_any_integer_is_a_seed(seed):
    assert 0 <= uniforms(np.array([stream_key(seed)]), np.array([0]))[0] < 1
