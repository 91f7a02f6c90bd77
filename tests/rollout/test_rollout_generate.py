"""A function of a user's plays episodes; what it returns is checked, and a rollout of several samples counts once."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from runs import column, config_of, train, write_rows
from whet.batch import collate, weights
from whet.config.base import Plugin
from whet.errors import ConfigError, EngineError
from whet.rollout.episode import response_decoder
from whet.rollout.generate import Generate, GeneratedPlay, build_generate
from whet.rollout.group import Group, GroupPlayer
from whet.rollout.slime_sample import sampling_from, sampling_params
from whet.types import Completion, Episode, Prompt, Sample, Sampling, Unit, VersionSpan

HERE = __name__


# --- what users write -------------------------------------------------------------------------------------


async def twice(episode, engine, sampling, *, tokenizer, joint: str = "+"):
    """Two completions with something between them."""
    for text in (joint, ""):
        episode.extend(await engine.generate(episode.tokens, sampling))
        episode.inject(tokenizer.encode(text, add_special_tokens=False))
    episode.status, episode.info = "completed", {"num_turns": 2.0}
    return episode


async def split(episode, engine, sampling):
    """One rollout as two samples: the first half, and the second after a fresh prompt."""
    parts = []
    for _ in range(2):
        part = Episode(episode.prompt, episode.group, episode.index)
        part.extend(await engine.generate(part.tokens, sampling))
        part.status = "completed"
        parts.append(part)
    return parts


async def slime(args, sample, sampling_params):
    """As its guide writes them: everything about the response is set by hand."""
    tokenizer, prompt_ids = args.tokenizer, list(sample.tokens)
    response_ids, mask, logprobs = [], [], []
    for _ in range(args.turns):
        output = await args.generate(prompt_ids + response_ids, {**sampling_params, "max_new_tokens": 4})
        response_ids += output.tokens
        mask += [1] * len(output.tokens)
        logprobs += output.logprobs
        between = tokenizer.encode("|", add_special_tokens=False)
        response_ids += between
        mask += [0] * len(between)
        logprobs += [-9.0] * len(between)
    sample.tokens = prompt_ids + response_ids
    sample.response_length, sample.loss_mask, sample.rollout_log_probs = len(response_ids), mask, logprobs
    sample.response = tokenizer.decode(response_ids)
    sample.metadata["seen"] = args.rollout_max_response_len
    sample.status = sample.Status.COMPLETED
    return sample


async def slime_split(args, sample, sampling_params):
    import copy

    samples = []
    for reward in (1.0, 0.5):
        part = copy.deepcopy(await slime(args, sample, sampling_params))
        part.reward = reward
        samples.append(part)
        sample.tokens = sample.tokens[:3]
    return samples


async def careless(args, sample, sampling_params, *, how):
    output = await args.generate(sample.tokens, sampling_params)
    sample.tokens = list(sample.tokens) + output.tokens
    sample.response_length, sample.rollout_log_probs = len(output.tokens), list(output.logprobs)
    sample.loss_mask, sample.status = [1] * len(output.tokens), "completed"
    for name, value in how.items():
        setattr(sample, name, value)
    return how.get("whole", sample)


async def wrong(episode, engine, sampling, *, how: str):
    if how == "raises":
        raise KeyError("lost")
    if how == "sleeps":
        await asyncio.sleep(60)
    if how == "text":
        return "done"
    if how == "nothing":
        return []
    if how == "cancels":
        raise asyncio.CancelledError
    if how == "leaves":
        raise SystemExit(3)
    odd = {"reward": "1", "status": "great", "sampler_logprobs": [float("nan")] * len(episode.tokens)}
    if how in odd:
        episode.status = "completed"
        setattr(episode, how, odd[how])
    if how == "double":
        episode.status = "completed"
        return [episode, episode]
    if how == "short":
        episode.tokens.append(1)
        episode.status = "completed"
    return episode  # pending


async def passes_on_abort(episode, engine, sampling):
    completion = await engine.generate(episode.tokens, sampling)
    episode.extend(completion)
    episode.status = "aborted" if completion.finish_reason == "abort" else "completed"
    return [episode, Episode(episode.prompt, "", 0, status="completed")]


def plain(episode, engine, sampling): ...


async def strange(a, b): ...


number = 3


def built(name: str, **options: Any) -> Generate:
    class Settings:
        class rollout:
            max_tokens = 77

    settings: Any = Settings()
    return build_generate(Plugin(use=f"{HERE}:{name}", **options), settings)


async def play(name: str, engine: Any, prompt: Prompt, tokenizer: Any, *, patience: float = 5.0, **options: Any):
    """The play that this function makes of an episode."""
    play = GeneratedPlay(Episode(prompt, "g0", 1), built(name, **options), tokenizer)
    decode = response_decoder(tokenizer)
    await play.run(engine, Sampling(max_tokens=20), seed=3, decode=decode, timeout_s=patience)
    return play


# --- our signature ----------------------------------------------------------------------------------------


async def test_a_function_plays_the_episode_and_each_call_draws_anew(scripted, make_prompt, tokenizer):
    engine = scripted(lambda *_: "ab")
    episode = (await play("twice", engine, make_prompt("Q:"), tokenizer)).episode
    eos = tokenizer.eos_token
    assert (episode.status, episode.response) == ("completed", f"ab{eos}+ab")
    assert episode.loss_mask == [False] * 2 + [True] * 3 + [False] + [True] * 3
    assert episode.versions == [VersionSpan(0, 2, 5), VersionSpan(0, 6, 9)]
    assert (episode.rollout, episode.info) == (1, {"num_turns": 2.0})
    first, second = (sampling.seed for _, sampling, _ in engine.calls)
    assert first != second and {key for _, _, key in engine.calls} == {"g0"}
    again = scripted(lambda *_: "ab")
    await play("twice", again, make_prompt("Q:"), tokenizer)
    assert [sampling.seed for _, sampling, _ in again.calls] == [first, second]


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("raises", "raised KeyError: 'lost'"),
        ("text", "returned a str, expected an Episode"),
        ("nothing", "returned an empty list"),
        ("short", "returned an episode with 3 tokens, 2 loss_mask, 2 sampler_logprobs"),
        ("pending", "returned an episode that is pending"),
        ("cancels", "raised RuntimeError: CancelledError"),
        ("leaves", "raised RuntimeError: SystemExit 3"),
        ("reward", "with the reward '1', expected a number"),
        ("status", "with status 'great', expected one of completed"),
        ("sampler_logprobs", "a logprob in sampler_logprobs that is not finite"),
        ("double", "returned one episode twice in a list"),
        ("sleeps", "took longer than its timeout_s of 0.05 s"),
    ],
)
async def test_what_goes_wrong_costs_the_episode(how: str, told: str, scripted, make_prompt, tokenizer):
    options = {"how": how, "timeout_s": 0.05 if how == "sleeps" else 60}
    episode = (await play("wrong", scripted(lambda *_: "x"), make_prompt("Q:"), tokenizer, **options)).episode
    assert episode.status == "failed" and told in (episode.error or "")
    assert episode.tokens == [*b"Q:"]


async def test_a_request_that_can_never_be_served_costs_the_episode(scripted, make_prompt, tokenizer):
    engine = scripted(lambda *_: "x")

    def validate(tokens, sampling):
        raise EngineError("together more than the 8 positions of the model")

    engine.validate = validate
    episode = (await play("twice", engine, make_prompt("Q:"), tokenizer)).episode
    assert episode.status == "failed" and "more than the 8 positions" in (episode.error or "")
    assert engine.calls == []


async def test_an_engine_that_fails_or_is_silent_ends_the_run(make_prompt, tokenizer):
    class Failing:
        async def generate(self, *_: Any, **__: Any) -> Completion:
            raise EngineError("the engine is gone")

    class Silent:
        async def generate(self, *_: Any, **__: Any) -> Completion:
            await asyncio.sleep(60)
            raise AssertionError("unreachable")

    with pytest.raises(EngineError, match="gone"):
        await play("twice", Failing(), make_prompt("Q:"), tokenizer)
    with pytest.raises(EngineError, match=r"2 tokens that rollout\.generate asked for .* within 0\.05 s"):
        await play("twice", Silent(), make_prompt("Q:"), tokenizer, patience=0.05)


async def test_an_aborted_rollout_begins_anew(scripted, make_prompt, tokenizer):
    answers = [Completion([97], [-1.0], "abort"), Completion([98], [-1.0], "stop")]
    engine = scripted(lambda *_: answers.pop(0))
    made = await play("passes_on_abort", engine, make_prompt("Q:"), tokenizer)
    assert made.episode.status == "aborted" and made.parts == []
    decode = response_decoder(tokenizer)
    await made.run(engine, Sampling(max_tokens=20), seed=3, decode=decode, timeout_s=5.0)
    assert (made.episode.status, made.episode.response, len(made.parts)) == ("completed", "b", 1)


@pytest.mark.parametrize(
    ("use", "options", "told"),
    [
        ("plain", {}, "expected an async function"),
        ("strange", {}, r"takes \(a, b\)"),
        ("number", {}, "expected an async function"),
        ("nothing", {}, "has no 'nothing'"),
        ("twice", {"joiint": "+"}, "joiint"),
        ("twice", {"tokenizer": "x"}, "tokenizer cannot be set"),
        ("twice", {"timeout_s": 0}, "timeout_s is 0"),
        ("wrong", {}, "how"),
    ],
)
def test_what_is_no_such_function_is_refused(use: str, options: dict, told: str):
    with pytest.raises(ConfigError, match=told):
        built(use, **options)


# --- slime's ----------------------------------------------------------------------------------------------


async def test_a_function_written_for_slime_plays_the_episode(scripted, make_prompt, tokenizer):
    engine = scripted(lambda *_: "ab")
    episode = (await play("slime", engine, make_prompt("Q:"), tokenizer, turns=2)).episode
    eos = tokenizer.eos_token_id
    assert episode.tokens == [*b"Q:", *b"ab", eos, *b"|", *b"ab", eos, *b"|"]
    assert episode.loss_mask == [False] * 2 + ([True] * 3 + [False]) * 2
    # Where nothing was sampled the logprob is 0, whatever was written there.
    assert episode.sampler_logprobs == pytest.approx([0, 0] + [-0.1, -0.2, -0.3, 0] * 2)
    assert (episode.status, episode.prompt.metadata["seen"]) == ("completed", 77)
    assert [sampling.max_tokens for _, sampling, _ in engine.calls] == [4, 4]
    assert episode.versions == [VersionSpan(0, 2, 10)]


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"loss_mask": [1]}, "a sample with 1 loss_mask for a response of 3 tokens"),
        ({"rollout_log_probs": []}, "a sample with 0 rollout_log_probs for a response of 3 tokens"),
        ({"rollout_log_probs": [0.0, float("nan"), 0.0]}, "not finite"),
        ({"response_length": 9}, "a sample of 5 tokens with response_length 9"),
        ({"response_length": 5}, "tokens hold the prompt, then the response"),
        ({"status": "pending"}, "status 'pending'"),
        ({"status": "done"}, "status 'done'"),
        ({"reward": {"a": 1.0}}, "the reward {'a': 1.0}, expected a number"),
        ({"whole": None}, "a NoneType, expected the sample"),
    ],
)
async def test_what_does_not_fit_together_costs_the_episode(how: dict, told: str, scripted, make_prompt, tokenizer):
    episode = (await play("careless", scripted(lambda *_: "ab"), make_prompt("Q:"), tokenizer, how=how)).episode
    assert episode.status == "failed" and told in (episode.error or "")


async def test_without_a_mask_the_whole_response_is_trained(scripted, make_prompt, tokenizer):
    how = {"loss_mask": None}
    episode = (await play("careless", scripted(lambda *_: "ab"), make_prompt("Q:"), tokenizer, how=how)).episode
    assert (episode.status, episode.loss_mask) == ("completed", [False] * 2 + [True] * 3)


def test_sampling_goes_there_and_back():
    sampling = Sampling(9, 0.7, 0.9, 5, ("a", "b"), (3,), True, 11)
    assert sampling_from(sampling_params(sampling), Sampling()) == sampling
    assert sampling_from({}, sampling) == sampling
    bare = sampling_params(Sampling(seed=4))
    assert (bare["top_k"], bare["stop"]) == (-1, None) and sampling_from(bare, sampling) == Sampling(seed=4)
    assert sampling_from({"stop": "x", "stop_token_ids": None}, sampling).stop == ("x",)
    with pytest.raises(ValueError, match="min_p"):
        sampling_from({"min_p": 0.1}, sampling)


# --- a rollout of several samples -------------------------------------------------------------------------


class Fixed:
    """Scores what has no reward with 1."""

    async def score(self, episode: Episode) -> None:
        if episode.reward is None and episode.status == "completed":
            episode.reward = 1.0

    async def score_group(self, episodes: Any) -> None: ...


def player(name: str, engine: Any, tokenizer: Any, **options: Any) -> GroupPlayer:
    scorer: Any = Fixed()
    made: Any = built(name, **options)
    return GroupPlayer(engine, made, scorer, Sampling(max_tokens=20), tokenizer=tokenizer, seed=0, timeout_s=5.0)


async def test_the_parts_of_a_rollout_stand_behind_the_group(scripted, make_prompt, tokenizer):
    made = player("slime_split", scripted(lambda *_: "ab"), tokenizer, turns=1)
    group = made.begin("g0", make_prompt("Q:"), 2)
    ended: list[Episode] = []
    await made.play_group(group, ended.append)
    assert [(one.index, one.rollout, one.reward) for one in group.episodes] == [
        *((0, 0, 1.0), (1, 1, 1.0), (2, 0, 0.5), (3, 1, 0.5)),
    ]
    assert ended == []  # a rollout of several is whole with its group
    await made.play_group(group)
    assert len(group.episodes) == 4
    group.restart()
    assert [(one.index, one.rollout, one.status) for one in group.episodes] == [
        (0, None, "pending"),
        (1, None, "pending"),
    ]


async def test_a_rollout_of_one_is_told_of_when_it_ends(scripted, make_prompt, tokenizer):
    made = player("twice", scripted(lambda *_: "ab"), tokenizer)
    group: Group = made.begin("g0", make_prompt("Q:"), 2)
    ended: list[Episode] = []
    await made.play_group(group, ended.append)
    assert len(ended) == len(group.episodes) == 2


def test_sequences_that_share_a_rollout_count_once():
    def sample(trained: int, rollout: int) -> Sample:
        mask = [False] + [True] * trained
        return Sample([1] * len(mask), mask, reward=1.0, columns={"rollout_ids": rollout})

    # Unit a: rollout 0 of 1 + 3 tokens, rollout 1 of 2 tokens; unit b: another rollout 0, of 4 tokens.
    batch = collate([Unit("a", (sample(1, 0), sample(2, 1), sample(3, 0))), Unit("b", (sample(4, 0),))])
    third = 1 / 3
    expected = [0, third / 4, 0, third / 2, third / 2, 0, *[third / 4] * 3, 0, *[third / 4] * 4]
    assert weights(batch, "sequence").tolist() == pytest.approx(expected)
    assert weights(batch, "row").tolist() == pytest.approx([third / 2, third, third / 2, third])
    assert weights(batch, "fixed_length", max_length=5).unique().tolist() == pytest.approx([0, third / 5])
    # As if the two halves had been one sequence.
    whole = collate([Unit("a", (sample(4, 0), sample(2, 1))), Unit("b", (sample(4, 0),))])
    for kind in ("sequence", "token"):
        assert weights(batch, kind).unique().tolist() == pytest.approx(weights(whole, kind).unique().tolist())


# --- whole runs -------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path, tiny_qwen: Path):
    def make(**settings: Any):
        rows = [{"prompt": f"{a}+1=", "label": str(a + 1)} for a in range(4)]
        base = {
            **{"model__path": str(tiny_qwen), "data__train": write_rows(tmp_path / "rows.jsonl", rows)},
            **{"reward": "random", "train__steps": 2},
            **{"rollout__prompts_per_step": 2, "rollout__group_size": 2, "rollout__max_tokens": 5},
        }
        return config_of("grpo", tmp_path / "out", **{**base, **settings})

    return make


@pytest.mark.parametrize(("name", "options", "each"), [("twice", {}, 1), ("split", {}, 2), ("slime", {"turns": 2}, 1)])
def test_a_run_trains_on_what_a_function_plays(name: str, options: dict, each: int, config, tmp_path: Path):
    run = train(config(rollout__generate={"use": f"{HERE}:{name}", **options}))
    assert run.loop.global_step == 2
    assert column(tmp_path / "out", "rollout/num_episodes") == [4.0 * each] * 2


def test_environment_and_function_do_not_go_together(config):
    with pytest.raises(ConfigError, match=r"rollout\.generate is .*, but env is given"):
        train(config(rollout__generate=f"{HERE}:twice", env="single"))
