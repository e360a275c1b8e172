"""Labels that are to be among given classes."""

import difflib
from collections.abc import Sequence


def trouble(label: str, classes: Sequence[str]) -> str:
    """Why `label` is not to be used, with the nearest class where one is near; "" if it is one of `classes`."""
    if label in classes:
        return ""
    close = difflib.get_close_matches(label.lower(), classes, 1)
    return f"label {label!r}; " + (f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(classes)}")
