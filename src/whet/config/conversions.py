"""What can become of another tool's name: it sets settings, has no effect here, or is refused with a reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from whet.config.algorithm_rules import CREDIT_OF, REINFORCES
from whet.config.names import show
from whet.config.run import RunConfig

Converted = Mapping[str, Any]
"""Dotted path of a setting -> its value."""


class Refused(ValueError):
    """A name or its value cannot be honoured; the message says why and what to do."""


@dataclass(frozen=True)
class Unless:
    """A value that holds unless the setting itself is given anywhere."""

    value: Any


@dataclass(frozen=True)
class Alias:
    """One name of another tool and what becomes of it."""

    name: str
    origins: tuple[str, ...]
    """Who uses it."""
    effect: Literal["sets", "checked", "no effect", "refused"]
    convert: Callable[[Any, str], Converted]
    """The value as written and the method of the run -> settings. Raises Refused where it cannot be honoured."""
    targets: tuple[str, ...] = ()
    note: str = ""
    """How values are read, why there is no effect, or why the name is refused."""
    switch: bool = False
    """Whether the flag may stand alone, which means true."""
    check: Callable[[RunConfig, Any], str | None] | None = None
    """What contradicts the value in the finished configuration."""


# How each kind of name is made.


def renamed(origins: tuple[str, ...], name: str, target: str, note: str = "") -> Alias:
    """A name that differs from ours in nothing else."""
    return Alias(name, origins, "sets", lambda value, method: {target: value}, (target,), note)


def converted(
    origins: tuple[str, ...],
    name: str,
    targets: str,
    convert: Callable[[Any], Converted],
    note: str,
    *,
    switch: bool = False,
    check: Callable[[RunConfig, Any], str | None] | None = None,
) -> Alias:
    """A name whose value is said differently here."""
    return Alias(
        name, origins, "sets", lambda value, method: convert(value), tuple(targets.split()), note, switch, check
    )


def of_credit(origins: tuple[str, ...], name: str, option: str) -> Alias:
    """An option of the credit rule, which is the method's own unless another is given."""

    def convert(value: object, method: str) -> Converted:
        return {f"credit.{option}": value, "credit.use": Unless(CREDIT_OF.get(method, "gae"))}

    return Alias(
        name, origins, "sets", convert, (f"credit.{option}", "credit.use"), "of credit `gae` or `reinforce_plus_plus`"
    )


def by_method(name: str, ways: Mapping[tuple[str, ...], Alias], otherwise: str, note: str = "") -> Alias:
    """A name that means different things to different methods; `otherwise` says why the rest have no use for it."""

    def convert(value: object, method: str) -> Converted:
        for methods, alias in ways.items():
            if method in methods:
                return alias.convert(value, method)
        raise Refused(f"cannot be honoured by {method}: {otherwise}")

    targets = tuple(dict.fromkeys(target for alias in ways.values() for target in alias.targets))
    origins = tuple(dict.fromkeys(origin for alias in ways.values() for origin in alias.origins))
    notes = (f"{', '.join(methods)}: {alias.note}" for methods, alias in ways.items() if alias.note)
    switch = any(alias.switch for alias in ways.values())
    return Alias(name, origins, "sets", convert, targets, "; ".join(filter(None, [*notes, note])), switch)


def checked(origins: tuple[str, ...], name: str, note: str, check: Callable[[RunConfig, Any], str | None]) -> Alias:
    """A number that follows from other settings: it sets nothing, and must agree with them."""
    return Alias(name, origins, "checked", lambda value, method: whole_number(value), note=note, check=check)


def idle(origins: tuple[str, ...], name: str, why: str, only: tuple[object, ...] | None = (True, False, None)) -> Alias:
    """A name that needs nothing here, for the values of `only` (None: any); others are refused."""

    def convert(value: object, method: str) -> Converted:
        if only is not None and not any(value == one and type(value) is type(one) for one in only):
            raise Refused(f"cannot be honoured: {why}; leave it out")
        return {}

    # By identity: 1 == True, but a count is no switch.
    takes = {choice for choice in (True, False) if any(one is choice for one in only or ())}
    accepted = "" if only is None or False in takes else f"{' or '.join(map(show, only))} only: "
    return Alias(name, origins, "no effect", convert, note=accepted + why, switch=only is None or True in takes)


def refused(origins: tuple[str, ...], name: str, why: str, off: tuple[object, ...] = (False, None)) -> Alias:
    """The name of something that is not here. Values of `off` ask for nothing and pass."""

    def convert(value: object, method: str) -> Converted:
        if not any(value is one for one in off):
            raise Refused(f"is refused: {why}")
        return {}

    return Alias(name, origins, "refused", convert, note=why, switch=True)


# How values are read.


def switch(value: object) -> bool:
    if not isinstance(value, bool):
        raise Refused("must be true or false")
    return value


def experiment(value: object) -> Converted:
    name = str(value)
    if not name or name in (".", "..") or "/" in name or "\\" in name:
        raise Refused("must be a plain name, as it becomes a folder under runs/; use output_dir for a path")
    return {"output_dir": f"runs/{name}"}


def device(value: object) -> Converted:
    if isinstance(value, str) and value.startswith("cuda:"):
        if value != "cuda:0":
            raise Refused("cannot choose a GPU by number; set CUDA_VISIBLE_DEVICES and use cuda")
        value = "cuda"
    return {"backend.device": "auto" if value is None else value}


def freeze_layers(value: object) -> Converted:
    return {"model.freeze.layers": 0 if value is None else value}


def use_lora(value: object) -> Converted:
    return {"model.adapter.type": "lora"} if switch(value) else {"model.adapter": None}


def train_mode(value: object) -> Converted:
    modes: dict[object, Converted] = {
        "full": {"model.adapter": None},
        "lora": {"model.adapter.type": "lora"},
        "qlora": {"model.adapter.type": "lora", "model.quantization.bits": 4},
    }
    if not isinstance(value, str) or value not in modes:
        raise Refused("must be full, lora or qlora")
    return modes[value]


def load_in(bits: int) -> Callable[[object], Converted]:
    return lambda value: {"model.quantization.bits": bits} if value is not None and switch(value) else {}


def not_load_in(bits: int) -> Callable[[RunConfig, object], str | None]:
    """For a switch that is off: the quantisation that contradicts it."""

    def check(config: RunConfig, value: object) -> str | None:
        quantization = config.model.quantization
        if value is False and quantization is not None and quantization.bits == bits:
            return f"but model.quantization.bits is {bits}; keep one of the two"
        return None

    return check


def variant(name: str) -> Callable[[object], Converted]:
    """A switch of the adapter; off, it makes none."""
    return lambda value: {f"model.adapter.{name}": True} if value is not None and switch(value) else {}


def not_variant(name: str) -> Callable[[RunConfig, object], str | None]:
    def check(config: RunConfig, value: object) -> str | None:
        if value is False and getattr(config.model.adapter, name, False):
            return f"but model.adapter.{name} is true; keep one of the two"
        return None

    return check


def init_lora_weights(value: object) -> Converted:
    if value is False:
        raise Refused("cannot be false: the adapter would begin with a random update; use true (the default)")
    return {"model.adapter.init": "default" if value is True else value}


def precision(name: str) -> Callable[[object], Converted]:
    def convert(value: object) -> Converted:
        if value is None:
            return {}
        return {"backend.precision": name if switch(value) else Unless("float32")}

    return convert


def not_precision(*names: str) -> Callable[[RunConfig, object], str | None]:
    """For a switch that is off: the precisions that contradict it."""

    def check(config: RunConfig, value: object) -> str | None:
        if value is False and config.backend.precision in names:
            return f"but backend.precision is {config.backend.precision}; keep one of the two"
        return None

    return check


def max_steps(value: object) -> Converted:
    return {"train.steps": None if value == -1 else value}


_SCHEDULES: Mapping[object, str] = {"constant_with_warmup": "constant", "cosine_with_min_lr": "cosine"}


def scheduler(value: object) -> Converted:
    return {"optim.schedule": _SCHEDULES.get(value, value) if isinstance(value, str) else value}


def scheduler_kwargs(value: object) -> Converted:
    if value in (None, {}):
        return {}
    if not isinstance(value, dict) or set(value) != {"min_lr_rate"}:
        raise Refused("can hold min_lr_rate alone (optim.min_lr_ratio)")
    return {"optim.min_lr_ratio": value["min_lr_rate"]}


def warmup_steps(value: object) -> Converted:
    is_share = isinstance(value, float) and 0 < value < 1
    return {"optim.warmup_ratio": value} if is_share else {"optim.warmup_steps": value}


def tf32(value: object) -> Converted:
    return {} if value is None else {"backend.matmul": "high" if switch(value) else "highest"}


def use_cpu(value: object) -> Converted:
    return {"backend.device": "cpu"} if switch(value) else {}


def metric(value: object) -> Converted:
    if not isinstance(value, str):
        return {"eval.metric": value}
    return {"eval.metric": "eval/" + value.removeprefix("eval_").removeprefix("eval/")}


def greater_is_better(value: object) -> Converted:
    return {} if value is None else {"eval.mode": "max" if switch(value) else "min"}


def when(section: str, off: Converted) -> Callable[[object], Converted]:
    """`eval_strategy` and `save_strategy`: `steps` leaves the interval to the name beside it."""

    def convert(value: object) -> Converted:
        if value == "epoch":
            return {f"{section}.every_epochs": 1}
        if value in ("no", False, None):
            return off
        if value == "steps":
            return {}
        raise Refused("must be no, steps or epoch")

    return convert


def resume(value: object) -> Converted:
    return {} if value is None else {"checkpoint.resume": value}


def report_to(value: object) -> Converted:
    names = value if isinstance(value, list) else [value]
    if unknown := [name for name in names if name not in ("tensorboard", "all", "none", None)]:
        raise Refused(
            f"cannot include {', '.join(map(str, unknown))}: this version writes TensorBoard files and "
            "metrics.jsonl (always); use tensorboard or none"
        )
    return {"log.tensorboard": "tensorboard" in names or "all" in names}


def top_k(value: object) -> Converted:
    return {"rollout.top_k": 0 if value == -1 else value}


def chat(value: object) -> Converted:
    return {"data.chat": "always" if switch(value) else "never"}


def eps_clip(value: object) -> Converted:
    return {"loss.clip_low": value, "loss.clip_high": Unless(value)}


_CREDITS = {"ppo": "gae", "on_policy_distillation": "opd"}


def estimator(value: object) -> Converted:
    """A credit rule, or a loss that goes with that of GRPO."""
    if value in ("gspo", "cispo", "sapo"):
        return {"credit.use": "grpo", "loss.use": value}
    return {"credit.use": _CREDITS.get(value, value) if isinstance(value, str) else value}


_TYPES = {
    **{"reward": "reward", "dpo": "dpo", "kto": "kto", "cpo": "cpo", "simpo": "simpo", "cposimpo": "cpo-simpo"},
    **{"ppo": "ppo", "rloo": "rloo"},
}


def rlhf_type(value: object) -> Converted:
    kind = str(value).lower().replace("-", "").replace("_", "")
    if kind in _TYPES:
        return {"method": _TYPES[kind]}
    raise Refused(f"cannot be {value}: it must be PPO, RLOO, CPO, DPO, SimPO, CPOSimPO, KTO or Reward")


def whole_number(value: object) -> Converted:
    if isinstance(value, bool) or not isinstance(value, int):
        raise Refused("must be a whole number")
    return {}


def global_batch_size(config: RunConfig, value: int) -> str | None:
    """Compare the samples per optimizer step with what the other settings make of them."""
    if config.method not in REINFORCES:
        rows, accumulation = config.train.batch_size, config.train.accumulation
        if value == rows * accumulation:
            return None
        return (
            f"but train.batch_size {rows} x train.accumulation {accumulation} = {rows * accumulation}; "
            "change one of them, or leave this out"
        )
    rollout = config.rollout
    samples = rollout.prompts_per_step * rollout.group_size
    if value * rollout.optimizer_steps == samples:
        return None
    steps = samples // value if value > 0 and samples % value == 0 else None
    return (
        f"but rollout.prompts_per_step {rollout.prompts_per_step} x rollout.group_size {rollout.group_size} / "
        f"rollout.optimizer_steps {rollout.optimizer_steps} = {samples / rollout.optimizer_steps:g}; "
        + (f"set rollout.optimizer_steps to {steps}, " if steps else "change one of them, ")
        + "or leave this out"
    )
