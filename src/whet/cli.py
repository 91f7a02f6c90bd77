"""The command line: `whet METHOD CONFIG.yaml [--section.key value …]`, and what goes before and after training."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from whet import __version__
from whet.errors import ConfigError, WhetError
from whet.manual import CHECK_HELP, EVAL_HELP, HELP, PLAN_HELP, SAMPLE_HELP

if TYPE_CHECKING:
    from whet.config.run import RunConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit code: 0, 2 for what a user can mend, 75 where a process or a machine of the
    run was lost, 130 after an interrupt."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"whet {__version__}")
        return 0
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        from whet.config.names import did_you_mean

        nearest = did_you_mean(command, COMMANDS) or "."
        print(f"whet: there is no command {command!r}{nearest} Try whet --help", file=sys.stderr)
        return 2
    from whet.log import quiet_libraries, setup_logging

    # Before PyTorch is loaded: threads that wait for one another sleep, or a busy core costs a factor of five.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    quiet_libraries()
    setup_logging()
    try:
        return COMMANDS[command](rest)
    except WhetError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except PermissionError as error:
        print(
            f"{error.filename or 'a file'}: {error.strerror}; change its permissions, or run as its owner",
            file=sys.stderr,
        )
        return 2
    except SystemExit as end:  # argparse has said what is wrong, or has helped
        return int(end.code or 0)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _load(method: str | None, arguments: list[str], *, trains: bool = True):
    """The configuration of a command; notes on names without effect go to the log."""
    from whet.config.loader import load
    from whet.log import logger

    path = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
    loaded = load(method, path, [*arguments, *_processes(arguments)], trains=trains)
    for note in loaded.notes:
        logger.info(note)
    return loaded.config


def _processes(arguments: Sequence[str]) -> list[str]:
    """The flag that says how many processes there are, where whoever started them (torchrun) has said so already."""
    from whet.ranks.environment import size_in_environment

    size = size_in_environment()
    given = any(re.match(r"--(cluster\.)?num[-_]processes", argument) for argument in arguments)
    return [] if size is None or given else ["--cluster.num_processes", str(size)]


def _train(method: str, arguments: list[str]) -> int:
    if _asks_help(arguments):
        return _method_help(method)
    command = [method, *arguments]
    return _over_processes(_load(method, arguments), command, _run)


def _over_processes(config: RunConfig, command: Sequence[str], work: Callable[[RunConfig], int]) -> int:
    """Do the work here, or start the processes that it is spread over; in one of those, follow the first."""
    from whet.ranks.environment import RANK, size_in_environment

    size = size_in_environment()
    if size is None and config.cluster.address is not None:
        from whet.cluster.ray.run import launch as launch_on_cluster

        return launch_on_cluster(config, command)
    if size is None and config.cluster.size > 1:
        from whet.ranks.launch import launch

        return launch(command, config.cluster.size)
    if size is not None and size != config.cluster.size:
        raise ConfigError(
            f"cluster.num_processes is {config.cluster.size}, but {size} processes were started (WORLD_SIZE); leave it "
            "out, or start as many"
        )
    if size is not None and os.environ[RANK] != "0":
        from whet.spread import follow

        return follow(config)
    return work(config)


def _run(config: RunConfig) -> int:
    from whet.compose import compose
    from whet.spread import crew_of

    with crew_of(config) as crew:
        run = compose(config, crew=crew)
        with _orderly_end(run.loop.request_stop, "after this step"):
            asyncio.run(run.train())
    return 0 if run.loop.finished else 130


def _sample(arguments: list[str]) -> int:
    if _asks_help(arguments):
        from whet.config.reference import summary

        print(f"{SAMPLE_HELP}\n{summary()}")
        return 0
    arguments = [re.sub(r"^--then(?==|$)", "--sample.then", argument) for argument in arguments]
    command = ["sample", *arguments]
    config = _load("sample", arguments)
    if config.cluster.address is not None:
        return _over_processes(config, command, _sample_here)
    return _sample_here(config)


def _sample_here(config: RunConfig) -> int:
    from whet.sample.report import in_lines
    from whet.sample.run import compose_sampling

    run = compose_sampling(config)
    with _orderly_end(run.request_stop, "as soon as possible"):
        report = asyncio.run(run.sample())
    if report is None:
        return 130
    print("\n".join(in_lines(report)))
    if run.then is None:
        return 0
    # Settings given on this line are in the configuration already, so the file alone is what other processes read.
    return _over_processes(run.then, [run.then.method, run.write_then()], _run)


@contextmanager
def _orderly_end(request_stop: Callable[[], None], when: str) -> Iterator[None]:
    """The first SIGINT or SIGTERM asks for an orderly end; a second one ends at once, as without us.

    Not by the event loop's own handlers: they would wait while a step computes, and a run over rows is one
    computation after the other.
    """

    def ask(number: int, frame: object) -> None:
        signal.signal(number, before[number])
        os.write(2, f"stopping {when}; once more stops at once\n".encode())
        request_stop()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _eval(arguments: list[str]) -> int:
    if _asks_help(arguments):
        print(EVAL_HELP, end="")
        return 0
    command = ["eval", *arguments]
    return _over_processes(_load(None, arguments, trains=False), command, _evaluate)


def _evaluate(config: RunConfig) -> int:
    from whet.compose import evaluate
    from whet.spread import crew_of

    with crew_of(config) as crew:
        metrics, transcripts = asyncio.run(evaluate(config, crew))
    for name, value in metrics.items():
        print(f"{name:40} {value:.6g}")
    for episode in transcripts:
        print(f"\n[{episode.prompt.id}] reward {episode.reward}\n{episode.prompt.content}\n-> {episode.response}")
    return 0


def _chat(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("whet chat", description="Talk to a model. An empty line ends the talk.")
    parser.add_argument("model", help="folder of a model (or of an adapter), or its name on the hub")
    parser.add_argument("--system", help="system message")
    parser.add_argument("--max-tokens", type=int, default=512, help="longest answer in tokens (default 512)")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy (default 0.7)")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus sampling (default 1, off)")
    parser.add_argument("--seed", type=int, default=0, help="of the first answer; each further one adds 1")
    parser.add_argument("--plain", action="store_true", help="complete plain text, without the chat template")
    options = parser.parse_args(arguments)
    if options.max_tokens < 1 or options.temperature < 0 or not 0 < options.top_p <= 1:
        parser.error("--max-tokens must be at least 1, --temperature at least 0, --top-p above 0 and at most 1")
    from whet.chat import talk

    talk(options)
    return 0


def _serve(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "whet serve", description="Serve a model to OpenAI's clients, on this machine only. Ctrl-C stops."
    )
    parser.add_argument("model", help="folder of a model (or of an adapter), or its name on the hub")
    parser.add_argument("--host", default="127.0.0.1", help="any but loopback needs --api-key (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default 8000)")
    parser.add_argument("--name", help="the model's name for clients (default: MODEL as given)")
    parser.add_argument("--api-key", default=os.environ.get("WHET_API_KEY"), help="default: $WHET_API_KEY")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the weights")
    parser.add_argument("--max-concurrent", type=int, default=64, help="decoded at a time (default 64)")
    parser.add_argument("--max-requests", type=int, default=1024, help="in flight; more are refused (default 1024)")
    parser.add_argument("--timeout-s", type=float, default=600, help="most seconds of one completion (default 600)")
    parser.add_argument("--prefix-cache-mb", type=float, default=256, help="kept for next turns (default 256 MiB)")
    options = parser.parse_args(arguments)
    if min(options.max_concurrent, options.max_requests) < 1 or options.timeout_s <= 0 or options.prefix_cache_mb < 0:
        parser.error(
            "--max-concurrent and --max-requests must be at least 1, --timeout-s and --prefix-cache-mb positive"
        )
    if any(importlib.util.find_spec(needed) is None for needed in ("fastapi", "uvicorn")):
        raise ConfigError(
            "whet serve needs FastAPI and uvicorn; install them with pip install -e '.[serve]' in the checkout of whet"
        )
    from whet.serve.command import serve

    serve(options)
    return 0


def _merge(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "whet merge", description="Add an adapter into the weights of its base, and say how much the outputs changed."
    )
    parser.add_argument("adapter", help="folder of an adapter, such as the output_dir of a run or a checkpoint in it")
    parser.add_argument("output", help="new folder for the merged model")
    parser.add_argument("--base", help="folder or hub name of the base model (default: the one the adapter names)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the base's own")
    parser.add_argument("--trust-remote-code", action="store_true", help="run model code that comes with the base")
    options = parser.parse_args(arguments)
    from whet.merge import merge_folder

    merged = merge_folder(
        options.adapter,
        options.output,
        base_model=options.base,
        dtype=options.dtype,
        trust_remote_code=options.trust_remote_code,
    )
    print(f"{options.adapter} is merged into {merged.base}: {options.output}, {merged.dtype}")
    print(
        f"largest difference of {merged.outputs} with the adapter and merged: {merged.difference:.2g} "
        f"(they reach {merged.largest:.2g})"
    )
    return 0


def _convert(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "whet convert",
        description="Write a model into another kind of folder: safetensors (hf), torch.distributed.checkpoint "
        "(torch_dist), a checkpoint of Megatron-Core (megatron), which any layout of its ranks loads. What SRC is, is "
        "recognised. Tensors pass through one at a time, and are read back and compared.",
    )
    parser.add_argument("source", metavar="SRC", help="folder of a model, such as a checkpoint of a run")
    parser.add_argument("output", metavar="DST", help="new folder")
    parser.add_argument("--to", required=True, choices=("hf", "torch_dist", "megatron"), help="what DST is to be")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as they are")
    parser.add_argument("--shard-gb", type=float, help="most gigabytes of a file (default: as SRC has it, or 5)")
    parser.add_argument(
        "--verify",
        choices=("none", "checksum", "logits"),
        default="checksum",
        help="logits loads the whole model besides, on both sides (default checksum)",
    )
    parser.add_argument("--merge", action="store_true", help="SRC is an adapter: merge it into its base on the way")
    parser.add_argument("--base", help="with --merge: folder or hub name of the base (default: as the adapter says)")
    options = parser.parse_args(arguments)
    if options.shard_gb is not None and not 0 < options.shard_gb < float("inf"):
        parser.error("--shard-gb must be positive and finite")
    if options.base and not options.merge:
        parser.error("--base goes with --merge")
    from whet.check.memory import available_bytes
    from whet.log import progress_over
    from whet.weights.convert import convert

    done = convert(
        options.source,
        options.output,
        options.to,
        dtype=options.dtype,
        verify=options.verify,
        merge=options.merge,
        base_model=options.base,
        memory_bytes=available_bytes("cpu"),
        options={"shard_gb": options.shard_gb},
        watch=progress_over,
    )
    checked = ", read back and equal to the bit" if done.checked else ""
    print(
        f"{options.source} ({done.source}) -> {options.output} ({options.to}): {done.num_tensors} tensors, "
        f"{done.num_bytes / 1e9:.3g} GB{checked}"
    )
    if (compared := done.compared) is not None:
        print(f"largest difference of logits: {compared.difference:.2g} (they reach {compared.largest:.2g})")
    return 0


def _check(arguments: list[str]) -> int:
    if _asks_help(arguments):
        print(CHECK_HELP, end="")
        return 0
    parser = argparse.ArgumentParser("whet check", add_help=False, allow_abbrev=False)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--plan", action="store_true")
    options, arguments = parser.parse_known_args(arguments)
    wanted, arguments = _wanted(arguments) if options.plan else (None, arguments)
    path = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
    from whet.check.command import check
    from whet.log import console

    then = None
    if wanted is not None:
        from whet.plan.command import plan
        from whet.plan.load import measured

        def then(found):
            return plan(found.config, console(), wanted, measured(found))

    return 0 if check(path, arguments, console(), rows=options.rows, then=then) else 2


def _plan(arguments: list[str]) -> int:
    if _asks_help(arguments):
        print(PLAN_HELP, end="")
        return 0
    wanted, arguments = _wanted(arguments)
    config = _load(None, arguments)
    from whet.log import console
    from whet.plan.command import plan

    return 0 if plan(config, console(), wanted) else 2


def _wanted(arguments: list[str]):
    """What is asked of a plan, and the arguments without it."""
    parser = argparse.ArgumentParser("whet plan", add_help=False, allow_abbrev=False)
    parser.add_argument("--gpus")
    for name in ("--nodes", "--prompt-tokens", "--response-tokens"):
        parser.add_argument(name, type=int)
    options, rest = parser.parse_known_args(arguments)
    if any(
        given is not None and given < 1 for given in (options.nodes, options.prompt_tokens, options.response_tokens)
    ):
        parser.error("--nodes, --prompt-tokens and --response-tokens must be at least 1")
    from whet.plan.command import Wanted

    return Wanted(options.gpus, options.nodes or 1, options.prompt_tokens, options.response_tokens), rest


def _import(arguments: list[str]) -> int:
    from whet.migrate.run import TOOLS, import_file, write

    parser = argparse.ArgumentParser(
        "whet import",
        description="Make a configuration of another tool's file: a YAML file or a script with the command (trl), a "
        "YAML file (llamafactory), a launch script (slime). The file is read, never run. Ends with 2 where the result "
        "still needs something filled in.",
    )
    parser.add_argument("tool", choices=TOOLS, help="whose file it is")
    parser.add_argument("file", help="the file")
    parser.add_argument("-o", "--output", metavar="OUT.yaml", help="where to write the configuration; default: shown")
    parser.add_argument("--force", action="store_true", help="write over OUT.yaml")
    parser.add_argument("--method", help="trl: the trainer, where the file does not tell")
    parser.add_argument("--dataset_dir", metavar="FOLDER", help="llamafactory: the folder of dataset_info.json")
    options = parser.parse_args(arguments)
    if options.method and options.tool != "trl":
        parser.error(f"--method is for trl; the file of {options.tool} says it")
    if options.dataset_dir and options.tool != "llamafactory":
        parser.error("--dataset_dir is for llamafactory")
    imported = import_file(options.tool, options.file, method=options.method, dataset_dir=options.dataset_dir)
    shown, told = write(imported, options.output, force=options.force)
    print(shown, end="")
    print(told, end="", file=sys.stderr)
    return 2 if imported.missing else 0


def _demo(arguments: list[str]) -> int:
    from whet.demo import main as demo

    return demo(arguments)


def _asks_help(arguments: list[str]) -> bool:
    return any(argument in ("-h", "--help") for argument in arguments)


def _method_help(method: str) -> int:
    from whet.config.reference import summary

    print(f"whet {method} CONFIG.yaml [--section.key value …]\n\n{summary()}")
    return 0


METHODS = (
    *("sft", "reward", "dpo", "simpo", "cpo", "cpo-simpo", "orpo", "apo", "kto", "bco", "gkd", "distill"),
    *("grpo", "dr-grpo", "dapo", "rloo", "reinforce++", "reinforce++-baseline", "remax", "gspo", "cispo", "sapo"),
    *("ppo", "opd"),
)
"""Methods that train; written out, so that help needs no import."""

COMMANDS: dict[str, Callable[[list[str]], int]] = {
    **{method: partial(_train, method) for method in METHODS},
    "sample": _sample,
    "eval": _eval,
    "chat": _chat,
    "serve": _serve,
    "merge": _merge,
    "convert": _convert,
    "check": _check,
    "plan": _plan,
    "import": _import,
    "demo": _demo,
}


if __name__ == "__main__":
    sys.exit(main())
