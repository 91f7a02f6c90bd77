"""What an embedded engine has done since it was made."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Stats:
    """What the engine has done since it was made."""

    generated_tokens: int = 0
    completions: int = 0
    steps: int = 0
    seconds: float = 0.0
    """Spent in steps: prefill, decoding and sampling, not waiting."""
    prefill_tokens: int = 0
    """Prompt tokens computed."""
    prefill_tokens_saved: int = 0
    """Prompt tokens not computed because another request shared them, in flight or ended."""

    @property
    def prefix_hit_rate(self) -> float:
        """Share of the prompt tokens that needed no computation."""
        return self.prefill_tokens_saved / max(1, self.prefill_tokens + self.prefill_tokens_saved)
