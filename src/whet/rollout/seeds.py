"""Seeds that depend on what they are for and on nothing else, the same in every process and version."""

from __future__ import annotations

import hashlib
import json


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2**63) made of `parts`, such as (run seed, group id, index)."""
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
