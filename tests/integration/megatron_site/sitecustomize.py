"""Put before everything else on PYTHONPATH: whoever imports Megatron gets the stand-ins of the tests first."""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from pathlib import Path


class StandIns(MetaPathFinder):
    """Finds nothing, and sees what is looked for."""

    def find_spec(self, name, path, target=None):
        if name == "megatron":
            sys.meta_path.remove(self)
            sys.path.insert(0, str(Path(__file__).parent.parent))
            import megatron_stand_ins  # noqa: F401
        return None


sys.meta_path.insert(0, StandIns())
