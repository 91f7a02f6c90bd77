"""Answers of a model to prompts and conversations, through the embedded engine."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from whet.data.encode import Encoder
from whet.data.shapes import PromptRow
from whet.data.template import Renderer
from whet.models.parts import base
from whet.roles import Policy
from whet.types import Message, Sampling


async def answers(policy: Policy, prompts: Sequence[str | list[Message]], sampling: Sampling) -> list[str]:
    """One answer per prompt, in order, without the stop token.

    Text is treated as the run's training prompts are (`data.prompt_template`, `data.chat`); messages go
    through the chat template. An answer is cut where the model's positions end. Raises ModelError when a chat
    template is needed and missing, EngineError when a prompt leaves no room for an answer.
    """
    renderer, encoder = Renderer(policy.config.data, policy.tokenizer), Encoder(policy.tokenizer)
    rendered = [renderer.prompt(PromptRow(prompt)) for prompt in prompts]
    engine = policy.engine()
    try:
        completions = await asyncio.gather(
            *(
                engine.generate(encoded.tokens.tolist(), _fitting(sampling, policy, len(encoded.tokens)))
                for encoded in encoder.encode(rendered)
            )
        )
    finally:
        await engine.close()
    stops = {*policy.stop_token_ids, *sampling.stop_token_ids}
    tokens = [[t for t in completion.tokens if t not in stops] for completion in completions]
    return [policy.tokenizer.decode(t, skip_special_tokens=True) for t in tokens]


def _fitting(sampling: Sampling, policy: Policy, num_tokens: int) -> Sampling:
    """The same sampling with no more tokens than the model has positions left after a prompt of `num_tokens`."""
    positions = getattr(base(policy.backend.model).config.get_text_config(), "max_position_embeddings", None)
    room = sampling.max_tokens if positions is None else max(1, positions - num_tokens)
    return replace(sampling, max_tokens=min(sampling.max_tokens, room))
