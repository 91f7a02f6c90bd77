"""Encoding: where pieces meet, what begins and ends a sequence, and which tokenizers are the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from whet.data.encode import Encoder, digest_tokenizer
from whet.data.pieces import Piece, Rendered
from whet.data.problems import Malformed
from whet.errors import ModelError
from whet.models.tiny import make_tokenizer

CORPUS = ["the answer is seven", "the answer\n\nis eleven", "answer: seven eleven", "\n\n\n", "naïve café 🐫"] * 20


def sequence(*pieces: tuple[str, bool], begin: bool = False, end: bool = False) -> Rendered:
    return Rendered(tuple(Piece(text, trained) for text, trained in pieces), begin=begin, end=end)


@pytest.fixture(scope="module")
def bpe() -> PreTrainedTokenizerFast:
    """A tokenizer with merges, so that tokens may straddle borders."""
    return make_tokenizer("bpe", corpus=CORPUS, vocab_size=400)


@pytest.fixture(scope="module")
def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama 2's: a blank before the first word of every text, which is part of that word's token."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    core.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    core.add_special_tokens(["</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


def test_no_token_straddles_the_border_of_what_is_trained(bpe: PreTrainedTokenizerFast):
    whole = bpe("the answer", add_special_tokens=False)["input_ids"]
    (encoded,) = Encoder(bpe).encode([sequence(("the ans", False), ("wer", True))])
    assert encoded.tokens.tolist() != whole
    assert bpe.decode(encoded.tokens) == "the answer"
    assert bpe.decode(encoded.tokens[encoded.mask]) == "wer"
    prompt = bpe("the ans", add_special_tokens=False)["input_ids"]
    assert encoded.tokens[: len(prompt)].tolist() == prompt


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_many_sequences_encode_as_each_does_alone(kind: str, request: pytest.FixtureRequest):
    encoder = Encoder(request.getfixturevalue(kind))
    many = [
        sequence(("the answer is", False), (" seven", True), end=True),
        sequence(("", False), ("eleven", True)),
        sequence(("answer: ", False), ("seven", True), ("\n\n", False), ("eleven seven", True)),
    ]
    for alone, together in zip([encoder.encode([one])[0] for one in many], encoder.encode(many), strict=True):
        assert alone.tokens.tolist() == together.tokens.tolist()
        assert alone.mask.tolist() == together.mask.tolist()


def test_a_tokenizer_that_puts_a_blank_before_a_text_puts_none_between_pieces(sentencepiece: PreTrainedTokenizerFast):
    # Piece by piece, it would spell "the answer seven" as "the ans wer seven".
    encoder = Encoder(sentencepiece)
    at_a_border = sequence(("the answer", False), (" seven", True))
    within_a_token = sequence(("the ans", False), ("wer seven", True))
    for one, mine in ((at_a_border, "seven"), (within_a_token, "wer seven")):
        (encoded,) = encoder.encode([one])
        assert sentencepiece.decode(encoded.tokens) == one.text
        assert sentencepiece.decode(encoded.tokens[encoded.mask]).strip() == mine
    whole = sentencepiece(at_a_border.text, add_special_tokens=False)["input_ids"]
    assert encoder.encode([at_a_border])[0].tokens.tolist() == whole


def test_bos_stands_once_before_plain_text_and_eos_once_after(make_chat: Callable[..., PreTrainedTokenizerFast]):
    tokenizer = make_chat(bos=True)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    texts = [("ab", "c"), ("<s>ab", "c"), ("ab", "c<|im_end|>")]
    for prompt, response in texts:
        (encoded,) = Encoder(tokenizer).encode([sequence((prompt, False), (response, True), begin=True, end=True)])
        assert encoded.tokens.tolist() == [bos, *b"abc", eos]
        assert encoded.mask.tolist() == [False, False, False, True, True]


def test_a_chat_template_that_writes_bos_gets_no_second_one(make_chat: Callable[..., PreTrainedTokenizerFast]):
    tokenizer = make_chat("llama3", bos=True)
    encoder = Encoder(tokenizer)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    (encoded,) = encoder.encode([sequence((text, False))])
    assert encoded.tokens.tolist().count(tokenizer.bos_token_id) == 1
    encoder.require_single_start(encoded)


def test_two_bos_in_the_text_are_refused(make_chat: Callable[..., PreTrainedTokenizerFast]):
    encoder = Encoder(make_chat(bos=True))
    (encoded,) = encoder.encode([sequence(("<s><s>a", True), begin=True)])
    with pytest.raises(Malformed, match="begins with two '<s>'; remove"):
        encoder.require_single_start(encoded)


def test_eos_is_trained_where_pad_is_the_same_token():
    tokenizer = make_tokenizer("bytes")
    tokenizer.pad_token = tokenizer.eos_token
    (encoded,) = Encoder(tokenizer).encode([sequence(("a", False), ("b", True), end=True)])
    assert (encoded.tokens[-1], encoded.mask[-1]) == (tokenizer.pad_token_id, True)


def test_a_tokenizer_without_eos_is_an_error_where_one_is_needed():
    tokenizer = make_tokenizer("bytes")
    tokenizer.eos_token = None
    assert Encoder(tokenizer).encode([sequence(("a", False))])[0].tokens.tolist() == [*b"a"]
    with pytest.raises(ModelError, match=r"no end-of-sequence token, .*; add eos_token to its tokenizer_config\.json"):
        Encoder(tokenizer).encode([sequence(("a", True), end=True)])


def test_a_character_of_several_bytes_stays_on_one_side(tokenizer: PreTrainedTokenizerFast):
    (encoded,) = Encoder(tokenizer).encode([sequence(("🐫", False), ("三é", True))])
    assert encoded.mask.tolist() == [False] * 4 + [True] * 5
    assert tokenizer.decode(encoded.tokens[encoded.mask]) == "三é"


def test_the_digest_follows_vocabulary_template_and_special_tokens_but_not_earlier_calls():
    tokenizer = make_tokenizer("bytes")
    digest = digest_tokenizer(tokenizer)
    tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=2)
    assert digest_tokenizer(tokenizer) == digest == digest_tokenizer(make_tokenizer("bytes"))
    others = [make_tokenizer("bytes") for _ in range(3)]
    others[0].add_tokens(["new"])
    others[1].chat_template += " "
    others[2].eos_token = "<|endoftext|>"
    assert len({digest, *map(digest_tokenizer, others)}) == 4
