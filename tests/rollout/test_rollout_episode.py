"""An episode is played in tokens, turn by turn, and ends with the status it deserves."""

from __future__ import annotations

import asyncio
import sys
import threading
import time

import pytest

from whet.engines.protocol import Engine
from whet.envs.single import SingleTurn
from whet.errors import EngineError
from whet.rollout.episode import Play, response_decoder
from whet.rollout.protocols import Observation, Turn
from whet.types import Completion, Episode, Sampling, VersionSpan


class Dialogue:
    """Answers `said` for as long as there is something left to say."""

    def __init__(self, tokenizer, *said: str, greeting: str = "") -> None:
        self.turns = [tokenizer.encode(text, add_special_tokens=False) for text in said]
        self.greeting = tokenizer.encode(greeting, add_special_tokens=False)
        self.seen: list[Completion] = []

    async def reset(self) -> Observation:
        return Observation(self.greeting)

    async def step(self, completion: Completion) -> Turn:
        self.seen.append(completion)
        return Turn(done=False, observation=Observation(self.turns.pop(0))) if self.turns else Turn(done=True)


async def play(engine: Engine, env, prompt, tokenizer, *, timeout_s: float = 5.0, **sampling) -> Episode:
    episode = Episode(prompt, "g0", 1)
    decode = response_decoder(tokenizer)
    return await Play(episode, env).run(engine, Sampling(**sampling), seed=3, decode=decode, timeout_s=timeout_s)


async def test_one_turn_holds_prompt_and_completion(scripted, make_prompt, tokenizer):
    prompt = make_prompt("2+2=")
    episode = await play(scripted(lambda *_: "4"), SingleTurn(prompt, tokenizer), prompt, tokenizer)
    assert episode.status == "completed"
    assert episode.response == "4"
    assert episode.tokens == [*b"2+2=", *b"4", tokenizer.eos_token_id]
    assert episode.loss_mask == [False] * 4 + [True] * 2
    assert episode.sampler_logprobs == [0.0] * 4 + [-0.1, -0.2]
    assert episode.versions == [VersionSpan(0, 4, 6)]


async def test_turns_append_tokens_and_never_change_what_stands(scripted, make_prompt, tokenizer):
    prompt = make_prompt("Q:")
    engine = scripted(lambda tokens, _: "first" if len(tokens) < 5 else "second")
    env = Dialogue(tokenizer, "<tool>", greeting="hi")
    episode = await play(engine, env, prompt, tokenizer)
    eos = [tokenizer.eos_token_id]
    assert episode.tokens == [*b"Q:", *b"hi", *b"first", *eos, *b"<tool>", *b"second", *eos]
    assert episode.loss_mask == [False] * 4 + [True] * 6 + [False] * 6 + [True] * 7
    assert [logprob for logprob, mask in zip(episode.sampler_logprobs, episode.loss_mask, strict=True) if not mask] == (
        [0.0] * 10
    )
    assert episode.versions == [VersionSpan(0, 4, 10), VersionSpan(0, 16, 23)]
    # What the engine is given is the beginning of the episode, token for token.
    assert [call[0] for call in engine.calls] == [episode.tokens[:4], episode.tokens[:16]]
    assert episode.response == f"hifirst{tokenizer.eos_token}<tool>second"


async def test_each_turn_has_a_seed_of_its_own_and_the_groups_key(scripted, make_prompt, tokenizer):
    engine = scripted(lambda *_: "x")
    await play(engine, Dialogue(tokenizer, "a", "b"), make_prompt("Q:"), tokenizer)
    await play(engine, Dialogue(tokenizer, "a", "b"), make_prompt("Q:"), tokenizer)
    seeds = [sampling.seed for _, sampling, _ in engine.calls]
    assert seeds[:3] == seeds[3:] and len(set(seeds)) == 3
    assert {key for _, _, key in engine.calls} == {"g0"}


async def test_the_tokens_of_all_turns_share_one_limit(scripted, make_prompt, tokenizer):
    engine = scripted(lambda *_: "abc")
    env = Dialogue(tokenizer, "1", "2", "3")
    episode = await play(engine, env, make_prompt("Q:"), tokenizer, max_tokens=10)
    # 4 tokens (abc and the end) twice, then 2 of the third turn.
    assert [sampling.max_tokens for _, sampling, _ in engine.calls] == [10, 6, 2]
    assert (episode.num_sampled, episode.status) == (10, "truncated")
    # A completion that was cut off is not shown to the environment.
    assert [len(completion.tokens) for completion in env.seen] == [4, 4]


async def test_an_environment_that_never_ends_is_cut_off(scripted, make_prompt, tokenizer):
    class Endless(SingleTurn):
        async def step(self, completion: Completion) -> Turn:
            return Turn(done=False)

    prompt = make_prompt("Q:")
    episode = await play(scripted(lambda *_: "a"), Endless(prompt, tokenizer), prompt, tokenizer, max_tokens=8)
    assert (episode.num_sampled, episode.status) == (8, "truncated")


async def test_a_cut_off_completion_is_truncated(scripted, make_prompt, tokenizer):
    prompt = make_prompt("Q:")
    engine = scripted(lambda *_: "a long story")
    episode = await play(engine, SingleTurn(prompt, tokenizer), prompt, tokenizer, max_tokens=6)
    assert (episode.status, episode.response) == ("truncated", "a long")


async def test_an_aborted_completion_keeps_what_it_has(scripted, make_prompt, tokenizer):
    prompt = make_prompt("Q:")
    engine = scripted(lambda *_: Completion([97, 98], [-1.0, -2.0], "abort"))
    episode = await play(engine, SingleTurn(prompt, tokenizer), prompt, tokenizer)
    assert (episode.status, episode.response, episode.num_sampled) == ("aborted", "ab", 2)
    empty = await play(
        scripted(lambda *_: Completion([], [], "abort")), SingleTurn(prompt, tokenizer), prompt, tokenizer
    )
    assert (empty.status, empty.response) == ("aborted", "")


async def test_an_environment_that_raises_fails_its_episode(scripted, make_prompt, tokenizer):
    class Broken(SingleTurn):
        async def step(self, completion: Completion) -> Turn:
            raise KeyError("browser")

    prompt = make_prompt("Q:")
    episode = await play(scripted(lambda *_: "x"), Broken(prompt, tokenizer), prompt, tokenizer)
    assert episode.status == "failed"
    assert episode.error == "environment Broken.step raised KeyError: 'browser'"
    assert episode.response == "x"


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (lambda: None, "environment Odd.step returned None, expected Turn"),
        (lambda: Turn(False, Observation("ab")), "environment Odd.step observed 'ab', expected token ids"),
        (lambda: Turn(False, Observation([-1])), "environment Odd.step observed [-1], expected token ids"),
        (lambda: next(iter(())), "environment Odd.step raised RuntimeError: StopIteration"),
        (sys.exit, "environment Odd.step raised RuntimeError: SystemExit"),
    ],
    ids=["nothing", "text", "negative", "stop", "exit"],
)
async def test_an_environment_that_answers_what_is_none_fails_its_episode(
    answer, told, scripted, make_prompt, tokenizer
):
    class Odd:
        def reset(self) -> Observation:
            return Observation()

        def step(self, completion: Completion) -> Turn:
            return answer()

    episode = await play(scripted(lambda *_: "x"), Odd(), make_prompt("Q:"), tokenizer, max_tokens=4)
    assert episode.status == "failed" and told in (episode.error or "")


async def test_an_observation_beyond_the_positions_of_the_model_is_not_kept(scripted, make_prompt, tokenizer):
    engine = scripted(lambda *_: "x")
    engine.max_length = 20
    episode = await play(engine, Dialogue(tokenizer, "a" * 100), make_prompt("Q:"), tokenizer, max_tokens=9)
    assert episode.status == "truncated" and episode.tokens == [*b"Q:", *b"x", tokenizer.eos_token_id]


async def test_one_stop_text_of_an_environment_is_not_taken_letter_by_letter(scripted, make_prompt, tokenizer):
    class Stopping(SingleTurn):
        stop = "</search>"

    prompt, engine = make_prompt("Q:"), scripted(lambda *_: "x")
    await play(engine, Stopping(prompt, tokenizer), prompt, tokenizer)
    assert engine.calls[0][1].stop == ("</search>",)


async def test_an_environment_that_does_not_answer_fails_its_episode(scripted, make_prompt, tokenizer):
    class Asleep(SingleTurn):
        async def reset(self) -> Observation:
            await asyncio.sleep(60)
            return Observation()

    prompt = make_prompt("Q:")
    episode = await play(scripted(lambda *_: "x"), Asleep(prompt, tokenizer), prompt, tokenizer, timeout_s=0.05)
    assert (episode.status, episode.error) == ("failed", "environment Asleep.reset did not answer within 0.05 s")


async def test_an_engine_that_does_not_answer_is_an_error_that_says_what_was_waited_for(make_prompt, tokenizer):
    class Silent:
        async def generate(self, tokens, sampling, *, prefix_key=None) -> Completion:
            await asyncio.sleep(60)
            raise AssertionError("unreachable")

    prompt = make_prompt("Q:")
    with pytest.raises(
        EngineError, match=r"g0/1 \(prompt p0, 2 tokens so far, .* within 0.05 s; raise engine.timeout_s"
    ):
        await play(Silent(), SingleTurn(prompt, tokenizer), prompt, tokenizer, timeout_s=0.05)


@pytest.mark.parametrize(
    ("completion", "told"),
    [
        (Completion([1, 2], [-0.1], "stop"), "2 tokens but 1 logprobs"),
        (Completion([], [], "stop"), "no token and finish reason 'stop'"),
    ],
)
async def test_an_engine_that_breaks_its_promises_is_an_error(completion, told, scripted, make_prompt, tokenizer):
    prompt = make_prompt("Q:")
    with pytest.raises(EngineError, match=told):
        await play(scripted(lambda *_: completion), SingleTurn(prompt, tokenizer), prompt, tokenizer)


def test_only_special_tokens_at_the_end_are_left_out_of_the_text(tokenizer):
    decode = response_decoder(tokenizer, stop_token_ids=[ord("!")])
    start, end = tokenizer.encode("<|im_start|>")[0], tokenizer.eos_token_id
    assert decode([start, *b"a , b", end, end]) == "<|im_start|>a , b"
    assert decode([*b"a!b!", end]) == "a!b"
    assert decode([end]) == decode([]) == ""


# --- what an environment may have besides ---------------------------------------------------------------


class Recorded(SingleTurn):
    """Notes what is called, and counts."""

    stop = ("</a>",)

    def __init__(self) -> None:
        self.called: list[str] = []

    async def step(self, completion: Completion) -> Turn:
        self.called.append("step")
        return Turn(done=True)

    def info(self) -> dict[str, float]:
        return {"num_turns": self.called.count("step")}

    async def close(self) -> None:
        self.called.append("close")


async def test_stop_texts_of_an_environment_are_added_to_those_of_the_run(scripted, make_prompt, tokenizer):
    engine = scripted(lambda *_: "x")
    await play(engine, Recorded(), make_prompt("Q:"), tokenizer, stop=("###", "</a>"))
    assert engine.calls[0][1].stop == ("###", "</a>")


async def test_what_an_environment_counts_is_kept_and_it_is_closed(scripted, make_prompt, tokenizer):
    env = Recorded()
    episode = await play(scripted(lambda *_: "x"), env, make_prompt("Q:"), tokenizer)
    assert episode.info == {"num_turns": 1.0}
    assert env.called == ["step", "close"]


async def test_an_environment_is_closed_where_it_was_not_asked(scripted, make_prompt, tokenizer):
    env = Recorded()
    await play(scripted(lambda *_: Completion([97], [-1.0], "length")), env, make_prompt("Q:"), tokenizer)
    assert env.called == ["close"]


async def test_an_environment_is_closed_when_its_episode_is_cancelled(scripted, make_prompt, tokenizer):
    class Asleep(Recorded):
        async def step(self, completion: Completion) -> Turn:
            self.called.append("step")
            await asyncio.sleep(60)
            return Turn(done=True)

    env = Asleep()
    playing = asyncio.create_task(play(scripted(lambda *_: "x"), env, make_prompt("Q:"), tokenizer))
    while not env.called:
        await asyncio.sleep(0)
    playing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await playing
    assert env.called == ["step", "close"]


async def test_an_environment_that_cannot_close_costs_nothing_but_a_warning(scripted, make_prompt, tokenizer, caplog):
    class Jammed(Recorded):
        async def close(self) -> None:
            raise OSError("the door is stuck")

    episode = await play(scripted(lambda *_: "x"), Jammed(), make_prompt("Q:"), tokenizer)
    assert episode.status == "completed"
    assert "Jammed.close raised OSError: the door is stuck" in caplog.text


@pytest.mark.parametrize("counted", [{"n": float("nan")}, {"n": "many"}, None])
async def test_what_is_no_count_fails_the_episode(counted, scripted, make_prompt, tokenizer):
    class Vague(Recorded):
        def info(self):
            return counted

    episode = await play(scripted(lambda *_: "x"), Vague(), make_prompt("Q:"), tokenizer)
    assert episode.status == "failed" and "Vague.info" in (episode.error or "")


async def test_plain_methods_run_in_threads_and_do_not_hold_up_the_others(scripted, make_prompt, tokenizer):
    class Slow:
        def reset(self) -> Observation:
            time.sleep(0.2)
            return Observation(tokenizer.encode("hi", add_special_tokens=False))

        def step(self, completion: Completion) -> Turn:
            time.sleep(0.2)
            return Turn(done=True)

    start = time.monotonic()
    many = [play(scripted(lambda *_: "x"), Slow(), make_prompt("Q:"), tokenizer) for _ in range(8)]
    episodes = await asyncio.gather(*many)
    assert [episode.response for episode in episodes] == ["hix"] * 8
    assert time.monotonic() - start < 1.6  # one after the other they take 3.2 s


async def test_a_plain_method_that_hangs_fails_its_episode(scripted, make_prompt, tokenizer):
    class Stuck(SingleTurn):
        def step(self, completion: Completion) -> Turn:
            threading.Event().wait(2)
            return Turn(done=True)

    prompt = make_prompt("Q:")
    episode = await play(scripted(lambda *_: "x"), Stuck(prompt, tokenizer), prompt, tokenizer, timeout_s=0.05)
    assert episode.error == "environment Stuck.step did not answer within 0.05 s"


async def test_an_episode_ends_where_the_model_has_no_more_positions(scripted, make_prompt, tokenizer):
    engine = scripted(lambda *_: "word")
    engine.max_length = 13
    env = Dialogue(tokenizer, "<tool>", "<tool>", "<tool>")
    episode = await play(engine, env, make_prompt("Q:"), tokenizer, max_tokens=100)
    assert episode.status == "truncated" and len(episode.tokens) == 13
    assert [sampling.max_tokens for _, sampling, _ in engine.calls] == [11], "then there was no room"


async def test_an_episode_that_was_aborted_goes_on_where_it_stopped(scripted, make_prompt, tokenizer):
    parts = [
        Completion([97, 98], [-1.0, -2.0], "abort", (VersionSpan(0, 0, 2),)),
        Completion([99], [-3.0], "stop", (VersionSpan(1, 0, 1),)),
    ]
    engine = scripted(lambda *_: parts.pop(0))
    env = Dialogue(tokenizer)
    played = Play(Episode(make_prompt("Q:"), "g0", 1), env)
    run = {"seed": 3, "decode": response_decoder(tokenizer), "timeout_s": 5.0}
    assert (await played.run(engine, Sampling(max_tokens=8), **run)).status == "aborted"
    assert env.seen == [] and not played.closed
    episode = await played.run(engine, Sampling(max_tokens=8), **run)
    assert episode.status == "completed" and played.closed
    (seen,) = env.seen
    assert seen == Completion([97, 98, 99], [-1.0, -2.0, -3.0], "stop", (VersionSpan(0, 0, 2), VersionSpan(1, 2, 3)))
    asked = [(tokens, sampling.max_tokens) for tokens, sampling, _ in engine.calls]
    assert asked == [([*b"Q:"], 8), ([*b"Q:ab"], 6)]
    assert engine.calls[0][1].seed != engine.calls[1][1].seed, "the draws of the first part are not repeated"


@pytest.mark.parametrize(("greeting", "goes_on"), [("hi", True), ("ho", False)])
async def test_an_episode_of_an_earlier_process_goes_on_if_its_environment_begins_alike(
    greeting: str, goes_on: bool, scripted, make_prompt, tokenizer
):
    engine = scripted(lambda *_: "x")
    episode = Episode(make_prompt("Q:"), "g0", 1)
    episode.inject([*b"hi"])
    episode.extend(Completion([97], [-1.0], "abort", (VersionSpan(0, 0, 1),)))
    played = Play(episode, Dialogue(tokenizer, greeting=greeting))
    await played.run(engine, Sampling(max_tokens=8), seed=3, decode=response_decoder(tokenizer), timeout_s=5.0)
    begin = [*b"Q:", *greeting.encode(), *([97] if goes_on else [])]
    assert episode.tokens == [*begin, ord("x"), tokenizer.eos_token_id]
    assert [span.start for span in episode.versions] == ([4, 5] if goes_on else [4])


async def test_what_an_environment_says_beyond_the_words_of_the_model_costs_its_episode(
    scripted, make_prompt, tokenizer
):
    engine = scripted(lambda *_: "x")

    def validate(tokens, sampling):
        if max(tokens) > 300:
            raise EngineError("the prompt holds token 999")

    engine.validate = validate
    env = Dialogue(tokenizer, "<tool>")
    env.turns = [[999]]
    episode = await play(engine, env, make_prompt("Q:"), tokenizer, max_tokens=30)
    assert episode.status == "failed" and "after environment Dialogue" in (episode.error or "")
