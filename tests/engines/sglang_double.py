"""A stand-in for SGLang's server: its HTTP API, over the embedded engine and a real model whose weights matter.

`python sglang_double.py --model-path FOLDER --port PORT`. What it answers follows SGLang 0.5.23: names and defaults of
fields, answers 400 outside of a weight update, versions of the weights with every completion, streams that repeat what
was sent before. Options that it has no use for are taken and passed over.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import json
import pickle
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from safetensors import safe_open
from torch import Tensor, distributed
from transformers import AutoModelForCausalLM, AutoTokenizer

from whet.engines.local.engine import LocalEngine
from whet.errors import EngineError
from whet.types import Completion, Sampling

KNOWN = {
    *("max_new_tokens", "temperature", "top_p", "top_k", "sampling_seed", "ignore_eos", "no_stop_trim", "stop"),
    *("skip_special_tokens", "stop_token_ids"),
}
SUCCESS = "Succeeded to update model weights."


class Server:
    """The state behind the endpoints."""

    def __init__(self, folder: str, max_running: int, interval: int) -> None:
        self.folder, self.interval = folder, interval
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        ends = self.model.generation_config.eos_token_id
        self.ends = tuple(ends) if isinstance(ends, list) else (ends,)
        self.engine = LocalEngine(self.model, self.tokenizer, max_concurrent=max_running, timeout_s=3600)
        self.labels = ["default"]
        """The versions of the weights, as they were named, in order; the engine counts them."""
        self.running: dict[str, asyncio.Event] = {}
        self.groups: dict[str, Any] = {}
        self.session = False
        self.released: set[str] = set()
        self.deaf = False
        """Whether weights are passed over, as some builds of servers do, with an answer that all is well."""
        self.base: dict[str, Tensor] | None = None
        self.adapters: dict[str, str] = {}

    @property
    def parameters(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters())

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take weights in by the names of a checkpoint."""
        own = self.parameters
        for name, tensor in weights:
            if name not in own:
                raise KeyError(f"parameter {name} is not known")
            if not self.deaf:
                own[name].copy_(tensor)

    async def changed(self, label: str | None = None) -> None:
        """The weights are others, and may have another name."""
        if label is not None:
            self.labels.append(label)
        await self.engine.update_weights(len(self.labels) - 1)

    async def flush(self, wanted: bool) -> str | None:
        """What stands in the way of emptying the cache, if that is wanted."""
        if wanted and self.running:
            return (
                "Weights were updated, but the cache was not flushed because requests are still running or queued. "
                "Retract or finish them, then call /flush_cache."
            )
        return None

    def sampling(self, params: dict[str, Any]) -> Sampling:
        if strange := set(params) - KNOWN:
            raise ValueError(f"Unexpected sampling parameters: {sorted(strange)}")
        ignore = bool(params.get("ignore_eos", False))
        stops = () if ignore else (*(params.get("stop_token_ids") or ()), *self.ends)  # as SGLang: one for all
        stop = params.get("stop") or ()
        return Sampling(
            max_tokens=params.get("max_new_tokens", 128),
            temperature=params.get("temperature", 1.0),
            top_p=params.get("top_p", 1.0),
            top_k=max(0, params.get("top_k", -1)),
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            stop_token_ids=stops,
            ignore_eos=ignore,
            seed=params.get("sampling_seed") or 42,
        )

    def meta(self, rid: str, prompt: int, pieces: Any, reason: Any, spans: Any) -> dict[str, Any]:
        tokens, logprobs = pieces
        return {
            "id": rid,
            "finish_reason": reason,
            "prompt_tokens": prompt,
            "weight_version": self.labels[-1],
            "completion_tokens": len(tokens),
            "cached_tokens": 0,
            "output_token_logprobs": [[lp, token, None] for lp, token in zip(logprobs, tokens, strict=True)],
            **({} if spans is None else {"weight_versions": spans}),
        }


def reason_of(completion: Completion) -> dict[str, Any]:
    kind = completion.finish_reason
    if kind == "abort":
        return {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
    return {"type": "length", "length": len(completion.tokens)} if kind == "length" else {"type": "stop", "matched": 0}


def bad(message: str, **more: Any) -> JSONResponse:
    return JSONResponse({"success": False, "message": message, **more}, status_code=400)


def good(message: str = "Success", **more: Any) -> JSONResponse:
    return JSONResponse({"success": True, "message": message, **more})


def application(server: Server) -> FastAPI:
    app = FastAPI()
    generation(app, server)
    control(app, server)
    weights(app, server)
    information(app, server)
    return app


def generation(app: FastAPI, server: Server) -> None:
    async def events(body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        rid, tokens = body.get("rid") or base64.b16encode(id(body).to_bytes(8, "big")).decode(), body["input_ids"]
        if (name := body.get("lora_path")) is not None and name not in server.adapters:
            raise ValueError(f"Got LoRA adapter that has never been loaded: {name}")
        sampling = server.sampling(body.get("sampling_params") or {})
        server.engine.validate(tuple(tokens), sampling)
        server.running[rid] = asyncio.Event()
        task = asyncio.create_task(server.engine.generate(tokens, sampling, prefix_key=rid))
        told, request = 0, None
        try:
            while not task.done():
                await asyncio.sleep(0.002)
                request = next((one for one in server.engine._requests() if one.key == rid), request)
                if request is not None and len(request.output) - told >= server.interval and not task.done():
                    told = len(request.output)
                    pieces = list(request.output[:told]), list(request.logprobs[:told])
                    yield {
                        "text": None,
                        "output_ids": pieces[0],
                        "meta_info": server.meta(rid, len(tokens), pieces, None, None),
                    }
            done = await task
            spans = [{"version": server.labels[s.version], "start": s.start, "end": s.end} for s in done.versions]
            pieces = list(done.tokens), list(done.logprobs)
            meta = server.meta(rid, len(tokens), pieces, reason_of(done), spans)
            yield {"text": server.tokenizer.decode(done.tokens), "output_ids": pieces[0], "meta_info": meta}
        finally:
            task.cancel()
            server.running.pop(rid, None)

    @app.post("/generate")
    async def generate(request: Request) -> Response:
        body = await request.json()
        if server.released:
            return JSONResponse({"error": {"message": "memory is released"}}, status_code=500)
        stream = events(body)
        try:
            first = await anext(stream)
        except (ValueError, EngineError, KeyError) as error:
            return JSONResponse({"error": {"message": str(error)}}, status_code=400)
        if not body.get("stream"):
            return JSONResponse([first, *[event async for event in stream]][-1])

        async def lines() -> AsyncIterator[bytes]:
            try:
                yield f"data: {json.dumps(first)}\n\n".encode()
                async for event in stream:
                    yield f"data: {json.dumps(event)}\n\n".encode()
                yield b"data: [DONE]\n\n"
            finally:
                await stream.aclose()

        return StreamingResponse(lines(), media_type="text/event-stream")


def control(app: FastAPI, server: Server) -> None:
    @app.post("/abort_request")
    async def abort_request(request: Request) -> Response:
        body = await request.json()
        if body.get("abort_all"):
            await server.engine.abort()
        elif rid := body.get("rid"):
            await server.engine.abort([one for one in server.running if one.startswith(rid)])
        return Response(status_code=200)

    @app.post("/pause_generation")
    async def pause(request: Request) -> Response:
        mode = (await request.json()).get("mode", "abort")
        if mode not in ("abort", "retract", "in_place"):
            return JSONResponse({"detail": "Invalid mode"}, status_code=422)
        if mode == "abort":
            await server.engine.abort()
        await server.engine.pause()
        return JSONResponse({"message": "Generation paused successfully.", "status": "ok"})

    @app.post("/continue_generation")
    async def go_on(request: Request) -> Response:
        await request.json()
        await server.engine.resume()
        return JSONResponse({"message": "Generation continued successfully.", "status": "ok"})

    @app.post("/flush_cache")
    async def flush_cache() -> Response:
        return Response(status_code=400 if server.running else 200)

    @app.post("/release_memory_occupation")
    async def release(request: Request) -> Response:
        server.released |= set((await request.json()).get("tags") or ["kv_cache", "weights"])
        return Response(status_code=200)

    @app.post("/resume_memory_occupation")
    async def resume(request: Request) -> Response:
        server.released -= set((await request.json()).get("tags") or ["kv_cache", "weights"])
        return Response(status_code=200)


def weights(app: FastAPI, server: Server) -> None:
    @app.post("/update_weights_from_disk")
    async def from_disk(request: Request) -> Response:
        body = await request.json()
        folder = Path(body["model_path"])
        try:
            files = sorted(folder.glob("*.safetensors"))
            if not files or not (folder / "config.json").is_file():
                return bad(f"Failed to get weights iterator: {folder} is no model.", num_paused_requests=0)
            for path in files:
                with safe_open(path, "pt") as file:
                    server.load((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
        except (OSError, KeyError) as error:
            return bad(f"Failed to update weights: {error}.", num_paused_requests=0)
        await server.changed(body.get("weight_version"))
        if why := await server.flush(body.get("flush_cache", True)):
            return bad(why, num_paused_requests=0)
        return good(SUCCESS, num_paused_requests=0)

    @app.post("/init_weights_update_group")
    async def init_group(request: Request) -> Response:
        body = await request.json()
        try:
            server.groups[body.get("group_name", "weight_update_group")] = await asyncio.to_thread(join, body)
        except Exception as error:
            return bad(f"Failed to initialize custom process group: {error}.")
        return good("Succeeded to initialize custom process group.")

    @app.post("/begin_weight_update")
    async def begin(request: Request) -> Response:
        if server.session:
            return bad("a weight-update session is already open; call end_weight_update() first")
        server.session = True
        return good()

    @app.post("/end_weight_update")
    async def end(request: Request) -> Response:
        if not server.session:
            return bad("no weight-update session is open; call begin_weight_update() first")
        server.session = False
        return good()

    @app.post("/update_weights_from_distributed")
    async def from_distributed(request: Request) -> Response:
        body = await request.json()
        if not server.session:
            return bad("update_weights_from_distributed must run between begin_weight_update() and end_weight_update()")
        try:
            received = await asyncio.to_thread(
                receive, server.groups[body.get("group_name", "weight_update_group")], body
            )
            server.load(received)
        except Exception as error:
            return bad(f"Failed to receive weights: {error}")
        await server.changed(body.get("weight_version"))
        if why := await server.flush(body.get("flush_cache", True)):
            return bad(why)
        return good("Succeeded to update parameter online.")

    @app.post("/update_weights_from_tensor")
    async def from_tensor(request: Request) -> Response:
        body = await request.json()
        if not server.session:
            return bad("update_weights_from_tensor must run between begin_weight_update() and end_weight_update()")
        server.load(pickle.loads(base64.b64decode(body["serialized_named_tensors"][0])))
        await server.changed(body.get("weight_version"))
        return good()

    @app.post("/update_weight_version")
    async def update_version(request: Request) -> Response:
        body = await request.json()
        if body.get("abort_all_requests", True):
            await server.engine.abort()
        await server.changed(body["new_version"])
        return good(f"Weight version updated to {body['new_version']}", new_version=body["new_version"])

    @app.api_route("/weights_checker", methods=["GET", "POST"])
    async def checker() -> Response:
        sums = {name: hashlib.sha256(one.numpy().tobytes()).hexdigest() for name, one in server.parameters.items()}
        whole = hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()
        return good(ranks=[{"checksums": sums, "per_gpu_checksum": whole}], per_engine_checksum=whole)

    @app.post("/load_lora_adapter")
    async def load_adapter(request: Request) -> Response:
        body = await request.json()
        merge(server, Path(body["lora_path"]))
        server.adapters[body["lora_name"]] = body["lora_path"]
        await server.changed()
        return JSONResponse({"success": True, "loaded_adapters": server.adapters})

    @app.post("/unload_lora_adapter")
    async def unload_adapter(request: Request) -> Response:
        body = await request.json()
        if server.adapters.pop(body["lora_name"], None) is None:
            return JSONResponse({"success": False, "error_message": "not loaded"}, status_code=400)
        return JSONResponse({"success": True, "loaded_adapters": server.adapters})


def merge(server: Server, folder: Path) -> None:
    """The last adapter that was loaded is the one that counts: one is enough to stand in."""
    own = server.parameters
    if server.base is None:
        server.base = {name: one.clone() for name, one in own.items()}
    server.load(server.base.items())
    config = json.loads((folder / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            if name.endswith(".lora_A.weight"):
                plain = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight") + ".weight"
                a, b = file.get_tensor(name), file.get_tensor(name.replace("lora_A", "lora_B"))
                own[plain].add_(scale * (b @ a))


def information(app: FastAPI, server: Server) -> None:
    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=200)

    @app.get("/health_generate")
    async def health_generate() -> Response:
        return Response(status_code=200)

    @app.get("/model_info")
    async def model_info() -> Response:
        return JSONResponse({"model_path": server.folder, "weight_version": server.labels[-1], "is_generation": True})

    @app.get("/server_info")
    async def server_info() -> Response:
        length = server.model.config.max_position_embeddings
        told = {"model_path": server.folder, "context_length": None, "max_total_num_tokens": length * 8, "tp_size": 1}
        return JSONResponse({**told, "pp_size": 1, "max_req_input_len": length - 5, "version": "0.5.23"})

    @app.post("/test/deaf")
    async def deaf(request: Request) -> Response:
        server.deaf = bool((await request.json())["deaf"])
        return Response(status_code=200)

    @app.post("/get_weights_by_name")
    async def by_name() -> Response:
        return JSONResponse({"error": {"message": "Get parameter by name failed"}}, status_code=400)


def join(body: dict[str, Any]) -> Any:
    """The group, joined as SGLang's `init_custom_process_group` does."""
    from torch.distributed.distributed_c10d import Backend, PrefixStore, _new_process_group_helper, _world

    limit = timedelta(seconds=60)
    address, size, rank = (
        f"tcp://{body['master_address']}:{body['master_port']}",
        body["world_size"],
        body["rank_offset"],
    )
    store, rank, size = next(distributed.rendezvous(address, rank, size, timeout=limit))
    name = body.get("group_name", "weight_update_group")
    group, _ = _new_process_group_helper(
        size, rank, [], Backend(body.get("backend", "nccl")), PrefixStore(name, store), group_name=name, timeout=limit
    )
    _world.pg_group_ranks[group] = {one: one for one in range(size)}
    return group


def receive(group: Any, body: dict[str, Any]) -> list[tuple[str, Tensor]]:
    found = []
    for name, dtype, shape in zip(body["names"], body["dtypes"], body["shapes"], strict=True):
        tensor = torch.empty(shape, dtype=getattr(torch, dtype))
        distributed.broadcast(tensor, src=0, group=group)
        found.append((name, tensor))
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--max-running-requests", type=int, default=16)
    parser.add_argument("--stream-interval", type=int, default=1)
    options, _ = parser.parse_known_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        server = Server(options.model_path, options.max_running_requests, options.stream_interval)
        with suppress(KeyboardInterrupt):
            uvicorn.run(application(server), host=options.host, port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
