"""The examples of many GPUs: they fit where they say, and run with a tiny model of the same architecture."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from shrunk import EXAMPLES, FAMILIES, FILES, shrunk

from reward_models import make_reward_model
from whet.compose import compose
from whet.config.loader import load
from whet.envs.retriever import Index, Server, read_corpus
from whet.hardware import read_machines
from whet.log import METRICS_FILE
from whet.migrate.run import import_file
from whet.models.tiny import make_tiny
from whet.plan.choose import Planned

NAMES = [f"{path.parent.name}/{path.stem}" for path in FILES]
PLANNED = re.compile(r"whet plan (\S+\.yaml) --gpus (\S+)(?: --nodes (\d+))?(?: --reward\.path (\S+))?")


@pytest.fixture
def search(tmp_path: Path) -> Iterator[str]:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"contents": f"{a}+{a} is {2 * a}"}) + "\n" for a in range(9)))
    server = Server(Index(read_corpus(corpus)), port=0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.url
    server.shutdown()
    server.server_close()


def test_there_is_a_page_for_each_and_its_folder_is_in_the_table():
    table = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for name in FAMILIES:
        assert (EXAMPLES / name / "README.md").is_file()
        assert f"({name}/README.md)" in table


@pytest.mark.parametrize("example", FILES, ids=NAMES)
def test_an_example_fits_on_the_gpus_that_its_page_names(example: Path):
    page = (example.parent / "README.md").read_text(encoding="utf-8")
    file, gpus, nodes, reward = next(found for found in PLANNED.findall(page) if found[0] == example.name)
    config = load(None, str(example), ["--reward.path", reward] if reward else []).config
    outcome = Planned(config, read_machines(gpus, int(nodes or 1))).configured
    assert outcome.fits, f"{file}: {outcome.training.peak}"
    assert outcome.how.total == read_machines(gpus, int(nodes or 1)).devices


@pytest.mark.parametrize("example", FILES, ids=NAMES)
def test_an_example_runs_with_a_tiny_model(example: Path, tmp_path: Path, request: pytest.FixtureRequest):
    settings = {}
    if example.parent.name == "rloo-7b":
        make_tiny(tmp_path / "base", family="qwen3")
        settings["reward__path"] = str(make_reward_model(tmp_path / "base", tmp_path / "reward"))
    if example.parent.name == "search-r1-lite":
        settings["env__url"] = request.getfixturevalue("search")
    config = shrunk(example, tmp_path, **settings)
    if config.rollout.filter is not None:  # an untrained model is always wrong: every group would be left out
        config = shrunk(example, tmp_path, **settings, reward="random")
    run = compose(config)
    asyncio.run(run.train())
    lines = [json.loads(line) for line in (tmp_path / "out" / METRICS_FILE).read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines if "loss" in line or "train/loss" in line] == [1, 2]
    assert (tmp_path / "out" / "checkpoint-2").is_dir()


def test_the_guides_script_imports_into_a_configuration_that_fits(tmp_path: Path):
    """The flags of slime's GLM-4-9B guide: four GPUs train, four sample."""
    flags = """
        --hf-checkpoint /root/GLM-Z1-9B-0414 --ref-load /root/GLM-Z1-9B-0414_torch_dist --load /root/x --save /root/x
        --prompt-data /root/dapo-math-17k.jsonl --input-key prompt --label-key label --apply-chat-template
        --rollout-shuffle --rm-type deepscaler --num-rollout 3000 --rollout-batch-size 32 --n-samples-per-prompt 8
        --rollout-max-response-len 8192 --rollout-temperature 0.8 --num-steps-per-rollout 1 --balance-data
        --save-interval 20 --eval-interval 5 --eval-prompt-data /root/aime-2024.jsonl --n-samples-per-eval-prompt 16
        --eval-max-response-len 16384 --eval-top-p 0.7 --tensor-model-parallel-size 2 --sequence-parallel
        --pipeline-model-parallel-size 1 --context-parallel-size 2 --expert-model-parallel-size 1
        --expert-tensor-parallel-size 1 --recompute-granularity full --recompute-method uniform
        --recompute-num-layers 1 --use-dynamic-batch-size --max-tokens-per-gpu 4608 --advantage-estimator grpo
        --use-kl-loss --kl-loss-coef 0.00 --kl-loss-type low_var_kl --entropy-coef 0.00 --eps-clip 0.2
        --eps-clip-high 0.28 --optimizer adam --lr 1e-6 --lr-decay-style constant --weight-decay 0.1 --adam-beta1 0.9
        --adam-beta2 0.98 --rollout-num-gpus-per-engine 2 --actor-num-nodes 1 --actor-num-gpus-per-node 4
        --rollout-num-gpus 4"""
    script = tmp_path / "run-glm4-9B.sh"
    script.write_text("ray job submit -- python3 train.py " + " ".join(flags.split()) + "\n", encoding="utf-8")
    imported = import_file("slime", str(script), method=None, dataset_dir=None)
    assert imported.lost == [] and imported.missing == [] and imported.config is not None
    outcome = Planned(imported.config, read_machines("8xH100-80G")).configured
    assert outcome.fits and outcome.how.total == 8
    assert str(outcome.how) == "megatron on 4 (data 1, tensor 2, context 2, recomputing); 2 sglang of 2"
