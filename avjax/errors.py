"""Errors that a user can fix: each says what was got, what was expected and what to do."""

import difflib
from collections.abc import Iterable


class AvjaxError(Exception):
    """A mistake in the input, the configuration or the set-up; entry points print it as one line and exit with 2."""


class UnusableMedia(AvjaxError):
    """A media file out of which neither picture nor sound can be had; extraction quarantines the clip."""


class Stopped(Exception):
    """A run was told to stop, and has kept its state; the message says where. The same command goes on from there."""


def choose(what: str, got: object, choices: Iterable[object]) -> None:
    """Checks that a value is one of its choices.

    Args:
      what: the key, flag or kind of name that the value stands for, as the user writes it.

    Raises:
      AvjaxError: it is none; the message names the nearest, and all of them.
    """
    choices = list(choices)
    if got not in choices:
        named = ", ".join(str(choice) or "'' (none)" for choice in choices)
        raise AvjaxError(f"{what} is {got!r}; choose one of {named}{nearest(got, choices)}")


def nearest(got: object, choices: Iterable[object]) -> str:
    """Names the choice that is most like what was got, as an addition to a message; "" where none is."""
    names = [str(choice) for choice in choices]
    # Matching on the last part too, so that `data.root` is found for `root`.
    close = difflib.get_close_matches(str(got), names, 1, 0.5) or [
        n for n in names if difflib.SequenceMatcher(None, n.split(".")[-1], str(got).split(".")[-1]).ratio() > 0.7
    ]
    return f"; did you mean {close[0]!r}?" if close else ""
