"""Whether a model divides over ranks as the layout asks, as far as its configuration tells."""

from __future__ import annotations

from transformers import PreTrainedConfig

from whet.config.backend import BackendConfig
from whet.errors import ConfigError
from whet.models.shape import experts, kv_heads


def check_divides(config: PreTrainedConfig, backend: BackendConfig) -> None:
    """Raises ConfigError for heads or experts that do not divide over so many ranks."""
    config, name = config.get_text_config(), config.model_type
    tensor, context, expert = backend.tensor_parallel, backend.context_parallel, backend.expert_parallel
    heads, keys, (count, _) = config.num_attention_heads, kv_heads(config), experts(config)
    problems = [
        f"backend.tensor_parallel is {tensor}, but {name} has {number} {what}, which that does not divide; set it to a "
        "divisor, or use backend.context_parallel"
        for what, number in (("heads", heads), ("heads of keys and values", keys))
        if number % tensor
    ]
    if heads % tensor == 0 and (heads // tensor) % context:
        problems.append(
            f"backend.context_parallel is {context}, but each rank has {heads // tensor} heads of {name} for "
            "them to share; set it to a divisor of that"
        )
    if expert > 1 and count == 1:
        problems.append(f"backend.expert_parallel is {expert}, but {name} has no experts; leave it out")
    elif count % expert:
        problems.append(
            f"backend.expert_parallel is {expert}, but {name} has {count} experts, which that does not divide; set it "
            "to a divisor"
        )
    if problems:
        raise ConfigError("; and ".join(problems))
