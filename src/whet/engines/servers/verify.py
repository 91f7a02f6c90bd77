"""Whether a server computes what the trainer computes: the only proof that weights have arrived."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from whet.engines.servers.request import Request
from whet.engines.servers.server import Server
from whet.errors import EngineError
from whet.types import Sampling
from whet.weights.bits import Sums, differing, of_engine
from whet.weights.stamp import Stamp, stamp

Expected = Callable[[Sequence[int], int], Sequence[float]]
"""`expected(tokens, n)`: the trainer's own logprobs, at temperature 1, of the last `n` of the tokens."""
PROBE_TOKENS = 16
LIMITS = {"float32": (2e-3, 1e-3), "other": (0.6, 0.1)}
"""Largest and mean difference of logprobs that arithmetic explains (engine and trainer agree to 1e-6 in float32, and
to 1e-2 in bfloat16)."""
NAMED = 3
"""Groups of weights that an error names."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What a server answers to a prompt of no meaning, greedily."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


def probe_prompt(vocabulary: int) -> tuple[int, ...]:
    """Tokens from everywhere in the vocabulary."""
    return tuple((7919 * place + 13) % vocabulary for place in range(8))


async def ask(server: Server, prompt: Sequence[int]) -> Probe:
    """Let a server sample the probe. Raises EngineError."""
    request = Request(tuple(prompt), Sampling(max_tokens=PROBE_TOKENS, temperature=0.0, ignore_eos=True), None)
    await server.sample(request, frozenset())
    return Probe(tuple(request.output), tuple(request.logprobs))


def differences(probe: Probe, prompt: Sequence[int], expected: Expected) -> tuple[float, float]:
    """Largest and mean difference between the server's logprobs and the trainer's."""
    theirs = expected((*prompt, *probe.tokens), len(probe.tokens))
    apart = [abs(a - b) for a, b in zip(probe.logprobs, theirs, strict=True)]
    return max(apart), sum(apart) / len(apart)


def judge(
    server: Server,
    probe: Probe,
    apart: tuple[float, float],
    before: Probe | None,
    changed: bool,
    precise: bool,
    why: str,
    did: str,
) -> None:
    """Raises EngineError unless the server computes with the weights that it was given.

    `before` is its answer under earlier weights, `changed` whether what was sent since is different, `precise` whether
    both sides compute in float32, `why` what to do, `did` how the server came to its weights.
    """
    largest, mean = LIMITS["float32" if precise else "other"]
    same = changed and before is not None and before == probe
    if apart[0] <= largest and apart[1] <= mean and not (same and apart[0] > largest / 100):
        return
    told = (
        "answers as before, to the last digit, although the weights have changed" if same else "computes something else"
    )
    raise EngineError(
        f"{server.name} has {did} without an error and {told}: logprobs of {len(probe.tokens)} tokens "
        f"differ from the trainer's by up to {apart[0]:.4g} (mean {apart[1]:.4g}, expected at most "
        f" {largest:g}). It samples from another policy than the one that is trained; {why}"
    )


def why_unlike(folder: str, read: Stamp, remedy: str) -> str:
    """Why a server that read a folder by itself computes something else than the trainer, for which the files were as
    `read` tells."""
    if read and stamp(folder) != read:
        return f"the files of {folder} have changed since the trainer read them: is another run writing there?"
    return (
        f"see, in this order, whether another run has rewritten {folder}, whether the server computes in another dtype "
        f"than the trainer or quantises (engine.options), and whether it has an extension of its own: {remedy}"
    )


def compare_sums(server: Server, sent: Sums, ranks: list[dict[str, list[int]]], why: str) -> int:
    """How many groups of weights a server holds as they were sent. Raises EngineError where it holds others."""
    differ, compared = differing(sent, of_engine(ranks))
    if differ:
        more = f" and {len(differ) - NAMED} more" if len(differ) > NAMED else ""
        raise EngineError(
            f"{server.name} does not hold the weights that were sent to it: {', '.join(differ[:NAMED])}{more} of "
            f"{compared} groups have another checksum; {why}"
        )
    return compared
