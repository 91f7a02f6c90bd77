"""Plain Python values as JSON, so that they come out of the sandbox without pickle. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_LONGEST_INT_BITS = 64
_EXCERPT = 2000


def encode(value: Any) -> Any:
    """Numbers, text, bytes and containers of them as what JSON can hold. Anything else becomes how it is written.

    Raises RecursionError for a container that holds itself.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        number = int(value)
        # JSON readers refuse integers of thousands of digits.
        return number if number.bit_length() < _LONGEST_INT_BITS else {"int": hex(number)}
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bytes | bytearray):
        return {"bytes": bytes(value).hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, list):
        return [encode(item) for item in list.__iter__(value)]
    if isinstance(value, tuple):
        return {"tuple": [encode(item) for item in tuple.__iter__(value)]}
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in dict.items(value)]}
    if isinstance(value, set | frozenset):
        return {"set": [encode(item) for item in value]}
    if callable(getattr(value, "item", None)) and not hasattr(value, "__len__"):  # a number of numpy
        return encode(value.item())
    return {"other": f"{type(value).__name__} {value!r:.{_EXCERPT}}"}


def decode(value: Any) -> Any:
    """What was encoded; values that are not plain are `Other`.

    Raises ValueError for JSON that `encode` does not write.
    """
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    try:
        ((kind, inner),) = value.items()
        return _READ[kind](inner)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"{value!r:.{_EXCERPT}} is no encoded value") from error


@dataclass(frozen=True)
class Other:
    """A value that is not plain, by its type and what it is written as; it equals what is written the same."""

    called: str


_READ = {
    "int": lambda inner: int(inner, 16),
    "bytes": bytes.fromhex,
    "complex": lambda inner: complex(*inner),
    "tuple": lambda inner: tuple(map(decode, inner)),
    "dict": lambda inner: {decode(key): decode(item) for key, item in inner},
    "set": lambda inner: {frozenset(item) if isinstance(item := decode(one), set) else item for one in inner},
    "other": Other,
}
