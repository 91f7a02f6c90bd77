"""Every offline method: loss and gradient do not depend on layout or micro-batches, and are those of the model's own
forward, row by row."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from whet.backends.local import LocalBackend
from whet.batch import Batch, collate
from whet.config.loader import from_values
from whet.loop import annotated
from whet.methods import Method
from whet.recipe import method_of
from whet.tally import weight_keys
from whet.types import Sample, Unit

LOSSES_OF_DPO = (
    *("sigmoid", "robust", "hinge", "ipo", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sigmoid_norm"),
)
CASES = {
    **{f"dpo {name}": ("dpo", {"use": name}) for name in LOSSES_OF_DPO},
    "dpo ld_alpha": ("dpo", {"ld_alpha": 0.5}),
    "dpo wpo": ("dpo", {"wpo": True}),
    "dpo js": ("dpo", {"f_divergence": "js"}),
    **{name: (name, {}) for name in ("simpo", "cpo", "cpo-simpo", "orpo", "apo", "kto", "bco", "reward")},
}
LAYOUTS = {"tree": {"share_prefixes": True}, "packed": {"share_prefixes": False}, "rows": {"share_prefixes": False}}


def method_named(case: str) -> Method:
    name, loss = CASES[case]
    if loss.get("use") == "exo_pair":
        loss = {**loss, "label_smoothing": 0.05}
    values = {"model": {"path": "m"}, "data": {"train": "d"}, "loss": loss}
    return method_of(from_values(values, method=name, where="the test").config)


def units_for(method: Method) -> list[Unit]:
    """Pairs with a prompt in common: long and short, one with an untrained chosen side, one with a one-token answer;
    the same completions one by one for unpaired methods."""
    draw = random.Random(1)
    lengths = [(12, 7, 9), (3, 20, 1), (30, 2, 15), (8, 0, 6), (1, 5, 5)]
    units = []
    for i, (prompt, *answers) in enumerate(lengths):
        head = [draw.randrange(256) for _ in range(prompt)]
        samples = []
        for label, count in zip((1.0, 0.0), answers, strict=True):
            answer = [draw.randrange(256) for _ in range(max(count, 1))]
            mask = [False] * prompt + [count > 0] * len(answer)
            samples.append(Sample(head + answer, mask, columns={"labels": label}))
        margins = {"margins": 0.1 * i} if method.task == "reward" else {}
        if method.task == "unpaired":
            units += [Unit(f"{i}/{j}", (sample,)) for j, sample in enumerate(samples)]
        else:
            units.append(Unit(str(i), tuple(samples), margins))
    return units


class Frozen:
    """A reference that says the same of a token sequence however it is laid out."""

    shares_prefixes = True

    def forward(self, batch: Batch, outputs) -> dict[str, Tensor]:
        values = -5.0 - (batch.tokens * 7 + batch.position_ids * 3) % 11 / 10
        return dict.fromkeys(outputs, torch.where(batch.loss_mask, values, 0))


def prepared(method: Method, backend: LocalBackend, *, share_prefixes: bool) -> Batch:
    batch = collate(units_for(method), share_prefixes=share_prefixes)
    running = {"reward_mean": [3, 0.25]}
    batch = annotated(batch, method, {"policy": backend, "reference": Frozen()}, running)
    return batch.weighed(weight_keys(method.terms))


def with_score(model, method: Method):
    if method.scores:
        torch.manual_seed(5)
        model.score = nn.Linear(model.config.hidden_size, 1, bias=False)
    return model


def gradient(model) -> Tensor:
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])


def assert_same(ours: Tensor, theirs: Tensor, tolerance: float = 2e-5) -> None:
    assert theirs.norm() > 0
    assert (ours - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_those_of_the_models_own_forward(case, model, backend_of):
    method = method_named(case)
    backend = backend_of(with_score(model, method), micro_batch_size=1)
    batch = prepared(method, backend, share_prefixes=True)
    loss = backend.forward_backward(batch, method.terms)["loss"]
    ours = gradient(model)
    model.zero_grad(set_to_none=True)
    out = own_outputs(model, batch, frozenset().union(*(term.outputs for term in method.terms)))
    parts = [
        term.coef * (term.loss(out, batch, **term.options)[0] * batch[f"weights/{term.weight_key}"]).sum()
        for term in method.terms
    ]
    expected = torch.stack(parts).sum()
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    assert_same(ours, gradient(model))


def own_outputs(model, batch: Batch, names: frozenset[str]) -> dict[str, Tensor]:
    """Outputs by the model's own forward, one row at a time, with gradient."""
    rows = []
    for start, end in pairwise(batch.cu_seqlens.tolist()):
        tokens = batch.tokens[start:end]
        states = model(input_ids=tokens[None], use_cache=False, output_hidden_states=True)
        logp = states.logits[0, :-1].float().log_softmax(-1)
        chosen = logp.gather(1, tokens[1:, None])[:, 0]
        squares = (2 * logp).logsumexp(-1).detach()
        score = model.score(states.hidden_states[-1][0, -1:])[0] if "scores" in names else torch.zeros(1)
        rows.append((torch.cat([logp.new_zeros(1), chosen]), torch.cat([logp.new_zeros(1), squares]), score))
    logprobs, squares, scores = (torch.cat(part) for part in zip(*rows, strict=True))
    out = {"logprobs": logprobs, "log_sum_sq_probs": squares}
    masked = {name: torch.where(batch.loss_mask, values, 0) for name, values in out.items()}
    return {**masked, "scores": scores}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_do_not_depend_on_layout_or_micro_batches(case, layout, tiny_qwen, backend_of):
    method = method_named(case)
    results = []
    for attention, sharing, limits in (("tree", True, {}), (layout, layout == "tree", {"micro_batch_size": 2})):
        model = with_score(AutoModelForCausalLM.from_pretrained(tiny_qwen), method)
        backend = backend_of(model, attention=attention, **limits)
        batch = prepared(method, backend, share_prefixes=sharing)
        metrics = backend.forward_backward(batch, method.terms)
        results.append((metrics, gradient(model)))
    (whole, expected), (cut, found) = results
    assert cut == pytest.approx(whole, rel=1e-4, abs=1e-5)
    assert_same(found, expected)


@pytest.mark.parametrize("case", ["dpo sigmoid", "cpo", "kto"])
def test_a_pair_shares_its_prompt_in_the_tree(case, tiny_qwen, backend_of):
    method = method_named(case)
    shared, flat = (collate(units_for(method), share_prefixes=sharing) for sharing in (True, False))
    saved = sum(t.num_tokens for t in flat.trees) - sum(t.num_tokens for t in shared.trees)
    # The other prompts are too short for a segment of their own to pay (tree.MIN_SAVED_TOKENS).
    assert saved == (0 if method.task == "unpaired" else 30)
