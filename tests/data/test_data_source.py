"""Sources: an order that follows from seed and epoch, and resumes exactly."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import chain

import pytest
from transformers import PreTrainedTokenizerFast

from whet.config.data import DataConfig
from whet.data.prepare import prepare
from whet.data.prepared import Prepared
from whet.data.source import PromptRows, RowSource, epoch_order
from whet.errors import CheckpointError
from whet.types import Prompt, Unit


@pytest.fixture
def ten(
    settings: Callable[..., DataConfig], write_rows: Callable[..., str], tokenizer: PreTrainedTokenizerFast
) -> Prepared:
    return prepare(settings(), write_rows(*({"text": f"row {i}"} for i in range(10))), tokenizer)


@pytest.fixture
def prompts() -> list[Prompt]:
    return [Prompt(f"train/{i}", (i,), str(i)) for i in range(5)]


def numbers(taken: list[Unit] | list[Prompt]) -> list[int]:
    return [int(item.id.partition("/")[2]) for item in taken]


def test_the_order_is_a_permutation_that_seed_and_epoch_decide():
    orders = [epoch_order(50, seed=seed, epoch=epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert epoch_order(50, seed=1, epoch=1).tolist() == orders[3]
    assert epoch_order(4, seed=0, epoch=0, shuffle=False).tolist() == [0, 1, 2, 3]


def test_the_order_is_the_same_on_every_machine_and_version():
    # A resumed run on another machine must not skip or repeat rows.
    assert epoch_order(8, seed=0, epoch=0).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]


async def test_a_window_never_straddles_two_epochs(ten: Prepared):
    source = RowSource(ten, seed=0)
    windows, places = [], []
    for _ in range(6):
        windows.append(numbers(await source.take(4)))
        places.append((source.epoch, source.position))
    assert [len(window) for window in windows] == [4, 4, 2, 4, 4, 2]
    assert places == [(0, 4), (0, 8), (1, 0), (1, 4), (1, 8), (2, 0)]
    assert sorted(chain(*windows[:3])) == sorted(chain(*windows[3:])) == list(range(10))
    assert windows[:3] != windows[3:]
    assert len(source) == 10


async def test_rows_come_in_file_order_without_shuffling(ten: Prepared):
    source = RowSource(ten, seed=0, shuffle=False)
    assert [numbers(await source.take(7)) for _ in range(3)] == [
        [0, 1, 2, 3, 4, 5, 6],
        [7, 8, 9],
        [0, 1, 2, 3, 4, 5, 6],
    ]


@pytest.mark.parametrize("steps", range(8))
async def test_a_resumed_source_goes_on_as_if_nothing_had_happened(ten: Prepared, steps: int):
    source = RowSource(ten, seed=5)
    for _ in range(steps):
        await source.take(3)
    state = json.loads(json.dumps(source.state_dict()))
    resumed = RowSource(ten, seed=5)
    await resumed.take(2)
    resumed.load_state_dict(state)
    assert (resumed.epoch, resumed.position) == (source.epoch, source.position)
    for _ in range(9):
        assert numbers(await resumed.take(3)) == numbers(await source.take(3))


async def test_a_checkpoint_of_other_data_is_refused(ten: Prepared):
    state = RowSource(ten, seed=0).state_dict()
    for other in (
        RowSource(ten, seed=1),
        RowSource(ten, seed=0, shuffle=False),
        RowSource(ten.hold_out(0.5, 0)[0], seed=0),
    ):
        with pytest.raises(CheckpointError, match=r"was made with other data: its .* is .*, now it is .*; restore"):
            other.load_state_dict(state)


async def test_prompts_wrap_as_often_as_asked(prompts: list[Prompt]):
    source = PromptRows(prompts, seed=2)
    taken = numbers(await source.take(13))
    assert [sorted(taken[:5]), sorted(taken[5:10])] == [list(range(5))] * 2
    assert (source.epoch, source.position, len(source)) == (2, 3, 5)
    assert sorted(taken[10:] + numbers(await source.take(2))) == list(range(5))


async def test_prompts_do_not_depend_on_how_many_are_taken_at_a_time(prompts: list[Prompt]):
    once, often = PromptRows(prompts, seed=2), PromptRows(prompts, seed=2)
    parts = [numbers(await often.take(n)) for n in (1, 7, 4)]
    assert numbers(await once.take(12)) == list(chain(*parts))
    assert once.state_dict() == often.state_dict()


async def test_resumed_prompts_go_on_and_other_prompts_are_refused(prompts: list[Prompt]):
    source = PromptRows(prompts, seed=2)
    await source.take(7)
    resumed = PromptRows(prompts, seed=2)
    resumed.load_state_dict(json.loads(json.dumps(source.state_dict())))
    assert numbers(await resumed.take(6)) == numbers(await source.take(6))
    other = PromptRows([*prompts[:4], Prompt("train/4", (9,), "9")], seed=2)
    with pytest.raises(CheckpointError, match="its content is"):
        other.load_state_dict(source.state_dict())
