"""`whet serve`: load a model and answer requests until told to stop."""

from __future__ import annotations

import argparse
import asyncio
import signal

from whet.config.run import RunConfig
from whet.engines.local.engine import LocalEngine
from whet.log import logger
from whet.models.load import check_model_folder, load_tokenizer
from whet.recipe import method_of
from whet.roles import load_policy
from whet.serve.server import Server, check_address


def serve(options: argparse.Namespace) -> None:
    """Serve `options.model` until SIGINT or SIGTERM.

    Raises ModelError for a model that cannot be loaded or served, ConfigError for an address that cannot be used.
    """
    config = RunConfig.model_validate({"model": {"path": options.model, "dtype": options.dtype}})
    check_address(options.host, options.api_key)
    check_model_folder(config.model)
    tokenizer = load_tokenizer(config.model)
    policy = load_policy(config, method_of(config), tokenizer, train=False)
    engine = LocalEngine(
        policy.backend.model,
        tokenizer,
        stop_token_ids=policy.stop_token_ids,
        max_concurrent=options.max_concurrent,
        timeout_s=options.timeout_s,
        autocast=policy.arithmetic.autocast,
        prefix_cache_mb=options.prefix_cache_mb,
    )
    server = Server(
        engine,
        tokenizer,
        name=options.name or options.model,
        host=options.host,
        port=options.port,
        api_key=options.api_key,
        max_requests=options.max_requests,
    )
    asyncio.run(_until_told(server, engine))


async def _until_told(server: Server, engine: LocalEngine) -> None:
    told, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, told.set)
    try:
        async with server:
            logger.info("serving at %s; Ctrl-C stops", server.url)
            await told.wait()
    finally:
        await engine.close()
