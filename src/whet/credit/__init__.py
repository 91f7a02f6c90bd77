"""Credit: from rewards to advantages."""

from whet.credit.base import Credit, credit
from whet.credit.group import grpo, grpo_no_std, rloo

__all__ = ["CREDITS", "Credit", "credit"]

CREDITS: dict[str, Credit] = {"grpo": grpo, "grpo_no_std": grpo_no_std, "rloo": rloo}
"""Built-in credit rules by the name that a configuration uses."""
