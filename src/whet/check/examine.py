"""Everything that can be known before a model is loaded: what is wrong all at once, what is odd, what a run will take.

Every training command begins with it, and `whet check` ends with it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerBase

from whet.backends.divides import check_divides
from whet.check import judge
from whet.check.memory import Estimate, estimate, shortage
from whet.check.work import Units, Work, units_of_prompts, units_of_rows, work_of
from whet.checkpoints.folder import check_folder
from whet.config.loader import UNKNOWN
from whet.config.rules import SAMPLES
from whet.config.run import RunConfig
from whet.data.prepared import Prepared
from whet.data.prompts import Prompts
from whet.errors import ConfigError, Gathering, ModelError
from whet.feeds.prompts import PromptFeed
from whet.feeds.rows import RowFeed
from whet.keeper import Keeper
from whet.methods import METHODS, Method, completed
from whet.models.load import check_model_folder, load_tokenizer, stop_tokens_in_files
from whet.models.source import adapter_base, load_config
from whet.models.vocabulary import check_same_vocabulary
from whet.recipe import method_of
from whet.roles import backend_maker, critic_of, engine_maker, frozen_models, resamples
from whet.schedule import Schedule, plan

logger = logging.getLogger(__name__)


@dataclass
class Examined:
    """What was found; None for what errors have kept from being looked at. Warnings went to the log."""

    config: RunConfig
    errors: Gathering = field(default_factory=Gathering)
    method: Method | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    stop_token_ids: tuple[int, ...] = ()
    feed: RowFeed | PromptFeed | None = None
    keeper: Keeper | None = None
    schedule: Schedule | None = None
    work: Work | None = None
    memory: Estimate | None = None

    @property
    def parts(self) -> dict[str, Prepared | Prompts]:
        """The data that could be read, by what it is for."""
        found = {"training": getattr(self.feed, "train", None), "held-out": getattr(self.feed, "eval", None)}
        if isinstance(self.feed, PromptFeed):
            found |= {held.label: held.prompts for held in self.feed.held_out}
        return {name: part for name, part in found.items() if part is not None}


def examine(config: RunConfig, method: Method | None = None, *, trains: bool = True) -> Examined:
    """Look at settings, folders, models, data and memory, in this order, and go on after each error.

    Nothing is written but the cache of tokenised rows, and no weight is loaded. Without `trains`, what is only
    needed for training is left out.
    """
    found = Examined(config, method=method)
    _settings(found, trains)
    if config.model.path != UNKNOWN:
        positions = _models(found)
        _data(found, positions)
    if trains and found.work is not None:
        _memory(found)
    return found


def _settings(found: Examined, trains: bool) -> None:
    config, errors = found.config, found.errors
    if found.method is None and config.method not in SAMPLES:
        # With a wrong loss, the method still says what its data look like.
        known = METHODS.get(config.method)
        found.method = completed(known) if known else None
        with errors.going_on():
            found.method = method_of(config)
    with errors.going_on():
        engine_maker(config)
    with errors.going_on():
        backend_maker(config)
    if trains:
        with errors.going_on():
            check_folder(config.output_dir, config.model)
        with errors.going_on():
            found.keeper = Keeper(config)


def _models(found: Examined) -> int | None:
    """Folders and tokenizers of the policy and of the models beside it. Returns how many positions all of them have."""
    config, errors, positions = found.config, found.errors, None
    with errors.going_on():
        found.tokenizer = load_tokenizer(config.model)
    with errors.going_on():
        positions = check_model_folder(config.model, scores=found.method is not None and found.method.scores)
    if config.backend.use == "fsdp":
        with errors.going_on():
            check_divides(load_config(adapter_base(config.model) or config.model), config.backend)
    beside = {} if found.method is None else frozen_models(config, found.method)
    for setting, model in beside.items():
        with errors.going_on():
            with _named(setting):
                theirs = check_model_folder(model)
            positions = min((one for one in (positions, theirs) if one is not None), default=None)
            if found.tokenizer is not None:
                check_same_vocabulary(found.tokenizer, model, where=setting)
    if found.method is not None and "critic" in found.method.trains:
        positions = _critic(found, positions)
    if found.tokenizer is not None and found.method is not None and not found.method.scores:
        with errors.going_on():
            found.stop_token_ids = stop_tokens_in_files(config.model, found.tokenizer)
    return positions


def _critic(found: Examined, positions: int | None) -> int | None:
    """The critic's folder, which may be a reward model's. Returns how many positions all models have."""
    setting = "model.path" if found.config.critic.path is None else "critic.path"
    with found.errors.going_on(), _named(setting):
        critic = critic_of(found.config)
        theirs = check_model_folder(critic, scores=True)
        positions = min((one for one in (positions, theirs) if one is not None), default=None)
        if found.tokenizer is not None and setting == "critic.path":
            check_same_vocabulary(found.tokenizer, critic, where=setting)
    return positions


@contextmanager
def _named(setting: str) -> Iterator[None]:
    """Errors about a model say which setting names it."""
    try:
        yield
    except ModelError as error:
        raise ModelError(str(error).replace("model.path is", f"{setting} is", 1)) from error


def _data(found: Examined, positions: int | None) -> None:
    config, errors, method, tokenizer = found.config, found.errors, found.method, found.tokenizer
    if tokenizer is None:
        return
    if config.method in SAMPLES or (method is not None and method.source == "prompts"):
        feed = PromptFeed(config, tokenizer, errors)
    elif method is not None:
        feed = RowFeed(config, tokenizer, method.task, errors)
    else:
        return
    found.feed = feed
    decoded = 0 if method is None else _decoded_length(feed, config, method)
    if positions is not None and (longest := max(feed.longest, decoded)) > positions:
        remedy = feed.remedy if feed.longest > positions else "lower rollout.max_tokens or data.max_length"
        text = (
            f"the longest sequence has {longest:,} tokens, but the model has {positions:,} positions "
            f"(max_position_embeddings in its config.json); {remedy}, or use a model that reads further"
        )
        with errors.going_on():
            raise ConfigError(text)
    if method is None:
        return
    for name, part in found.parts.items():
        judge.part(name, part, method, tokenizer, found.stop_token_ids)
    if len(feed):
        found.schedule = plan(config, len(feed), rollouts=method.source == "prompts")
        if isinstance(feed, PromptFeed) and feed.replay is not None:
            found.schedule = replace(found.schedule, stop_at=len(feed.replay))
        if found.keeper is not None:
            with errors.going_on():
                found.keeper.check_data(feed.walk())
            if changed := found.keeper.changes():
                logger.warning(
                    "settings are others than %s was trained with: %s", found.keeper.found, "; ".join(changed)
                )
    if feed.train is not None and found.schedule is not None:
        units = sizes_of(feed.train, config)
        found.work = work_of(units, found.schedule, config, decoded_length=decoded)


def _decoded_length(feed: RowFeed | PromptFeed, config: RunConfig, method: Method) -> int:
    """Tokens of the longest sequence that is sampled, its prompt included; 0 where nothing is."""
    if isinstance(feed, PromptFeed):
        return feed.longest
    if feed.train is None or not resamples(config, method):
        return 0
    return int(feed.train.arrays.prompts.max()) + config.rollout.max_tokens


def sizes_of(part: Prepared | Prompts, config: RunConfig) -> Units:
    """Tokens of each unit, with shared prefixes once unless `model.attention` says otherwise."""
    shares = config.model.attention in ("auto", "tree")
    if isinstance(part, Prompts):
        return units_of_prompts(part, config, shares=shares)
    return units_of_rows(part, shares=shares)


def _memory(found: Examined) -> None:
    """The estimate, and a warning where the device has less."""
    assert found.method is not None and found.work is not None, "memory follows from the method and its data"
    try:
        found.memory = estimate(found.config, found.method, found.work)
    except Exception as error:  # a model that has been refused, or whose code needs content: nothing is told
        logger.debug("no estimate of memory: %s", error)
        return
    if not found.memory.fits:
        logger.warning("%s", shortage(found.memory, found.config))
