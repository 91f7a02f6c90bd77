"""The slot cache: growth keeps what is held, stays within its limits, and copies slots."""

from __future__ import annotations

import torch

from whet.engines.local.cache import LENGTH_BLOCK, ROW_BLOCK, SlotCache

LIKE = torch.zeros(1, 2, 1, 4)


def test_growing_keeps_what_is_held_and_never_exceeds_the_limits():
    cache = SlotCache(max_rows=40, max_length=LENGTH_BLOCK + 10)
    cache.reserve(3, 7)
    keys, values = cache.layer(0, LIKE, LIKE)
    assert keys.shape == (ROW_BLOCK, 2, LENGTH_BLOCK, 4)
    keys[2, :, 6], values[2, :, 6] = 1.0, 2.0
    cache.reserve(ROW_BLOCK + 1, LENGTH_BLOCK + 1)
    keys, values = cache.layer(0, LIKE, LIKE)
    assert keys.shape == (2 * ROW_BLOCK, 2, LENGTH_BLOCK + 10, 4)
    assert keys[2, :, 6].eq(1).all()
    assert values[2, :, 6].eq(2).all()
    assert keys.sum() == 2 * 4
    cache.reserve(40, 1)
    assert cache.layer(0, LIKE, LIKE)[0].shape[0] == 40


def test_a_slot_is_copied_in_every_layer_up_to_its_length():
    cache = SlotCache(max_rows=2, max_length=8)
    cache.reserve(2, 8)
    for layer in range(2):
        keys, _ = cache.layer(layer, LIKE, LIKE)
        keys[1] = layer + 1
    cache.copy(1, 0, 3)
    for layer in range(2):
        keys, _ = cache.layer(layer, LIKE, LIKE)
        assert keys[0, :, :3].eq(layer + 1).all()
        assert keys[0, :, 3:].eq(0).all()


def test_clearing_lets_go_of_the_memory():
    cache = SlotCache(max_rows=2, max_length=None, dtype=torch.bfloat16)
    cache.reserve(2, 8)
    assert cache.layer(0, LIKE, LIKE)[0].dtype == torch.bfloat16
    cache.clear()
    assert not cache._layers
