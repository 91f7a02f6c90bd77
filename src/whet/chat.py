"""A talk with a model on the terminal."""

from __future__ import annotations

import argparse
import asyncio

from whet.answer import answers
from whet.config.run import RunConfig
from whet.errors import ModelError
from whet.models.load import check_model_folder, load_tokenizer
from whet.recipe import method_of
from whet.roles import load_policy
from whet.types import Message, Sampling


def talk(options: argparse.Namespace) -> None:
    """Read a line, print the answer, until an empty line or the end of input.

    With `options.plain` each line is completed on its own; otherwise the conversation goes on.
    Raises ModelError for a model that cannot be loaded or has no chat template.
    """
    config = RunConfig.model_validate({"model": {"path": options.model}})
    check_model_folder(config.model)
    tokenizer = load_tokenizer(config.model)
    if not options.plain and not tokenizer.chat_template:
        raise ModelError(f"{options.model} has no chat template, so it cannot talk; use --plain to complete text")
    policy = load_policy(config, method_of(config), tokenizer, train=False)
    messages: list[Message] = [{"role": "system", "content": options.system}] if options.system else []
    seed = options.seed
    while line := _read_line():
        sampling = Sampling(options.max_tokens, options.temperature, options.top_p, seed=seed)
        seed += 1
        if options.plain:
            print(asyncio.run(answers(policy, [line], sampling))[0])
            continue
        messages.append({"role": "user", "content": line})
        answer = asyncio.run(answers(policy, [messages], sampling))[0]
        messages.append({"role": "assistant", "content": answer})
        print(answer)


def _read_line() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""
