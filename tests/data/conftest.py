"""What the tests of the data room share: byte tokenizers under several chat templates, and files in a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from whet.config.data import DataConfig
from whet.models.tiny import make_tokenizer

LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

DEFAULT_SYSTEM = """\
{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

# As Qwen3 does: thoughts stand only after the last user message, where even an answer without any gets an empty block.
THINKING = """\
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set thought = '' %}
        {%- set answer = message.content %}
        {%- if '</think>' in answer %}
            {%- set thought = answer.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set answer = answer.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- answer + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

# No generation prompt: the answer follows the closing bracket, behind a blank.
INST = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' + message.content + ' [/INST]' }}
    {%- elif message.role == 'assistant' %}
        {{- ' ' + message.content + eos_token }}
    {%- else %}
        {{- raise_exception('only user and assistant roles are supported') }}
    {%- endif %}
{%- endfor %}"""

# Written without regard to add_generation_prompt, with a header before the answer.
NO_PROMPT = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}"""

# As DeepSeek-R1 does: the prompt opens a thought, but a turn is rendered without it.
FORCED_THOUGHT = """\
{%- for message in messages %}
    {{- '<|' + message.role + '|>' + message.content.split('</think>')[-1] + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|><think>\\n' }}
{%- endif %}"""

# As later Qwen models do: the prompt opens a thought, and every turn is rendered with one.
OPEN_THOUGHT = """\
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set parts = message.content.split('</think>') %}
        {%- set thought = parts[0].split('<think>')[-1].strip() if parts | length > 1 else '' %}
        {{- '<|im_start|>assistant\\n<think>\\n' + thought }}
        {{- '\\n</think>\\n\\n' + parts[-1].strip() + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n<think>\\n' }}
{%- endif %}"""

# As Phi-3 does: a second token behind the last turn of a conversation.
CLOSED = """\
{%- for message in messages %}
    {{- '<|' + message.role + '|>\\n' + message.content + '<|eot_id|>\\n' }}
{%- endfor %}
{{- '<|assistant|>\\n' if add_generation_prompt else eos_token }}"""

# As GLM does: a turn ends where the next one begins.
FLOOR = """\
{%- for message in messages %}
    {{- '<|' + ('observation' if message.role == 'tool' else message.role) + '|>\\n' + message.content }}
    {%- for call in message.tool_calls or [] %}{{- '<tool_call>' + call.function.name + '</tool_call>' }}{%- endfor %}
{%- endfor %}
{{- '<|assistant|>\\n' if add_generation_prompt }}"""

TEMPLATES = {
    "llama3": LLAMA3,
    "default_system": DEFAULT_SYSTEM,
    "thinking": THINKING,
    "inst": INST,
    "no_prompt": NO_PROMPT,
    "forced_thought": FORCED_THOUGHT,
    "open_thought": OPEN_THOUGHT,
    "closed": CLOSED,
    "floor": FLOOR,
}
SPECIALS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|user|>", "<|assistant|>", "<|observation|>"]


@pytest.fixture(scope="session")
def make_chat() -> Callable[..., PreTrainedTokenizerFast]:
    """A byte tokenizer under a named template; `bos` has it begin every text with `<s>`, as Llama's does."""

    def make(template: str = "chatml", *, bos: bool = False) -> PreTrainedTokenizerFast:
        tokenizer = make_tokenizer("bytes")
        tokenizer.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": SPECIALS})
        if bos:
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
            )
        if template != "chatml":
            tokenizer.chat_template = TEMPLATES[template]
        return tokenizer

    return make


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, `<|im_end|>` as EOS, ChatML."""
    return make_tokenizer("bytes")


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., str]:
    """Writes objects, or lines as they stand, to a JSONL file and returns its path."""

    def write(*rows: dict[str, Any] | str, name: str = "train.jsonl") -> str:
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., DataConfig]:
    """A data configuration that keeps its cache in the test's own folder."""

    def make(**values: Any) -> DataConfig:
        return DataConfig(**{"cache_dir": str(tmp_path / "cache"), **values})

    return make
