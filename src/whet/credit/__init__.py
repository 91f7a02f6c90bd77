"""Credit: from rewards to advantages."""

from whet.credit.base import Credit, credit
from whet.credit.distill import opd
from whet.credit.group import grpo, grpo_no_std, maxrl, reinforce_plus_plus_baseline, remax, rloo
from whet.credit.returns import gae, reinforce_plus_plus
from whet.credit.whiten import whiten

__all__ = ["CREDITS", "Credit", "credit", "whiten"]

CREDITS: dict[str, Credit] = {
    "grpo": grpo,
    "grpo_no_std": grpo_no_std,
    "rloo": rloo,
    "maxrl": maxrl,
    "remax": remax,
    "reinforce_plus_plus": reinforce_plus_plus,
    "reinforce_plus_plus_baseline": reinforce_plus_plus_baseline,
    "gae": gae,
    "opd": opd,
}
"""Built-in credit rules by the name that a configuration uses."""
