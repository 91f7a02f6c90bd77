"""The reward `code` gives 1 to programs that pass their tests, and 0 to everything that only looks like it."""

from __future__ import annotations

import asyncio
import time

import pytest

from whet.rewards.code import CodeReward, program_in
from whet.rewards.sandbox import syscalls
from whet.types import Episode, Prompt

if syscalls.supported() is not None:
    pytest.skip(f"no sandbox here: {syscalls.supported()}", allow_module_level=True)

ADD = {"inputs": ["1 2\n", "3 4\n", "-1 1\n"], "outputs": ["3", "7", "0"]}
SQUARE = {"fn_name": "square", "inputs": [[2], [-3], [0]], "outputs": [4, 9, 0]}
ASSERTIONS = ["assert square(2) == 4", "assert square(-3) == 9", "assert not square(0)"]
CHECK = "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-3) == 9\n\ncheck(square)\n"
CHEATS = {
    "exit": "import sys; sys.exit(0)",
    "exit at once": "import os; os._exit(0)",
    "exit when called": "import os\ndef square(x): os._exit(0)",
    "equal to everything": "class All:\n    def __eq__(self, other): return True\ndef square(x): return All()",
    "int that is equal": "class All(int):\n    def __eq__(self, other): return True\ndef square(x): return All(5)",
    "no assertions": "import builtins\nbuiltins.AssertionError = KeyError\ndef square(x): return 5",
    "forged report": 'import os\nos.write(3, b\'{"value": 4}\\n{"value": 9}\\n{"value": 0}\\n\')\nos._exit(0)',
    "endless": "def square(x):\n    while True: pass",
    "bomb": "import os\nwhile True: os.fork()",
    "reader": "def square(x): return open('/etc/passwd').read()",
    "killer": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
    "hoarder": "hoard = []\nwhile True: hoard.append(bytearray(1 << 24))",
    "flooder": "while True: print('x' * 10000)",
}


async def graded(response: str, label: object, **options: object) -> float:
    prompt = Prompt("p", [1], "write it", label=label)
    return await CodeReward(**options)(Episode(prompt, "g", 0, response=response))  # type: ignore[arg-type]


def fenced(program: str) -> str:
    return f"Here it is:\n```python\n{program}\n```\nDone."


@pytest.mark.parametrize("label", [SQUARE, ASSERTIONS, CHECK], ids=["function", "assertions", "statements"])
async def test_functions_are_graded_by_every_form_of_tests(label: object):
    assert await graded(fenced("def square(x): return x * x"), label) == 1.0
    assert await graded(fenced("def square(x): return x + x"), label) == 0.0
    assert await graded(fenced("def cube(x): return x ** 3"), label) == 0.0
    assert await graded(fenced("def square(x: return"), label) == 0.0
    assert await graded("I do not know.", label) == 0.0
    assert await graded("", label) == 0.0


async def test_programs_are_graded_by_what_they_print():
    assert await graded(fenced("print(sum(map(int, input().split())))"), ADD) == 1.0
    assert await graded(fenced("import sys\nprint(sum(map(int, input().split())))\nsys.exit()"), ADD) == 1.0
    assert await graded(fenced("a, b = map(int, input().split()); print(abs(a) + b)"), ADD) == 0.0
    assert await graded(fenced("print(sum(map(int, input().split()))); 1 / 0"), ADD) == 0.0


async def test_the_share_of_passed_tests_counts_where_it_is_asked_for():
    assert await graded(fenced("a, b = map(int, input().split()); print(abs(a) + b)"), ADD, partial=True) == 2 / 3
    assert await graded(fenced("def square(x): return abs(x) ** 2 or 5"), SQUARE, partial=True) == 2 / 3
    # What came before a crash was passed.
    crash = "import os\ndef square(x): return x * x if x > 0 else os._exit(0)"
    assert await graded(fenced(crash), SQUARE, partial=True) == 1 / 3


@pytest.mark.parametrize("cheat", CHEATS.values(), ids=CHEATS.keys())
@pytest.mark.parametrize("label", [SQUARE, ASSERTIONS], ids=["function", "assertions"])
async def test_cheats_are_worth_nothing(cheat: str, label: object):
    assert await graded(fenced(cheat), label, answer_timeout_s=1.0, memory_mb=256) == 0.0
    assert await graded(fenced("def square(x): return x * x"), label) == 1.0


@pytest.mark.parametrize("name", ["exit", "exit at once", "exit when called", "endless", "bomb", "killer", "flooder"])
async def test_cheats_are_worth_nothing_for_whole_programs_and_statements(name: str):
    assert await graded(fenced(CHEATS[name]), ADD, answer_timeout_s=1.0) == 0.0
    assert await graded(fenced(CHEATS[name]), CHECK, answer_timeout_s=1.0) == 0.0


async def test_all_tests_of_an_answer_share_one_limit():
    slow = "import time\ntime.sleep(0.4)\nprint(sum(map(int, input().split())))"
    start = time.monotonic()
    assert await graded(fenced(slow), ADD, answer_timeout_s=0.6, partial=True) == 1 / 3
    assert time.monotonic() - start < 3.0


async def test_many_answers_are_graded_at_a_time():
    responses = [fenced(f"def square(x): return x * x + {i % 2}") for i in range(40)]
    assert await asyncio.gather(*(graded(one, SQUARE) for one in responses)) == [1.0, 0.0] * 20


def test_no_more_answers_are_graded_at_a_time_than_there_are_servers():
    reward = CodeReward()
    assert reward.max_concurrent == reward._sandbox.num_servers


@pytest.mark.parametrize(
    ("response", "program"),
    [
        ("```python\na\n```\nbetter:\n```py\nb\n```", "b\n"),
        ("```python\na\n```\nOutput:\n```text\n5\n```", "a\n"),
        ("```\na\n```", "a\n"),
        ("~~~python3 x\na\n~~~", "a\n"),
        ("<think>```python\na\n```</think>\n```python\nb\n```", "b\n"),
        ("<think>```python\na\n```</think>\nb", "\nb"),
        ("print(1)", "print(1)"),
        ("```python\ns = '```'\n```", "s = '```'\n"),
    ],
)
def test_the_last_fenced_block_after_thinking_is_the_program(response: str, program: str):
    assert program_in(response) == program


def test_a_label_without_tests_is_refused_beforehand():
    with pytest.raises(ValueError, match="expected unit tests"):
        CodeReward().check(Prompt("p", [1], "write it", label={"answer": 5}))
    CodeReward().check(Prompt("p", [1], "write it", label=SQUARE))
