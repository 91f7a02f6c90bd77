"""Models made from nothing."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from whet.errors import ModelError
from whet.models.tiny import END, END_OF_TEXT, PAD, START, make_tiny, make_tokenizer

TEXTS = ["What is 12+34? ", "The answer is 46.\n\tñ 漢字 🙂", "a <|im_end|> b"]


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_byte_tokens_are_numbered_by_value_and_survive_a_reload(tmp_path, family):
    _, tokenizer = load(make_tiny(tmp_path, family=family))
    assert len(tokenizer) == 260
    for text in TEXTS[:2]:
        assert tokenizer.encode(text) == list(text.encode())
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.convert_tokens_to_ids([END_OF_TEXT, START, END, PAD]) == [256, 257, 258, 259]
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == (END, PAD, None)
    assert tokenizer.encode(TEXTS[2]) == [*b"a ", 258, *b" b"]


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_bpe_survives_a_reload_keeps_digits_apart_and_fits_its_vocabulary(tmp_path, family):
    corpus = ["the answer is 1234 and the answer is 5678"] * 50
    made = make_tokenizer("bpe", corpus=corpus, vocab_size=270)
    _, tokenizer = load(make_tiny(tmp_path, family=family, tokenizer="bpe", corpus=corpus, vocab_size=270))
    assert len(tokenizer) == 270
    for text in [*TEXTS, *corpus[:1]]:
        assert tokenizer.encode(text) == made.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("the answer is")) < len("the answer is")
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("1234")) == ["1", "2", "3", "4"]


def test_template_wraps_turns_and_opens_the_answer():
    tokenizer = make_tokenizer()
    messages = [{"role": "user", "content": "1+1"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n"
    answered = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": "2"}], tokenize=False)
    assert answered == text + "2<|im_end|>\n"


def test_template_shows_tools_and_their_calls():
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2"},
    ]
    text = make_tokenizer().apply_chat_template(messages, tools=[{"name": "add"}], tokenize=False)
    assert text == (
        '<|im_start|>system\nBe brief.\n\nYou may call these functions:\n{"name": "add"}<|im_end|>\n'
        '<|im_start|>assistant\n<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|im_end|>\n'
        "<|im_start|>tool\n2<|im_end|>\n"
    )


def test_weights_depend_on_the_seed_alone_and_leave_the_generator_alone(tmp_path):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    folders = [make_tiny(tmp_path / str(i), seed=seed) for i, seed in enumerate([3, 3, 4])]
    assert torch.equal(torch.get_rng_state(), before)
    first, again, other = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert first == again != other


def test_embedding_may_be_larger_than_the_tokenizer(tmp_path):
    model, tokenizer = load(make_tiny(tmp_path, vocab_size=1000, tie_embeddings=False))
    assert model.get_input_embeddings().weight.shape == (1000, 64)
    assert model.lm_head.weight.shape == (1000, 64)
    assert len(tokenizer) == 260
    assert model.lm_head.weight.data_ptr() != model.get_input_embeddings().weight.data_ptr()


def test_settings_of_a_family_go_before_its_defaults(tmp_path):
    eight, _ = load(make_tiny(tmp_path / "8", family="qwen3_moe"))
    four, _ = load(make_tiny(tmp_path / "4", family="qwen3_moe", settings={"num_experts": 4}))
    assert [model.model.layers[0].mlp.experts.down_proj.shape[0] for model in (eight, four)] == [8, 4]
    latent, _ = load(make_tiny(tmp_path / "latent", family="deepseek_v3"))
    dense, mixed = latent.model.layers
    assert not hasattr(dense.mlp, "experts")
    assert (mixed.mlp.experts.num_experts, mixed.mlp.shared_experts.intermediate_size) == (8, 48)
    assert mixed.self_attn.kv_b_proj.weight.shape == (4 * (16 + 16), 16)


def test_generation_stops_at_either_end_token(tmp_path):
    model, _ = load(make_tiny(tmp_path))
    assert model.generation_config.eos_token_id == [258, 256]
    assert model.generation_config.pad_token_id == 259


def test_template_can_be_left_out(tmp_path):
    _, tokenizer = load(make_tiny(tmp_path, chat_template=False))
    assert tokenizer.chat_template is None
    assert not (tmp_path / "chat_template.jinja").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"family": "gpt"}, "qwen3, llama, glm4, qwen3_moe, deepseek_v3"),
        ({"family": "qwen3_moe", "settings": {"num_expert": 4}}, "'num_expert', which the configuration of qwen3_moe"),
        ({"tokenizer": "words"}, "'bytes' or 'bpe'"),
        ({"tokenizer": "bpe"}, "corpus is not given"),
        ({"vocab_size": 100}, "260"),
    ],
)
def test_what_cannot_be_made_is_refused(tmp_path, options, said):
    with pytest.raises(ModelError, match=said):
        make_tiny(tmp_path, **options)
