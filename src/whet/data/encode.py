"""Encoding: rendered pieces become tokens and a mask; the border of what is trained is a token border."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice, takewhile

import numpy as np
from transformers import PreTrainedTokenizerBase

from whet.data.pieces import Rendered
from whet.data.problems import Malformed
from whet.errors import ModelError

# Tokens that surely hold the last character: it has four bytes at most.
_CHARACTER = 4


@dataclass(frozen=True, slots=True)
class Encoded:
    """tokens: [T] int32. mask: [T] bool, never true on the first token, which nothing predicts.

    prompt: tokens before the first trained piece; 0 where there is no text before it.
    """

    tokens: np.ndarray
    mask: np.ndarray
    prompt: int = 0


@dataclass(frozen=True)
class Encoder:
    """Tokenises pieces one by one, so that a prompt's tokens are the ones that an engine is given."""

    tokenizer: PreTrainedTokenizerBase

    def encode(self, sequences: Sequence[Rendered]) -> list[Encoded]:
        """Tokens and mask of each sequence, the same however many are encoded at a time.

        Raises ModelError when a sequence needs EOS and the tokenizer has none.
        """
        if self._joins:
            pieces = iter(self._ids([piece.text for rendered in sequences for piece in rendered.pieces]))
            return [self._assemble(rendered, list(islice(pieces, len(rendered.pieces)))) for rendered in sequences]
        return [self._assemble(rendered, self._in_context(rendered)) for rendered in sequences]

    def require_single_start(self, encoded: Encoded) -> None:
        """Raise Malformed when a sequence begins with two BOS tokens."""
        bos = self.tokenizer.bos_token_id
        if bos is not None and len(encoded.tokens) > 1 and encoded.tokens[0] == encoded.tokens[1] == bos:
            name = self.tokenizer.bos_token
            text = (
                f"the sequence begins with two {name!r}; remove it from the text, data.prompt_template or chat template"
            )
            raise Malformed("two BOS tokens", text)

    def shared(self, first: Encoded, second: Encoded) -> int:
        """How many tokens two sequences begin with alike; half a character at the end is not counted."""
        length = min(len(first.tokens), len(second.tokens))
        different = np.flatnonzero(first.tokens[:length] != second.tokens[:length])
        count = int(different[0]) if len(different) else length
        while count and self._text(first.tokens[max(0, count - _CHARACTER) : count].tolist()).endswith("\ufffd"):
            count -= 1
        return count

    def _assemble(self, rendered: Rendered, pieces: Sequence[Sequence[int]]) -> Encoded:
        tokens = list(chain.from_iterable(pieces))
        mask = [piece.trained for piece, ids in zip(rendered.pieces, pieces, strict=True) for _ in ids]
        start = self._start if rendered.begin and tokens[: len(self._start)] != self._start else []
        # By position, never by id: where pad is eos, EOS is trained all the same.
        end = [self._end] if rendered.end and tokens[-1:] != [self._end] else []
        full_mask = np.array([False] * len(start) + mask + [True] * len(end), dtype=np.bool_)
        full_mask[:1] = False
        before = takewhile(lambda pair: not pair[0].trained, zip(rendered.pieces, pieces, strict=True))
        prompt = sum(len(ids) for _, ids in before)
        return Encoded(np.array([*start, *tokens, *end], dtype=np.int32), full_mask, prompt and len(start) + prompt)

    def _in_context(self, rendered: Rendered) -> list[list[int]]:
        """Tokens of each piece for a tokenizer that writes the start of a text differently (a blank before it).

        Pieces are cut out of the tokens of the whole text where it has a border there. Where a token
        straddles it, the piece is tokenised behind a line break, which is then taken off.
        """
        text, tokens, result = "", [], []
        for piece in rendered.pieces:
            text += piece.text
            longer = self._ids([text])[0]
            if longer[: len(tokens)] == tokens:
                ids = longer[len(tokens) :]
            else:
                anchor, anchored = self._ids(["\n", "\n" + piece.text])
                ids = anchored[len(anchor) :]
            tokens = tokens + ids
            result.append(ids)
        return result

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    @cached_property
    def _joins(self) -> bool:
        """Whether tokens of pieces, laid end to end, spell the pieces laid end to end."""
        probes = ["a", "b", " a", "\na"]
        return self._text(list(chain.from_iterable(self._ids(probes)))) == "".join(probes)

    @cached_property
    def _start(self) -> list[int]:
        """The tokens that the tokenizer puts before every text by itself."""
        bare, full = self._ids(["a"])[0], self.tokenizer("a")["input_ids"]
        return next((full[:i] for i in range(len(full)) if full[i : i + len(bare)] == bare), [])

    @cached_property
    def _end(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise ModelError(
                f"the tokenizer {self.tokenizer.name_or_path or ''} has no end-of-sequence token, so a model trained "
                f"with it would never stop; add eos_token to its tokenizer_config.json"
            )
        return self.tokenizer.eos_token_id


def digest_vocabulary(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of what every token id stands for."""
    words = sorted(tokenizer.get_vocab().items(), key=lambda word: word[1])
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()


def digest_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of everything that decides how a tokenizer and its chat template write a text."""
    if tokenizer.is_fast:
        core = json.loads(tokenizer.backend_tokenizer.to_str())
        # Left behind by whoever called the tokenizer last; every call sets them anew.
        core.pop("truncation", None)
        core.pop("padding", None)
    else:
        added = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items()}
        core = [type(tokenizer).__name__, tokenizer.get_vocab(), added, repr(sorted(tokenizer.init_kwargs.items()))]
    state = [core, tokenizer.chat_template, {name: str(token) for name, token in tokenizer.special_tokens_map.items()}]
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
