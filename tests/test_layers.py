"""The rules of the house: which module may import which, what only one file may touch, how long things get."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "whet"

# A module or folder of src/whet imports only from those to its left, and from itself.
ORDER = (
    *("types", "columns", "errors", "database", "tree", "batch", "tensor", "losses", "credit", "config", "migrate"),
    *("annotate", "shaping", "methods", "tally", "hardware", "models", "flops", "merge"),
    *("checkpoints", "weights", "engines", "data", "rollout"),
    *("ranks", "backends", "scorer", "rewards", "envs", "cluster"),
    *("view", "log", "schedule", "sanity", "recipe", "mix", "speed", "loop", "rollouts_only", "evaluate"),
    *("served", "roles"),
    *("spread", "precompute", "provenance", "feeds", "keeper"),
    *("check", "plan", "compose", "answer"),
    *("sample", "chat", "trainer", "demo", "serve", "manual", "cli", "__main__"),
)

# These rooms see less than what lies to their left.
NARROW = {
    "types": set(),
    "losses": {"whet.types", "whet.errors", "whet.columns", "whet.batch", "whet.tensor.kl"},
    "credit": {"whet.types", "whet.errors", "whet.columns", "whet.batch"},
}

# Of the packages that are not ours, these rooms import no others (the standard library is free). A loss states
# the limits of its options by pydantic's annotations.
OUTSIDE = {
    "types": set(),
    "errors": set(),
    "losses": {"torch", "pydantic"},
    "credit": {"torch", "pydantic"},
    "config": {"pydantic", "yaml"},
}

# Heavy or optional packages, and the only files, or rooms, that import them.
CONFINED = {
    "vllm": {"engines/worker/"},
    "sglang": set(),
    "megatron": {"backends/megatron/"},
    "deepspeed": {"backends/deepspeed.py"},
    "ray": {"cluster/ray/"},
    "peft": {"models/"},
    "httpx2": {"engines/servers/http.py", "rewards/endpoint.py", "rewards/judge.py"},
    "bitsandbytes": {"models/quantize.py"},
    "fastapi": {"serve/"},
    "starlette": {"serve/"},
    "uvicorn": {"serve/"},
    "math_verify": {"rewards/math_worker.py"},
    "bm25s": {"envs/retriever.py"},
}

NAMELESS = {"util", "utils", "helper", "helpers", "common", "misc"}
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80


def imports_of(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything imported, wherever it stands in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{prefix}.{alias.name}") for alias in node.names)


def import_violations(path: Path, package: Path, tree: ast.Module) -> Iterator[str]:
    relative = path.relative_to(package)
    room = relative.parts[0].removesuffix(".py")
    for line, name in imports_of(tree):
        where = f"{relative.as_posix()}:{line}"
        top, *below = name.split(".")
        if name.startswith("."):
            yield f"{where} imports {name}; write the full name, whet..."
        elif top == "whet":
            yield from (f"{where} {fault}" for fault in own_faults(room, name, below))
        elif top in CONFINED and not any(relative.as_posix().startswith(place) for place in CONFINED[top]):
            yield f"{where} imports {top}, which only {' and '.join(sorted(CONFINED[top]))} may"
        elif room in OUTSIDE and top not in OUTSIDE[room] and top not in sys.stdlib_module_names:
            yield f"{where} imports {top}; {room} imports only {sorted(OUTSIDE[room]) or 'the standard library'}"


def own_faults(room: str, name: str, below: list[str]) -> Iterator[str]:
    """What is wrong with `room` importing `name`, which is ours and goes on after `whet` with `below`."""
    target = below[0] if below else ""
    if room == "__init__":
        yield f"imports {name}; the package itself imports nothing"
    elif target in ("", "__version__") or target == room:
        return
    elif target not in ORDER:
        yield f"imports {name}, which has no place in ORDER"
    elif ORDER.index(target) > ORDER.index(room):
        yield f"imports {name}, which lies to the right of {room}"
    elif room in NARROW and not any(f"{name}.".startswith(f"{allowed}.") for allowed in NARROW[room]):
        yield f"imports {name}; {room} imports only {', '.join(sorted(NARROW[room])) or 'nothing of ours'}"


def shape_violations(path: Path, package: Path, tree: ast.Module) -> Iterator[str]:
    """Names that say nothing, and files and functions that have grown too long."""
    relative = path.relative_to(package)
    for part in relative.with_suffix("").parts:
        if part in NAMELESS:
            yield f"{relative.as_posix()}: nothing is called {part}; name it after what it holds"
    lines = len(path.read_text(encoding="utf-8").splitlines())
    if lines > MAX_FILE_LINES:
        yield f"{relative.as_posix()} has {lines} lines, more than {MAX_FILE_LINES}"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield f"{relative.as_posix()}:{node.lineno} {node.name} has {length} lines, not {MAX_FUNCTION_LINES}"


def violations(package: Path) -> list[str]:
    """Every broken rule in a package folder, one line each."""
    found = []
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package)
        room = relative.parts[0].removesuffix(".py")
        if room not in (*ORDER, "__init__"):
            found.append(f"{relative.as_posix()}: {room} has no place in ORDER")
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        found += import_violations(path, package, tree)
        found += shape_violations(path, package, tree)
        if not ast.get_docstring(tree):
            found.append(f"{relative.as_posix()} does not open with a sentence that says what it is")
    return list(dict.fromkeys(found))


def test_imports_and_lengths_keep_the_rules_of_the_house():
    assert PACKAGE.is_dir()
    assert violations(PACKAGE) == []


def test_every_folder_is_a_package_that_says_what_it_holds():
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_configuration_is_read_without_torch():
    code = "import sys, whet.config.run; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "src", check=True)
    assert done.stdout.strip() == "[]"


BROKEN = {
    "an import from the right": ("batch.py", "from whet.losses.sft import sft"),
    "an import from the right by way of the package": ("batch.py", "from whet import loop"),
    "an import from the right inside a function": ("tree.py", "def grow():\n    import whet.batch"),
    "a relative import": ("losses/sft.py", "from ..batch import Batch"),
    "a loss that looks at a model": ("losses/sft.py", "from whet.tensor.attention import attention"),
    "a loss that leans on another package": ("losses/sft.py", "import transformers"),
    "a credit rule that imports a loss": ("credit/group.py", "from whet.losses.policy import ppo_clip"),
    "a configuration that imports torch": ("config/run.py", "import torch"),
    "an engine's package outside its file": ("engines/local/engine.py", "import vllm"),
    "ray outside its file": ("backends/local.py", "def start():\n    from ray import init"),
    "peft outside the models": ("checkpoints/export.py", "from peft import PeftModel"),
    "math-verify outside its reward": ("data/rows.py", "from math_verify import parse"),
    "a room that is not in the order": ("cellar/wine.py", "bottles = 1"),
    "an import of a room that is not in the order": ("loop.py", "import whet.cellar"),
    "a file called utils": ("data/utils.py", "size = 1"),
    "a folder called common": ("data/common/rows.py", "size = 1"),
    "a package that imports at once": ("__init__.py", "from whet.types import Sample"),
    "a file that is too long": ("loop.py", "\n".join(f"step_{i} = {i}" for i in range(MAX_FILE_LINES))),
    "a function that is too long": ("loop.py", "def run():\n" + "    step = 1\n" * MAX_FUNCTION_LINES),
}

FINE = {
    "an import from the left": ("loop.py", "from whet.batch import Batch"),
    "an import within the room": ("losses/policy.py", "from whet.losses.sft import sft"),
    "a loss with its own means": ("losses/policy.py", "import math\nimport torch\nfrom whet.tensor.kl import k3"),
    "the version": ("cli.py", "from whet import __version__"),
    "an engine's package in its file": ("engines/worker/worker.py", "import vllm"),
    "peft in the models": ("models/adapters.py", "from peft import LoraConfig"),
}


def write(package: Path, name: str, code: str) -> None:
    path = package / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'"""A file."""\n{code}\n', encoding="utf-8")


@pytest.mark.parametrize("name,code", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_rule_is_reported_with_its_file(tmp_path: Path, name: str, code: str):
    write(tmp_path, name, code)
    assert [found.startswith(name) for found in violations(tmp_path)] == [True]


@pytest.mark.parametrize("name,code", FINE.values(), ids=FINE.keys())
def test_what_is_allowed_is_not_reported(tmp_path: Path, name: str, code: str):
    write(tmp_path, name, code)
    assert violations(tmp_path) == []


def test_a_file_without_its_sentence_is_reported(tmp_path: Path):
    (tmp_path / "loop.py").write_text("step = 1\n", encoding="utf-8")
    assert violations(tmp_path) == ["loop.py does not open with a sentence that says what it is"]
