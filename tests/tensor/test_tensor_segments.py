"""Attention over the tree is attention over rows: values and gradients against explicit masks in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from whet import tree
from whet.tensor import segments
from whet.tensor.segments import Segments
from whet.tree import Tree

MODULE = nn.Module()


def random_tree(seed: int, *, num_rows: int = 8, longest: int = 14, vocabulary: int = 2) -> Tree:
    draw = np.random.default_rng(seed)
    rows = [draw.integers(vocabulary, size=draw.integers(1, longest + 1)) for _ in range(num_rows)]
    return tree.build(rows, min_saved=1)


def family(prompt: int, *branches: int, vocabulary: int = 1000) -> list[np.ndarray]:
    """Rows with a common prompt, each going on for so many tokens of its own."""
    draw = np.random.default_rng(prompt)
    shared = draw.integers(vocabulary, size=prompt)
    return [
        np.concatenate([shared, [vocabulary + i], draw.integers(vocabulary, size=n)]) for i, n in enumerate(branches)
    ]


def visible(laid: Tree) -> Tensor:
    """[P, P] whether a place sees another: walk back along the predecessors."""
    sees = torch.zeros(laid.num_tokens, laid.num_tokens, dtype=torch.bool)
    for place in range(laid.num_tokens):
        seen = place
        while seen >= 0:
            sees[place, seen] = True
            seen = int(laid.predecessors[seen])
    return sees


def dense(laid: Tree, query, key, value, scaling=None, sliding_window=None, softcap=None, s_aux=None) -> Tensor:
    """The definition, with a [P, P] mask."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    sees = visible(laid)
    if sliding_window:
        positions = torch.from_numpy(laid.position_ids)
        sees &= positions[:, None] - positions < sliding_window
    scores = scores.masked_fill(~sees, -math.inf)
    if s_aux is not None:
        sink = s_aux.reshape(1, -1, 1, 1).expand(1, -1, scores.shape[2], 1)
        weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return (weights @ value).transpose(1, 2)


def inputs(laid: Tree, heads: int = 4, kv_heads: int = 2, dim: int = 8, seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = [(1, h, laid.num_tokens, dim) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(s, generator=draw, dtype=torch.float64).requires_grad_() for s in shapes]


def value_and_gradients(attend, tensors: list[Tensor], dtype: torch.dtype, device="cpu", **options) -> list[Tensor]:
    """The output [1, P, H, D] and the gradient of a weighted sum of it by query, key and value, in float64."""
    leaves = [x.detach().to(device, dtype).requires_grad_() for x in tensors]
    out = attend(*leaves, **options)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device)
    (out.double() * weights).sum().backward()
    return [x.detach().double().cpu() for x in (out, *(leaf.grad for leaf in leaves))]


def ours(laid: Tree, device="cpu"):
    context = Segments(laid, device)
    return lambda q, k, v, scaling=None, **options: context.attend(MODULE, q, k, v, scaling, **options)


def agree(laid: Tree, tensors: list[Tensor], dtype=torch.float32, tolerance=2e-6, **options) -> None:
    found = value_and_gradients(ours(laid), tensors, dtype, **options)
    exact = value_and_gradients(lambda *x, **o: dense(laid, *x, **o), tensors, torch.float64, **options)
    for name, ours_, theirs in zip(("output", "query", "key", "value"), found, exact, strict=True):
        scale = theirs.abs().max().item()
        assert (ours_ - theirs).abs().max().item() <= tolerance * max(1.0, scale), name


@pytest.mark.parametrize("seed", range(25))
def test_a_random_tree_attends_like_its_rows(seed: int):
    laid = random_tree(seed)
    agree(laid, inputs(laid, seed=seed))


def test_random_trees_are_deep_and_have_segments_of_one_token():
    lengths, depths = [], []
    for seed in range(25):
        laid = random_tree(seed)
        lengths += np.diff(laid.starts).tolist()
        depths.append(max(len(laid.ancestors(s)) for s in range(len(laid.parents))) + 1)
    assert min(lengths) == 1 and max(depths) >= 4


@pytest.mark.parametrize("seed", range(5))
def test_float64_agrees_to_the_last_digits(seed: int):
    laid = random_tree(seed)
    agree(laid, inputs(laid, seed=seed), dtype=torch.float64, tolerance=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_bf16_agrees_within_its_rounding(seed: int):
    laid = random_tree(seed)
    agree(laid, inputs(laid, seed=seed), dtype=torch.bfloat16, tolerance=0.03)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (4, 1), (6, 2)])
def test_any_grouping_of_heads(heads: int, kv_heads: int):
    laid = random_tree(3)
    agree(laid, inputs(laid, heads, kv_heads))


def test_a_scaling_of_the_models_own():
    laid = random_tree(4)
    agree(laid, inputs(laid), scaling=0.7)


@pytest.mark.parametrize("width", [3, 12])
def test_values_narrower_or_wider_than_keys(width: int):
    laid = random_tree(5)
    query, key, _ = inputs(laid, dim=8)
    value = torch.randn(1, 2, laid.num_tokens, width, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    agree(laid, [query, key, value])


LAYOUTS = {
    "a single token": [np.array([5])],
    "one row": family(20, 10),
    "rows of one token": [np.array([i]) for i in range(5)],
    "branches of one token": family(30, 0, 0, 0),
    "a prompt longer than LONG": family(segments.LONG + 40, 3, 9, 30),
    "branches longer than LONG": family(10, segments.LONG + 1, segments.LONG + 70, segments.LONG),
    "branches of all lengths": family(50, *range(0, 60, 4)),
}


@pytest.mark.parametrize("rows", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts(rows: list[np.ndarray]):
    laid = tree.build(rows, min_saved=1)
    agree(laid, inputs(laid))


def test_groups_side_by_side_share_calls_and_nothing_else():
    # Prompts of equal length are paths of equal length, which go into one call.
    trees = [tree.build(family(40, 5, 8, 12), min_saved=1), tree.build(family(40, 3), min_saved=1)]
    trees += [tree.build(family(40, 7, 7), min_saved=1), tree.flat(family(12, 3, 4, 5))]
    laid = tree.join(trees)
    agree(laid, inputs(laid))


OPTIONS = {
    "a window shorter than the rows": {"sliding_window": 5},
    "a window of one token": {"sliding_window": 1},
    "soft-capped scores": {"softcap": 1.5},
    "attention sinks": {"s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)},
    "all of them": {"sliding_window": 4, "softcap": 2.0, "s_aux": torch.zeros(4, dtype=torch.float64), "scaling": 0.4},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("seed", range(3))
def test_what_some_models_ask_for_besides(options: dict, seed: int):
    laid = random_tree(seed)
    agree(laid, inputs(laid, seed=seed), **options)


def test_a_window_longer_than_the_longest_row_takes_the_fast_way(monkeypatch: pytest.MonkeyPatch):
    laid = random_tree(0)
    monkeypatch.setattr(segments, "_attend_by_scores", None)
    agree(laid, inputs(laid), sliding_window=int(laid.position_ids.max()) + 1)


def test_siblings_look_at_their_prompt_in_one_call():
    calls = Segments(tree.build(family(100, *[20] * 8), min_saved=1))._calls
    assert len(calls.above) == 1
    assert len(calls.own) == 2, "the prompt, and the eight completions together"


def test_padding_of_queries_wastes_little():
    lengths = sorted(np.random.default_rng(0).integers(1, 400, size=200).tolist())
    for run in segments._like_lengths(lengths):
        longest = lengths[run[-1]]
        assert longest <= max(1.25 * lengths[run[0]], lengths[run[0]] + 8)
        assert longest < segments.LONG or len(run) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["random", *LAYOUTS])
def test_variable_length_attention_agrees_on_a_gpu(layout: str, dtype: torch.dtype):
    laid = random_tree(0) if layout == "random" else tree.build(LAYOUTS[layout], min_saved=1)
    tensors = inputs(laid, dim=64)
    found = value_and_gradients(ours(laid, "cuda"), tensors, dtype, "cuda")
    exact = value_and_gradients(lambda *x: dense(laid, *x), tensors, torch.float64)
    for name, ours_, theirs in zip(("output", "query", "key", "value"), found, exact, strict=True):
        assert (ours_ - theirs).abs().max() <= 0.03 * max(1.0, theirs.abs().max().item()), name


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, *OPTIONS.values()], ids=["plain", *OPTIONS])
def test_float32_and_special_attention_agree_on_a_gpu(options: dict):
    laid = random_tree(1)
    tensors = inputs(laid)
    on_gpu = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in options.items()}
    found = value_and_gradients(ours(laid, "cuda"), tensors, torch.float32, "cuda", **on_gpu)
    exact = value_and_gradients(lambda *x, **o: dense(laid, *x, **o), tensors, torch.float64, **options)
    for ours_, theirs in zip(found, exact, strict=True):
        assert torch.allclose(ours_, theirs, atol=1e-4, rtol=1e-4)
