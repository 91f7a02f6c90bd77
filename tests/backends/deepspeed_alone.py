"""One rank of the deepspeed backend by itself, with weights divided all the same: what training on several holds not.

python tests/backends/deepspeed_alone.py MODEL TEACHER FOLDER        with the environment of torchrun
"""

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from tests.awkward_units import awkward_units
from whet.backends.deepspeed import DeepSpeedBackend
from whet.backends.device import Arithmetic
from whet.backends.local import LocalBackend, WithoutAdapter
from whet.batch import collate
from whet.config.backend import BackendConfig
from whet.config.model import ModelConfig
from whet.config.optim import OptimConfig
from whet.errors import TrainingError
from whet.losses import LOSSES
from whet.losses.distill import Divergence
from whet.methods import Term
from whet.models.load import load_model, load_tokenizer
from whet.ranks.layout import Layout
from whet.ranks.share import shares
from whet.tally import weight_keys

EXACT = Arithmetic(torch.device("cpu"), None, "highest")
DIVIDED = {"zero_stage": 3, "options": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}
TERMS = [Term("sft", LOSSES["sft"], "token")]


def divided(path, **options):
    cfg = ModelConfig(path=path, **({"adapter": options.pop("adapter")} if "adapter" in options else {}))
    config = BackendConfig(**DIVIDED)
    return DeepSpeedBackend(cfg, load_tokenizer(cfg), config, EXACT, layout=Layout(), **options)


def whole(path):
    cfg = ModelConfig(path=path)
    return LocalBackend(load_model(cfg, EXACT.device), load_tokenizer(cfg), BackendConfig(), EXACT)


def weights_of(backend):
    return {name: weight.clone() for name, weight in backend.weights()}


def main(model: str, teacher: str, folder: str) -> None:
    batch = collate(awkward_units(), share_prefixes=True).weighed(weight_keys(TERMS))
    share = shares(batch, 1, [1.0] * batch.num_units, 8192)[0][1]

    trained = divided(model, optim=OptimConfig())
    assert all(weight.numel() == 0 for weight in trained.model.parameters()), "weights are not divided"
    before = weights_of(trained)
    infinite = batch.with_columns(**{"weights/token": torch.full_like(batch["weights/token"], torch.inf)})
    trained.forward_backward(shares(infinite, 1, [1.0] * batch.num_units, 8192)[0][1], TERMS)
    try:
        trained.optim_step(1e-3)
        raise AssertionError("a gradient that is not finite was used")
    except TrainingError as error:
        assert "Nothing was updated" in str(error)
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(trained).items())

    frozen, own = divided(teacher, frozen=True), weights_of(whole(teacher))
    expected = whole(teacher).forward(batch, {"logprobs"})["logprobs"]
    assert torch.allclose(frozen.forward(share, {"logprobs"})[0]["logprobs"], expected, atol=1e-6)
    frozen.save(Path(folder) / "frozen")
    files = load_file(Path(folder) / "frozen" / "model.safetensors")
    assert all(torch.equal(files[name], weight) for name, weight in own.items())
    frozen.move_towards(divided(model, frozen=True), 0.25)
    for name, weight in frozen.weights():
        assert torch.allclose(weight, own[name].lerp(before[name], 0.25), atol=1e-7), name
    frozen.load(Path(folder) / "frozen")
    assert all(torch.equal(weight, own[name]) for name, weight in frozen.weights())

    student = divided(model, optim=OptimConfig())
    student.compute.learn_from(frozen.compute)
    hidden = frozen.forward(share, {"hidden"})[0]["hidden"]
    asked = Divergence(beta=0.5, temperature=1.0)
    taught = batch.with_columns(teacher_hidden=hidden)
    with student.compute.installed():
        value = student.compute(taught, {asked})[asked]
    alone, other = whole(model), whole(teacher)
    alone.compute.learn_from(other.compute)
    with alone.compute.installed():
        assert torch.allclose(value, alone.compute(taught, {asked})[asked], atol=1e-6)

    adapted = divided(model, adapter={"rank": 4}, optim=OptimConfig())
    adapted.forward_backward(share, TERMS)
    adapted.optim_step(0.1)
    reference = WithoutAdapter(adapted).forward(share, {"logprobs"})[0]["logprobs"]
    assert torch.allclose(reference, whole(model).forward(batch, {"logprobs"})["logprobs"], atol=1e-5)
    assert not torch.allclose(adapted.forward(share, {"logprobs"})[0]["logprobs"], reference, atol=1e-2)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    main(*sys.argv[1:])
    dist.destroy_process_group()
