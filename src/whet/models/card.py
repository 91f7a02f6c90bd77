"""The card that a final model carries: what it was made from and how."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from whet.models.source import ADAPTER_CONFIG


def write_card(
    folder: Path, *, name: str, base_model: str, method: str, settings: str, metrics: Mapping[str, float]
) -> None:
    """Write `README.md` into a folder that holds a model or an adapter: name, base model, method, evaluation, settings
    (YAML)."""
    rows = "".join(f"| {name} | {value:.6g} |\n" for name, value in sorted(metrics.items()))
    evaluation = f"## Evaluation\n\n| metric | value |\n|---|---|\n{rows}\n" if rows else ""
    library = "peft" if (folder / ADAPTER_CONFIG).is_file() else "transformers"
    text = (
        f"---\nlibrary_name: {library}\ntags: [whet, {method}]\n---\n\n# {name}\n\n"
        f"Trained from `{base_model}` with `whet {method}`.\n\n{evaluation}## Settings\n\n```yaml\n{settings}```\n"
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
