"""Audio from any container, its acoustic features on a common time grid, and the prosody behind the prosody words.

samples = read_audio(path)
analysis = analyse(samples)  # the expensive part, once
acoustic(analysis), prosody(analysis)
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from avjax.errors import UnusableMedia
from avjax.media.video import decodable, decoded, opened, within

SAMPLE_RATE = 16000
HOPS_PER_SECOND = 100
FLOOR_DB = -80.0  # dBFS; anything below is digital silence: the last bit of a codec or a converter
MELS = 40
MFCCS = 13
ACOUSTIC_NAMES = (*(f"mel{i}" for i in range(MELS)), *(f"mfcc{i}" for i in range(MFCCS)), "energy", "voicing", "f0")

_HOP = SAMPLE_RATE // HOPS_PER_SECOND
_WINDOW = 400  # 25 ms
_FFT = 512
# pYIN is nearly all of the cost. A hop of 20 ms and candidates a fifth of a semitone apart (librosa's default is 0.1)
# take 50 ms for a clip of 3.3 s instead of 390 ms with a hop of 10 ms; the median F0 changes by 0.6 %.
_PITCH = {"fmin": 65.0, "fmax": 600.0, "hop_length": 2 * _HOP, "frame_length": 1024, "resolution": 0.2}

# Syllable nuclei after de Jong & Wempe (2009): intensity peaks in voiced speech at most 25 dB below the loud end (95th
# percentile), with a dip of at least 2 dB between them; syllables are at least 100 ms apart.
_BELOW_LOUD_DB = 25.0
_DIP_DB = 2.0
_APART_HOPS = 10
_SMOOTH_HOPS = 5
_PAUSE_HOPS = 30  # silences of 300 ms and more are pauses, not speech
_LOUDEST = 0.25  # the proportion of syllables that counts as stressed


@dataclass(frozen=True)
class Analysis:
    """Measurements of one audio signal at H hops of 10 ms, hop h centred at h x 10 ms.

    `mel_db` (H, 40) and `energy_db` (H,) float32: dBFS, at least `FLOOR_DB`; `f0_hz` (H,) float32, 0 where unvoiced;
    `voicing` (H,) float32: probability that the hop is voiced.
    """

    mel_db: np.ndarray
    energy_db: np.ndarray
    f0_hz: np.ndarray
    voicing: np.ndarray

    @property
    def inside(self) -> np.ndarray:
        """Marks the hops from the first to the last one that is not digital silence, (H,) bool."""
        audible = self.energy_db > FLOOR_DB
        return np.logical_or.accumulate(audible) & np.logical_or.accumulate(audible[::-1])[::-1]


@dataclass(frozen=True)
class Acoustic:
    """Acoustic `features` (S, D) float32, columns `ACOUSTIC_NAMES`; `mask` (S,) bool, False in outer silence."""

    features: np.ndarray
    mask: np.ndarray


@dataclass(frozen=True)
class Prosody:
    """Pitch, speech rate and stress of a clip; None if there is no voiced speech to measure."""

    f0_median_hz: float | None
    syllables_per_second: float | None
    stress_db: float | None


@dataclass(frozen=True)
class Sampling:
    """Requested sampling of audio: `rate` samples per second, at most `max_seconds` (None = all)."""

    rate: int = SAMPLE_RATE
    max_seconds: float | None = None


def read_audio(
    path: str | Path, sampling: Sampling = Sampling(), *, start: float = 0.0, end: float | None = None
) -> np.ndarray:
    """Decodes the audio of a file, or of its part [`start`, `end`) in seconds on the clip's clock (see `video.py`).

    Audio that begins after the video is preceded by silence, so that both stay on one clock.

    Returns:
      (n,) float32, the mean of the channels, in [-1, 1].

    Raises:
      UnusableMedia: no such file, no audio stream, or no sample (in the part).
    """
    (samples,) = read_audio_parts(path, [sampling], start=start, end=end)
    if not samples.size:
        raise UnusableMedia(nothing_decoded(start, end))
    return samples


def nothing_decoded(start: float, end: float | None) -> str:
    """Returns the reason why a part without samples is unusable."""
    return f"no audio can be decoded{within(start, end)}"


def read_audio_parts(
    path: str | Path, samplings: Sequence[Sampling], *, start: float = 0.0, end: float | None = None
) -> list[np.ndarray]:
    """Decodes the audio of a file once for all `samplings`, each as in `read_audio`; (0,) if there is no sample.

    Raises:
      UnusableMedia: no such file, or no audio stream.
    """
    ends = [min(start + (s.max_seconds or np.inf), np.inf if end is None else end) for s in samplings]
    collected = [_Resampled(sampling.rate, until) for sampling, until in zip(samplings, ends, strict=True)]
    with opened(path) as container:
        streams = decodable(container.streams.audio)
        if not streams:
            raise UnusableMedia("no audio stream")
        frames = decoded(container, streams[0], start, max(ends))
        # Broadcasts and damaged files change their layout or rate midway; a resampler takes only one.
        for _, run in groupby(frames, key=lambda pair: (pair[1].format.name, pair[1].layout.name, pair[1].rate)):
            for time, frame in run:
                for samples in collected:
                    samples.add(time, frame)
            for samples in collected:
                samples.end_run()
    return [samples.cut(start) for samples in collected]


class _Resampled:
    """Collects the frames that begin before `end` as mono samples, `rate` per second."""

    def __init__(self, rate: int, end: float) -> None:
        self._rate, self._end = rate, end
        self._begin, self._resampler = None, None
        self._parts = [np.zeros(0, np.float32)]

    def add(self, time: float, frame: Any) -> None:
        """Adds the next frame, which begins at `time`."""
        import av

        if time >= self._end:
            return
        if self._begin is None:
            self._begin = time
        if self._resampler is None:
            self._resampler = av.AudioResampler(format="fltp", rate=self._rate)
        self._collect(self._resampler.resample(frame))

    def end_run(self) -> None:
        """Flushes the resampler: frames of another layout or rate follow, or none."""
        if self._resampler:
            self._collect(self._resampler.resample(None))
            self._resampler = None

    def cut(self, start: float) -> np.ndarray:
        """Returns the samples (n,) from `start` to `end`, with silence until the first frame."""
        first = round((start - (self._begin or 0.0)) * self._rate)
        samples = np.pad(np.concatenate(self._parts), (max(0, -first), 0))[max(0, first) :]
        if np.isfinite(self._end):
            samples = samples[: round((self._end - start) * self._rate)]
        # Lossy codecs overshoot full scale.
        return np.clip(np.nan_to_num(samples, posinf=1.0, neginf=-1.0), -1.0, 1.0)

    def _collect(self, frames: Iterable[Any]) -> None:
        # The resampler's own downmix makes equal channels 3 dB louder, beyond full scale: the mean is taken instead.
        self._parts += [frame.to_ndarray().mean(0) for frame in frames]


def analyse(samples: np.ndarray) -> Analysis:
    """Measures energy, mel spectrum and pitch of (n,) samples at 16 kHz, n ≥ 1.

    The power of the 40 mel bands adds up to the energy.
    """
    import librosa

    hops = -(-len(samples) // _HOP)
    # Zeros up to the end of the last window, so that the shortest signal has one.
    padded = np.pad(samples.astype(np.float32), (0, hops * _HOP + _PITCH["frame_length"] - len(samples)))
    spectrum = librosa.stft(padded, n_fft=_FFT, hop_length=_HOP, win_length=_WINDOW)[:, :hops]
    window_power = np.square(librosa.filters.get_window("hann", _WINDOW)).sum()
    power = 2 * np.abs(spectrum) ** 2 / (_FFT * window_power)
    bands = librosa.filters.mel(sr=SAMPLE_RATE, n_fft=_FFT, n_mels=MELS, norm=None)
    f0, _, voicing = librosa.pyin(padded, sr=SAMPLE_RATE, fill_na=0.0, **_PITCH)
    return Analysis(
        mel_db=_decibels(bands @ power).T,
        energy_db=_decibels(power.sum(0)),
        f0_hz=np.repeat(f0, 2)[:hops].astype(np.float32),
        voicing=np.repeat(voicing, 2)[:hops].astype(np.float32),
    )


def acoustic(analysis: Analysis, steps_per_second: int = 10) -> Acoustic:
    """Averages an analysis over steps of 1/`steps_per_second` s and scales it to order 1.

    Columns: 40 mel bands in units of 20 dB above the floor (silence is 0); 13 MFCCs, half the orthonormal DCT of these
    bands; energy on the same scale; the probability of voicing; F0 in octaves above 100 Hz, averaged over voiced hops,
    0 if none is voiced. Leading and trailing digital silence is excluded from every average and masked, since its
    length carries no information about the speaker; pauses in between are kept.

    Raises:
      ValueError: `steps_per_second` does not divide 100.
    """
    from scipy.fft import dct

    if HOPS_PER_SECOND % steps_per_second:
        raise ValueError(f"steps_per_second must divide {HOPS_PER_SECOND}; got {steps_per_second}")
    per_step = HOPS_PER_SECOND // steps_per_second
    mel, energy = ((level - FLOOR_DB) / 20 for level in (analysis.mel_db, analysis.energy_db))
    mfcc = dct(mel, norm="ortho")[:, :MFCCS] / 2
    voiced = analysis.f0_hz > 0
    octaves = np.log2(np.where(voiced, analysis.f0_hz, 100) / 100)
    inside = analysis.inside
    steady = _step_means(np.column_stack([mel, mfcc, energy, analysis.voicing]), inside, per_step)
    pitch = _step_means(octaves[:, None], inside & voiced, per_step)
    mask = np.logical_or.reduceat(inside, np.arange(0, len(inside), per_step))
    return Acoustic(np.column_stack([steady, pitch]).astype(np.float32), mask)


def prosody(analysis: Analysis) -> Prosody:
    """Measures pitch, speech rate and stress, from which the sentences about prosody are generated.

    Pitch: median F0 over voiced hops, in Hz. Rate: syllable nuclei per second of speech; speech lies between the first
    and the last hop that is voiced or loud, without pauses of 0.3 s or more. Stress: the mean level of the loudest
    quarter of the nuclei above the median level of speech, in dB.
    """
    from scipy.ndimage import uniform_filter1d

    voiced = analysis.f0_hz > 0
    if not voiced.any():
        return Prosody(None, None, None)
    pitch = float(np.median(analysis.f0_hz[voiced]))
    level = uniform_filter1d(analysis.energy_db, _SMOOTH_HOPS, mode="nearest")
    threshold = np.percentile(level[analysis.inside], 95) - _BELOW_LOUD_DB
    nuclei = _nuclei(level, threshold, voiced)
    if not nuclei.size:
        return Prosody(pitch, None, None)
    speech = _without_pauses(voiced | (level > threshold))
    loudest = np.sort(level[nuclei])[-max(1, round(_LOUDEST * len(nuclei))) :]
    return Prosody(
        f0_median_hz=pitch,
        syllables_per_second=float(len(nuclei) * HOPS_PER_SECOND / speech.sum()),
        stress_db=float(loudest.mean() - np.median(level[speech])),
    )


def surface(analysis: Analysis) -> tuple[float, float]:
    """Measures surface cues of a recording: lead-in in seconds and loudness in dBFS.

    The lead-in ends at the first hop that is at most 25 dB below the loud end; loudness is the mean power between the
    first and the last hop that is not digital silence. For silent audio: its whole length, and `FLOOR_DB`.
    """
    inside = analysis.energy_db[analysis.inside]
    if not inside.size:
        return len(analysis.energy_db) / HOPS_PER_SECOND, FLOOR_DB
    loud = analysis.energy_db > np.percentile(inside, 95) - _BELOW_LOUD_DB
    return float(np.argmax(loud) / HOPS_PER_SECOND), float(10 * np.log10(np.mean(10 ** (inside / 10))))


def _decibels(power: np.ndarray) -> np.ndarray:
    return np.maximum(10 * np.log10(np.maximum(power, 1e-12)), FLOOR_DB).astype(np.float32)


def _step_means(values: np.ndarray, valid: np.ndarray, per_step: int) -> np.ndarray:
    """Averages (H, D) values over the valid hops of every step of `per_step` hops: (S, D), 0 if none is valid."""
    starts = np.arange(0, len(values), per_step)
    sums = np.add.reduceat(values * valid[:, None], starts)
    counts = np.add.reduceat(valid.astype(int), starts)
    return sums / np.maximum(counts, 1)[:, None]


def _nuclei(level: np.ndarray, threshold: float, voiced: np.ndarray) -> np.ndarray:
    """Returns the hops of the syllable nuclei in a smoothed level (H,) in dB."""
    from scipy.signal import find_peaks

    peaks, _ = find_peaks(level, height=threshold, prominence=_DIP_DB, distance=_APART_HOPS)
    return peaks[voiced[peaks]]


def _without_pauses(active: np.ndarray) -> np.ndarray:
    """Fills the gaps in `active` (H,) bool that are shorter than a pause."""
    hops = np.flatnonzero(active)
    speech = active.copy()
    for last, following in pairwise(hops):
        if following - last - 1 < _PAUSE_HOPS:
            speech[last:following] = True
    return speech
