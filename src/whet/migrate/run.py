"""The command `whet import`: read another tool's file, write a configuration of ours, and say what became of it."""

from __future__ import annotations

from pathlib import Path

from whet.errors import ConfigError
from whet.migrate import llamafactory, slime, trl
from whet.migrate.build import Imported, build
from whet.migrate.draft import Draft
from whet.migrate.write import configuration, report

TOOLS = ("trl", "llamafactory", "slime")


def import_file(tool: str, path: str, *, method: str | None = None, dataset_dir: str | None = None) -> Imported:
    """Another tool's file as a configuration of ours. Nothing is run, and no file but those that it names is read.

    `method` names TRL's trainer where the file does not, `dataset_dir` the folder of LLaMA-Factory's
    `dataset_info.json`. Raises ConfigError with file and line for what cannot be read.
    """
    return build(_draft(tool, path, method, dataset_dir))


def _draft(tool: str, path: str, method: str | None, dataset_dir: str | None) -> Draft:
    if tool == "trl":
        return trl.read(path, method)
    return llamafactory.read(path, dataset_dir) if tool == "llamafactory" else slime.read(path)


def write(imported: Imported, out: str | None, *, force: bool = False) -> tuple[str, str]:
    """What goes to standard output and to standard error; with `out` the configuration is written to that file.

    Raises ConfigError where the file is there already, unless `force`.
    """
    text = configuration(imported)
    if out is None:
        return text, report(imported, None)
    if Path(out).exists() and not force:
        raise ConfigError(f"{out} is there already; remove it, write to another file, or add --force")
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(text, encoding="utf-8")
    return report(imported, out), ""
