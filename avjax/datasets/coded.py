"""Corpora whose file names say everything: RAVDESS and Java-SED (specification of the data sets)."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from avjax import source
from avjax.datasets.about import about
from avjax.datasets.base import GENDERS, Clip, Corpus, Task
from avjax.errors import AvjaxError

# Modality 01: picture and sound, 02: picture, 03: sound; vocal channel 01: speech; emotion, intensity, statement,
# repetition, actor.
_RAVDESS = re.compile(r"(?P<kind>0[123])-(?P<take>01-(0[1-8])-\d\d-(0[12])-\d\d-(\d\d))", re.ASCII)
_SUFFIXES = (".mp4", ".wav")
_STATEMENTS = {"01": "Kids are talking by the door", "02": "Dogs are sitting by the door"}
# Actor, sentence, emotion, repetition.
_JAVA_SED = re.compile(r"(\d\d)-\d\d-(0[1-6])_\d\d", re.ASCII)


def ravdess(root: Path) -> Corpus:
    """RAVDESS as it was downloaded: `Actor_01/01-01-….mp4`, the 1,440 clips of speech with picture and sound.

    `02-01-….mp4` and `03-01-….wav` are copies of these, picture alone and sound alone. Where a clip is there as such a
    pair only, it is the pair, with the id of the picture's file.

    Raises:
      AvjaxError: there is no such file below `root`, or none can be used.
    """
    emotions = tuple(about("ravdess").classes)
    films, sounds = ([(p, m) for p in source.files(root, s) if (m := _RAVDESS.fullmatch(p.stem))] for s in _SUFFIXES)
    whole = {m["take"] for _, m in films if m["kind"] == "01"}
    sound_of = {m["take"]: p for p, m in reversed(sounds) if m["kind"] == "03" and m["take"] not in whole}
    clips = [_ravdess(p, m, emotions, None) for p, m in films if m["kind"] == "01"]
    clips += [
        _ravdess(p, m, emotions, sound_of[m["take"]]) for p, m in films if m["kind"] == "02" and m["take"] in sound_of
    ]
    return gathered("ravdess", clips, {}, f"{root}: no Actor_01/01-01-….mp4")


def _ravdess(path: Path, code: re.Match[str], emotions: Sequence[str], audio: Path | None) -> Clip:
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


def java_sed(root: Path) -> Corpus:
    """Java-SED as it was downloaded: `dataset-resize/01-01-01_01.mp4`, or such files anywhere below `root`.

    Raises:
      AvjaxError: there is no such file below `root`, or none can be used.
    """
    emotions = tuple(about("java_sed").classes)
    found = [(p, m) for p in source.files(root, ".mp4") if (m := _JAVA_SED.fullmatch(p.stem))]
    clips = [Clip(p.stem, p, emotions[int(m[2]) - 1], speaker=m[1], gender=GENDERS[int(m[1]) > 5]) for p, m in found]
    return gathered("java_sed", clips, {}, f"{root}: no dataset-resize/01-01-01_01.mp4")


def gathered(
    name: str, clips: Iterable[Clip], reasons: Mapping[str, str], lacking: str, kind: str = "single"
) -> Corpus:
    """The data set `name`, of those of `clips` that can be used; the others are rejected with a reason.

    Args:
      reasons: id → why a clip cannot be used, beside those that are known to be broken (`avjax.datasets.about`).
      lacking: what is to be said where there is no clip.
      kind: of the task.
    Raises:
      AvjaxError: no clip is there, or none can be used.
    """
    known = about(name)
    kept: dict[str, Clip] = {}
    rejected = []
    for clip in clips:
        twice = "duplicate clip id: another file has this name" if clip.id in kept else ""
        if reason := twice or known.broken.get(clip.id) or reasons.get(clip.id) or _trouble(clip):
            rejected.append((clip.id, reason))
        else:
            kept[clip.id] = clip
    if not kept:
        why = f"none of {len(rejected)} clips can be used; the first: {': '.join(rejected[0])}" if rejected else lacking
        raise AvjaxError(f"{why}; set --config.data.root to the folder of the download")
    return Corpus(name, Task(kind, tuple(known.classes)), tuple(kept.values()), (), tuple(rejected))


def _trouble(clip: Clip) -> str:
    reason = source.trouble(clip.audio) if clip.audio else ""
    return source.trouble(clip.path) or (reason and f"its sound file: {reason}")
