"""The models of a run by role: the policy, its critic, and the frozen reference and teacher beside it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from whet.annotate import Annotation, TeacherTopK
from whet.backends.device import Arithmetic, choose
from whet.backends.local import LocalBackend, WithoutAdapter
from whet.backends.protocol import Backend, RankBackend
from whet.config.model import FreezeConfig, ModelConfig
from whet.config.parallel_rules import is_spread
from whet.config.plugin import resolve
from whet.config.rules import DISTILLS
from whet.config.run import RunConfig
from whet.engines.local.engine import LocalEngine
from whet.engines.local.weights import num_bytes, own_copy
from whet.engines.protocol import Engine
from whet.engines.servers.engine import ServerEngine
from whet.errors import ConfigError
from whet.methods import REFERENCE, Method
from whet.models.adapters import has_adapter, reference_is_adapter_off
from whet.models.load import load_model, load_tokenizer, stop_token_ids, stop_tokens_in_files
from whet.models.source import adapter_base
from whet.ranks.crew import Crew
from whet.ranks.layout import Layout
from whet.ranks.led import Led
from whet.recipe import method_of
from whet.served import SERVERS, server_engine
from whet.weights.stamp import Stamp, stamp

logger = logging.getLogger(__name__)

BACKENDS: dict[str, Any] = {"local": LocalBackend}
"""What makes a backend, by name."""
SPREAD = {
    "fsdp": "whet.backends.fsdp:FsdpBackend",
    "deepspeed": "whet.backends.deepspeed:DeepSpeedBackend",
    "megatron": "whet.backends.megatron:MegatronBackend",
}
"""Backends over several processes, each imported where it is chosen."""
ENGINES: dict[str, Any] = {"local": LocalEngine, **dict.fromkeys(SERVERS, server_engine)}


@dataclass
class Policy:
    """A model ready to compute and to answer, the frozen models beside it, and what was resolved on the way."""

    config: RunConfig
    method: Method
    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: tuple[int, ...]
    arithmetic: Arithmetic
    backends: dict[str, Backend]
    crew: Crew | None = None
    """The ranks that the models are spread over, led from here."""
    read: dict[str, Stamp] = field(default_factory=dict)
    """The files of weights of what samples, by folder, as they were when they were read."""
    servers: dict[str, ServerEngine] = field(default_factory=dict)
    """Engines on servers that run, by the role of their model."""

    @property
    def backend(self) -> Backend:
        return self.backends["policy"]

    @property
    def lmbda(self) -> float:
        """Share of the steps of a distillation that train on the policy's own completions."""
        return share_on_policy(self.config, self.method)

    @property
    def resamples(self) -> bool:
        """Whether the rows' completions are replaced by sampled ones."""
        return resamples(self.config, self.method)

    @property
    def computed_once(self) -> list[tuple[Annotation, str]]:
        """The annotations of rows that are computed before the first step, and the role that computes each."""
        found: list[tuple[Annotation, str]] = []
        for stage in self.method.annotate:
            if stage == REFERENCE and self.config.reference.precompute:
                found.append((stage, "reference"))
            if isinstance(stage, TeacherTopK) and not self.resamples:
                found.append((stage, "teacher"))
        return found

    def content(self, role: str) -> str:
        """What the outputs of the model in this role follow from."""
        backend = self.backends[role]
        told = backend.describe()
        words = backend.compute.words if role == "teacher" else "all"  # what it shares with the student
        known = (told["device"], told["precision"], told["attention"], words)
        return " ".join([backend.digest(), *map(str, known)])

    def release(self, role: str) -> None:
        """Let go of a frozen model that nothing runs any more, its annotations computed once."""
        once = {stage for stage, _ in self.computed_once}
        if not any(role in stage.roles for stage in self.method.annotate if stage not in once):
            self.backends.pop(role)
            if self.crew is not None:
                self.crew.release(role)

    def engine(self, role: str = "policy", *, own_weights: bool = False) -> Engine:
        """A new engine over the weights of the model in this role, or over a copy of them that `update_weights`
        brings up to date, so that one thread may train while another samples. It samples from a copy as well where
        no process has the whole model."""
        if self.config.engine.use in SERVERS:
            return self._on_servers(role)
        config, backend = self.config.engine, self.backends[role]
        special: dict[str, Any] = {}
        if config.use in ENGINES:  # a user's engine need not know of these
            special["packed_weights"] = config.packed_weights
            special["cache"] = config.cache
            special["prefix_cache_mb"] = config.kept_mb(has_env=self.config.env is not None)
        model = backend.model
        if isinstance(backend, Led):
            model = load_model(self._config_of(role), self.arithmetic.device).requires_grad_(False).eval()
            special["weights_from"] = partial(backend.weights, trained=True)
        elif own_weights:
            special["weights_from"] = model
            model = own_copy(model)
        if "weights_from" in special:
            logger.info("the engine samples from a copy of the weights, %.0f MiB", num_bytes(model) / 2**20)
        return engine_maker(self.config)(
            model,
            self.tokenizer,
            stop_token_ids=self.stop_token_ids,
            max_concurrent=config.max_concurrent,
            timeout_s=config.timeout_s,
            autocast=self.arithmetic.autocast,
            **special,
        )

    def _config_of(self, role: str) -> ModelConfig:
        """What the model in a role that samples begins as."""
        if role == "teacher":
            return frozen_models(self.config, self.method)["distill.teacher"]
        return self.config.model

    def _on_servers(self, role: str) -> Engine:
        """The engine of this role's servers, which all who ask share: servers are not started twice."""
        known = self.servers.get(role)
        if known is None or known.health()["status"] == "closed":
            known = server_engine(
                self.config, self.backends[role], self.tokenizer, self.stop_token_ids, self.arithmetic, self.read
            )
            self.servers[role] = known
        return known


def share_on_policy(config: RunConfig, method: Method) -> float:
    """Share of the steps of a distillation that train on the policy's own completions."""
    if config.distill.lmbda is not None:
        return config.distill.lmbda
    return 0.5 if method.name == "gkd" else 0.0


def resamples(config: RunConfig, method: Method) -> bool:
    """Whether the rows' completions are replaced by sampled ones."""
    return method.name in DISTILLS and (share_on_policy(config, method) > 0 or config.distill.seq_kd)


def engine_maker(config: RunConfig) -> Any:
    """What makes the run's engine. Raises ConfigError for an unknown one."""
    return resolve(config.engine.use, ENGINES, what="engine", where="engine.use")


def backend_maker(config: RunConfig) -> Any:
    """What makes the run's backends. Raises ConfigError for an unknown one."""
    use = config.backend.use
    return resolve(SPREAD.get(use, use), BACKENDS, what="backend", where="backend.use")


def load_policy(
    config: RunConfig,
    method: Method,
    tokenizer: PreTrainedTokenizerBase,
    *,
    train: bool,
    crew: Crew | None = None,
) -> Policy:
    """Load the model on its device, with an optimizer if it is to be trained, and the frozen models it needs.

    Evaluation of what was sampled needs no frozen model, that of rows needs all. With a `crew`, all its ranks load
    their part of each model, and the backends are those of all.
    """
    if crew is None:
        if is_spread(config):
            raise ConfigError(
                f"backend.use is {config.backend.use!r} over {config.cluster.size} processes, which only the command "
                "line starts (whet METHOD CONFIG.yaml); set backend.use to local here"
            )
        return _load_policy(config, method, tokenizer, train)
    with crew.loading((config, train)):
        policy = _load_policy(config, method, tokenizer, train, crew.layout)
    led: dict[str, Backend] = {role: Led(crew, role, own, config.backend) for role, own in policy.backends.items()}
    return replace(policy, backends=led, crew=crew)


def load_part(config: RunConfig, train: bool, layout: Layout) -> Mapping[str, RankBackend]:
    """What a rank that follows holds of each model, by role."""
    policy = _load_policy(config, method_of(config), load_tokenizer(config.model), train, layout)
    return policy.backends  # pyright: ignore[reportReturnType]


def _load_policy(
    config: RunConfig,
    method: Method,
    tokenizer: PreTrainedTokenizerBase,
    train: bool,
    ranks: Layout | None = None,
) -> Policy:
    arithmetic = choose(config.backend)
    if train and arithmetic.device.type == "cpu" and config.model.dtype == "float16":
        raise ConfigError("model.dtype is 'float16', which a CPU does not train in; use float32 or bfloat16")
    torch.manual_seed(config.seed)
    read = {path: stamp(path) for path in (config.model.path, config.distill.teacher) if path is not None}
    loader = _Loader(config, method, tokenizer, arithmetic, train, ranks)
    shared = {"values": True} if train and "values" in method.outputs_of("policy") else {}
    optim = config.optim if train else None
    backends = {"policy": loader.backend(config.model, scores=method.scores, optim=optim, **shared)}
    roles = method.roles if train or method.source == "rows" else frozenset()
    if "reference" in roles:
        backends["reference"] = loader.reference(backends["policy"])
    if "critic" in roles:
        optim = config.critic.optim(config.optim) if train else None
        backends["critic"] = loader.backend(critic_of(config), scores=True, optim=optim)
    if "teacher" in roles:
        backends["teacher"] = loader.frozen(frozen_models(config, method)["distill.teacher"])
        backends["policy"].compute.learn_from(backends["teacher"].compute)
    stops = stop_token_ids(backends["policy"].model, tokenizer) if ranks is None else None
    stops = stops or stop_tokens_in_files(config.model, tokenizer)  # a part of a model may not know them
    return Policy(config, method, tokenizer, stops, arithmetic, backends, read=read)


def frozen_models(config: RunConfig, method: Method) -> dict[str, ModelConfig]:
    """The models that the configuration names beside the policy, by the setting that names them."""
    model, distill, found = config.model, config.distill, {}
    if config.reference.path is not None and "reference" in method.roles:
        plain = {"path": config.reference.path, "adapter": None, "revision": None, "freeze": FreezeConfig()}
        found["reference.path"] = model.model_copy(update=plain)
    if distill.teacher is not None and "teacher" in method.roles:
        found["distill.teacher"] = ModelConfig(
            path=distill.teacher,
            dtype=distill.dtype or model.dtype,
            quantization=distill.quantization,
            attention=model.attention,
            trust_remote_code=model.trust_remote_code,
        )
    return found


def critic_of(config: RunConfig) -> ModelConfig:
    """The model that a critic of its own begins as."""
    if config.critic.path is None:
        return config.model
    critic = config.model.model_copy(update={"path": config.critic.path, "revision": None})
    # An adapter is trained on; there is no second one on top of it.
    return critic if adapter_base(critic) is None else critic.model_copy(update={"adapter": None})


@dataclass(frozen=True)
class _Loader:
    """Makes backends that share device, arithmetic and temperature."""

    config: RunConfig
    method: Method
    tokenizer: PreTrainedTokenizerBase
    arithmetic: Arithmetic
    train: bool
    ranks: Layout | None

    def backend(self, model: ModelConfig, *, scores: bool = False, frozen: bool = False, **options: Any) -> Backend:
        """A backend over a model that is loaded now."""
        sampled = self.method.source == "prompts"
        options["attention"] = self.config.model.attention
        options["temperature"] = self.config.rollout.temperature if sampled else 1.0
        make, config = backend_maker(self.config), self.config.backend
        if self.ranks is not None:
            options |= {"layout": self.ranks, "scores": scores, "frozen": frozen}
            return make(model, self.tokenizer, config, self.arithmetic, **options)
        loaded = load_model(model, self.arithmetic.device, scores=scores)
        loaded = loaded.requires_grad_(False) if frozen else loaded
        return make(loaded, self.tokenizer, config, self.arithmetic, **options)

    def frozen(self, model: ModelConfig) -> Backend:
        """A model of its own that is never trained."""
        return self.backend(model, frozen=True)

    def reference(self, policy: Backend) -> Backend:
        """Another model if one is named; under a new adapter, or one that is only evaluated, the policy with its
        adapter off; otherwise, and under an adapter that is trained on, a second copy of what the run began with.

        Where it is computed before the first step, the policy itself is still that copy.
        """
        settings, model = self.config.reference, self.config.model
        if settings.path is not None:
            other = self.frozen(frozen_models(self.config, self.method)["reference.path"])
            if settings.sync_steps is not None:
                _check_same_shapes(other.model, policy.model, settings.path)
            return other
        if reference_is_adapter_off(policy.model) or (not self.train and has_adapter(policy.model)):
            return WithoutAdapter(policy)
        if settings.precompute and not _held_against(self.method):
            return policy
        return self.frozen(model)


def _check_same_shapes(reference: nn.Module, policy: nn.Module, path: str) -> None:
    """Raises ConfigError unless weights of the one can move towards those of the other."""
    theirs = {name: tuple(weight.shape) for name, weight in reference.named_parameters()}
    ours = {name: tuple(weight.shape) for name, weight in policy.named_parameters()}
    if theirs != ours:
        name = next(name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name))
        raise ConfigError(
            f"reference.sync_steps moves the reference towards the policy, but reference.path is {path!r}, whose "
            f"{name} is {theirs.get(name, 'missing')} where the policy's is {ours.get(name, 'missing')}; give a model "
            "of the same shape, or leave one of the two out"
        )


def _held_against(method: Method) -> bool:
    """Whether more than the logprobs of rows is asked of the reference, so that it stays for the whole run."""
    return any("reference" in stage.roles for stage in method.annotate if stage != REFERENCE)
