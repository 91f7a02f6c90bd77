"""Whole runs of the offline methods: they learn, their metrics have the expected names, and they go on from a kill."""

from __future__ import annotations

import asyncio
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from runs import column, config_of, killed, metrics, same_bits, saved_weights, train, without_clock, write_rows
from whet.batch import collate
from whet.compose import compose, evaluate
from whet.errors import ConfigError, DataError, ModelError
from whet.models.tiny import make_tiny

PAIRED = ("dpo", "apo", "simpo", "cpo", "cpo-simpo", "orpo")
UNPAIRED = ("kto", "bco")
DISTILLS = ("gkd", "distill")
ALL = (*PAIRED, *UNPAIRED, "reward", *DISTILLS)
PREFERENCE = {"rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"}
NAMES = {
    **{method: PREFERENCE | {"rewards/margins", "rewards/accuracies"} for method in PAIRED},
    **dict.fromkeys(UNPAIRED, PREFERENCE),
    "reward": {"accuracy", "margin", "min_reward", "mean_reward", "max_reward"},
    **{method: {"mean_token_accuracy"} for method in DISTILLS},
}
MODES = {
    "full": {},
    "lora": {"model__adapter": {"rank": 4}},
    "qlora": {"model__adapter": {"rank": 4}, "model__quantization": {}},
}


def pairs() -> list[dict]:
    """Right sums against wrong ones, in words that a model can tell apart."""
    draw = random.Random(0)
    rows = []
    for a in range(1, 9):
        for b in range(1, 9):
            wrong = a + b + draw.choice([1, 2, 3])
            rows.append({"prompt": f"{a}+{b}=", "chosen": f"{a + b} yes", "rejected": f"{wrong} no"})
    return rows


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("rows")
    rows = pairs()
    labelled = [
        {"prompt": r["prompt"], "completion": r[k], "label": k == "chosen"} for r in rows for k in r if k[0] in "cr"
    ]
    return {
        "preference": write_rows(folder / "pairs.jsonl", rows),
        "unpaired": write_rows(folder / "labelled.jsonl", labelled),
        "sft": write_rows(folder / "sft.jsonl", [{"prompt": r["prompt"], "response": r["chosen"]} for r in rows]),
        "teacher": str(make_tiny(folder / "teacher", hidden_size=96, seed=3)),
    }


@pytest.fixture
def config(tmp_path, tiny_qwen, files):
    def make(method: str, name: str = "out", mode: str = "full", **settings):
        data = "unpaired" if method in UNPAIRED else "sft" if method in DISTILLS else "preference"
        given = {
            "model__path": str(tiny_qwen),
            "data__train": files[data],
            "train__steps": 12,
            "train__batch_size": 32,
            "optim__lr": 5e-3 if mode == "full" else 2e-2,
            "backend__threads": 1,
            "data__cache_dir": str(tmp_path / "cache"),
            **({"distill__teacher": files["teacher"]} if method in DISTILLS else {}),
            **({"rollout__max_tokens": 6} if method == "gkd" else {}),
            **MODES[mode],
        }
        return config_of(method, tmp_path / name, **(given | settings))

    return make


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", ALL)
def test_every_method_learns_in_every_mode(method, mode, config, tmp_path):
    settings = {"distill__lmbda": 0.0} if method == "gkd" else {}
    train(config(method, mode=mode, **settings))
    lines = metrics(tmp_path / "out", "loss")
    assert NAMES[method] <= lines[0].keys()
    first, last = (sum(line["loss"] for line in part) / 2 for part in (lines[:2], lines[-2:]))
    assert last < first
    if method in PAIRED:
        accuracies = column(tmp_path / "out", "rewards/accuracies")
        assert sum(accuracies[-2:]) > sum(accuracies[:2])
        assert lines[-1]["rewards/margins"] > lines[0]["rewards/margins"]
    elif method in UNPAIRED:
        gaps = [line["rewards/chosen"] - line["rewards/rejected"] for line in lines]
        assert gaps[-1] > gaps[0]
    elif method == "reward":
        assert lines[-1]["accuracy"] > 0.8
        assert lines[-1]["min_reward"] < lines[-1]["mean_reward"] < lines[-1]["max_reward"]


@pytest.mark.parametrize("method", ["dpo", "kto", "apo", "bco"])
def test_before_training_the_policy_is_its_reference(method, config, tmp_path):
    for mode in MODES:
        train(config(method, mode, mode=mode, train__steps=1))
        first = metrics(tmp_path / mode, "loss")[0]
        assert first["rewards/chosen"] == pytest.approx(0.0, abs=1e-6)
        assert first["rewards/rejected"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("method", "mode", "settings"),
    [
        ("dpo", "full", {}),
        ("dpo", "lora", {"model__adapter": {"rank": 4, "dropout": 0.1}}),
        ("dpo", "qlora", {"reference__precompute": True}),
        ("dpo", "full", {"reference__sync_steps": 2}),
        ("dpo", "full", {"loss__use": "bco_pair"}),
        ("kto", "lora", {}),
        ("bco", "full", {}),
        ("reward", "full", {}),
        ("reward", "lora", {}),
        ("gkd", "full", {"distill__lmbda": 0.5, "distill__seq_kd": True}),
        ("distill", "lora", {"distill__top_k": 8}),
    ],
)
def test_a_killed_run_ends_with_the_weights_of_an_undisturbed_one(method, mode, settings, config, tmp_path):
    common = {"train__steps": 6, "checkpoint__every_steps": 2, **settings}
    train(config(method, "whole", mode, **common))
    # The state of the third step's checkpoint is written, but the checkpoint does not yet bear its name.
    assert killed(config(method, "out", mode, **common), "whet.keeper.save_rng", 2, "after") == -9
    train(config(method, "out", mode, **common))
    assert same_bits(saved_weights(tmp_path / "out"), saved_weights(tmp_path / "whole"))
    assert without_clock(metrics(tmp_path / "out")) == without_clock(metrics(tmp_path / "whole"))


@pytest.mark.parametrize("mode", MODES)
def test_references_computed_before_the_first_step_change_nothing(mode, config, tmp_path):
    common = {"train__steps": 4, "eval__at_start": True, "data__eval_share": 0.2}
    train(config("dpo", "online", mode, **common))
    runs = [train(config("dpo", name, mode, reference__precompute=True, **common)) for name in ("once", "again")]
    for name in ("once", "again"):
        ours, theirs = (column(tmp_path / name, "loss"), column(tmp_path / "online", "loss"))
        assert ours == pytest.approx(theirs, rel=1e-5)
        assert column(tmp_path / name, "eval/loss") == pytest.approx(column(tmp_path / "online", "eval/loss"), rel=1e-5)
    assert all("reference" not in run.policy.backends for run in runs)


def test_precomputed_references_are_found_again_and_not_computed(config, monkeypatch):
    train(config("dpo", "first", train__steps=1, reference__precompute=True))
    monkeypatch.setattr("whet.precompute._compute", lambda *_: pytest.fail("computed again"))
    train(config("dpo", "second", train__steps=1, reference__precompute=True, seed=5))


def test_precomputed_references_of_another_model_are_not_taken(config, tmp_path, monkeypatch):
    train(config("dpo", "first", train__steps=1, reference__precompute=True))
    other = str(make_tiny(tmp_path / "other", seed=9))
    monkeypatch.setattr("whet.precompute._compute", lambda *_: (_ for _ in ()).throw(RuntimeError("computed")))
    with pytest.raises(RuntimeError, match="computed"):
        train(config("dpo", "second", train__steps=1, reference__precompute=True, model__path=other))


def test_another_model_can_be_the_reference(config, tmp_path, files):
    other = str(make_tiny(tmp_path / "other", seed=9))
    train(config("dpo", train__steps=1, reference__path=other))
    assert abs(metrics(tmp_path / "out", "loss")[0]["rewards/chosen"]) > 1e-3


def test_a_synchronised_reference_follows_the_policy(config, tmp_path):
    run = train(config("dpo", train__steps=4, reference__sync_steps=4, reference__sync_alpha=1.0))
    pairs_of = zip(
        run.policy.backend.model.parameters(), run.policy.backends["reference"].model.parameters(), strict=True
    )
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs_of)


def test_a_step_on_few_pairs_and_accumulation_is_a_step_on_many(config, tmp_path):
    for name, settings in (("whole", {}), ("cut", {"train__batch_size": 4, "train__accumulation": 8})):
        train(config("dpo", name, train__steps=3, **settings))
    assert column(tmp_path / "cut", "loss") == pytest.approx(column(tmp_path / "whole", "loss"))


def test_mixtures_report_each_part(config, tmp_path):
    terms = [{"use": "sigmoid", "coef": 0.8}, {"use": "bco_pair", "coef": 0.2}, {"use": "nll", "on": "chosen"}]
    train(config("dpo", train__steps=2, terms=terms))
    line = metrics(tmp_path / "out", "loss")[-1]
    parts = 0.8 * line["sigmoid_loss"] + 0.2 * line["bco_pair_loss"] + line["nll_loss"]
    assert line["loss"] == pytest.approx(parts, rel=1e-5)


def test_the_nll_of_cpo_is_the_sft_loss_of_the_chosen_completions(config, tmp_path, files):
    train(config("cpo", "cpo", train__steps=1, data__shuffle=False))
    settings = {"data__train": files["sft"], "train__steps": 1, "train__batch_size": 32, "data__shuffle": False}
    train(config_of("sft", tmp_path / "sft", model__path=config("cpo").model.path, **settings))
    nll = metrics(tmp_path / "cpo", "nll_loss")[0]["nll_loss"]
    assert nll == pytest.approx(metrics(tmp_path / "sft", "loss")[0]["loss"], rel=1e-5)


def test_a_reward_model_loads_in_plain_transformers(config, tmp_path):
    run = train(config("reward"))
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    unit = run.feed.train[0]
    ours = run.policy.backend.forward(collate([unit]), {"scores"})["scores"]
    theirs = [plain(torch.tensor([sample.tokens])).logits[0, 0].item() for sample in unit.samples]
    assert ours.tolist() == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize("method", ["dpo", "kto", "gkd"])
def test_a_trained_model_loads_in_plain_transformers(method, config, tmp_path):
    run = train(config(method, train__steps=2))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = torch.tensor([run.feed.train[0].samples[0].tokens])
    ours = run.policy.backend.model.eval()(tokens, use_cache=False).logits
    assert torch.equal(ours, plain(tokens, use_cache=False).logits)


def test_on_policy_distillation_trains_on_what_the_student_says(config, tmp_path):
    train(config("gkd", distill__lmbda=1.0, train__steps=3))
    lines = metrics(tmp_path / "out", "loss")
    assert [line["rollout/on_policy"] for line in lines] == [1.0] * 3
    assert all(0 < line["rollout/response_length_mean"] <= 6 for line in lines)


def test_a_teacher_of_other_words_is_refused_before_it_is_loaded(config, tmp_path, monkeypatch):
    other = str(make_tiny(tmp_path / "other", tokenizer="bpe", corpus=["1+1=2", "a b c"], vocab_size=300))
    monkeypatch.setattr("whet.roles.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(Exception, match=r"distill.teacher is .* whose tokenizer is another one"):
        compose(config("distill", distill__teacher=other))


def test_a_distilled_student_comes_nearer_to_its_teacher(config, tmp_path):
    for name, settings in (("exact", {}), ("top", {"distill__top_k": 260})):
        train(config("distill", name, **settings))
    exact, top = (column(tmp_path / name, "loss") for name in ("exact", "top"))
    assert top[0] == pytest.approx(exact[0], rel=1e-4)
    assert exact[-1] < 0.5 * exact[0]


def test_losses_over_pairs_need_pairs(config):
    with pytest.raises(ConfigError, match="compares chosen with rejected, but kto has no pairs"):
        compose(config("kto", loss__use="hinge"))


def test_a_full_disk_is_said_before_anything_is_precomputed(config, tmp_path, monkeypatch):
    cfg = config("dpo", "full", reference__precompute=True, data__cache_dir=str(tmp_path / "kept"))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("whet.precompute.os.posix_fallocate", full)
    with pytest.raises(DataError, match=r"ref_logprobs of the rows cannot be kept in .*kept: No space left on device"):
        compose(cfg)
    assert not [path for path in (tmp_path / "kept").iterdir() if not path.name.startswith("preference-")]


def test_a_loss_that_needs_a_teacher_is_refused_where_there_is_none(config):
    with pytest.raises(ConfigError, match="loss 'gkd' learns from a teacher, and dpo has none; set method to gkd"):
        compose(config("dpo", "untaught", loss={"use": "gkd"}))


def test_a_reference_of_another_shape_cannot_follow_the_policy(config, files):
    cfg = config("dpo", "apart", reference__path=files["teacher"], reference__sync_steps=1)
    with pytest.raises(ConfigError, match=r"reference.sync_steps .* whose .* is \(.*96.*\) where the policy's is"):
        compose(cfg)


def test_evaluation_against_itself_is_said(config, files, caplog):
    metrics = asyncio.run(evaluate(config("dpo", "itself", data__eval=files["preference"])))[0]
    assert metrics["eval/rewards/margins"] == 0 and "the model is held against itself" in caplog.text


def test_a_frozen_model_that_no_loss_asks_is_refused(config, files):
    with pytest.raises(ConfigError, match=r"reference is given, but the loss \(simpo\) does not ask the reference"):
        compose(config("dpo", loss__use="simpo", reference__precompute=True))
    with pytest.raises(ConfigError, match=r"distill.teacher is given, but the loss \(sft\) does not ask the teacher"):
        compose(config("distill", loss__use="sft"))


def test_completions_that_the_model_has_no_positions_for_are_refused_before_it_is_loaded(config, monkeypatch):
    monkeypatch.setattr("whet.roles.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(ConfigError, match=r"4,096 positions .*; lower rollout.max_tokens or data.max_length"):
        compose(config("gkd", rollout__max_tokens=5000))


def test_a_missing_teacher_is_reported_under_its_own_name(config, tmp_path):
    with pytest.raises(ModelError, match=r"distill.teacher is .*/nowhere"):
        compose(config("distill", distill__teacher=str(tmp_path / "nowhere"), rollout__max_tokens=256))


def test_an_adapter_is_evaluated_against_its_base_with_the_configuration_it_was_trained_with(config, tmp_path, files):
    held_out = {"data__eval": files["preference"], "train__steps": 4}
    run = train(config("dpo", mode="lora", **held_out))
    again = config("dpo", mode="lora", **held_out, model__path=str(tmp_path / "out"))
    found, _ = asyncio.run(evaluate(again))
    assert found == pytest.approx(run.loop.progress.last_eval, rel=1e-5)
    assert found["eval/rewards/margins"] != 0
