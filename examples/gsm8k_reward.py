"""A reward for GSM8K: 1 where the number behind #### is that of the label, and a little for writing one at all."""

import re

FINAL = re.compile(r"####\s*(-?[\d,.]*\d)")


def final(episode, *, form: float = 0.1) -> dict[str, float]:
    said, known = FINAL.findall(episode.response), FINAL.findall(str(episode.prompt.label))
    right = bool(said) and said[-1].replace(",", "") == known[-1].replace(",", "")
    return {"score": float(right) or form * bool(said), "right": float(right), "form": float(bool(said))}
