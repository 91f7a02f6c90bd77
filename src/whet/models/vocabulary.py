"""Whether two models speak in the same tokens."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from whet.config.model import ModelConfig
from whet.errors import ModelError
from whet.models.load import load_tokenizer


def check_same_vocabulary(tokenizer: PreTrainedTokenizerBase, other: ModelConfig, *, where: str) -> None:
    """Raise ModelError unless the model `other`, named by the setting `where`, gives every token the same number.

    Embeddings of different sizes are no difference: rows beyond the tokenizer's tokens are padding.
    """
    own, theirs = tokenizer.get_vocab(), load_tokenizer(other).get_vocab()
    if own == theirs:
        return
    different = sorted(token for token in own.keys() | theirs.keys() if own.get(token) != theirs.get(token))
    token = min(different, key=lambda t: min(own.get(t, 10**9), theirs.get(t, 10**9)))
    mine, there = (words.get(token, "absent") for words in (own, theirs))
    raise ModelError(
        f"{where} is {other.path!r}, whose tokenizer is another one: {len(different):,} tokens differ, as {token!r} "
        f"(number {mine} in the policy's, {there} in its); numbers of different tokens cannot be compared; use a model "
        "with the policy's tokenizer"
    )
