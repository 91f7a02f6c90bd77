"""Functions as tools: a Python function with the schema that the policy sees, called under a limit."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers.utils import get_json_schema
from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException

from whet.config.plugin import resolve
from whet.data.messages import read_tools
from whet.data.problems import Malformed
from whet.envs.calculator import calculate
from whet.envs.calls import Call
from whet.errors import ConfigError
from whet.rollout.threads import Threads, heard

BUILTINS: dict[str, Any] = {"calculator": calculate}


@dataclass(frozen=True)
class Tool:
    """A function, and its description in OpenAI's form."""

    function: Callable[..., Any]
    schema: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.schema["function"]["name"]

    async def run(self, call: Call, threads: Threads, timeout_s: float) -> Any:
        """What the function returns. Raises ToolFailure with what the policy is told."""
        try:
            inspect.signature(self.function).bind(**call.arguments)
        except TypeError as error:
            raise ToolFailure(f"{self.name}: {error}") from error
        asked = partial(self.function, **call.arguments)
        try:
            if inspect.iscoroutinefunction(self.function):
                result = asked()
            else:
                result = await threads.run(asked, timeout_s=timeout_s)
            if inspect.isawaitable(result):
                async with asyncio.timeout(timeout_s):
                    return await heard(result)
            return result
        except TimeoutError as error:
            raise ToolFailure(f"{self.name} took longer than {timeout_s:g} s") from error
        except Exception as error:  # the user's code: whatever it raises is for the policy to read
            raise ToolFailure(f"{self.name} raised {type(error).__name__}: {error}") from error


class ToolFailure(Exception):
    """A call that gave no result; the text is the tool's output."""


def build_tools(functions: Sequence[str | Mapping[str, Any]], where: str = "env.functions") -> dict[str, Tool]:
    """The tools by the name that the policy calls them by.

    Each is a dotted path or a built-in's name, or an object with `use` and its `schema`. Without a schema it is read
    from the signature and the docstring (Google's style).
    Raises ConfigError for a function that is not there or not described, and for two of one name.
    """
    tools: dict[str, Tool] = {}
    for position, written in enumerate(functions):
        place = f"{where}[{position}]"
        tool = _tool(written, place)
        if tool.name in tools:
            raise ConfigError(f"{place} is called {tool.name!r}, as one before it; give it another name by its schema")
        tools[tool.name] = tool
    if not tools:
        raise ConfigError(f"{where} is empty, so there is no tool to call; name a function as in my.tools:search")
    return tools


def output_text(result: Any, most_characters: int) -> str:
    """A result as the policy reads it: text as it is, all else as JSON; cut at so many characters."""
    text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)
    return text if len(text) <= most_characters else f"{text[:most_characters]}... (cut)"


def _tool(written: str | Mapping[str, Any], place: str) -> Tool:
    given = {"use": written} if isinstance(written, str) else dict(written)
    use, schema = given.pop("use", None), given.pop("schema", None)
    if given or not isinstance(use, str):
        raise ConfigError(
            f"{place} is {written!r}, expected the path of a function, or an object with `use` and, if wanted, `schema`"
        )
    function: Any = resolve(use, BUILTINS, what="tool", where=place)
    if not callable(function):
        raise ConfigError(f"{place} is {use!r}, a {type(function).__name__}; expected a function")
    return Tool(function, _given_schema(schema, place) if schema is not None else _read_schema(function, use, place))


def _given_schema(schema: Any, place: str) -> Mapping[str, Any]:
    try:
        (tool,) = read_tools([schema], f"{place}.schema") or ()
    except Malformed as error:
        raise ConfigError(f"{place}.schema: {error}") from error
    return tool


def _read_schema(function: Callable[..., Any], use: str, place: str) -> Mapping[str, Any]:
    try:
        described = get_json_schema(function)["function"]
    except (DocstringParsingException, TypeHintParsingException, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{place}: {use!r} cannot be described to the policy: {' '.join(str(error).split())}; give every parameter "
            f"a type and a line under `Args:` in the docstring, or give `schema`"
        ) from error
    return {"type": "function", "function": {name: part for name, part in described.items() if name != "return"}}
