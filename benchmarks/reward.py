"""The reward of the reinforcement-learning benchmark: a plain rule, so that no reward model runs."""


def vowel_share(text: str) -> float:
    """Share of the characters that are vowels."""
    return sum(character in "aeiou" for character in text) / max(1, len(text))


async def reward(episode) -> float:
    """The rule as whet calls it."""
    return vowel_share(episode.response)
