"""Where a launch script of slime puts a run: Megatron for training, SGLang for sampling, on how many GPUs."""

from __future__ import annotations

from whet.migrate.draft import Draft, named

CONCURRENT = 512
"""Sequences that each of slime's servers is sent at a time, where the script does not say."""


def place(draft: Draft) -> None:
    """Backend, processes and engines of a script.

    What slime takes for granted is written down: Megatron trains (unless `train_backend` says otherwise), SGLang
    samples. A script of one GPU that divides nothing stays with one process and the embedded engine.
    """
    nodes, per_node = draft.number("actor_num_nodes", 1), draft.number("actor_num_gpus_per_node", 1)
    if nodes * per_node == 1 and draft.value("rollout_num_gpus", 1) == 1:
        for name in ("colocate", "rollout_num_gpus", "rollout_num_gpus_per_engine"):
            draft.pass_over(name, "engine and trainer share one device, and its weights")
        for name in [one for one in draft.names if one.startswith("sglang_")]:
            draft.pass_over(name, "the embedded engine samples")
        _parallel(draft)
        return
    if "train_backend" not in draft.names:
        draft.defaults["train_backend"] = "megatron"
    _parallel(draft)
    if draft.method == "sft":
        for name in ("colocate", "rollout_num_gpus", "rollout_num_gpus_per_engine"):
            draft.pass_over(name, "nothing is sampled")
        return
    _engines(draft, nodes * per_node)


def _parallel(draft: Draft) -> None:
    """Sizes of 1 are left out, and with them what only goes with larger ones."""
    if draft.number("tensor_model_parallel_size", 1) == 1:
        draft.pass_over("sequence_parallel", "there is nothing to share without tensor_model_parallel_size above 1")
    if draft.number("expert_model_parallel_size", 1) == 1:
        draft.pass_over("expert_tensor_parallel_size", "experts are not divided")
    if draft.value("recompute_granularity") == "selective":
        draft.lose("recompute_granularity", "it is whole layers or none here: backend.activation_checkpointing")


def _engines(draft: Draft, training: int) -> None:
    """Servers on GPUs of their own, or on all those that train."""
    each = draft.number("rollout_num_gpus_per_engine", 1)
    colocate = bool(draft.value("colocate"))
    total = training if colocate else draft.number("rollout_num_gpus", 1)
    source = "colocate" if colocate else "rollout_num_gpus"
    told = named(source, draft.names[source].source) if source in draft.names else "slime's default"
    draft.set("engine.use", "sglang", told)
    draft.take("rollout_num_gpus")
    if total % each:
        draft.remarks.append(f"rollout_num_gpus_per_engine {each} does not divide the {total} GPUs that sample")
    engines = max(1, total // each)
    if engines > 1:
        draft.set("engine.num_engines", engines, told)
    concurrency = draft.take("sglang_server_concurrency")
    most = engines * (
        concurrency.value if concurrency is not None and isinstance(concurrency.value, int) else CONCURRENT
    )
    wanted = draft.number("over_sampling_batch_size", draft.number("rollout_batch_size", 32))
    draft.set("engine.max_concurrent", min(most, wanted * draft.number("n_samples_per_prompt", 1)), told)
