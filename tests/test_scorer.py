"""A reward model scores texts, conversations, answers and tokens as it was trained to, in any company."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from reward_models import make_reward_model
from whet.config.backend import BackendConfig
from whet.config.data import DataConfig
from whet.config.model import ModelConfig
from whet.errors import DataError, ModelError
from whet.scorer import RewardModel

ASKED = [{"role": "user", "content": "2+2?"}]
SAID = [*ASKED, {"role": "assistant", "content": "4"}]


@pytest.fixture(scope="module")
def folder(tiny_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_reward_model(tiny_qwen, tmp_path_factory.mktemp("reward") / "model")


@pytest.fixture(scope="module")
def model(folder: Path) -> RewardModel:
    return RewardModel.load(folder)


def test_scores_are_those_of_transformers_own_classifier(model: RewardModel, folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    peer = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    chat = tokenizer.apply_chat_template(SAID, tokenize=False).removesuffix("\n")  # the end of the turn is scored
    texts = ["2+2=4" + tokenizer.eos_token, "2+2=5" + tokenizer.eos_token, chat]
    ids = [tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"] for text in texts]
    with torch.no_grad():
        expected = [float(peer(input_ids=one).logits[0, 0]) for one in ids]
    assert model.score([("2+2=", "4"), ("2+2=", "5"), SAID]) == pytest.approx(expected, abs=1e-5)


def test_each_kind_of_item_is_the_same_thing_said_otherwise(model: RewardModel):
    assert model.score([("2+2=", "4")]) == pytest.approx(model.score(["2+2=4"]), abs=1e-6)
    assert model.score([(ASKED, "4")]) == model.score([SAID])
    assert model.score([list(model.tokens(SAID))]) == model.score([SAID])
    assert model.score([]) == []


def test_the_score_is_read_where_the_answer_ends(model: RewardModel):
    tokens, tokenizer = model.tokens(SAID), model.tokenizer
    assert tokenizer.decode(tokens).endswith("4<|im_end|>")  # not the line break that the template writes behind it
    assert model.tokens("hello")[-1] == tokenizer.eos_token_id


def test_scores_do_not_depend_on_the_company_or_the_order(model: RewardModel):
    items = [("2+2=", str(i)) for i in range(6)] + [SAID, "hello", ("what?", "that"), ("2+2=", "9" * 30)]
    alone = [model.score([item])[0] for item in items]
    assert model.score(items) == pytest.approx(alone, abs=1e-5)
    assert model.score(items[::-1]) == pytest.approx(alone[::-1], abs=1e-5)


def test_answers_to_one_prompt_share_its_computation(model: RewardModel, monkeypatch):
    seen = []
    original = model.backend.forward
    monkeypatch.setattr(model.backend, "forward", lambda batch, outputs: seen.append(batch) or original(batch, outputs))
    model.score([("a long question " * 10, "yes"), ("another", "no"), ("a long question " * 10, "no")])
    (batch,) = seen
    assert batch.num_units == 2 and batch.tree.num_tokens < batch.num_tokens - 150


def test_a_group_too_large_for_one_pass_is_cut(folder: Path, model: RewardModel):
    small = RewardModel.load(folder, backend=BackendConfig(max_tokens_per_device=64))
    items = [("2+2=", str(i)) for i in range(30)]
    assert small.score(items) == pytest.approx(model.score(items), abs=1e-5)


def test_its_own_way_of_putting_prompts_in_words_is_used(folder: Path, model: RewardModel):
    chatty = RewardModel.load(folder, data=DataConfig(chat="always"))
    assert chatty.tokens(("2+2?", "4")) == model.tokens(SAID)
    framed = RewardModel.load(folder, data=DataConfig(prompt_template="Q: {prompt} A: "))
    assert framed.tokens(("2+2?", "4")) == model.tokens("Q: 2+2? A: 4")


def test_an_adapter_is_a_reward_model_too(tiny_qwen: Path, tmp_path: Path):
    adapter = make_reward_model(tiny_qwen, tmp_path / "adapter", adapter=True)
    whole = make_reward_model(tiny_qwen, tmp_path / "whole")
    scores = RewardModel.load(adapter).score(["a", "b"])
    assert scores == pytest.approx(RewardModel.load(whole).score(["a", "b"]), abs=1e-5)  # the same head is drawn


def test_a_language_model_is_not_given_a_random_head(tiny_qwen: Path):
    with pytest.raises(ModelError, match=r"has no score head.*whet reward"):
        RewardModel.load(ModelConfig(path=str(tiny_qwen)))


@pytest.mark.parametrize("item", [[], ("a", 3), ASKED, 7, ("a", "b", "c")])
def test_what_cannot_be_scored_is_refused(model: RewardModel, item):
    with pytest.raises(DataError, match="cannot score"):
        model.score([item])


def test_what_is_longer_than_the_positions_is_refused(model: RewardModel):
    with pytest.raises(DataError, match="4,096 positions"):
        model.score(["a" * 5000])
