"""Parts of the settings: fields with a meaning, choices and limits, checked on construction."""

import dataclasses
import math
import operator
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

from avjax.errors import AvjaxError, choose

# Limit of a field → its name in messages, and its comparison.
_LIMITS = {
    "least": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "most": ("at most", operator.le),
    "below": ("below", operator.lt),
}


def setting(default: Any, meaning: str, *, choices: Sequence[Any] = (), **limits: float) -> Any:
    """Declares a field; choices and limits apply to each item of a tuple.

    Args:
      default: a value, or a class that makes it.
      meaning: a description, which `--keys` prints.
      choices: the allowed values; (): any.
      **limits: of a number, by the names in `_LIMITS`.
    """
    metadata = {"meaning": meaning, "choices": tuple(choices), "limits": limits}
    kind = "default_factory" if isinstance(default, type) else "default"
    return dataclasses.field(**{kind: default}, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the settings; checks type, choices and limits of every field on construction.

    Raises:
      AvjaxError: a value does not fit; the message gives its key, the value and what was expected.
    """

    prefix: ClassVar[str] = ""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            key = self.prefix + field.name
            value = typed(key, getattr(self, field.name), hints[field.name])
            check_limits(key, value, field.metadata)
            object.__setattr__(self, field.name, value)
        self.check_together()

    def check_together(self) -> None:
        """Checks conditions on several fields."""

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Self:
        """Makes the part from plain values; omitted keys have their defaults.

        Raises:
          AvjaxError: a key is unknown, or a value does not fit.
        """
        for key in plain:
            choose(f"{cls.prefix or 'the configuration '}key", key, [f.name for f in dataclasses.fields(cls)])
        return cls(**plain)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, without absent parts (None)."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {k: v.to_dict() if isinstance(v, Part) else v for k, v in values.items() if v is not None}

    def rows(self) -> Iterator[tuple[str, Any, str]]:
        """Yields (dotted key, value, meaning) of every field."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Part):
                yield from value.rows()
            elif value is not None:
                yield self.prefix + field.name, value, _meaning(field.metadata)


def _meaning(metadata: Mapping[str, Any]) -> str:
    choices = ", ".join(str(choice) or "''" for choice in metadata["choices"])
    return f"{metadata['meaning']} ({choices})" if choices else metadata["meaning"]


# ---- Types and limits -----------------------------------------------------------------------------------------------
_EXPECTED = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "text",
    Mapping: "keys and values",
}


def typed(key: str, value: Any, hint: Any) -> Any:
    """Returns the value as its declared type, or raises AvjaxError."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return None if value is None and type(None) in inner else _one_of_parts(key, value, inner)
    if isinstance(hint, type) and issubclass(hint, Part):
        return value if isinstance(value, hint) else hint.of(mapping(key, value))
    if origin is tuple:
        return _tuple(key, value, hint)
    if origin is Mapping:
        return mapping(key, value)
    fits = isinstance(value, hint | int if hint is float else hint)
    if not fits or (isinstance(value, bool) and hint is not bool):
        raise AvjaxError(f"{key} is {value!r}; expected {_EXPECTED[hint]}")
    return hint(value)


def _one_of_parts(key: str, value: Any, hints: Sequence[Any]) -> Any:
    hint = next(h for h in hints if h is not type(None))
    return value if isinstance(value, Part) else typed(key, value, hint)


def mapping(key: str, value: Any) -> dict[str, Any]:
    """Returns a mapping as a dict; raises AvjaxError for other values."""
    if not isinstance(value, Mapping):
        raise AvjaxError(f"{key} is {value!r}; expected {_EXPECTED[Mapping]}")
    return dict(value)


def _tuple(key: str, value: Any, hint: Any) -> tuple[Any, ...]:
    inner = typing.get_args(hint)
    items = list(value) if isinstance(value, tuple | list) else None
    many = len(inner) == 2 and inner[1] is Ellipsis
    if items is None or (not many and len(items) != len(inner)):
        count = "values" if many else f"{len(inner)} values"
        raise AvjaxError(f"{key} is {value!r}; expected {count} with commas between them, such as (1, 2)")
    hints = [inner[0]] * len(items) if many else inner
    return tuple(typed(key, item, h) for item, h in zip(items, hints, strict=True))


def check_limits(key: str, value: Any, metadata: Mapping[str, Any]) -> None:
    """Raises AvjaxError if a value, or an item of a tuple, is outside its choices or limits."""
    for item in value if isinstance(value, tuple) else (value,):
        if metadata["choices"]:
            choose(key, item, metadata["choices"])
        if isinstance(item, int | float) and not _within(item, metadata["limits"]):
            limits = [f"{_LIMITS[name][0]} {limit:g}" for name, limit in metadata["limits"].items()]
            raise AvjaxError(f"{key} is {value!r}; expected {' and '.join(limits) or 'a finite number'}")


def _within(value: float, limits: Mapping[str, float]) -> bool:
    return math.isfinite(value) and all(_LIMITS[name][1](value, limit) for name, limit in limits.items())


def check_patterns(patterns: Iterable[str], key: str) -> None:
    """Raises AvjaxError if one of the `patterns` of paths is not a regular expression."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise AvjaxError(f"{key}: {pattern!r} is no regular expression ({error})") from error
