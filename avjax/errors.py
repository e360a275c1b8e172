"""Errors that a user can fix: each states what was given, what was expected and what to do."""

import difflib
from collections.abc import Iterable


class AvjaxError(Exception):
    """A mistake in the input, the configuration or the set-up; entry points print it as one line and exit with 2."""


class UnusableMedia(AvjaxError):
    """A media file from which neither video nor audio can be read; extraction quarantines the clip."""


class Stopped(Exception):
    """A run stopped on request and saved its state; the message is the point, from which the same command continues."""


def choose(what: str, got: object, choices: Iterable[object]) -> None:
    """Checks that a value is one of its choices.

    Args:
      what: the key, flag or kind of name of the value, as the user writes it.
      got: the value.
      choices: the valid values.

    Raises:
      AvjaxError: it is not; the message names all choices and the nearest.
    """
    choices = list(choices)
    if got not in choices:
        named = ", ".join(str(choice) or "'' (none)" for choice in choices)
        raise AvjaxError(f"{what} is {got!r}; choose one of {named}{nearest(got, choices)}")


def nearest(got: object, choices: Iterable[object]) -> str:
    """Returns the end of a message that suggests the choice most similar to `got`; "" if none is similar."""
    names = [str(choice) for choice in choices]
    # Also matches the last part, so that `data.root` is suggested for `root`.
    close = difflib.get_close_matches(str(got), names, 1, 0.5) or [
        n for n in names if difflib.SequenceMatcher(None, n.split(".")[-1], str(got).split(".")[-1]).ratio() > 0.7
    ]
    return f"; did you mean {close[0]!r}?" if close else ""
