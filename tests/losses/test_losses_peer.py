"""Values and gradients against TRL's own loss functions, on ragged batches: a second opinion on every formula.

Needs the extra `peers`; skipped, saying so, where TRL is not installed.
"""

from __future__ import annotations

import os
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from whet.batch import Batch, collate
from whet.losses import LOSSES
from whet.losses.transport import aot_partners
from whet.types import Sample, Unit

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
pytest.importorskip("trl", reason="TRL is not installed; get it with the extra `peers`: pip install whet[peers]")

from trl import DPOTrainer, KTOTrainer, RewardTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

RTOL, ATOL = 1e-5, 1e-7


class Rows:
    """Random pairs of these numbers of trained tokens: as a batch of ours, and as TRL's padded rows.

    TRL's are shifted (the token at place t + 1 stands at t), all chosen rows first, 0 where nothing is trained.
    """

    def __init__(self, lengths: list[int], *, scale: float = 1.0, dtype: torch.dtype = torch.float32, seed: int = 0):
        draw = torch.Generator().manual_seed(seed)
        prompts = torch.randint(1, 4, (len(lengths),), generator=draw).tolist()
        samples = [Sample([1] * (p + n), [False] * p + [True] * n) for p, n in zip(prompts, lengths, strict=True)]
        units = [Unit(str(i), pair) for i, pair in enumerate(zip(samples[0::2], samples[1::2], strict=True))]
        self.batch: Batch = collate(units)
        logits = scale * torch.randn(self.batch.num_tokens, 5, generator=draw)
        logp = logits.log_softmax(-1)
        ref = (logits + scale * 0.5 * torch.randn(logits.shape, generator=draw)).log_softmax(-1)
        self.leaf = logp[:, 0].to(dtype).requires_grad_()
        self.theirs = self.leaf.detach().float().requires_grad_()
        self.squares = (2 * logp).logsumexp(-1)
        self.batch = self.batch.with_columns(ref_logprobs=ref[:, 0])
        self.width = int(self.batch.lengths.max())
        self.order = [*range(0, len(lengths), 2), *range(1, len(lengths), 2)]

    def ours(self, name: str, **options) -> tuple[Tensor, dict[str, Tensor]]:
        return LOSSES[name]({"logprobs": self.leaf, "log_sum_sq_probs": self.squares}, self.batch, **options)

    def padded(self, values: Tensor) -> Tensor:
        """[T] -> [N, width - 1], shifted."""
        values = torch.where(self.batch.loss_mask, values, 0)
        rows = values.split(self.batch.lengths.tolist())
        return torch.stack([nn.functional.pad(rows[i], (0, self.width - len(rows[i])))[1:] for i in self.order])

    @property
    def mask(self) -> Tensor:
        """[N, width] completion mask."""
        return nn.functional.pad(self.padded(torch.ones(self.batch.num_tokens)), (1, 0)).long()

    def sums(self, mean: bool = False) -> tuple[Tensor, Tensor]:
        """Summed or mean logprobs of chosen and rejected completions, [U] each, for TRL."""
        totals = self.padded(self.theirs).sum(1)
        counts = self.mask.sum(1).clamp(min=1)
        chosen, rejected = (totals / counts if mean else totals).chunk(2)
        return chosen, rejected

    def same(self, ours: Tensor, theirs: Tensor) -> None:
        """Equal values, and equal gradients at the logprobs of every token."""
        assert torch.allclose(ours, theirs, rtol=RTOL, atol=ATOL), (ours, theirs)
        (own,) = torch.autograd.grad(ours.sum(), self.leaf, allow_unused=True)
        (right,) = torch.autograd.grad(theirs.sum(), self.theirs)
        assert torch.allclose(own.float(), right.to(own.dtype).float(), rtol=RTOL, atol=ATOL), (own, right)


class Answers(nn.Module):
    """A model that has its answers ready."""

    is_gradient_checkpointing = False

    def __init__(self, logprobs: Tensor, squares: Tensor | None = None):
        super().__init__()
        nothing = torch.zeros_like(logprobs)
        self.answer = SimpleNamespace(
            log_probs=logprobs, log_sum_sq_probs=squares, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool()
        )

    def forward(self, **inputs):
        return self.answer


def trainer(**settings) -> SimpleNamespace:
    """What TRL's loss functions look up in the trainer that they are methods of."""

    def identity(x: Tensor) -> Tensor:
        return x

    accelerator = SimpleNamespace(device=torch.device("cpu"), gather=identity, gather_for_metrics=identity)
    return SimpleNamespace(
        accelerator=accelerator,
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
    )


def dpo(rows: Rows, loss_type: str, **options) -> tuple[Tensor, dict[str, list[float]]]:
    """TRL's loss, the mean over pairs, and its metrics."""
    divergences = {"js": "js_divergence", "alpha": "alpha_divergence"}
    model = Answers(rows.padded(rows.theirs), rows.padded(rows.squares))
    self = trainer(
        model=model,
        ref_model=Answers(rows.padded(rows.batch["ref_logprobs"])),
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=options.get("beta", 0.1),
        label_smoothing=options.get("label_smoothing", 0.0),
        ld_alpha=options.get("ld_alpha"),
        f_divergence_type=divergences.get(kind := options.get("f_divergence", "reverse_kl"), kind),
        f_alpha_divergence_coef=options.get("f_alpha", 0.5),
        use_weighting=options.get("wpo", False),
        args=SimpleNamespace(discopop_tau=options.get("tau", 0.05), gradient_checkpointing_kwargs=None),
    )
    inputs = {"input_ids": rows.mask, "attention_mask": rows.mask, "completion_mask": rows.mask}
    return DPOTrainer._compute_loss(self, model, inputs, False), self._metrics["train"]


DIVERGENT = ("sigmoid", "sigmoid_norm", "robust", "hinge", "ipo", "exo_pair", "discopop")
PLAIN = ("nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down")
SORTED = ("aot", "aot_unpaired")
FIXED = {"exo_pair": {"label_smoothing": 0.1}, "bco_pair": {"running_mean": False}, "robust": {"label_smoothing": 0.2}}
# At this β the random log-ratios reach into every branch of every loss.
CASES = [(name, {"beta": beta}) for name in (*DIVERGENT, *PLAIN, *SORTED) for beta in (0.1, 0.6)]
CASES += [(name, {"beta": 0.3, "ld_alpha": alpha}) for name in (*DIVERGENT, *PLAIN, *SORTED) for alpha in (0.0, 0.4)]
# TRL weighs a hinge in place, which its backward pass does not survive: left out wherever `wpo` stands.
CASES += [(name, {"beta": 0.3, "wpo": True}) for name in (*DIVERGENT, *PLAIN) if name != "hinge"]
CASES += [
    (name, {"beta": 0.3, **divergence})
    for name in DIVERGENT
    for divergence in (
        {"f_divergence": "forward_kl"},
        {"f_divergence": "js"},
        {"f_divergence": "alpha"},
        {"f_divergence": "alpha", "f_alpha": 1.7},
        {"f_divergence": "js", "ld_alpha": 0.4, "wpo": name != "hinge"},
    )
]
CASES += [(name, {"label_smoothing": 0.2, "beta": 0.3}) for name in SORTED]
CASES += [("discopop", {"tau": 0.5}), ("robust", {"label_smoothing": 0.0}), ("exo_pair", {"label_smoothing": 0.4})]
RAGGED = {
    "ragged": [3, 5, 1, 1, 6, 2, 4, 9],
    "one pair": [4, 2],
    "a row without trained tokens": [3, 0, 0, 2, 5, 5],
}


@pytest.mark.parametrize("lengths", RAGGED.values(), ids=RAGGED)
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_preference_losses_are_those_of_trl(name: str, options: dict, lengths: list[int]):
    rows = Rows(lengths)
    check_dpo(rows, name, options)


def check_dpo(rows: Rows, name: str, options: dict) -> None:
    options = {**FIXED.get(name, {}), **options}
    if name == "bco_pair":
        rows.batch = rows.batch.with_columns(reward_mean=torch.zeros(rows.batch.num_sequences))
    partners = aot_partners(rows.leaf, rows.batch, ld_alpha=options.get("ld_alpha", 1.0))
    rows.batch = rows.batch.with_columns(**partners)
    values, metrics = rows.ours(name, **options)
    theirs, reported = dpo(rows, name, **options)
    rows.same(values.mean(), theirs)
    for metric, value in metrics.items():
        assert value.mean().item() == pytest.approx(reported[metric][0], rel=1e-5, abs=1e-6), metric


# Left out: what overflows there (DiscoPOP's e^-z, divergences that exponentiate), where ours stays finite.
@pytest.mark.parametrize("name", [n for n in (*DIVERGENT, *PLAIN, *SORTED) if n != "discopop"])
def test_preference_losses_are_those_of_trl_at_very_large_logits(name: str):
    check_dpo(Rows([3, 5, 1, 1, 6, 2, 4, 9], scale=200.0), name, {"beta": 0.1})
    if name in DIVERGENT:
        check_dpo(Rows([3, 5, 1, 1, 6, 2, 4, 9], scale=200.0), name, {"beta": 0.1, "f_divergence": "js"})


@pytest.mark.parametrize("name", (*DIVERGENT, *PLAIN, *SORTED))
def test_preference_losses_of_bf16_logprobs_are_those_of_trl_in_float32(name: str):
    check_dpo(Rows([3, 5, 1, 1, 6, 2], dtype=torch.bfloat16), name, {"beta": 0.1})


@pytest.mark.parametrize("lengths", RAGGED.values(), ids=RAGGED)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("scale", [1.0, 200.0])
def test_simpo_and_cpo_are_those_of_trl(lengths: list[int], label_smoothing: float, scale: float):
    for loss_type, name, options in (
        ("sigmoid", "cpo", {"beta": 0.3}),
        ("simpo", "simpo", {"beta": 2.0, "gamma": 1.0}),
        ("simpo", "simpo", {"beta": 2.5, "gamma": 0.3}),
    ):
        rows = Rows(lengths, scale=scale)
        self = trainer(
            alpha=0.0,
            beta=options["beta"],
            loss_type=loss_type,
            simpo_gamma=options.get("gamma"),
            label_smoothing=label_smoothing,
        )
        theirs, chosen, rejected = CPOTrainer.cpo_loss(self, *rows.sums(mean=name == "simpo"))
        values, metrics = rows.ours(name, label_smoothing=label_smoothing, **options)
        rows.same(values, theirs)
        assert torch.allclose(metrics["rewards/chosen"], chosen, rtol=RTOL)
        assert torch.allclose(metrics["rewards/rejected"], rejected, rtol=RTOL)


# Very large logits are certainties, of which TRL's odds are infinite and their gradient NaN.
@pytest.mark.parametrize("lengths", [RAGGED["ragged"], RAGGED["one pair"]], ids=str)
@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_orpo_is_that_of_trl(lengths: list[int], scale: float):
    rows = Rows(lengths, scale=scale)
    self = trainer(beta=0.3)
    theirs, chosen, _, ratio, log_odds = ORPOTrainer.odds_ratio_loss(self, *rows.sums(mean=True))
    values, metrics = rows.ours("orpo", beta=0.3)
    rows.same(values, -theirs)
    assert torch.allclose(metrics["rewards/chosen"], chosen)
    assert metrics["log_odds_ratio"].mean().item() == pytest.approx(ratio.item(), rel=1e-5)
    assert metrics["log_odds_chosen"].mean().item() == pytest.approx(log_odds.item(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("scale", [1.0, 200.0])
@pytest.mark.parametrize("baseline", [0.7, -0.4])
@pytest.mark.parametrize("labels", [[1, 0, 0, 1, 1, 0], [1] * 6, [0] * 6], ids=str)
def test_unpaired_losses_are_those_of_trl(loss_type: str, scale: float, baseline: float, labels: list[int]):
    rows = Rows([3, 5, 1, 1, 6, 0], scale=scale)
    self = trainer(
        loss_type=loss_type,
        beta=0.3,
        desirable_weight=1.3,
        undesirable_weight=0.6,
        calculate_KL=loss_type == "kto",
        model=(model := Answers(rows.padded(rows.theirs))),
        ref_model=(reference := Answers(rows.padded(rows.batch["ref_logprobs"]))),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        # Over mismatched rows: their mean difference is the baseline.
        _compute_kl_logps=lambda asked, batch: torch.full((6,), 0.0 if asked is reference else baseline),
    )
    inputs = {"input_ids": rows.mask, "attention_mask": rows.mask, "completion_mask": rows.mask}
    in_their_order = torch.tensor(labels)[rows.order]
    theirs = KTOTrainer._compute_loss(self, model, inputs | {"label": in_their_order}, False)
    rows.batch = rows.batch.with_columns(
        labels=torch.tensor(labels).float(), kl_baseline=torch.full((6,), max(0.0, baseline))
    )
    values, metrics = rows.ours(loss_type, beta=0.3, desirable_weight=1.3, undesirable_weight=0.6)
    rows.same(values.mean(), theirs)
    reported = self._metrics["train"]
    for metric, value in metrics.items():
        there = reported[metric][0] if metric in reported else torch.nan
        assert value.nanmean().item() == pytest.approx(there, rel=1e-5, abs=1e-6, nan_ok=True), metric


@pytest.mark.parametrize("with_margin", [False, True])
@pytest.mark.parametrize("centering", [None, 0.01])
@pytest.mark.parametrize("pairs", [1, 7])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_bradley_terry_is_that_of_trl(with_margin: bool, centering: float | None, pairs: int, scale: float):
    draw = torch.Generator().manual_seed(0)
    rows = Rows([1] * (2 * pairs))
    scores = scale * torch.randn(2 * pairs, generator=draw)
    rows.leaf, rows.theirs = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    inputs = {"attention_mask": rows.mask}
    if with_margin:
        inputs["margin"] = torch.rand(pairs, generator=draw)
        rows.batch = rows.batch.with_columns(margins=inputs["margin"])

    class Scores(nn.Module):
        def forward(self, **inputs):
            return SimpleNamespace(logits=rows.theirs[rows.order][:, None])

    model = Scores()
    self = trainer(model=model, args=SimpleNamespace(center_rewards_coefficient=centering))
    theirs = RewardTrainer.compute_loss(self, model, inputs)
    values, metrics = LOSSES["bradley_terry"]({"scores": rows.leaf}, rows.batch, centering=centering or 0.0)
    rows.same(values.mean(), theirs)
    reported = self._metrics["train"]
    reduced = {"min_reward": torch.min, "max_reward": torch.max}
    for metric, value in metrics.items():
        ours = reduced.get(metric, torch.mean)(value).item()
        assert ours == pytest.approx(reported[metric][0], rel=1e-5, abs=1e-6), metric
