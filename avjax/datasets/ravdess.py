"""RAVDESS (Livingstone and Russo 2018): speech of 24 actors; the names of files give labels, actors and sentences."""

import re
from collections.abc import Sequence
from pathlib import Path

from avjax.datasets.base import GENDERS, Clip, Corpus, make_corpus
from avjax.datasets.metadata import metadata
from avjax.utils import media_files

# Modality 01: picture and sound, 02: picture, 03: sound; vocal channel 01: speech; emotion, intensity, statement,
# repetition, actor.
_NAME = re.compile(r"(?P<kind>0[123])-(?P<take>01-(0[1-8])-\d\d-(0[12])-\d\d-(\d\d))", re.ASCII)
_SUFFIXES = (".mp4", ".wav")
_STATEMENTS = {"01": "Kids are talking by the door", "02": "Dogs are sitting by the door"}


def index(root: Path) -> Corpus:
    """Indexes RAVDESS as it was downloaded: `Actor_01/01-01-….mp4`, the 1,440 clips of speech with picture and sound.

    `02-01-….mp4` and `03-01-….wav` are copies of these, picture alone and sound alone. Where a clip is there as such a
    pair only, it is the pair, with the id of the picture's file.

    Raises:
      AvjaxError: there is no such file below `root`, or none can be used.
    """
    emotions = tuple(metadata("ravdess").classes)
    films, sounds = ([(p, m) for p in media_files.files(root, s) if (m := _NAME.fullmatch(p.stem))] for s in _SUFFIXES)
    whole = {m["take"] for _, m in films if m["kind"] == "01"}
    sound_of = {m["take"]: p for p, m in reversed(sounds) if m["kind"] == "03" and m["take"] not in whole}
    clips = [_clip(p, m, emotions, None) for p, m in films if m["kind"] == "01"]
    clips += [
        _clip(p, m, emotions, sound_of[m["take"]]) for p, m in films if m["kind"] == "02" and m["take"] in sound_of
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
