"""A reward that takes its time, so that a run can be interrupted."""

import asyncio


async def brevity(episode) -> float:
    """Fewer distinct characters are better."""
    await asyncio.sleep(0.2)
    return -float(len(set(episode.response)))
