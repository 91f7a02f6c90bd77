"""The check at start-up: does our way through the model give what the model's own forward gives?"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from whet.backends.device import Arithmetic
from whet.backends.forward import Forward, Mode, own_logprobs
from whet.batch import Batch, collate
from whet.errors import ModelError
from whet.models.parts import base, decoder
from whet.tensor.attention import attention
from whet.types import Sample, Unit

logger = logging.getLogger(__name__)

MODES: tuple[Mode, ...] = ("tree", "packed", "rows")
MIXES = {"full_attention", "sliding_attention"}
"""Kinds of layers in which tokens meet by attention alone, over all that is visible."""
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.25, torch.float16: 0.05}
"""Largest difference of a logprob that rounding explains, by type of the weights. A wrong mask or a forgotten
scale is off by far more on most tokens, so the mean must also lie within a tenth of this. What rounding adds in
bf16 or fp16 arithmetic is measured on the model itself."""


def choose_mode(
    model: PreTrainedModel,
    wanted: Mode | Literal["auto"],
    arithmetic: Arithmetic,
    *,
    temperature: float = 1.0,
    chunk_mb: int,
    made: Callable[..., Forward] = Forward,
) -> Forward:
    """The first of tree, packed, rows (or the wanted one) whose logprobs agree with the model's own forward.

    `made` makes what is tried, of the arguments of `Forward`. Says which was taken when it is not the first. Raises
    ModelError with the difference when none agrees.
    """
    modes = MODES if wanted == "auto" else (wanted,)
    found: list[str] = []
    for mode in modes:
        forward = made(model, mode, temperature=temperature, chunk_mb=chunk_mb)
        why = disagreement(forward, arithmetic)
        if why is None:
            _say(model, mode, found)
            return forward
        found.append(f"{mode!r} {why}")
    raise ModelError(
        f"{type(base(model)).__name__} does not give the logprobs of its own forward: {'; '.join(found)}. "
        "Its head or attention does something that whet does not know; choose model.attention auto, or rows"
    )


def _say(model: PreTrainedModel, mode: Mode, found: list[str]) -> None:
    """Report what is not as one might expect."""
    if found:
        logger.warning("attention %r is used: %s", mode, "; ".join(found))
    config = base(model).config.get_text_config()
    dropout = getattr(config, "attention_dropout", None) or getattr(config, "attn_pdrop", None)
    if dropout and mode != "rows":
        message = "the model asks for attention dropout of %g, which way %r leaves out; model.attention: rows keeps it"
        logger.warning(message, dropout, mode)


@torch.no_grad()
def disagreement(forward: Forward, arithmetic: Arithmetic) -> str | None:
    """How this way differs from the model's own forward on a small made-up batch, or None if it does not."""
    model = forward.model
    batch = _probe(base(model).config.get_text_config().vocab_size, forward.shares_prefixes).to(arithmetic.device)
    training = model.training
    model.eval()
    try:
        with arithmetic.context():
            expected = forward.enter(lambda: own_logprobs(model, batch, forward.temperature))
            if not torch.isfinite(expected).all():
                raise ModelError(
                    f"the logprobs of {type(base(model)).__name__}'s own forward are not finite; its weights hold NaN "
                    "or infinity, or the precision overflows (model.dtype, backend.precision)"
                )
            try:
                if forward.mode != "rows" and (why := forward.enter(lambda: _hidden_mixing(model, arithmetic.device))):
                    return f"cannot be: {why}"
                with forward.installed():
                    ours = forward(batch, {"logprobs"})["logprobs"]
            except Exception as error:  # whatever the code of a model does not expect, another way may do
                return f"fails: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        noise = _rounding(forward, arithmetic, batch, expected)
    finally:
        model.train(training)
    difference = (ours - expected).abs()[batch.loss_mask]
    limit = TOLERANCE[next(model.parameters()).dtype]
    if difference.max() <= limit + 4 * noise.max() and difference.mean() <= limit / 10 + 3 * noise.mean():
        return None
    return f"is off by {difference.max():.2g} (mean {difference.mean():.2g})"


def _rounding(forward: Forward, arithmetic: Arithmetic, batch: Batch, rounded: Tensor) -> Tensor:
    """What the run's arithmetic alone changes of the model's own logprobs; 0 where it is float32 throughout."""
    if arithmetic.autocast is None and arithmetic.matmul == "highest":
        return torch.zeros(1, device=rounded.device)
    torch.set_float32_matmul_precision("highest")
    try:
        with _Promoting():
            exact = forward.enter(lambda: own_logprobs(forward.model, batch, forward.temperature))
    finally:
        torch.set_float32_matmul_precision(arithmetic.matmul)
    return (rounded - exact).abs()[batch.loss_mask]


class _Promoting(TorchFunctionMode):
    """Products of float32 and shorter numbers are of float32: weights that ranks gather are as short as autocast's."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [a for a in args if isinstance(a, Tensor) and a.is_floating_point()]
        if len({a.dtype for a in tensors}) > 1 and any(a.dtype == torch.float32 for a in tensors):
            mixed = {id(a) for a in tensors if a.dtype in (torch.bfloat16, torch.float16)}
            args = tuple(a.float() if id(a) in mixed else a for a in args)
        return func(*args, **(kwargs or {}))


class _Listener:
    """An attention context that only takes note of who asks, and whether for a window."""

    def __init__(self) -> None:
        self.layers: set[int] = set()
        self.windows: set[int] = set()

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling, **options) -> Tensor:
        self.layers.add(id(module))
        self.windows |= {window} if (window := options.get("sliding_window")) else set()
        return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(1, 2)


def _hidden_mixing(model: nn.Module, device: torch.device) -> str | None:
    """Why tokens may meet otherwise than by our attention; on a batch as small as the probe it need not show."""
    config, listener = base(model).config.get_text_config(), _Listener()
    if kinds := set(getattr(config, "layer_types", None) or ()) - MIXES:
        return f"it has layers of type {', '.join(sorted(kinds))}"
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    with attention(base(model)):
        options = {"attention_mask": None, "use_cache": False, "attention_context": listener}
        decoder(model)(input_ids=token, position_ids=token, **options)
    if len(listener.layers) != config.num_hidden_layers:
        others = config.num_hidden_layers - len(listener.layers)
        return f"{others} of {config.num_hidden_layers} layers do not attend through transformers' attention interface"
    if getattr(config, "sliding_window", None) and not listener.windows:
        return "it does not tell its attention of its sliding window"
    return None


def _probe(vocab_size: int, share: bool) -> Batch:
    """Two units whose rows share prefixes at two depths; all tokens trained."""
    draw = torch.Generator().manual_seed(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(vocab_size, (count,), generator=draw).tolist())

    units = []
    for name in ("a", "b"):
        trunk, branch = tokens(40), tokens(24)
        rows = [trunk + branch + tokens(9), trunk + branch + tokens(17), trunk + tokens(12)]
        units.append(Unit(name, tuple(Sample(row, (True,) * len(row)) for row in rows)))
    return collate(units, share_prefixes=share)
