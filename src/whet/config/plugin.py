"""Things chosen by name: a built-in or a dotted path becomes an object, its parameters become a schema."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from whet.config.names import did_you_mean, expects, is_mistaken_bool, show
from whet.config.problems import problems_of, refuse
from whet.errors import ConfigError


def resolve(use: str, builtins: Mapping[str, object], *, what: str, where: str) -> object:
    """The built-in of this name, or the object at `package.module:attribute` or `package.module.attribute`.

    `what` is the kind of thing (`reward`), `where` the setting and its source (`reward.use, run.yaml,
    line 4`); both only serve the message. Modules of the current working directory are found.
    Raises ConfigError for an unknown name, a module that cannot be imported, a missing attribute.
    """
    if use in builtins:
        return builtins[use]
    if ":" in use:
        module, _, attribute = use.partition(":")
        candidates = [(module, attribute)]
    else:
        parts = use.split(".")
        candidates = [(".".join(parts[:cut]), ".".join(parts[cut:])) for cut in range(len(parts) - 1, 0, -1)]
    if not candidates or not all(part.isidentifier() for part in use.replace(":", ".").split(".")):
        known = ", ".join(sorted(builtins)) or "none"
        raise ConfigError(
            f"{where}: there is no {what} {use!r}{did_you_mean(use, builtins) or '.'} "
            f"Built in: {known}. Your own is written package.module:attribute."
        )
    with _working_directory_importable():
        for module, attribute in candidates:
            found = _import(module, what=f"{what} {use!r}", where=where)
            if found is not None:
                return _attribute(found, attribute, what=f"{what} {use!r}", where=where)
    raise ConfigError(
        f"{where}: {what} {use!r} needs a module {candidates[0][0]!r}, and there is none in the working "
        f"directory ({os.getcwd()}) or among the installed packages{did_you_mean(use, builtins)}"
    )


@contextmanager
def _working_directory_importable() -> Iterator[None]:
    """Put the working directory first on the import path, as `python -m` does, and take it off again."""
    here = os.getcwd()
    sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        # The imported module may have changed the path itself: only our own entry is taken off, if it is there.
        with suppress(ValueError):
            sys.path.remove(here)


def _import(module: str, *, what: str, where: str) -> object | None:
    """The module, or None when it, or a package that it lies in, does not exist."""
    try:
        return importlib.import_module(module)
    except Exception as error:
        absent = error.name if isinstance(error, ModuleNotFoundError) else None
        if absent is not None and (module == absent or module.startswith(f"{absent}.")):
            return None
        # The module is a user's: whatever it raises while it is imported is theirs to read.
        raise ConfigError(f"{where}: {what}: importing {module} failed: {type(error).__name__}: {error}") from error


def _attribute(module: object, attribute: str, *, what: str, where: str) -> object:
    found = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = [name for name in vars(module) if not name.startswith("_")]
            raise ConfigError(
                f"{where}: {what}: {module.__name__} has no {attribute!r}{did_you_mean(attribute, names)}"  # type: ignore[attr-defined]
            )
        found = getattr(found, part)
    return found


def options_of(fn: Callable[..., object]) -> type[BaseModel]:
    """The keyword-only parameters of a function or class, as a strict frozen schema.

    Types, `Annotated[..., Field(...)]` metadata and defaults are kept. A parameter without a type takes
    anything. Unknown options are refused unless the function takes `**options` itself.
    Raises ConfigError when the signature cannot be read.
    """
    written = fn.func if isinstance(fn, partial) else fn
    name = getattr(written, "__name__", type(written).__name__)
    try:
        parameters = inspect.signature(fn).parameters.values()
        fields: dict[str, Any] = {
            one.name: (_annotation(one, written), ... if one.default is one.empty else one.default)
            for one in parameters
            if one.kind is one.KEYWORD_ONLY
        }
    except (NameError, AttributeError, SyntaxError, TypeError, ValueError) as error:
        raise ConfigError(f"the options of {name} cannot be read from its signature: {error}") from error
    takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters)
    config = ConfigDict(
        frozen=True,
        extra="allow" if takes_any else "forbid",
        allow_inf_nan=False,
        arbitrary_types_allowed=True,
        protected_namespaces=(),
    )
    return create_model(name, __config__=config, **fields)


def _annotation(parameter: inspect.Parameter, fn: Callable[..., object]) -> Any:
    """The type of a parameter, evaluated where it was written.

    Only options are evaluated: the types of other parameters may be imported for type checkers alone.
    """
    if parameter.annotation is parameter.empty:
        return Any
    if not isinstance(parameter.annotation, str):
        return parameter.annotation
    # The type was written in the module of the function, or of the class whose objects are called.
    written = fn.__init__ if inspect.isclass(fn) else fn if inspect.isroutine(fn) else type(fn).__call__
    return eval(parameter.annotation, getattr(inspect.unwrap(written), "__globals__", {}))


def validated_options(fn: Callable[..., object], options: Mapping[str, object], *, where: str) -> dict[str, Any]:
    """Options checked against a function's own parameters, defaults filled in, ready to be passed to it.

    `where` names whose options they are (`reward math (run.yaml, line 4)`).
    Raises ConfigError that tells every unknown option, wrong value and missing option at once.
    """
    schema, raw = options_of(fn), dict(options)
    texts = [
        f"{name} must be {expects(field.annotation)}, got {show(raw[name])}"
        for name, field in schema.model_fields.items()
        if is_mistaken_bool(raw.get(name), field.annotation)
    ]
    checked = None
    try:
        checked = schema.model_validate(raw)
    except ValidationError as error:
        texts += [problem.text for problem in problems_of(error, raw, schema)]
    accepted = ", ".join(schema.model_fields) or "none"
    refuse([f"{where}: {text} (options: {accepted})" for text in texts])
    assert checked is not None, "a failed validation has problems"
    return {**{name: getattr(checked, name) for name in schema.model_fields}, **(checked.__pydantic_extra__ or {})}
