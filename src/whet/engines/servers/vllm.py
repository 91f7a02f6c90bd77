"""vLLM's server: token-in, token-out over `/inference/v1/generate`, weights over an extension of its workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from whet.config.engine import EngineConfig
from whet.engines.servers.dialect import Ask, Bucket, Group, News, Start, flags
from whet.engines.servers.http import Channel, Refused, Unreachable
from whet.errors import EngineError
from whet.types import Sampling

WORKER = Path(__file__).parent.parent / "worker"
"""Folder of the extension; nothing but it is put on the server's PYTHONPATH."""
EXTENSION = "whet_worker.Extension"
MODEL = "whet"
PREFIX = "generate-tokens-"
"""What the server puts before the ids of requests."""
STREAM_INTERVAL = 16
"""Tokens that come together: every event costs both sides, and what is lost with a server is at most so much."""


class Vllm:
    """See `Dialect`. Versions 0.26 to 0.32."""

    name = "vllm"
    checks_weights = True
    stops_with_ignore_eos = True
    receives_flat = True
    reads_deltas = True

    def __init__(self) -> None:
        self._extended: dict[str, bool] = {}

    def command(self, config: EngineConfig, start: Start, host: str, port: int) -> list[str]:
        settings: dict[str, Any] = {
            "model": start.model,
            "served_model_name": MODEL,
            "host": host,
            "port": port,
            "enable_scale_out": True,
            "worker_extension_cls": EXTENSION,
            # Under temperature; before top-k and top-p where these are off, see `validate`.
            "logprobs_mode": "processed_logprobs",
            "tensor_parallel_size": config.tensor_parallel,
            "seed": start.seed,
        }
        given: dict[str, Any] = {"dtype": start.dtype, "max_num_seqs": max(start.max_concurrent, 1)}
        given["stream_interval"] = STREAM_INTERVAL
        if start.device == "cpu":
            given["enforce_eager"] = True  # compiling takes longer than it saves on a CPU
        if config.sleep:
            given["enable_sleep_mode"] = True
        if start.adapter_rank is not None:
            given |= {"enable_lora": True, "max_lora_rank": _lora_rank(start.adapter_rank), "max_loras": 2}
        return ["-m", "vllm.entrypoints.openai.api_server", *flags(settings | given | _named(config.options))]

    def environment(self, config: EngineConfig, start: Start) -> Mapping[str, str]:
        found = {
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "PYTHONPATH": str(WORKER),
        }
        if start.device == "cpu":
            found |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
        return found

    def request(self, ask: Ask) -> tuple[str, dict[str, Any]]:
        body: dict[str, Any] = {
            "request_id": ask.id,
            "token_ids": list(ask.tokens),
            "stream": True,
            "cache_salt": f"whet-{ask.version}",
            "sampling_params": _sampling(ask.sampling, ask.stop_token_ids),
        }
        if ask.adapter is not None:
            body["model"] = ask.adapter
        return "/inference/v1/generate", body

    def news(self, event: Mapping[str, Any], told: int) -> News:
        choices = event.get("choices") or []
        if not choices:
            return News([], [])
        choice = choices[0]
        tokens = choice.get("token_ids") or []
        content = (choice.get("logprobs") or {}).get("content") or []
        if len(content) != len(tokens):
            raise EngineError(f"vllm answered {len(tokens)} tokens with {len(content)} logprobs; use vllm 0.26 to 0.32")
        reason = choice.get("finish_reason")
        if reason not in (None, "stop", "length", "abort"):
            raise Unreachable(f"vllm ended a completion with finish reason {reason!r}; see its log")
        versions = choice.get("weight_versions")
        found = None if versions is None else tuple((str(v["version"]), v["start"], v["end"]) for v in versions)
        return News(list(tokens), [entry["logprob"] for entry in content], reason, found)

    async def ready(self, channel: Channel, timeout_s: float) -> None:
        await channel.ask("/health", timeout_s=timeout_s)

    async def working(self, channel: Channel, timeout_s: float) -> None:
        if await self.knows(channel, timeout_s):
            await self._call(channel, "whet_hello", timeout_s=timeout_s)

    async def max_length(self, channel: Channel, timeout_s: float) -> int | None:
        models = await channel.ask("/v1/models", timeout_s=timeout_s)
        return models["data"][0].get("max_model_len")

    async def world_size(self, channel: Channel, timeout_s: float) -> int:
        return (await channel.ask("/get_world_size", timeout_s=timeout_s))["world_size"]

    async def pause(self, channel: Channel, timeout_s: float) -> None:
        await channel.ask("/pause", {}, query={"mode": "keep", "clear_cache": "false"}, timeout_s=timeout_s)

    async def resume(self, channel: Channel, timeout_s: float) -> None:
        await channel.ask("/resume", {}, timeout_s=timeout_s)

    async def abort(self, channel: Channel, ids: Sequence[str], timeout_s: float) -> None:
        if ids:  # none would be all
            await channel.ask("/abort_requests", {"request_ids": [PREFIX + one for one in ids]}, timeout_s=timeout_s)

    async def begin(self, channel: Channel, timeout_s: float) -> None:
        if await self.knows(channel, timeout_s):
            await self._call(channel, "whet_begin", timeout_s=timeout_s)

    async def open_session(self, channel: Channel, timeout_s: float) -> None:
        await self.begin(channel, timeout_s)

    async def close_session(self, channel: Channel, timeout_s: float) -> None:
        """`finish` does it."""

    async def load_files(self, channel: Channel, folder: str, paths: Sequence[str], timeout_s: float) -> None:
        if await self.knows(channel, timeout_s):
            await self._call(channel, "whet_load_files", list(paths), timeout_s=timeout_s)
        else:
            options = {"weights_path": folder}
            body = {"method": "reload_weights", "kwargs": options}
            await channel.ask("/collective_rpc", body, timeout_s=timeout_s, doing="reload weights")

    async def join(self, channel: Channel, group: Group, offset: int, timeout_s: float) -> None:
        await self._require_extension(channel, "broadcast", timeout_s)
        arguments = (group.address, group.port, offset, group.size, group.backend, group.name, group.timeout_s)
        await self._call(channel, "whet_join", *arguments, timeout_s=timeout_s)

    async def receive(self, channel: Channel, bucket: Bucket, version: int, timeout_s: float) -> None:
        await self._call(channel, "whet_receive", bucket.names, bucket.dtypes, bucket.shapes, timeout_s=timeout_s)

    async def open(self, channel: Channel, bucket: Bucket, handles: Sequence[str], timeout_s: float) -> None:
        await self._require_extension(channel, "shared", timeout_s)
        arguments = (handles[0], bucket.names, bucket.dtypes, bucket.shapes)
        await self._call(channel, "whet_open", *arguments, timeout_s=timeout_s)

    async def finish(self, channel: Channel, version: int, timeout_s: float) -> None:
        if await self.knows(channel, timeout_s):
            await self._call(channel, "whet_finish", timeout_s=timeout_s)

    async def label(self, channel: Channel, version: int, timeout_s: float) -> None:
        try:
            await channel.ask("/update_weight_version", {"new_version": str(version)}, timeout_s=timeout_s)
        except Refused as error:  # before 0.30 there were no versions
            if "404" not in str(error):
                raise

    async def version(self, channel: Channel, timeout_s: float) -> str | None:
        try:
            return str((await channel.ask("/weight_info", timeout_s=timeout_s))["weight_version"])
        except Refused:
            return None

    async def bits(self, channel: Channel, timeout_s: float) -> list[dict[str, Any]]:
        if not await self.knows(channel, timeout_s):
            return []
        return await self._call(channel, "whet_bits", timeout_s=timeout_s)

    async def knows(self, channel: Channel, timeout_s: float) -> bool:
        """Whether the server was started with the extension."""
        if channel.address not in self._extended:
            self._extended[channel.address] = await self._has_extension(channel, timeout_s)
        return self._extended[channel.address]

    async def load_adapter(self, channel: Channel, name: str, folder: str, timeout_s: float) -> None:
        await channel.ask("/v1/load_lora_adapter", {"lora_name": name, "lora_path": folder}, timeout_s=timeout_s)

    async def unload_adapter(self, channel: Channel, name: str, timeout_s: float) -> None:
        await channel.ask("/v1/unload_lora_adapter", {"lora_name": name}, timeout_s=timeout_s)

    async def sleep(self, channel: Channel, timeout_s: float) -> None:
        # Level 1 keeps the weights in the memory of the host: nothing has to be sent anew before the next step.
        await channel.ask("/sleep", {}, query={"level": "1"}, timeout_s=timeout_s)

    async def wake(self, channel: Channel, timeout_s: float) -> None:
        await channel.ask("/wake_up", {}, timeout_s=timeout_s)

    async def _has_extension(self, channel: Channel, timeout_s: float) -> bool:
        try:
            await self._call(channel, "whet_hello", timeout_s=timeout_s)
        except (Refused, Unreachable) as error:
            if "whet_hello" in str(error) or "404" in str(error):
                return False
            raise
        return True

    async def _require_extension(self, channel: Channel, transport: str, timeout_s: float) -> None:
        if not await self.knows(channel, timeout_s):
            raise EngineError(
                f"{channel.name} was started without whet's extension of its workers, which engine.publish.by: "
                f"{transport} needs; start it with {_how_to_extend()}, or set engine.publish.by to file"
            )

    async def _call(self, channel: Channel, method: str, *arguments: Any, timeout_s: float) -> list[Any]:
        body = {"method": method, "args": list(arguments), "timeout": timeout_s}
        answer = await channel.ask("/collective_rpc", body, timeout_s=timeout_s + 5.0, doing=method)
        return (answer or {}).get("results", [])


def remedy(external: bool) -> str:
    """What to do where a server does not compute with the weights that it was given."""
    if external:
        return f"start it with {_how_to_extend()}: without it vLLM's CPU build keeps a copy of its first weights"
    return "leave --vllm-worker-extension-cls alone, and see the server's log"


def _how_to_extend() -> str:
    return f"PYTHONPATH={WORKER} and --worker-extension-cls {EXTENSION}"


def _sampling(sampling: Sampling, stop_token_ids: Sequence[int]) -> dict[str, Any]:
    stops = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else set(stop_token_ids))
    found: dict[str, Any] = {
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "seed": sampling.seed & (2**63 - 1),
        "logprobs": 0,
        "stop_token_ids": sorted(stops),
        "ignore_eos": True,  # the ends are those given here, and no others
        "detokenize": bool(sampling.stop),
        "skip_special_tokens": False,
    }
    if sampling.stop:
        found |= {"stop": list(sampling.stop), "include_stop_str_in_output": True}
    return found


def _named(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name.replace("-", "_"): value for name, value in options.items()}


def _lora_rank(rank: int) -> int:
    """The smallest of the ranks that vLLM knows which holds this one."""
    return next((known for known in (1, 8, 16, 32, 64, 128, 256, 320, 512) if known >= rank), rank)
