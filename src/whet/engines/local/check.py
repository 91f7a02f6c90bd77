"""The check at start-up: the embedded engine computes what the model's own forward does, or is refused."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from whet.engines.local.contexts import refuse_unsupported
from whet.engines.local.forward import Forward
from whet.engines.local.pages import Paging
from whet.errors import EngineError

NUM_DECODED = 3
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
HALF_TOLERANCE = 0.5
"""Largest difference of two logprobs that rounding explains, by type of the weights."""
LONGEST_WINDOW = 256
"""A sliding window up to this length is checked with prompts longer than it."""
MIXES = {"full_attention", "sliding_attention"}


def check(model: nn.Module, tokens_below: int, *, packs: bool = False, paging: Paging | None = None) -> None:
    """Compare logprobs of prefill and decode with those of the model's own forward, on random tokens.

    Runs without autocast, in the type of the weights. `tokens_below`: the size of the vocabulary.
    Raises EngineError if they differ, or if a layer mixes tokens by something other than attention.
    """
    forward = Forward(model, max_rows=2, packs=packs, paging=paging)
    name = type(forward.model).__name__
    windows = _windows(forward, name)
    longest = 9 + max([w for w in windows if w <= LONGEST_WINDOW], default=0)
    if forward.max_length is not None:
        longest = min(longest, forward.max_length - NUM_DECODED)
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, tokens_below, size=n + NUM_DECODED) for n in (longest, min(5, longest))]
    with forward.running():
        ours = _teacher_forced(forward, rows)
    theirs = _own_logprobs(model, forward, rows)
    difference = max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
    tolerance = TOLERANCE.get(forward.head.weight.dtype, HALF_TOLERANCE)
    if not difference <= tolerance:
        raise EngineError(
            f"the embedded engine does not reproduce {name}: its logprobs differ from the model's own forward by "
            f"{difference:.2g}, where rounding explains {tolerance:g}; choose another engine with engine.use"
        )


class _Probe:
    """An attention context that only writes down what each layer's attention is given."""

    def __init__(self) -> None:
        self.options: dict[int, dict] = {}

    def attend(self, module, query, key, value, scaling, **options) -> Tensor:
        self.options[module.layer_idx] = options
        groups = query.shape[1] // value.shape[1]
        return value.repeat_interleave(groups, dim=1).transpose(1, 2)


def _windows(forward: Forward, name: str) -> set[int]:
    """The sliding windows of the model's layers. Raises EngineError for layers that the cache cannot serve."""
    config, probe = forward.config, _Probe()
    token = torch.zeros((1, 1), dtype=torch.int64, device=forward.device)
    with forward.running():
        forward.call(token, token, probe)
    if len(probe.options) != config.num_hidden_layers:
        raise EngineError(
            f"the embedded engine cannot serve {name}: {config.num_hidden_layers - len(probe.options)} of its "
            f"{config.num_hidden_layers} layers do not attend through transformers' attention interface "
            "(linear attention, state space, or code of its own); choose another engine with engine.use"
        )
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    for layer, (kind, options) in enumerate(zip(types, map(probe.options.get, range(len(types))), strict=True)):
        refuse_unsupported(options or {})
        if kind not in MIXES or (kind == "sliding_attention" and not (options or {}).get("sliding_window")):
            raise EngineError(
                f"the embedded engine cannot serve {name}: layer {layer} is of type {kind!r}, but only full "
                "attention, and sliding windows told to the attention, are known; choose another engine with engine.use"
            )
    return {int(o["sliding_window"]) for o in probe.options.values() if o.get("sliding_window")}


def _teacher_forced(forward: Forward, rows: list[np.ndarray]) -> list[Tensor]:
    """Logprobs [NUM_DECODED + 1, V] after the prompt and after each decoded token, of each row."""
    prompts = [row[:-NUM_DECODED] for row in rows]
    forward.cache.reserve(len(rows), max(map(len, rows)))
    hidden, _ = forward.prefill(prompts, [[i] for i in range(len(rows))])
    states = [hidden]
    for step in range(NUM_DECODED):
        positions = np.array([len(prompt) + step for prompt in prompts])
        tokens = np.array([row[position] for row, position in zip(rows, positions, strict=True)])
        states.append(forward.decode(tokens, positions))
    logprobs = [forward.logits(state).log_softmax(-1) for state in states]
    return list(torch.stack(logprobs, 1))


def _own_logprobs(model: nn.Module, forward: Forward, rows: list[np.ndarray]) -> list[Tensor]:
    with forward.evaluating():
        inputs = [torch.from_numpy(row)[None].to(forward.device) for row in rows]
        logits = [model(input_ids=ids, use_cache=False).logits[0, -NUM_DECODED - 1 :] for ids in inputs]
        return [x.float().log_softmax(-1) for x in logits]
