"""How a command is launched on several processes: `accelerate launch`, its configuration file, torchrun."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from whet.config.conversions import Refused
from whet.config.process_names import deepspeed, fsdp_settings, zero
from whet.config.written import Written, read_document
from whet.migrate.draft import Draft, Left, named
from whet.migrate.shell import Word

_COUNTS = ("num_processes", "nproc_per_node")


def launched(draft: Draft, flags: Mapping[str, list[Word]], beside: Callable[[Word], str]) -> None:
    """Take what the flags of a launcher say of processes, and the file they name. `beside` finds files."""
    if "config_file" in flags:
        given = flags["config_file"][-1]
        if Path(beside(given)).is_file():
            document = read_document(beside(given))
            _accelerate(draft, document.values, document.origin.at(("num_processes",)), given.text)
        else:
            draft.remarks.append(f"{given.text} ({given.source}) is not there, so it was not read: look at backend")
    for name in _COUNTS:
        if name in flags and flags[name][-1].text.isdigit():
            draft.names["num_processes"] = Written(("num_processes",), int(flags[name][-1].text), flags[name][0].source)


def _accelerate(draft: Draft, values: Mapping[str, Any], source: str, file: str) -> None:
    """A configuration file of accelerate: processes, DeepSpeed or FSDP, precision."""
    kind, count = str(values.get("distributed_type", "NO")).upper(), values.get("num_processes", 1)
    if isinstance(count, int) and not isinstance(count, bool) and count > 1:
        draft.names["num_processes"] = Written(("num_processes",), count, source)
    try:
        if kind == "DEEPSPEED":
            _set_all(draft, _deepspeed(values.get("deepspeed_config") or {}), named("deepspeed_config", file))
        elif kind == "FSDP":
            _set_all(draft, fsdp_settings(values.get("fsdp_config") or {"version": 2}), named("fsdp_config", file))
    except Refused as reason:
        section = f"{kind.lower()}_config"
        draft.lost.append(Left(section, values.get(section), file, f"it {reason}"))
    precision = values.get("mixed_precision")
    if precision in ("bf16", "fp16") and precision not in draft.names:
        draft.set("backend.precision", precision, named("mixed_precision", file))


def _deepspeed(written: Mapping[str, Any]) -> Mapping[str, Any]:
    """accelerate writes ZeRO's settings flat, or names DeepSpeed's own file."""
    if "deepspeed_config_file" in written:
        return deepspeed(written["deepspeed_config_file"])
    parts = {part: {"device": written.get(f"offload_{part}_device") or "none"} for part in ("param", "optimizer")}
    return zero({"stage": written.get("zero_stage", 2), **{f"offload_{part}": where for part, where in parts.items()}})


def _set_all(draft: Draft, settings: Mapping[str, Any], source: str) -> None:
    for path, value in settings.items():
        draft.set(path, value, source)


def beside_the_file(draft: Draft) -> None:
    """The file that `deepspeed` names may lie beside the one that names it."""
    written = draft.names.get("deepspeed")
    if written is None or not isinstance(written.value, str) or Path(written.value).is_file():
        return
    if (near := Path(draft.file).parent / written.value).is_file():
        draft.names["deepspeed"] = Written(written.path, str(near), written.source)


def several(draft: Draft) -> None:
    """Processes that are written down go into the configuration, with a backend that has several."""
    written = draft.names.get("num_processes")
    if written is None:
        return
    if written.value == 1:
        draft.take("num_processes")
        return
    chosen = any(one.path == ("backend", "use") for one in draft.settings)
    if not chosen and not ({"deepspeed", "fsdp", "fsdp_config"} & set(draft.names)):
        draft.set("backend.use", "fsdp", named("num_processes", written.source))
