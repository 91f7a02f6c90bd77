"""SGLang's server: token-in, token-out over `/generate`, weights over its own update calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from whet.config.engine import EngineConfig
from whet.engines.servers.dialect import Ask, Bucket, Group, News, Start, flags
from whet.engines.servers.http import Channel, Refused, Unreachable
from whet.errors import EngineError

STREAM_INTERVAL = 16
"""Tokens that come together; see `vllm.STREAM_INTERVAL`."""
ABSENT = ("404", "Not Found")


class Sglang:
    """See `Dialect`. Version 0.5.23, and those from 0.5.11 on as far as they have the same calls.

    Seeds count only where the server runs with `--sglang-enable-deterministic-inference`.
    """

    name = "sglang"
    checks_weights = False
    stops_with_ignore_eos = False
    receives_flat = False
    reads_deltas = False

    def __init__(self) -> None:
        self._groups: dict[str, str] = {}
        """The process group that each server has joined."""

    def command(self, config: EngineConfig, start: Start, host: str, port: int) -> list[str]:
        settings: dict[str, Any] = {
            "model_path": start.model,
            "host": host,
            "port": port,
            "tp_size": config.tensor_parallel,
            "random_seed": start.seed,
        }
        given: dict[str, Any] = {"dtype": start.dtype, "max_running_requests": max(start.max_concurrent, 1)}
        given["stream_interval"] = STREAM_INTERVAL
        if start.device == "cpu":
            given |= {"device": "cpu", "disable_overlap_schedule": True}
        if config.sleep:
            given["enable_memory_saver"] = True
        if start.adapter_rank is not None:
            given |= {"enable_lora": True, "max_lora_rank": start.adapter_rank, "max_loras_per_batch": 2}
            given["lora_target_modules"] = ["all"]
        options = {name.replace("-", "_"): value for name, value in config.options.items()}
        return ["-m", "sglang.launch_server", *flags(settings | given | options)]

    def environment(self, config: EngineConfig, start: Start) -> Mapping[str, str]:
        found = {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"} if start.device == "cpu" else {}
        return found

    def request(self, ask: Ask) -> tuple[str, dict[str, Any]]:
        sampling = ask.sampling
        params: dict[str, Any] = {
            "max_new_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "sampling_seed": sampling.seed & (2**63 - 1),
            "ignore_eos": sampling.ignore_eos,  # which holds for all stop tokens: see `Server._cut`
            "no_stop_trim": True,
            "skip_special_tokens": False,
        }
        if stops := {*sampling.stop_token_ids, *(() if sampling.ignore_eos else ask.stop_token_ids)}:
            params["stop_token_ids"] = sorted(stops)
        if sampling.stop:
            params["stop"] = list(sampling.stop)
        body: dict[str, Any] = {
            "rid": ask.id,
            "input_ids": list(ask.tokens),
            "sampling_params": params,
            "return_logprob": True,
            "logprob_start_len": -1,
            "stream": True,
            "extra_key": f"whet-{ask.version}",
        }
        if ask.adapter is not None:
            body["lora_path"] = ask.adapter
        return "/generate", body

    def news(self, event: Mapping[str, Any], told: int) -> News:
        meta = event.get("meta_info")
        if meta is None:
            raise Unreachable(f"sglang answered an event without meta_info: {str(event)[:200]}")
        entries = meta.get("output_token_logprobs") or []
        total = meta.get("completion_tokens", len(entries))
        # Events hold everything so far, or what is new where the server streams incrementally.
        fresh = entries[told:] if len(entries) == total else entries
        if told + len(fresh) != total and fresh:
            raise EngineError(
                f"sglang told of {total} tokens and of {len(entries)} logprobs, {told} of them known; use sglang "
                "0.5.11 to 0.5.23"
            )
        finish = meta.get("finish_reason")
        reason = finish.get("type") if isinstance(finish, dict) else finish
        if reason not in (None, "stop", "length", "abort"):
            raise Unreachable(f"sglang ended a completion with finish reason {finish!r}; see its log")
        if reason == "abort" and isinstance(finish, dict) and (status := finish.get("status_code")):
            kind = Refused if status < 500 else Unreachable
            raise kind(f"sglang gave up a request ({status}): {finish.get('message')}")
        return News(
            [entry[1] for entry in fresh], [entry[0] for entry in fresh], reason, _versions(meta, reason, total)
        )

    async def ready(self, channel: Channel, timeout_s: float) -> None:
        await channel.ask("/health", timeout_s=timeout_s)

    async def working(self, channel: Channel, timeout_s: float) -> None:
        await channel.ask("/health_generate", timeout_s=timeout_s)

    async def max_length(self, channel: Channel, timeout_s: float) -> int | None:
        info = await channel.ask("/server_info", timeout_s=timeout_s)
        found = info.get("context_length") or info.get("max_total_num_tokens")
        req = info.get("max_req_input_len")
        return found if found is not None else req

    async def world_size(self, channel: Channel, timeout_s: float) -> int:
        info = await channel.ask("/server_info", timeout_s=timeout_s)
        return int(info.get("tp_size", 1)) * int(info.get("pp_size", 1))

    async def pause(self, channel: Channel, timeout_s: float) -> None:
        await channel.ask("/pause_generation", {"mode": "in_place"}, timeout_s=timeout_s)

    async def resume(self, channel: Channel, timeout_s: float) -> None:
        await channel.ask("/continue_generation", {}, timeout_s=timeout_s)

    async def abort(self, channel: Channel, ids: Sequence[str], timeout_s: float) -> None:
        for one in ids:
            await channel.ask("/abort_request", {"rid": one}, timeout_s=timeout_s)

    async def begin(self, channel: Channel, timeout_s: float) -> None:
        """What is loaded from files needs no beginning; see `receive` and `open`."""

    async def load_files(self, channel: Channel, folder: str, paths: Sequence[str], timeout_s: float) -> None:
        body = {"model_path": folder, "flush_cache": False}
        await self._done(channel, "/update_weights_from_disk", body, timeout_s)

    async def join(self, channel: Channel, group: Group, offset: int, timeout_s: float) -> None:
        body = {
            "master_address": group.address,
            "master_port": group.port,
            "rank_offset": offset,
            "world_size": group.size,
            "group_name": group.name,
            "backend": group.backend,
        }
        await self._done(channel, "/init_weights_update_group", body, timeout_s)
        self._groups[channel.address] = group.name

    async def open_session(self, channel: Channel, timeout_s: float) -> None:
        """Weights may be sent piece by piece from now on. Servers before 0.5.23 need no telling."""
        try:
            await self._done(channel, "/begin_weight_update", {}, timeout_s)
        except Refused as error:
            if not any(sign in str(error) for sign in ABSENT):
                raise

    async def close_session(self, channel: Channel, timeout_s: float) -> None:
        """All pieces have come."""
        try:
            await self._done(channel, "/end_weight_update", {}, timeout_s)
        except Refused as error:
            if not any(sign in str(error) for sign in ABSENT):
                raise

    async def receive(self, channel: Channel, bucket: Bucket, version: int, timeout_s: float) -> None:
        body = {
            "names": bucket.names,
            "dtypes": bucket.dtypes,
            "shapes": bucket.shapes,
            "group_name": self._groups.get(channel.address, "whet"),
            "flush_cache": False,  # refused while requests are there; `extra_key` keeps old prefixes from new prompts
            "weight_version": str(version),
        }
        await self._done(channel, "/update_weights_from_distributed", body, timeout_s)

    async def open(self, channel: Channel, bucket: Bucket, handles: Sequence[str], timeout_s: float) -> None:
        body = {"serialized_named_tensors": list(handles), "flush_cache": False}
        await self._done(channel, "/update_weights_from_tensor", body, timeout_s)

    async def finish(self, channel: Channel, version: int, timeout_s: float) -> None:
        """What was loaded is in use."""

    async def label(self, channel: Channel, version: int, timeout_s: float) -> None:
        body = {"new_version": str(version), "abort_all_requests": False}
        await self._done(channel, "/update_weight_version", body, timeout_s)

    async def version(self, channel: Channel, timeout_s: float) -> str | None:
        for path in ("/model_info", "/get_model_info"):
            try:
                found = await channel.ask(path, timeout_s=timeout_s)
            except Refused:
                continue
            if (version := found.get("weight_version")) is not None:
                return str(version)
        return None

    async def bits(self, channel: Channel, timeout_s: float) -> list[dict[str, Any]]:
        try:
            answer = await channel.ask("/weights_checker", {"action": "checksum"}, timeout_s=timeout_s)
        except Refused:
            return []
        return [{"checksum": answer.get("per_engine_checksum") or answer.get("ranks")}]

    async def load_adapter(self, channel: Channel, name: str, folder: str, timeout_s: float) -> None:
        await self._done(channel, "/load_lora_adapter", {"lora_name": name, "lora_path": folder}, timeout_s)

    async def unload_adapter(self, channel: Channel, name: str, timeout_s: float) -> None:
        await self._done(channel, "/unload_lora_adapter", {"lora_name": name}, timeout_s)

    async def sleep(self, channel: Channel, timeout_s: float) -> None:
        await channel.ask("/release_memory_occupation", {"tags": ["kv_cache", "weights"]}, timeout_s=timeout_s)

    async def wake(self, channel: Channel, timeout_s: float) -> None:
        await channel.ask("/resume_memory_occupation", {"tags": ["weights", "kv_cache"]}, timeout_s=timeout_s)

    async def _done(self, channel: Channel, path: str, body: dict[str, Any], timeout_s: float) -> None:
        answer = await channel.ask(path, body, timeout_s=timeout_s)
        if isinstance(answer, dict) and answer.get("success") is False:
            raise Refused(f"{channel.name} answers POST {path}: {answer.get('message') or answer.get('error_message')}")


def remedy(external: bool) -> str:
    """What to do where a server does not compute with the weights that it was given."""
    return "use sglang 0.5.11 to 0.5.23, without quantisation of its own, and see its log"


def _versions(meta: Mapping[str, Any], reason: str | None, total: int) -> tuple[tuple[str, int, int], ...] | None:
    """Spans are told with the last event; before it they may still grow."""
    if reason is None or (told := meta.get("weight_versions")) is None:
        return None
    return tuple((str(span["version"]), span["start"], span["end"]) for span in told)
