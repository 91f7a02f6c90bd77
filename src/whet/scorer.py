"""A reward model ready to judge: texts, conversations or answers to prompts become scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from whet.backends.device import choose
from whet.backends.local import LocalBackend
from whet.batch import collate
from whet.config.backend import BackendConfig
from whet.config.data import DataConfig
from whet.config.model import ModelConfig
from whet.data.encode import Encoder
from whet.data.pairs import Judged
from whet.data.problems import Malformed
from whet.data.shapes import Conversation, SFTItem, Text, TextPair
from whet.data.template import Renderer
from whet.data.units import drafts
from whet.errors import DataError, ModelError
from whet.models.load import check_model_folder, load_model, load_tokenizer
from whet.models.scores import is_reward_adapter, read_score_head
from whet.models.source import adapter_base, load_config
from whet.types import Message, Sample, Unit

Scored = str | Sequence[Message] | tuple[str | Sequence[Message], str] | Sequence[int]
"""What can be scored: a text, a conversation that ends with an answer, a prompt with its answer, or tokens."""


class RewardModel:
    """A reward model with its own tokenizer and chat template. Made by `load`.

    model = RewardModel.load("runs/reward")
    better, worse = model.score([("2 + 2 = ?", "4"), ("2 + 2 = ?", "5")])
    """

    def __init__(
        self, backend: LocalBackend, tokenizer: PreTrainedTokenizerBase, data: DataConfig, positions: int | None
    ) -> None:
        self.backend, self.tokenizer, self.positions = backend, tokenizer, positions
        self._renderer, self._encoder = Renderer(data, tokenizer), Encoder(tokenizer)

    @classmethod
    def load(
        cls,
        model: str | Path | ModelConfig,
        *,
        data: DataConfig | None = None,
        backend: BackendConfig | None = None,
    ) -> RewardModel:
        """The reward model in a folder (whole, or an adapter), or of a name on the hub.

        `data` says how prompts and answers become text, as in the training of the reward model: `chat`, `system`,
        `prompt_template`, `response_template`, `template_kwargs`. `backend` says on which device and in which
        precision. Raises ModelError for a model that cannot be loaded, or that has no score head.
        """
        model = model if isinstance(model, ModelConfig) else ModelConfig(path=str(model))
        backend = backend or BackendConfig()
        positions = check_reward_model(model)
        tokenizer, arithmetic = load_tokenizer(model), choose(backend)
        loaded = load_model(model, arithmetic.device, scores=True).requires_grad_(False)
        _require_score_head(model)  # of a name on the hub, the files have come with loading
        made = LocalBackend(loaded, tokenizer, backend, arithmetic, attention=model.attention)
        return cls(made, tokenizer, data or DataConfig(), positions)

    def score(self, items: Sequence[Scored]) -> list[float]:
        """One score per item, in order, read at the token that ends the answer.

        A text stands as it is, with EOS after it; messages go through the chat template; a prompt is text or
        messages; tokens are taken as they are. Answers to one prompt share its computation.
        Raises DataError for what cannot be rendered, or is longer than the model has positions.
        """
        together: dict[tuple[int, ...] | int, list[int]] = {}
        tokens = [self.tokens(item) for item in items]
        for i, item in enumerate(items):
            together.setdefault(self._prompt_of(item, i), []).append(i)
        scores = [0.0] * len(items)
        groups = list(together.values())
        for places, values in zip(groups, self.score_groups([[tokens[i] for i in g] for g in groups]), strict=True):
            for place, value in zip(places, values, strict=True):
                scores[place] = value
        return scores

    def score_groups(self, groups: Sequence[Sequence[Sequence[int]]]) -> list[list[float]]:
        """The scores of token sequences; what the sequences of a group begin with alike is computed once."""
        limit = self.backend.config.max_tokens_per_device
        units = [
            Unit(f"{number}/{part}", tuple(Sample(tuple(one), (True,) * len(one)) for one in members))
            for number, group in enumerate(groups)
            for part, members in enumerate(_parts(group, limit))
        ]
        if not units:
            return [[] for _ in groups]
        batch = collate(units, share_prefixes=self.backend.shares_prefixes)
        scores = iter(self.backend.forward(batch, {"scores"})["scores"].tolist())
        return [[next(scores) for _ in group] for group in groups]

    def tokens(self, item: Scored) -> tuple[int, ...]:
        """The tokens that are scored: up to the one that ends the answer. Raises DataError as `score` does."""
        if isinstance(item, Sequence) and not isinstance(item, str) and item and isinstance(item[0], int):
            found = tuple(int(token) for token in item)  # type: ignore[arg-type]
        else:
            found = self._rendered(item_of(item))
        if self.positions is not None and len(found) > self.positions:
            raise DataError(
                f"a prompt and its answer have {len(found):,} tokens, but the reward model has {self.positions:,} "
                "positions (max_position_embeddings in its config.json); shorten them (rollout.max_tokens, "
                "data.max_prompt_length), or use a reward model that reads further"
            )
        return found

    def _rendered(self, item: SFTItem) -> tuple[int, ...]:
        judged = Judged(item, True)
        try:
            encoded = self._encoder.encode(self._renderer.sides(judged))
            self._encoder.require_single_start(encoded[0])
            # As in training: what a template writes behind the end of the answer is not scored.
            (draft,) = drafts("unpaired", judged, encoded, self._encoder)
        except Malformed as fault:
            raise DataError(f"the reward model cannot score {_excerpt(item)}: {fault}") from fault
        return tuple(draft.samples[0].tokens.tolist())

    def _prompt_of(self, item: Scored, number: int) -> Any:
        """What answers of one prompt have in common; the item's own number for all else."""
        if isinstance(item, tuple) and len(item) == 2 and not isinstance(item[0], int):
            return repr(item[0])
        if isinstance(item, list) and item and isinstance(item[0], dict):
            return repr(item[:-1])
        return number


def check_reward_model(model: ModelConfig) -> int | None:
    """Raises ModelError for what is wrong with a reward model without loading it; returns its positions, if limited."""
    positions = check_model_folder(model, scores=True)
    if Path(model.path).expanduser().is_dir():
        _require_score_head(model)
    return positions


def _require_score_head(model: ModelConfig) -> None:
    """Raise ModelError for a model without a score head: it would be given a random one."""
    below = adapter_base(model)
    has = read_score_head(below or model, load_config(below or model)) is not None
    if not has and not (below is not None and is_reward_adapter(Path(model.path).expanduser())):
        raise ModelError(
            f"model.path is {model.path!r}, which has no score head (score.weight), so it is no reward model; give one "
            "that `whet reward` has trained, or another sequence classifier with one score"
        )


def item_of(item: Any) -> SFTItem:
    """A text, conversation, or prompt with answer in the form of the data room. Raises DataError for all else."""
    if isinstance(item, str):
        return Text(item)
    if isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], str):
        prompt, response = item
        if isinstance(prompt, str):
            return TextPair(prompt, response)
        messages = [*prompt, {"role": "assistant", "content": response}]
        return Conversation(messages, trained_from=len(messages) - 1)
    if isinstance(item, Sequence) and item and isinstance(item[-1], dict) and item[-1].get("role") == "assistant":
        return Conversation(list(item), trained_from=len(item) - 1)
    raise DataError(
        f"a reward model cannot score {item!r:.80}; expected a text, messages that end with the assistant's, a pair "
        "(prompt, response), or tokens"
    )


def _parts(group: Sequence[Sequence[int]], limit: int) -> Iterator[list[Sequence[int]]]:
    """A group in parts of at most `limit` tokens each, so that a large one does not take all memory at once."""
    part: list[Sequence[int]] = []
    size = 0
    for one in group:
        if part and size + len(one) > limit:
            yield part
            part, size = [], 0
        part.append(one)
        size += len(one)
    if part:
        yield part


def _excerpt(item: SFTItem) -> str:
    if isinstance(item, Conversation):
        return f"{item.messages[-1]['content']!r:.60}"
    return f"{item.text if isinstance(item, Text) else item.response!r:.60}"
