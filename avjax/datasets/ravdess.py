"""RAVDESS (Livingstone and Russo 2018): speech of 24 actors; file names give labels, actors and sentences."""

import re
from collections.abc import Sequence
from pathlib import Path

from avjax.datasets.base import GENDERS, Clip, Corpus, make_corpus
from avjax.datasets.metadata import metadata
from avjax.utils import media_files

# Modality 01: video with audio, 02: video, 03: audio; vocal channel 01: speech; emotion, intensity, statement,
# repetition, actor.
_NAME = re.compile(r"(?P<kind>0[123])-(?P<take>01-(0[1-8])-\d\d-(0[12])-\d\d-(\d\d))", re.ASCII)
_SUFFIXES = (".mp4", ".wav")
_STATEMENTS = {"01": "Kids are talking by the door", "02": "Dogs are sitting by the door"}


def index(root: Path) -> Corpus:
    """Indexes RAVDESS as downloaded: `Actor_01/01-01-….mp4`, the 1,440 clips of speech with video and audio.

    `02-01-….mp4` and `03-01-….wav` are copies of these, video only and audio only. If only such a pair exists, it is
    the clip, with the id of the video file.

    Raises:
      AvjaxError: there is no such file below `root`, or none can be used.
    """
    emotions = tuple(metadata("ravdess").classes)
    videos, wavs = ([(p, m) for p in media_files.files(root, s) if (m := _NAME.fullmatch(p.stem))] for s in _SUFFIXES)
    complete = {m["take"] for _, m in videos if m["kind"] == "01"}
    audio_of = {m["take"]: p for p, m in reversed(wavs) if m["kind"] == "03" and m["take"] not in complete}
    clips = [_clip(p, m, emotions, None) for p, m in videos if m["kind"] == "01"]
    clips += [
        _clip(p, m, emotions, audio_of[m["take"]]) for p, m in videos if m["kind"] == "02" and m["take"] in audio_of
    ]
    return make_corpus("ravdess", clips, {}, f"{root}: no Actor_01/01-01-….mp4")


def _clip(path: Path, code: re.Match[str], emotions: Sequence[str], audio: Path | None) -> Clip:
    _, _, emotion, statement, actor = code.groups()
    return Clip(
        id=path.stem,
        path=path,
        label=emotions[int(emotion) - 1],
        audio=audio,
        speaker=actor,
        gender=GENDERS[int(actor) % 2],
        transcript=_STATEMENTS[statement],
    )
