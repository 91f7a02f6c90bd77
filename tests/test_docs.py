"""What the documentation shows is true: its Python runs, its YAML and its commands load, its links exist.

The blocks of one file run from top to bottom in one namespace and one empty folder. That folder holds
`train.jsonl` and `eval.jsonl` (questions with answers), `prompts.jsonl` and `held_out.jsonl` (with labels), all of
them also in `data/`, and, under each name of MODELS, a tiny model in the place of the one that the documentation
names; a tiny reward model is `runs/reward`. A block whose first line is a comment naming a file (`# my_rewards.py`,
`# sft.yaml`) is saved there under that name as well. `<!-- no-run: why -->` above a block leaves it out.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

from reward_models import make_reward_model
from whet.config.loader import from_values, load
from whet.config.run import RunConfig
from whet.envs.registry import build_env
from whet.recipe import method_of
from whet.rewards.registry import build_scorer

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md")])
EXAMPLES = sorted(ROOT.glob("examples/**/*.yaml"))
MODELS = ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-8B", "model")

FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)```", re.M | re.S)
SKIPPED = re.compile(r"<!--\s*no-run:[^>]*\S\s*-->\s*$")
FILE_NAME = re.compile(r"# ([\w/.-]+\.(?:py|yaml))\s*$", re.M)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the line of its first line of code, its code, whether it is run."""

    language: str
    line: int
    code: str
    run: bool


def blocks_of(text: str) -> list[Block]:
    found = []
    for match in FENCE.finditer(text):
        indent = len(match["indent"])
        code = "".join(line[indent:] for line in match["code"].splitlines(keepends=True))
        line = text.count("\n", 0, match.start("code")) + 1
        found.append(Block(match["language"], line, code, not SKIPPED.search(text[: match.start()])))
    return found


def blocks_to_run(page: Path, language: str) -> list[Block]:
    return [block for block in blocks_of(page.read_text(encoding="utf-8")) if block.language == language and block.run]


def pages_with(language: str) -> list:
    """The pages that hold a block of that language to run, as parameters named by their path."""
    return [pytest.param(page, id=page.relative_to(ROOT).as_posix()) for page in PAGES if blocks_to_run(page, language)]


def save_named(blocks: list[Block]) -> None:
    for block in blocks:
        if name := FILE_NAME.match(block.code):
            path = Path(name[1])
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.code, encoding="utf-8")


def run_python(page: Path) -> dict:
    """Run the Python blocks of a page in the current folder; tracebacks show the page's own lines."""
    save_named(blocks_to_run(page, "yaml") + blocks_to_run(page, "python"))
    namespace = {"__name__": "__main__"}
    for block in blocks_to_run(page, "python"):
        exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), namespace)
    return namespace


def settings_of(code: str) -> dict:
    """A YAML block as a whole configuration: one that shows only some sections gets what every run needs."""
    settings = yaml.safe_load(code)
    assert isinstance(settings, dict), "a YAML block holds a mapping"
    if "model_name_or_path" in settings:  # another tool's names: everything is there
        return settings
    if not isinstance(settings.get("model"), str):
        settings["model"] = {"path": MODELS[0]} | settings.get("model", {})
    settings["data"] = {"train": "train.jsonl"} | settings.get("data", {})
    if settings.get("method") in ("grpo", "sample"):
        settings.setdefault("reward", "exact")
    return settings


def commands_of(page: Path) -> list[list[str]]:
    """The commands of whet that take a configuration, as words: `["sft", "sft.yaml", "--optim.lr", "2e-5"]`."""
    lines = "\n".join(block.code for block in blocks_to_run(page, "bash")).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith("whet ")]
    commands = [words[1:] for words in commands if words[1] in ("sft", "grpo", "sample", "eval")]
    long = {"--then": "--sample.then"}
    return [[long.get(word, word) for word in words] for words in commands if "--help" not in words]


def check(config: RunConfig) -> None:
    """Raise ConfigError, a ValueError, where losses, credit, rewards or environment do not fit the settings."""
    if config.method != "sample":
        method_of(config)
    build_env(config.env)
    rewards = config.reward if isinstance(config.reward, list) else [config.reward] if config.reward else []
    of_models = (reward for reward in rewards if reward.use == "model")
    if rewards and all(Path(reward.options["path"]).is_dir() for reward in of_models):
        build_scorer(config.reward)


@pytest.fixture(scope="session")
def tiny_reward(tiny_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_reward_model(tiny_qwen, tmp_path_factory.mktemp("tiny") / "reward")


@pytest.fixture
def reader(tmp_path: Path, tiny_qwen: Path, tiny_reward: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that a reader of the documentation sits in."""
    rows = [{"prompt": f"What is {a} + {b}?", "response": str(a + b)} for a in range(6) for b in range(6)]
    prompts = [{"prompt": row["prompt"], "label": row["response"]} for row in rows]
    files = {"train": rows[:28], "eval": rows[28:], "prompts": prompts[:28], "held_out": prompts[28:]}
    (tmp_path / "data").mkdir()
    for name, part in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
        (tmp_path / "data" / f"{name}.jsonl").symlink_to(tmp_path / f"{name}.jsonl")
    for name in MODELS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(tiny_qwen)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "reward").symlink_to(tiny_reward)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before, precision = set(sys.modules), torch.get_float32_matmul_precision()
    yield tmp_path
    torch.set_float32_matmul_precision(precision)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize("page", pages_with("python"))
def test_python_of_the_page_runs(page: Path, reader: Path):
    assert run_python(page)


@pytest.mark.parametrize("page", pages_with("yaml"))
def test_yaml_of_the_page_is_a_configuration(page: Path, reader: Path):
    save_named(blocks_to_run(page, "python"))
    for block in blocks_to_run(page, "yaml"):
        try:
            check(from_values(settings_of(block.code)).config)
        except ValueError as error:
            pytest.fail(f"{page.name}:{block.line}: {error}")


@pytest.mark.parametrize("page", [page for page in pages_with("bash") if commands_of(page.values[0])])
def test_commands_of_the_page_are_configurations(page: Path, reader: Path, monkeypatch: pytest.MonkeyPatch):
    save_named(blocks_to_run(page, "yaml") + blocks_to_run(page, "python"))
    if page.parent.name == "examples":
        monkeypatch.chdir(page.parent)
    for command, *words in commands_of(page):
        file = words.pop(0) if words and not words[0].startswith("-") else None
        try:
            method = command if command != "eval" else None
            check(load(method, file, words, trains=command != "eval").config)
        except ValueError as error:
            pytest.fail(f"{page.name}: whet {command} {file or ''} {' '.join(words)}: {error}")


@pytest.mark.parametrize("example", [pytest.param(path, id=path.name) for path in EXAMPLES])
def test_example_is_a_configuration(example: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(example.parent)
    check(load(None, str(example), []).config)


def code_in(text: str) -> str:
    """All that stands in code: shell blocks and single backticks."""
    shell = [block.code for block in blocks_of(text) if block.language in ("bash", "sh", "console", "")]
    return "\n".join(shell + re.findall(r"`([^`\n]+)`", text))


def named(pattern: str) -> dict[str, str]:
    """What `pattern` finds in the code of the pages, each with one page that names it."""
    found = {}
    for page in PAGES:
        for name in re.findall(pattern, code_in(page.read_text(encoding="utf-8")), re.M):
            found[name] = page.name
    return found


def test_make_targets_of_the_pages_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    in_pages = named(r"(?:^|&& |\$ )make ([a-z]+)")
    assert {"demo", "test"} <= set(in_pages)
    assert {name: page for name, page in in_pages.items() if name not in targets} == {}


def test_commands_of_the_pages_exist():
    in_pages = named(r"(?:^|&& |\$ |/)whet ([a-z]+)\b(?! =)")
    if not in_pages:
        pytest.skip("the pages name no command of whet")
    done = subprocess.run(
        [sys.executable, "-m", "whet.cli", "--help"], capture_output=True, text=True, cwd=ROOT / "src", check=True
    )
    commands = set(re.findall(r"[a-z]+", done.stdout))
    assert {name: page for name, page in in_pages.items() if name not in commands} == {}


def test_links_between_the_pages_lead_somewhere():
    dead = {}
    for page in PAGES:
        for link, place in re.findall(
            r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", FENCE.sub("", page.read_text(encoding="utf-8"))
        ):
            if ":" in link:
                continue
            target = page.parent / link if link else page
            if not target.exists() or (place and place not in headings(target)):
                dead[f"{link}#{place}"] = page.name
    assert dead == {}


def headings(page: Path) -> set[str]:
    """The places in a page that a link may lead to."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_error_messages_of_the_table_are_those_of_the_code():
    """Of each message, its longest stretch without a value must stand in some string of the source."""
    code = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.glob("src/whet/**/*.py"))
    strings = re.sub(r"\"\s*\n\s*f?\"", "", code)
    table = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").partition("## Memory")[0]
    messages = re.findall(r"^\| `([^`]+)`", table, re.M)
    unknown = []
    for message in messages:
        fragments = re.split(r"…|[:;]|'[^']*'|\d[\d,.%]*|\w+\.\w+|\([^)]*\)", message)
        if max(fragments, key=len).strip(" ;,:") not in strings:
            unknown.append(message)
    assert len(messages) > 20 and unknown == []


def test_every_paper_that_the_code_names_is_in_the_index():
    id_of_paper = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
    index = set(id_of_paper.findall((ROOT / "docs" / "papers.md").read_text(encoding="utf-8")))
    named = {
        number: path.relative_to(ROOT).as_posix()
        for path in ROOT.glob("src/whet/**/*.py")
        for number in id_of_paper.findall(path.read_text(encoding="utf-8"))
    }
    assert named and {number: path for number, path in named.items() if number not in index} == {}


def page_of(folder: Path, text: str) -> Path:
    page = folder / "page.md"
    page.write_text(text, encoding="utf-8")
    return page


def test_blocks_share_a_namespace_and_import_the_files_they_name(reader: Path):
    page = page_of(
        reader,
        "```python\n# shown_rewards.py\ndef exact(x):\n    return x\n```\n"
        "```python\nfrom shown_rewards import exact as again\n```\n"
        "1. indented\n   ```python\n   total = again(2) + exact(3)\n   ```\n",
    )
    assert run_python(page)["total"] == 5


def test_a_failing_block_shows_its_line(reader: Path):
    page = page_of(reader, "# Title\n\n```python\nx = 1\nraise KeyError(x)\n```\n")
    with pytest.raises(KeyError) as failure:
        run_python(page)
    assert failure.traceback[-1].lineno + 1 == 5


def test_a_block_is_left_out_only_with_a_reason():
    shown, left_out = "```python\nx = 1\n```\n", "<!-- no-run: needs two machines -->\n\n"
    assert [block.run for block in blocks_of(left_out + shown + "<!-- no-run: -->\n" + shown)] == [False, True]


def test_a_misspelt_setting_in_a_block_is_found():
    with pytest.raises(ValueError, match="optimm"):
        from_values(settings_of("optimm: {lr: 1.0e-5}\n"))


def test_a_misspelt_option_of_the_readers_own_code_is_found(reader: Path):
    (reader / "own_rewards.py").write_text("def exact(episode, *, most=1): ...\n", encoding="utf-8")
    with pytest.raises(ValueError, match="mosst"):
        check(from_values(settings_of('method: grpo\nreward: {use: "own_rewards:exact", mosst: 2}\n')).config)
