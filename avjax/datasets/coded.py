"""Corpora whose file names say everything: RAVDESS and CREMA-D (specification of the data sets)."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from avjax import source
from avjax.datasets.base import Clip, Corpus, Task
from avjax.errors import AvjaxError

_RAVDESS = ("neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised")
_CREMA_D = {"ANG": "anger", "DIS": "disgust", "FEA": "fear", "HAP": "happiness", "NEU": "neutral", "SAD": "sadness"}
# Modality 01: picture and sound; vocal channel 01: speech; emotion, intensity, statement, repetition, actor.
_RAVDESS_NAME = re.compile(r"01-01-(0[1-8])-\d\d-\d\d-\d\d-(\d\d)")
_CREMA_D_NAME = re.compile(rf"(\d{{4}})_[A-Z]{{3}}_({'|'.join(_CREMA_D)})_(?:LO|MD|HI|XX|X)")


def ravdess(root: Path) -> Corpus:
    """RAVDESS as it was downloaded: `Actor_01/01-01-….mp4`, the 1,440 clips of speech with picture and sound.

    Raises:
      AvjaxError: there is no such file below `root`.
    """

    def clip(path: Path) -> Clip | None:
        found = _RAVDESS_NAME.fullmatch(path.stem)
        return found and Clip(path.stem, path, _RAVDESS[int(found[1]) - 1], speaker=found[2])

    return _indexed("ravdess", _RAVDESS, sorted(root.rglob("*.mp4")), clip, f"{root}: no Actor_01/01-01-….mp4")


def crema_d(root: Path) -> Corpus:
    """CREMA-D as it was downloaded: `VideoFlash/*.flv` beside `AudioWAV/*.wav`, with the intended emotions.

    The sound is that of the WAV file where there is one, else that of the film.

    Raises:
      AvjaxError: there is no such film.
    """

    def clip(path: Path) -> Clip | None:
        found = _CREMA_D_NAME.fullmatch(path.stem)
        sound = root / "AudioWAV" / f"{path.stem}.wav"
        audio = sound if sound.is_file() else None
        return found and Clip(path.stem, path, _CREMA_D[found[2]], audio=audio, speaker=found[1])

    films = sorted((root / "VideoFlash").glob("*.flv"))
    return _indexed("crema_d", tuple(_CREMA_D.values()), films, clip, f"{root}: no VideoFlash/1001_DFA_ANG_XX.flv")


def _indexed(
    name: str, classes: tuple[str, ...], files: Iterable[Path], clip: Callable[[Path], Clip | None], lacking: str
) -> Corpus:
    """The files whose names are clips; those that cannot be read are rejected with a reason."""
    clips, rejected, seen = [], [], set()
    for made in filter(None, map(clip, files)):
        reason = "duplicate clip id: another file has this name" if made.id in seen else source.trouble(made.path)
        rejected += [(made.id, reason)] if reason else []
        clips += [] if reason else [made]
        seen |= set() if reason else {made.id}
    if not clips:
        raise AvjaxError(f"{lacking}; set --config.data.root to the folder of the download")
    return Corpus(name, Task("single", classes), tuple(clips), (), tuple(rejected))
