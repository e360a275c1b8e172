"""A synthetic voice that babbles: source and filter, with given pitch, rate and stress.

The source is a sum of harmonics that decays with frequency; the filter has three resonances that move from vowel to
vowel. Both are evaluated harmonic by harmonic, so no filtering in time is needed.
"""

import dataclasses

import numpy as np

from avjax.media.audio import SAMPLE_RATE

# First three resonances in Hz of a, e, i, o, u: round values near those of a woman's vowels.
_VOWELS = np.array(
    [(850, 1450, 2800), (600, 2200, 2900), (350, 2700, 3300), (550, 1000, 2750), (380, 950, 2700)], float
)
_BANDWIDTHS = np.array([90.0, 120.0, 180.0])
_HARMONICS = 36
_TOP = 0.45 * SAMPLE_RATE  # harmonics above are omitted
_GAIN_EVERY = 16  # samples
_DIP_DB = -16.0  # level between syllables
_GLIDE = 0.04  # seconds in which one vowel, or one level, turns into the next


@dataclasses.dataclass(frozen=True)
class Speaker:
    """A voice: `pitch` usual F0 in Hz; `formants` factor on all resonances; `tilt` of the source in dB per octave."""

    pitch: float
    formants: float
    tilt: float


@dataclasses.dataclass(frozen=True)
class Manner:
    """A manner of speaking: `semitones` above the usual pitch, `rate` syllables per second, `stress` dB of accents."""

    semitones: float
    rate: float
    stress: float


def speak(speaker: Speaker, manner: Manner, seconds: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Babbles for `seconds`.

    Returns:
      samples (n,) float64 at 16 kHz and RMS 1, and openness (n,) of the mouth, between 0 and 1.
    """
    n = round(seconds * SAMPLE_RATE)
    time = np.arange(n) / SAMPLE_RATE
    syllables = max(2, round(manner.rate * seconds))
    bounds = np.linspace(0, seconds, syllables + 1)
    bounds[1:-1] += rng.uniform(-0.12, 0.12, syllables - 1) * seconds / syllables
    which = np.clip(np.searchsorted(bounds, time, side="right") - 1, 0, syllables - 1)
    phase = (time - bounds[which]) / np.diff(bounds)[which]  # 0–1 within a syllable
    accented = (np.arange(syllables) + rng.integers(3)) % 3 == 0
    vowels = rng.integers(len(_VOWELS), size=syllables)

    openness = np.sin(np.pi * phase) ** 0.7
    level = _smooth(np.where(accented, manner.stress, 0.0)[which]) + _DIP_DB * (1 - openness)
    f0 = _pitch(speaker, manner, time, seconds, accented[which], rng)
    formants = np.stack([_smooth(_VOWELS[vowels, i][which]) for i in range(3)]) * speaker.formants
    samples = _harmonics(f0, formants, speaker.tilt) * 10 ** (level / 20)
    samples = samples / _rms(samples) + _consonants(phase, rng)
    return samples / _rms(samples), openness


def _pitch(
    speaker: Speaker, manner: Manner, time: np.ndarray, seconds: float, accented: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Returns F0 (n,) in Hz: it declines by two semitones, rises on accents, and varies slightly."""
    wander = np.interp(time, np.linspace(0, seconds, 9), rng.normal(0, 0.35, 9))
    accent = _smooth(accented * (0.6 + 0.12 * manner.stress))
    return speaker.pitch * 2 ** ((manner.semitones + 1 - 2 * time / seconds + accent + wander) / 12)


def _harmonics(f0: np.ndarray, formants: np.ndarray, tilt: float) -> np.ndarray:
    """Synthesises the voiced samples (n,) from F0 (n,) and resonances (3, n), both in Hz."""
    angle = 2 * np.pi * np.cumsum(f0) / SAMPLE_RATE
    index = np.arange(len(f0))
    coarse = index[::_GAIN_EVERY]  # gains change slowly
    out = np.zeros_like(f0)
    for k in range(1, _HARMONICS + 1):
        frequency = k * f0[coarse]
        gain = 10 ** (tilt * np.log2(k) / 20) * np.where(frequency < _TOP, 1.0, 0.0)
        for centre, width in zip(formants[:, coarse], _BANDWIDTHS, strict=True):
            # Magnitude of a resonance with unit gain at 0 Hz.
            gain = gain * centre**2 / np.hypot(centre**2 - frequency**2, width * frequency)
        out += np.interp(index, coarse, gain) * np.sin(k * angle)
    return out


def _consonants(phase: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Synthesises a short hiss at the beginning of every syllable, (n,)."""
    hiss = np.diff(rng.normal(size=len(phase) + 1))
    return 0.12 * hiss * np.exp(-((phase / 0.12) ** 2))


def _smooth(steps: np.ndarray) -> np.ndarray:
    from scipy.ndimage import uniform_filter1d

    return uniform_filter1d(steps.astype(float), round(_GLIDE * SAMPLE_RATE), mode="nearest")


def _rms(samples: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(samples))))
