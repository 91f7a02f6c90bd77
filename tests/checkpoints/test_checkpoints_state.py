"""State goes to disk and comes back to the bit."""

import json
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from whet.checkpoints.state import (
    load_optimizer,
    load_rng,
    load_tensors,
    read_json,
    save_optimizer,
    save_rng,
    save_tensors,
    write_json,
)
from whet.errors import CheckpointError


def same(left, right):
    """Equal to the bit, in values, types, dtypes and order of keys."""
    if isinstance(left, torch.Tensor):
        raw = [
            t.contiguous().flatten().view(torch.uint8) if t.dim() else t.reshape(1).view(torch.uint8)
            for t in (left, right)
        ]
        return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*raw)
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right or (left != left and right != right)


def test_same_sees_differences():
    assert same({"a": (1, torch.tensor(-0.0))}, {"a": (1, torch.tensor(-0.0))})
    for other in ({"a": [1, torch.tensor(-0.0)]}, {"a": (1, torch.tensor(0.0))}, {"a": (1.0, torch.tensor(-0.0))}):
        assert not same({"a": (1, torch.tensor(-0.0))}, other)


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_every_dtype_come_back_to_the_bit(tmp_path, dtype):
    values = torch.tensor([0.0, -0.0, 1.5, 3e-5, 255.0]).to(dtype)
    nested = {"flat": values, "scalar": values[2], "empty": values[:0], "table": values[:4].reshape(2, 2)}
    save_tensors(nested, tmp_path / "x")
    assert same(load_tensors(tmp_path / "x"), nested)


def test_numbers_that_are_none_come_back_to_the_bit(tmp_path):
    nested = [torch.tensor([math.nan, math.inf, -math.inf]), math.inf, math.nan]
    save_tensors(nested, tmp_path / "x")
    assert same(load_tensors(tmp_path / "x"), nested)


def test_views_shared_tensors_and_clashing_names_are_kept(tmp_path):
    table = torch.arange(12.0).reshape(3, 4)
    nested = {"a": {"b": table}, "a.b": table.T, "row": table[1], "again": table, "p": nn.Parameter(table[0])}
    save_tensors(nested, tmp_path / "x")
    loaded = load_tensors(tmp_path / "x")
    assert list(loaded) == list(nested)
    for key in ("a.b", "row", "again", "p"):
        assert torch.equal(loaded[key], nested[key].data)
    assert torch.equal(loaded["a"]["b"], table)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
structures = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.integers() | st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=30, deadline=None)
@given(nested=structures)
def test_any_structure_comes_back_as_it_was(nested, tmp_path_factory):
    path = tmp_path_factory.mktemp("state") / "x"
    save_tensors([nested, torch.zeros(1)], path)
    assert same(load_tensors(path)[0], nested)


def test_structures_without_tensors_are_fine(tmp_path):
    save_tensors({"a": [1, (2, None)]}, tmp_path / "x")
    assert same(load_tensors(tmp_path / "x"), {"a": [1, (2, None)]})


def test_what_would_need_pickle_is_our_bug(tmp_path):
    with pytest.raises(AssertionError, match=r"a\.0 is a set"):
        save_tensors({"a": [{1}]}, tmp_path / "x")


def trained(dtype=torch.float32, steps=3, optimizer_class=torch.optim.AdamW, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)).to(dtype)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = optimizer_class(groups, lr=1e-2, **options)
    for step in range(steps):
        train(model, optimizer, step)
    return model, optimizer


def train(model, optimizer, step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(5, 4, generator=generator).to(next(model.parameters()).dtype)
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_optimizer_goes_on_as_if_it_had_not_stopped(tmp_path, dtype, amsgrad):
    model, optimizer = trained(dtype, amsgrad=amsgrad)
    optimizer.param_groups[0]["lr"] = 3e-3
    save_optimizer(optimizer, tmp_path)
    assert same(load_tensors(tmp_path / "optimizer.safetensors"), optimizer.state_dict())
    again, resumed = trained(dtype, steps=0, amsgrad=amsgrad)
    again.load_state_dict(model.state_dict())
    load_optimizer(resumed, tmp_path)
    assert same(resumed.state_dict(), optimizer.state_dict())
    for step in range(3, 6):
        train(model, optimizer, step)
        train(again, resumed, step)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_optimizer_without_steps_and_with_momentum_alone(tmp_path):
    for options in ({"steps": 0}, {"optimizer_class": torch.optim.SGD, "momentum": 0.9}):
        _, optimizer = trained(**options)
        save_optimizer(optimizer, tmp_path)
        assert same(load_tensors(tmp_path / "optimizer.safetensors"), optimizer.state_dict())


def test_optimizer_of_another_model_is_refused(tmp_path):
    _, optimizer = trained()
    save_optimizer(optimizer, tmp_path)
    with pytest.raises(CheckpointError, match="4 trained tensors, but the model has 1"):
        load_optimizer(torch.optim.AdamW([nn.Parameter(torch.zeros(2))]), tmp_path)
    shapes = [nn.Parameter(torch.zeros(p.shape[::-1])) for g in optimizer.param_groups for p in g["params"]]
    groups = [{"params": shapes[:2]}, {"params": shapes[2:]}]
    with pytest.raises(CheckpointError, match=r"exp_avg \[8, 4\].*\[4, 8\].*adapter and freezing"):
        load_optimizer(torch.optim.AdamW(groups), tmp_path)


def draws():
    return [
        random.random(), random.gauss(0, 1), random.gauss(0, 1),
        np.random.rand(), np.random.randn(),
        torch.rand(1).item(), torch.randn(3).tolist(),
    ]  # fmt: skip


def test_random_generators_go_on_where_they_were(tmp_path):
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    draws()
    random.gauss(0, 1)  # Now both hold the second of a pair of normal numbers back for the next call.
    save_rng(tmp_path)
    expected = draws()
    assert draws() != expected
    load_rng(tmp_path)
    assert draws() == expected


def test_json_comes_back_to_the_bit_and_refuses_keys_that_would_change(tmp_path):
    state = {"position": {"epoch": 3, "window": [1, 2]}, "best": 0.1 + 0.2, "metric": math.inf, "none": None}
    write_json(state, tmp_path / "state.json")
    assert same(read_json(tmp_path / "state.json"), state)
    with pytest.raises(AssertionError, match="key 7"):
        write_json({"groups": [{7: "x"}]}, tmp_path / "state.json")


@pytest.mark.parametrize("content", [None, b"", b"abc" * 20])
def test_files_that_cannot_be_read_are_checkpoint_errors(tmp_path, content):
    if content is not None:
        (tmp_path / "x").write_bytes(content)
    for read in (load_tensors, read_json):
        with pytest.raises(CheckpointError, match="another checkpoint"):
            read(tmp_path / "x")


def test_other_safetensors_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "x")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_tensors(tmp_path / "x")


def test_structure_is_plain_json_in_the_metadata(tmp_path):
    from safetensors import safe_open

    save_tensors({"step": 3, "w": torch.zeros(2)}, tmp_path / "x")
    with safe_open(tmp_path / "x", "pt") as file:
        assert list(file.keys()) == ["w"]
        assert json.loads(file.metadata()["structure"]) == {"dict": [["step", 3], ["w", {"tensor": "w"}]]}
