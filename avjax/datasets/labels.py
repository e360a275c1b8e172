"""Labels that are to be among given classes, and labels of numbers."""

import difflib
import math
from collections.abc import Mapping, Sequence

from avjax.utils.tables import number

NUMBERS = ("regression", "multilabel", "soft")  # the tasks (`avjax.tasks`) whose labels are numbers


def unknown_label(label: str, classes: Sequence[str]) -> str:
    """Says that a label is none of the classes, with the nearest class where one is near; "" if it is one."""
    if label in classes:
        return ""
    close = difflib.get_close_matches(label.lower(), classes, 1)
    return f"label {label!r}; " + (f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(classes)}")


def numbers(task: str, told: Mapping[str, str]) -> tuple[tuple[float, ...], str]:
    """The label that texts by name are, and why they are none ("" if they are one).

    Values are any numbers, answers are 1 or 0; shares may be votes: they are divided by their sum.
    """
    said = f"{', '.join(told)}: {', '.join(text or 'nothing' for text in told.values())}"
    found = tuple(map(number, told.values()))
    if not all(map(math.isfinite, found)):
        return (), f"{said}; expected numbers"
    if task == "multilabel" and not set(found) <= {0.0, 1.0}:
        return (), f"{said}; expected 1 or 0"
    if task == "soft":
        if min(found) < 0 or not sum(found):
            return (), f"{said}; expected proportions or votes, one above 0 and none below"
        found = tuple(share / sum(found) for share in found)
    return found, ""
