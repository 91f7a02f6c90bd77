"""The reward `math` grades as a teacher would, fast, and never hangs."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from whet.rewards.math import MathReward
from whet.rewards.math_pool import MathPool
from whet.types import Episode, Prompt

RIGHT = [
    ("1,000", "1000"),
    ("1/2", "0.5"),
    (r"\frac{2}{4}", r"\frac{1}{2}"),
    ("x=5", "5"),
    (r"50\%", "50"),
    ("2^{10}", "1024"),
    ("x+1", "1+x"),
    (r"\sqrt{8}", r"2\sqrt{2}"),
    (r"(1,2]", r"\left(1,2\right]"),
    ("5,6", "5,6"),
    ("(5,6)", "5,6"),
    (r"\{6,5\}", r"\{5,6\}"),
    ("x=1, y=2", "y=2, x=1"),
    (r"\text{Paris}", "Paris"),
    ("0", 0),
    ("3.0", 3),
]
WRONG = [
    ("(1,2]", "(1,2)"),
    ("6,5", "5,6"),
    ("(6,5)", "(5,6)"),
    ("", "5"),
    (" ", "5"),
    ("", "0"),
    ("-5", "5"),
    ("7x+", "7"),
    (r"\frac{1}{0}", "1"),
    ("1/0", 0),
]


async def grade(answer: str, label: object, **options: object) -> float:
    return await MathReward(**options).grade(f"so it is \\boxed{{{answer}}}.", label)


@pytest.mark.parametrize(("answer", "label"), RIGHT)
async def test_equal_answers_are_right(answer: str, label: object):
    assert await grade(answer, label) == 1.0


@pytest.mark.parametrize(("answer", "label"), WRONG)
async def test_other_answers_are_wrong(answer: str, label: object):
    assert await grade(answer, label) == 0.0


async def test_an_episode_is_graded_by_its_whole_response_and_label():
    prompt = Prompt("p0", [1], "2+2=", label=4)
    assert await MathReward()(Episode(prompt, "g0", 0, response=r"I think \boxed{5}, no, \boxed{4}")) == 1.0
    assert await MathReward()(Episode(prompt, "g0", 0, response="")) == 0.0


async def test_the_last_number_counts_only_without_a_box_and_when_allowed():
    assert await MathReward().grade("first 3, then 4", 4) == 1.0
    assert await MathReward(last_number=False).grade("first 3, then 4", 4) == 0.0
    assert await MathReward().grade(r"\boxed{3}, not 4", 4) == 0.0
    assert await MathReward().grade(r"\boxed{}, or 4", 4) == 0.0


async def test_order_counts_unless_told_otherwise():
    assert await grade("6,5", "5,6", ordered=False) == 1.0
    assert await grade("6,7", "5,6", ordered=False) == 0.0


async def test_a_missing_label_is_an_error_and_no_wrong_answer():
    with pytest.raises(ValueError, match="label is None"):
        await MathReward().grade("4", None)


async def test_an_endless_answer_is_wrong_within_its_limit_and_grading_goes_on():
    start = time.monotonic()
    assert await grade("10^{10^{10}}", "3", answer_timeout_s=0.5) == 0.0
    assert time.monotonic() - start < 5.0
    assert await grade("2^{3}", "8") == 1.0


async def test_a_worker_that_dies_is_replaced():
    pool = MathPool(1)
    assert await pool.equal("8", "2^{3}", ordered=True, timeout_s=5.0)
    pool._workers[0]._process.kill()
    pool._workers[0]._process.wait()
    assert await pool.equal("16", "2^{4}", ordered=True, timeout_s=5.0)
    pool.close()


async def test_an_interrupt_of_the_run_does_not_end_a_worker():
    pool = MathPool(1)
    assert await pool.equal("8", "2^{3}", ordered=True, timeout_s=5.0)
    process = pool._workers[0]._process
    process.send_signal(signal.SIGINT)
    assert await pool.equal("16", "2^{4}", ordered=True, timeout_s=5.0)
    assert pool._workers[0]._process is process
    pool.close()


def test_grading_works_in_threads_that_have_event_loops_of_their_own():
    verdicts: list[float] = []

    def work(power: int) -> None:
        verdicts.append(asyncio.run(grade(f"2^{{{power}}}", str(2**power))))

    threads = [threading.Thread(target=work, args=(power,)) for power in range(20, 26)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert verdicts == [1.0] * 6


async def test_many_symbolic_answers_at_once_each_get_their_own_verdict():
    questions = [(i, i % 3 == 0) for i in range(60)]
    verdicts = await asyncio.gather(
        *(grade(f"2^{{{i}}}", str(2**i) if right else str(2**i + 1)) for i, right in questions)
    )
    assert verdicts == [float(right) for _, right in questions]


async def test_thousands_of_plain_answers_are_graded_per_second():
    reward = MathReward()
    start = time.monotonic()
    verdicts = await asyncio.gather(*(reward.grade(f"it is \\boxed{{{i}}}", i) for i in range(4000)))
    assert sum(verdicts) == 4000
    assert time.monotonic() - start < 2.0


async def test_verdicts_agree_with_recorded_ones_on_real_solutions(shared_data: Path):
    path = shared_data / "gsm8k_model_solutions.jsonl"
    if not path.exists():
        pytest.skip(f"no {path.name} in {shared_data}")
    reward, agreed, total = MathReward(), 0, 0
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        label = row["ground_truth"].rpartition("A: ")[2]
        for answer in (value for value in row.values() if isinstance(value, dict)):
            total += 1
            agreed += await reward.grade(answer["solution"], label) == answer["is_correct"]
    assert total > 5000
    assert agreed / total >= 0.995


def test_a_worker_ends_by_itself_when_the_process_that_asked_is_gone():
    code = (
        "import asyncio, os\n"
        "from whet.rewards.math_pool import MathPool\n"
        "async def main():\n"
        "    pool = MathPool(1)\n"
        "    assert await pool.equal('8', '2^{3}', ordered=True, timeout_s=1)\n"
        "    asyncio.ensure_future(pool.equal('8', '10^{10^{10}}', ordered=True, timeout_s=1))\n"
        "    await asyncio.sleep(0.3)\n"
        "    print(pool._workers[0]._process.pid, flush=True)\n"
        "    os._exit(1)\n"
        "asyncio.run(main())\n"
    )
    # The worker is in the middle of an endless answer and cannot see that nobody waits for it.
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=60)
    worker = int(done.stdout)
    deadline = time.monotonic() + 10
    while alive(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(worker)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")  # where there is one, it tells the dead that nobody has buried
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"
