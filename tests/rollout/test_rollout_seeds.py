"""Seeds depend on their parts alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from whet.rollout.seeds import derive_seed


def test_a_seed_is_the_same_in_every_process():
    code = "from whet.rollout.seeds import derive_seed; print(derive_seed(3, 'g12', 5))"
    source = Path(__file__).resolve().parents[2] / "src"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=source, check=True)
    assert int(done.stdout) == derive_seed(3, "g12", 5) == 7330921957092048839


def test_every_part_counts_and_where_it_stands():
    seeds = [derive_seed(*parts) for parts in ((0, "g1", 2), (0, "g12"), (0, "g2", 1), (1, "g1", 2), (0, "g", 12))]
    assert len(set(seeds)) == len(seeds)


def test_seeds_fit_a_signed_64_bit_number():
    seeds = [derive_seed(0, "g", index) for index in range(500)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62
