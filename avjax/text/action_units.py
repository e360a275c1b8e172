"""Facial action units in plain words: the `[D_AUs]` of ETG-AVER's sentence (section III-A, "predefined rules").

The rules use absolute activity above a threshold, never ranks alone: a unit without any activity is never named. The
90th percentile detects an expression held for a tenth of the clip, which a mean over the clip would miss.
"""

from collections.abc import Sequence

import numpy as np

from avjax.errors import AvjaxError

# Noun phrases without "and" or commas, so that any few of them join into one grammatical list.
PHRASES: dict[str, str] = {
    "AU1": "raised inner brows",
    "AU2": "raised outer brows",
    "AU4": "lowered brows",
    "AU5": "raised upper lids",
    "AU6": "raised cheeks",
    "AU7": "tightened lids",
    "AU9": "a wrinkled nose",
    "AU10": "a raised upper lip",
    "AU12": "pulled-up lip corners",
    "AU14": "dimpled lip corners",
    "AU15": "pulled-down lip corners",
    "AU16": "a lowered lower lip",
    "AU17": "a raised chin",
    "AU18": "puckered lips",
    "AU20": "stretched lips",
    "AU23": "tightened lips",
    "AU24": "pressed lips",
    "AU25": "parted lips",
    "AU26": "a dropped jaw",
    "AU28": "sucked-in lips",
}
NEUTRAL = "a neutral face"
BLINKING = frozenset({"AU43", "AU45"})  # everyone blinks: it carries no information about emotion


def describe(
    intensities: np.ndarray, present: np.ndarray, names: Sequence[str], *, threshold: float = 1.0, at_most: int = 6
) -> str | None:
    """Names the units whose 90th percentile over the frames with a face is at least `threshold`, strongest first.

    Args:
      intensities: (T, A) on OpenFace's scale 0–5; values of frames without a face are ignored.
      present: (T,) bool, whether a frame shows the face.
      names: the A columns as "AU1", "AU12", ...; blinking (AU43, AU45) may be among them and is never named.
      threshold: intensity from which (inclusive) a unit counts as active.
      at_most: the maximum number of units named.

    Returns:
      Such as "raised cheeks, pulled-up lip corners and parted lips"; "a neutral face" if nothing is active; None,
      unknown, if no frame shows a face.

    Raises:
      AvjaxError: shapes disagree, a name is unknown, or an intensity in a frame with a face is not finite.
    """
    seen = _seen(intensities, present, names)
    return _in_words(np.percentile(seen, 90, axis=0), names, threshold, at_most) if len(seen) else None


def _seen(values: np.ndarray, present: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Checks `values` and returns their rows with a face, float32 (frames, A)."""
    values, present = np.asarray(values), np.asarray(present, bool)
    if present.ndim != 1 or values.shape != (len(present), len(names)):
        raise AvjaxError(
            f"action units of shape {values.shape} with `present` of shape {present.shape} and {len(names)} names: "
            "expected (frames, units), (frames,) and one name per unit"
        )
    if unknown := [name for name in names if name not in PHRASES and name not in BLINKING]:
        raise AvjaxError(
            f"no phrase for the action units {', '.join(unknown)}: write names as AU1 or AU12 and drop the columns "
            f"of other units; known are {', '.join(PHRASES)}"
        )
    seen = values[present].astype(np.float32)
    if bad := [name for name, fine in zip(names, np.isfinite(seen).all(0), strict=True) if not fine]:
        raise AvjaxError(f"not a finite number in {', '.join(bad)}: mark frames without measurements as not found")
    return seen


def _in_words(strength: np.ndarray, names: Sequence[str], threshold: float, at_most: int) -> str:
    order = np.argsort(-strength, kind="stable")  # ties keep the detector's order
    active = [PHRASES[names[i]] for i in order if strength[i] >= threshold and names[i] not in BLINKING]
    *others, last = active[:at_most] or [NEUTRAL]
    return f"{', '.join(others)} and {last}" if others else last
