"""Plans of whole runs: which layout is chosen, what to change where none fits, what the command prints."""

from __future__ import annotations

import io
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from tests.runs import config_of, sums, write_rows
from whet.check.examine import examine
from whet.check.memory import estimate, this_device
from whet.cli import main
from whet.config.loader import load
from whet.config.run import RunConfig
from whet.errors import ConfigError, ModelError
from whet.hardware import GIB, Machines, read_machines
from whet.models.tiny import make_tiny
from whet.plan.arrangement import arrangement_of, settings_of
from whet.plan.choose import Planned
from whet.plan.known import known_config
from whet.plan.load import load_of, measured
from whet.plan.models import sized
from whet.plan.remedies import changed, remedies
from whet.plan.report import flags, show_remedy

EIGHT = read_machines("8xH100-80G")


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the config.json of a small model and nothing else."""
    made = make_tiny(tmp_path_factory.mktemp("made"), vocab_size=4096, hidden_size=256, num_heads=8, num_kv_heads=4)
    folder = tmp_path_factory.mktemp("shape")
    shutil.copy(made / "config.json", folder)
    return folder


def grpo(shape: Path | str, **settings) -> RunConfig:
    given = {
        **{"model__path": str(shape), "data__train": "prompts.jsonl", "reward": "math", "rollout__group_size": 4},
        **{"rollout__prompts_per_step": 16, "rollout__max_tokens": 1024, "data__max_prompt_length": 256},
    }
    return config_of("grpo", Path("runs/plan"), **{**given, **settings})


def small(gib: float, count: int = 8) -> Machines:
    """Machines of which a GPU has so much memory."""
    return Machines(replace(EIGHT.gpu, memory=gib * GIB), count)


def test_gpus_are_named_by_number_kind_and_memory():
    assert (EIGHT.devices, EIGHT.gpu.name) == (8, "H100-80G")
    assert read_machines("h200", nodes=3).devices == 3
    assert read_machines("2xL40S").gpu.name == "L40S-48G"
    for wrong, said in [("8xH999", "known are"), ("8xA100", "A100-40G or A100-80G"), ("0xH100-80G", "expected a num")]:
        with pytest.raises(ConfigError, match=said):
            read_machines(wrong)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Qwen/Qwen3-4B", 4.02),
        ("/models/Qwen3-4B-Base", 4.02),
        ("Qwen/Qwen2.5-3B-Instruct", 3.09),
        ("zai-org/GLM-Z1-9B-0414", 9.40),
        ("Qwen/Qwen3-30B-A3B", 30.5),
        ("Qwen/Qwen3-235B-A22B", 235.1),
        ("deepseek-ai/DeepSeek-R1", 671.0),
        ("Qwen/Qwen2-7B", 7.62),
        ("meta-llama/Llama-3.1-8B-Instruct", 8.03),
        ("deepseek-ai/deepseek-coder-6.7b-instruct", 6.74),
    ],
)
def test_known_models_have_as_many_parameters_as_their_cards_say(name: str, billions: float):
    assert sized(grpo(name).model).parameters == pytest.approx(billions * 1e9, rel=3e-3)


def test_of_a_model_that_is_not_known_the_folder_is_asked_for():
    assert known_config("someone/Model-7B") is None
    with pytest.raises(ModelError, match=r"config\.json is enough, or one of the names Qwen/Qwen3-0\.6B"):
        sized(grpo("no/such/folder/anywhere").model)


def test_one_process_on_a_cpu_is_planned_as_check_estimates_it(tiny_qwen: Path):
    config = grpo(tiny_qwen, rollout__max_tokens=32)
    planned = Planned(config, None)
    work = load_of(config, planned.method).work(config, samples=True)
    expected = estimate(config, planned.method, work, this_device(config))
    assert planned.configured.training.peak.total == pytest.approx(expected.peak.total)
    assert planned.configured.speed is None


def test_the_best_layout_is_the_fastest_that_fits_and_can_be_written_down(shape: Path):
    planned = Planned(grpo(shape, engine__use="vllm"), EIGHT)
    best = planned.best
    assert best is not None and best.fits and best.speed is not None
    assert all(best.speed.step_s <= 1.06 * one.speed.step_s for one in planned.candidates if one.fits and one.speed)
    again = arrangement_of(changed(planned.config, settings_of(best.how, 8, planned.config)), samples=True)
    assert again == best.how


@pytest.mark.parametrize("example", ["glm4-9b-grpo/disaggregated", "qwen3-30b-a3b-grpo/grpo"])
def test_the_printed_flags_make_the_best_layout_of_a_file_that_says_another(example: str):
    path = str(Path(__file__).parents[2] / "examples" / f"{example}.yaml")
    planned = Planned(load(None, path, []).config, EIGHT)
    others = [one.how for one in planned.candidates[:: max(1, len(planned.candidates) // 8)]]
    assert planned.best is not None
    for how in (planned.best.how, *others):
        printed = flags(settings_of(how, 8, planned.config)).split()
        assert arrangement_of(load(None, path, printed).config, samples=True) == how
    assert not settings_of(planned.configured.how, 8, planned.config), "what is as it should be is not printed"


@pytest.mark.parametrize("backend", ["fsdp", "deepspeed", "megatron"])
def test_every_candidate_is_a_configuration_without_faults(shape: Path, backend: str):
    planned = Planned(grpo(shape, engine__use="vllm", backend__use=backend, cluster__num_processes=2), EIGHT)
    seen = {one.how for one in planned.candidates}
    assert len(seen) > 4
    for how in seen:
        assert how.total <= 8
        assert arrangement_of(changed(planned.config, settings_of(how, 8, planned.config)), samples=True) == how


def test_devices_that_are_not_there_are_counted(shape: Path):
    settings = {"backend__use": "fsdp", "cluster__num_processes": 6, "engine__use": "vllm", "engine__num_engines": 4}
    assert Planned(grpo(shape, **settings), EIGHT).configured.missing == 2
    together = Planned(grpo(shape, **settings, cluster__colocate=True, engine__sleep=True), EIGHT).configured
    assert together.missing == 0


def test_remedies_add_up_until_the_run_fits_and_then_say_how_many_machines_would_do(shape: Path):
    planned = Planned(grpo(shape, rollout__max_tokens=524288, rollout__group_size=8, engine__use="vllm"), small(7, 1))
    assert planned.best is None
    found = list(remedies(planned))
    *before, last = [one for one in found if "--gpus" not in one.settings]
    assert last.outcome.fits and not any(one.outcome.fits for one in before)
    excesses = [one.outcome.excess for one in [*before, last]]
    assert excesses == sorted(excesses, reverse=True)
    machines = [one for one in found if "--gpus" in one.settings]
    assert len(machines) == 1 and machines[0].outcome.fits
    printed = io.StringIO()
    show_remedy(3, last, Console(file=printed, width=200))
    assert (
        printed.getvalue().startswith(f"  3. --{next(iter(last.settings))} ")
        and ": fits, with local" in printed.getvalue()
    )


def test_more_memory_never_makes_a_plan_slower(shape: Path):
    config = grpo(shape, engine__use="vllm", rollout__max_tokens=4096)
    times = [best.speed.step_s for gib in (8, 12, 80) if (best := Planned(config, small(gib)).best) and best.speed]
    assert len(times) >= 2
    assert times == sorted(times, reverse=True)


def test_the_command_plans_and_its_exit_says_whether_it_fits(
    shape: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    run = tmp_path / "run.yaml"
    run.write_text(f"method: sft\nmodel: {{path: {shape}}}\ndata: {{train: rows.jsonl}}\n")
    assert main(["plan", str(run), "--gpus", "2xA100-40G"]) == 0
    said = capsys.readouterr().out
    for text in ("as configured: local on 1", "best of", "--backend.use fsdp --cluster.num_processes 2", "1.5M"):
        assert text in said
    assert "a step takes" not in said, "of so small a model time says nothing"
    assert main(["plan", str(run), "--gpus", "9xQ1"]) == 2
    assert main(["plan", str(run), "--nodes", "0"]) == 2


def test_check_plans_with_the_lengths_of_the_data(tiny_qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    rows = write_rows(tmp_path / "rows.jsonl", sums(16))
    config = config_of("sft", tmp_path / "run", model__path=str(tiny_qwen), data__train=rows)
    lengths = measured(examine(config))
    assert lengths is not None and (lengths.prompt, lengths.response) == (4, 2)  # `3+4=`; a digit or two, and the end
    run = tmp_path / "run.yaml"
    run.write_text(f"method: sft\nmodel: {{path: {tiny_qwen}}}\ndata: {{train: {rows}}}\n")
    assert main(["check", str(run), "--plan", "--gpus", "8xH100-80G", "--rows", "0"]) == 0
    said = capsys.readouterr().out
    assert "nothing stands in the way" in said and "prompts of 4 tokens (at most 4)" in said
