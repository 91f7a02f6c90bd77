"""The card of a final model."""

import pytest
import yaml

from whet.models.card import write_card


@pytest.mark.parametrize("file,library", [("config.json", "transformers"), ("adapter_config.json", "peft")])
def test_the_card_says_what_loads_the_folder_and_how_it_came_to_be(tmp_path, file, library):
    (tmp_path / file).write_text("{}")
    known = {"name": "mine", "base_model": "Qwen/Qwen3-0.6B", "method": "dpo", "settings": "seed: 3\n"}
    write_card(tmp_path, **known, metrics={"eval/loss": 0.25})
    _, head, body = (tmp_path / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head) == {"library_name": library, "tags": ["whet", "dpo"]}
    assert "Trained from `Qwen/Qwen3-0.6B` with `whet dpo`." in body
    assert "| eval/loss | 0.25 |" in body and "```yaml\nseed: 3\n```" in body
