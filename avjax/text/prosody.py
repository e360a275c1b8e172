"""Speech rate, pitch and stress in one word each: the `[R]`, `[P]` and `[S]` of ETG-AVER's sentence (Eq. 1).

Bounds are fixed numbers rather than quantiles of a training set, so that a clip has the same sentence in every fold; a
value on a bound gets the middle word. Quantiles over all speakers would, for pitch, encode sex rather than emotion.
"""

import math

from avjax.errors import AvjaxError


def pitch_word(
    f0_hz: float | None,
    speaker_median_hz: float | None,
    *,
    semitones: float = 2.0,
    bounds_hz: tuple[float, float] = (140.0, 220.0),
) -> str | None:
    """Returns "low", "normal" or "high", relative to the speaker's own median if it is known.

    Args:
      f0_hz: median fundamental frequency over the clip's voiced frames, Hz; None if nothing is voiced.
      speaker_median_hz: the same over all clips of the speaker (no labels needed), Hz; None if unknown.
      semitones: distance from the speaker's median beyond which pitch is low or high.
      bounds_hz: without that median, below the first is low and above the second is high.

    Returns:
      The word, or None without a measurement.

    Raises:
      AvjaxError: a frequency is not a positive finite number.
    """
    if f0_hz is None:
        return None
    _check("pitch in Hz", f0_hz, above=0.0)
    if speaker_median_hz is not None:
        _check("the speaker's median pitch in Hz", speaker_median_hz, above=0.0)
        ratio = 2.0 ** (semitones / 12.0)
        bounds_hz = (speaker_median_hz / ratio, speaker_median_hz * ratio)
    return _word(f0_hz, bounds_hz, ("low", "normal", "high"))


def rate_word(syllables_per_second: float | None, *, bounds: tuple[float, float] = (3.3, 5.0)) -> str | None:
    """Returns "slow" below the first bound, "fast" above the second, else "normal"; None without a measurement.

    Args:
      syllables_per_second: syllable nuclei per second of speech.
      bounds: in syllables per second.

    Raises:
      AvjaxError: the rate is not a positive finite number.
    """
    if syllables_per_second is None:
        return None
    _check("the speech rate in syllables per second", syllables_per_second, above=0.0)
    return _word(syllables_per_second, bounds, ("slow", "normal", "fast"))


def stress_word(db: float | None, *, bounds_db: tuple[float, float] = (6.0, 10.0)) -> str | None:
    """Returns "weak" below the first bound, "strong" above the second, else "moderate"; None without a measurement.

    Args:
      db: energy of the clip's loudest syllables relative to the clip's median, dB.
      bounds_db: in dB.

    Raises:
      AvjaxError: the stress is not finite, as relative to digital silence without a floor.
    """
    if db is None:
        return None
    _check("the stress in dB", db, above=-math.inf)
    return _word(db, bounds_db, ("weak", "moderate", "strong"))


def _word(value: float, bounds: tuple[float, float], words: tuple[str, str, str]) -> str:
    low, high = bounds
    return words[0] if value < low else words[2] if value > high else words[1]


def _check(what: str, value: float, above: float) -> None:
    if not (math.isfinite(value) and value > above):
        wanted = "a finite number" if above == -math.inf else f"a finite number above {above:g}"
        raise AvjaxError(f"{what} is {value}: expected {wanted}, or None where it could not be measured")
