"""A reward for runs over several processes."""


async def brevity(episode) -> float:
    """Fewer distinct characters are better."""
    return -float(len(set(episode.response)))
