"""Checks class labels and reads numeric labels."""

import difflib
import math
from collections.abc import Mapping, Sequence

from avjax.utils.tables import number

NUMBERS = ("regression", "multilabel", "soft")  # the tasks (`avjax.tasks`) whose labels are numbers


def unknown_label(label: str, classes: Sequence[str]) -> str:
    """Returns a message that a label is not a class, with the nearest class if there is one; "" if it is a class."""
    if label in classes:
        return ""
    close = difflib.get_close_matches(label.lower(), classes, 1)
    return f"label {label!r}; " + (f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(classes)}")


def numbers(task: str, texts: Mapping[str, str]) -> tuple[tuple[float, ...], str]:
    """Reads a numeric label from name → text; returns it with "", or () with the reason why it is invalid.

    Regression takes any numbers, multi-label 1 or 0; soft labels may be votes, which are divided by their sum.
    """
    got = f"{', '.join(texts)}: {', '.join(text or 'nothing' for text in texts.values())}"
    label = tuple(map(number, texts.values()))
    if not all(map(math.isfinite, label)):
        return (), f"{got}; expected numbers"
    if task == "multilabel" and not set(label) <= {0.0, 1.0}:
        return (), f"{got}; expected 1 or 0"
    if task == "soft":
        if min(label) < 0 or not sum(label):
            return (), f"{got}; expected proportions or votes, one above 0 and none below"
        label = tuple(share / sum(label) for share in label)
    return label, ""
