"""Settings of the data: files, how their columns are named, how rows become tokens."""

from typing import Literal

from pydantic import Field, JsonValue, ValidationInfo, field_validator

from whet.config.base import Config

_TAKEN = {
    *("conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize"),
    *("continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs"),
}
"""What rendering itself decides; no value of `template_kwargs` may take its place."""


def holds_its_place(template: str | None, what: str) -> str | None:
    """The template, which without its placeholder would give every row the same text. Raises ValueError."""
    place = "{" + what + "}"
    if template is not None and place not in template:
        raise ValueError(f"{template!r} has no {place}; put it where the text of the row goes")
    return template


class DataConfig(Config):
    """Training and evaluation data.

    Files are JSONL, JSON (a list, or an object holding one under `data`), CSV or Parquet; a path may
    carry a slice, as in `rows.jsonl@[0:1000]`.
    """

    train: str | list[str] | None = None
    """Training file, or several, read as one."""
    eval: str | list[str] | None = None
    """Held-out file, or several, read as one."""
    eval_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of the training rows held out for evaluation, when `eval` is not given."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Our name of a column -> its name in the file, as in `{prompt: question, response: answer}`."""
    prompt_template: str | None = None
    """Text around a plain prompt, with `{prompt}` where it goes."""
    response_template: str | None = None
    """Text around a plain response, with `{response}` where it goes."""
    system: str | None = None
    """System message put before conversations that have none, when the chat template is used."""
    chat: Literal["auto", "always", "never"] = "auto"
    """Use of the chat template: `auto` for messages only; `always` wraps plain prompts and responses
    into user and assistant messages; `never` refuses messages."""
    template_kwargs: dict[str, JsonValue] = Field(default_factory=dict)
    """Further variables of the chat template, as in `{enable_thinking: false}`."""
    train_on: Literal["completion", "all"] = "completion"
    """Which tokens are trained: the completions (assistant turns), or every token."""
    max_length: int = Field(default=2048, ge=2)
    """Longest sequence in tokens."""
    max_prompt_length: int | None = Field(default=None, ge=1)
    """Reinforcement learning: longer prompts are dropped and counted."""
    on_too_long: Literal["truncate", "drop", "error"] = "truncate"
    """What happens to sequences longer than `max_length`."""
    max_cut_share: float = Field(default=0.2, ge=0, le=1)
    """Refuse to start when more than this share of the rows is truncated or dropped."""
    shuffle: bool = True
    """Shuffle the rows anew in every epoch, from `seed` and the epoch."""
    cache_dir: str | None = None
    """Where tokenised data is kept; the default is `whet` in the user's cache folder."""
    cache_gb: float = Field(default=20.0, gt=0)
    """Most gigabytes of tokenised data to keep; beyond, what was not used for longest is removed."""

    @field_validator("prompt_template", "response_template")
    @classmethod
    def _holds_its_place(cls, template: str | None, info: ValidationInfo) -> str | None:
        return holds_its_place(template, str(info.field_name).removesuffix("_template"))

    @field_validator("template_kwargs")
    @classmethod
    def _leaves_rendering_alone(cls, variables: dict[str, JsonValue]) -> dict[str, JsonValue]:
        taken = sorted(_TAKEN & set(variables))
        if taken:
            raise ValueError(f"{', '.join(taken)} is decided by how rows are rendered; leave it out")
        return variables
