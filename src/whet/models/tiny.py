"""Small models made from nothing: random weights and a tokenizer, for tests, benchmarks and the demo."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GenerationConfig,
    Glm4Config,
    Glm4ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from whet.errors import ModelError

END_OF_TEXT, START, END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
SPECIALS = [END_OF_TEXT, START, END, PAD]
NUM_BYTES = 256


class Family(NamedTuple):
    """The classes of a family, and settings that only it has, for the default sizes of `make_tiny`."""

    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    settings: Mapping[str, Any] = {}


FAMILIES = {
    "qwen3": Family(Qwen3Config, Qwen3ForCausalLM),
    "llama": Family(LlamaConfig, LlamaForCausalLM),
    "glm4": Family(Glm4Config, Glm4ForCausalLM),
    "qwen3_moe": Family(
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True},
    ),
    "deepseek_v3": Family(
        DeepseekV3Config,
        DeepseekV3ForCausalLM,
        {
            "num_key_value_heads": None,  # as many as heads: keys and values come of one latent vector
            "head_dim": 8,  # as transformers has it: that of the rotated part alone
            "q_lora_rank": 32,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "first_k_dense_replace": 1,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 48,
            "num_nextn_predict_layers": 0,
        },
    ),
}

CHAT_TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages and messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- 'You may call these functions:' }}
    {%- for tool in tools %}
        {{- '\\n' + tool | tojson }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if not (tools and loop.first and message.role == 'system') %}
        {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
        {%- for call in message.tool_calls or [] %}
            {{- '<tool_call>' + (call.function or call) | tojson + '</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def make_tiny(
    folder: str | Path,
    *,
    family: Literal["qwen3", "llama", "glm4", "qwen3_moe", "deepseek_v3"] = "qwen3",
    tokenizer: Literal["bytes", "bpe"] = "bytes",
    corpus: Iterable[str] | None = None,
    vocab_size: int | None = None,
    hidden_size: int = 64,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    intermediate_size: int = 192,
    max_positions: int = 4096,
    tie_embeddings: bool = True,
    chat_template: bool = True,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Path:
    """Write a complete transformers folder: config, float32 weights drawn from `seed`, tokenizer, template.

    `bytes` has one token per byte, numbered by its value, and four special tokens. `bpe` is trained on
    `corpus` to at most `vocab_size` tokens (1024 when not given). The embedding has `vocab_size` rows,
    which may be more than the tokenizer uses, and the tokenizer's own size when not given.
    `settings` go to the configuration as they are, before those of FAMILIES: numbers of experts, ranks, ...
    Returns the folder. Raises ModelError for a family, setting, tokenizer or vocabulary that cannot be made.
    """
    if family not in FAMILIES:
        raise ModelError(f"family is {family!r}, expected one of {', '.join(FAMILIES)}")
    tok = make_tokenizer(tokenizer, corpus=corpus, vocab_size=vocab_size, chat_template=chat_template)
    tok.model_max_length = max_positions
    chosen = FAMILIES[family]
    if unknown := [name for name in settings or {} if not hasattr(chosen.config(), name)]:
        raise ModelError(f"settings has {unknown[0]!r}, which the configuration of {family} does not know")
    ids = {"bos_token_id": None, "eos_token_id": tok.eos_token_id, "pad_token_id": tok.pad_token_id}
    sizes = {
        "vocab_size": vocab_size or len(tok),
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "intermediate_size": intermediate_size,
        "max_position_embeddings": max_positions,
        "tie_word_embeddings": tie_embeddings,
    }
    config = chosen.config(**{**ids, **sizes, **chosen.settings, **(settings or {})})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = chosen.model(config)
    stops = [tok.eos_token_id, tok.convert_tokens_to_ids(END_OF_TEXT)]
    model.generation_config = GenerationConfig(**{**ids, "eos_token_id": stops})
    folder = Path(folder)
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


def make_tokenizer(
    kind: Literal["bytes", "bpe"] = "bytes",
    *,
    corpus: Iterable[str] | None = None,
    vocab_size: int | None = None,
    chat_template: bool = True,
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that ends turns with `<|im_end|>` and pads with a token of its own.

    Digits are single tokens in both kinds, so that arithmetic reads the same however it was trained.
    """
    smallest = NUM_BYTES + len(SPECIALS)
    if vocab_size is not None and vocab_size < smallest:
        raise ModelError(f"vocab_size is {vocab_size}, but the bytes and special tokens alone are {smallest}; raise it")
    if kind == "bytes":
        core = Tokenizer(models.BPE(vocab={symbol: byte for byte, symbol in enumerate(_byte_symbols())}, merges=[]))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    elif kind == "bpe":
        if corpus is None:
            raise ModelError("tokenizer 'bpe' is trained, but corpus is not given; pass texts, or use 'bytes'")
        core = _train_bpe(corpus, vocab_size or 1024)
    else:
        raise ModelError(f"tokenizer is {kind!r}, expected 'bytes' or 'bpe'")
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIALS)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[END_OF_TEXT, START],
        chat_template=CHAT_TEMPLATE if chat_template else None,
        clean_up_tokenization_spaces=False,
    )


def _train_bpe(corpus: Iterable[str], vocab_size: int) -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIALS), initial_alphabet=_byte_symbols(), show_progress=False
    )
    core.train_from_iterator(corpus, trainer)
    return core


def _byte_symbols() -> list[str]:
    """The character that byte-level tokenizers write for each byte value (Radford et al. 2019, GPT-2)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(NUM_BYTES)]
