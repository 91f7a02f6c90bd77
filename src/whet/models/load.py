"""Load a tokenizer and a causal language model as the configuration asks for them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jinja2
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from whet.config.model import FreezeConfig, ModelConfig
from whet.errors import ModelError
from whet.models import adapters, quantize
from whet.models.hollow import hollow_model
from whet.models.parts import base
from whet.models.scores import add_score_head, head_names, is_reward_adapter, read_score_head, refuse_reward_model
from whet.models.source import adapter_base, check_tokenizer_files, check_weights, load_config, locate, translate

logger = logging.getLogger(__name__)

# Tokens made for padding in the model families that do not name theirs, most specific first.
PADS = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>")


def check_model_folder(cfg: ModelConfig, *, scores: bool = False) -> int | None:
    """Raises ModelError for what can be known to be wrong without loading the weights.

    Looks for configuration, architecture, weights, tokenizer and chat template, whether the embedding has a
    row for every token, whether adapter and freezing name what the model has, and whether it is a reward model
    without being asked for `scores`. Returns how many positions the model has, None where it sets no limit.
    """
    inner = adapter_base(cfg) or cfg
    config = _checked_config(inner)
    quantize.check_installed(cfg)
    _check_kind(cfg, inner, config, scores)
    _check_vocabulary(config, load_tokenizer(cfg))
    if inner is cfg and (cfg.adapter is not None or cfg.freeze != FreezeConfig()):
        _rehearse(cfg, config)
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def load_tokenizer(cfg: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with `cfg.chat_template` in place of its own and with a pad token.

    Raises ModelError for a tokenizer that is missing or unreadable, and for a broken chat template.
    """
    check_tokenizer_files(cfg)
    try:
        tokenizer = AutoTokenizer.from_pretrained(**locate(cfg))
    except (OSError, ValueError, KeyError, TypeError) as error:
        translate(cfg, "its tokenizer cannot be loaded", error)
    if cfg.chat_template is not None:
        tokenizer.chat_template = _read_template(cfg.chat_template)
    if tokenizer.chat_template:
        _check_template(tokenizer, cfg)
    _set_pad(tokenizer)
    return tokenizer


def load_model(
    cfg: ModelConfig, device: torch.device, *, scores: bool = False, hollow: bool = False
) -> PreTrainedModel:
    """The model on `device` in `cfg.dtype`, its adapter in place and its frozen weights frozen.

    A folder that holds an adapter alone is loaded on top of its base model. With `scores` it is a reward model:
    any causal language model with a scalar head beside its own (see `parts.score_head`), which is read from the
    files if they hold one, and otherwise new, drawn from torch's random numbers. Quantised weights without an
    adapter are all frozen. A `hollow` one has all this but no weights (see `models.hollow`), and is on the CPU.
    Raises ModelError for weights that are missing, or of another shape than the configuration says, and for a
    reward model where none is asked for.
    """
    below = adapter_base(cfg)
    inner = below or cfg
    config = _checked_config(inner)
    _check_kind(cfg, inner, config, scores)
    if hollow:
        model = hollow_model(config, getattr(torch, inner.dtype), trust_remote_code=inner.trust_remote_code)
    else:
        model = _load_weights(inner, device, scores)
    if scores:
        add_score_head(model, read_score_head(inner, config))
    if below is not None:
        if cfg.adapter is not None:
            raise ModelError(
                f"model.path is {cfg.path!r}, which is an adapter itself, and model.adapter asks for another; "
                f"leave out model.adapter to train on with this one, or merge it first (whet merge)"
            )
        model = adapters.load_adapter(model, Path(cfg.path).expanduser())
    elif cfg.adapter is not None:
        model = adapters.add_adapter(model, cfg.adapter)
    if cfg.quantization is not None and not adapters.has_adapter(model):
        model.requires_grad_(False)
    else:
        adapters.freeze(model, cfg.freeze)
    if active := dropouts(model):
        named = ", ".join(f"{name} = {value}" for name, value in active.items())
        logger.warning("the model's configuration has dropout (%s); dropout on attention is not applied", named)
    return model


def stop_token_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens that end a completion: the tokenizer's own first, then those of the generation configuration.

    Raises ModelError where none is known: no completion would ever end.
    """
    inner = base(model)
    return _stops(tokenizer, getattr(inner, "generation_config", None), inner.config)


def stop_tokens_in_files(cfg: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The same without the model: what its files say."""
    inner = adapter_base(cfg) or cfg
    where = locate(inner)
    try:
        generation = GenerationConfig.from_pretrained(where.pop("pretrained_model_name_or_path"), **where)
    except OSError:  # not every model has one
        generation = None
    return _stops(tokenizer, generation, load_config(inner))


def _stops(tokenizer: PreTrainedTokenizerBase, *configs: Any) -> tuple[int, ...]:
    found = [tokenizer.eos_token_id]
    for config in configs:
        ids = getattr(config, "eos_token_id", None)
        found += ids if isinstance(ids, list) else [ids]
    stops = tuple(dict.fromkeys(int(token) for token in found if token is not None))
    if not stops:
        raise ModelError(
            "neither the tokenizer nor generation_config.json names an end-of-sequence token, so that no completion "
            "would ever end; set eos_token in the model's tokenizer_config.json"
        )
    return stops


def dropouts(model: nn.Module) -> dict[str, float]:
    """Dropout rates above zero in the model's configuration, by the name of the setting."""
    settings = base(model).config.get_text_config().to_dict().items()
    named = {name: value for name, value in settings if "drop" in name or name.endswith("_pdrop")}
    return {name: float(value) for name, value in named.items() if isinstance(value, float | int) and value > 0}


def _checked_config(cfg: ModelConfig) -> PreTrainedConfig:
    """The configuration of a causal language model whose weight files are whole."""
    config = load_config(cfg)
    folder = Path(cfg.path).expanduser()
    if folder.is_dir():
        check_weights(folder)
    return config


def _check_kind(cfg: ModelConfig, inner: ModelConfig, config: PreTrainedConfig, scores: bool) -> None:
    """A reward model where one is wanted and only there; `inner` is below the adapter, if there is one."""
    if scores:
        read_score_head(inner, config)
        return
    refuse_reward_model(inner, config)
    if inner is not cfg and is_reward_adapter(Path(cfg.path).expanduser()):
        raise ModelError(
            f"model.path is {cfg.path!r}, the adapter of a reward model, which gives scores and no words; give the "
            f"language model that it was trained from, {inner.path}"
        )


def _load_weights(cfg: ModelConfig, device: torch.device, scores: bool) -> PreTrainedModel:
    options = quantize.loading_options(cfg, device)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            **locate(cfg),
            **options,
            dtype=getattr(torch, cfg.dtype),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        translate(cfg, "its weights cannot be loaded", error)
    if mismatched := sorted(report["mismatched_keys"]):
        name, found, wanted = mismatched[0]
        raise ModelError(
            f"model.path is {cfg.path!r}, but its weights cannot be loaded: {len(mismatched)} have another shape than "
            f"config.json says ({name} is {list(found)}, expected {list(wanted)}); copy both again"
        )
    # Weights that are missing would be drawn at random. A reward model may do without its language-model head.
    unused = head_names(model) if scores else set()
    if missing := sorted(set(report["missing_keys"]) - unused):
        raise ModelError(
            f"model.path is {cfg.path!r}, but its files lack {len(missing)} of the model's weights ({missing[0]} …); "
            f"give a complete causal language model"
        )
    _repair_generation_config(model)
    if options:
        quantize.compute_alike(model)
        return model
    return model.to(device)


def _repair_generation_config(model: PreTrainedModel) -> None:
    """Published models name a temperature without do_sample, which loads but which save_pretrained refuses."""
    try:
        model.generation_config.validate(strict=True)
    except ValueError:
        model.generation_config.do_sample = True


def _rehearse(cfg: ModelConfig, config: PreTrainedConfig) -> None:
    """Adapter and freezing on a model without weights: a name that does not fit is said before they are read."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=cfg.trust_remote_code)
        except Exception as error:  # the code of a model may need real weights; then it is said when they are there
            logger.debug("no rehearsal without weights: %s", error)
            return
        if cfg.adapter is not None:
            model = adapters.add_adapter(model, cfg.adapter)
        adapters.freeze(model, cfg.freeze)


def _check_vocabulary(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = config.get_text_config().vocab_size
    beyond = {token: index for token, index in tokenizer.get_vocab().items() if index >= rows}
    # Text models carry special tokens of their picture-reading siblings that no text ever contains.
    used = {
        t: i for t, i in beyond.items() if i not in tokenizer.added_tokens_decoder or i in tokenizer.all_special_ids
    }
    if used:
        token, index = max(used.items(), key=lambda item: item[1])
        raise ModelError(
            f"the tokenizer has tokens up to {index} ({token!r}), but the model's embedding has {rows} rows; "
            f"use the tokenizer that the model was trained with"
        )
    if beyond:
        logger.warning("the model's embedding has no row for %s; do not use them in data", ", ".join(sorted(beyond)))


def _read_template(given: str) -> str:
    if "{" in given or "\n" in given:
        return given
    path = Path(given).expanduser()
    if not path.is_file():
        raise ModelError(
            f"model.chat_template is {given!r}, but there is no file {path.absolute()}; "
            f"give the path of a Jinja file, or the template itself"
        )
    return path.read_text(encoding="utf-8")


def _check_template(tokenizer: PreTrainedTokenizerBase, cfg: ModelConfig) -> None:
    """Templates may refuse a conversation, but they must parse, and render something where they do not refuse."""
    origin = "model.chat_template" if cfg.chat_template is not None else f"the chat template of {cfg.path!r}"
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    except jinja2.TemplateSyntaxError as error:
        raise ModelError(
            f"{origin} is broken in line {error.lineno}: {error.message}; correct it, or leave it out"
        ) from error
    except jinja2.TemplateError as error:
        logger.info("%s does not render a lone user message: %s", origin, error)
        return
    if "Hello" not in text:
        raise ModelError(
            f"{origin} leaves out the message: a user's 'Hello' renders as {text!r}; "
            f"it must loop over `messages` and write each message.content"
        )


def _set_pad(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the tokenizer a pad token where it has none, other than its end token if it knows any other.

    Losses never look at it: masks go by length.
    """
    if tokenizer.pad_token is None:
        vocabulary = tokenizer.get_vocab()
        free = [token for token in PADS if token in vocabulary and token != tokenizer.eos_token]
        if free or tokenizer.eos_token:
            tokenizer.pad_token = free[0] if free else tokenizer.eos_token
    if tokenizer.pad_token is not None and tokenizer.pad_token == tokenizer.eos_token:
        logger.warning("%s is both pad and end token; masks go by length, so it is still learned", tokenizer.eos_token)
