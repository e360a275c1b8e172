"""MELD as downloaded (Poria et al. 2019): utterances of a television series, three tables, one official split.

`train_splits/`, `dev_splits_complete/` and `output_repeated_splits_test/` hold `dia{D}_utt{U}.mp4`, and
`{train,dev,test}_sent_emo.csv` describe them. Dialogue numbers start over in each part.
"""

import re
from pathlib import Path

from avjax.datasets import labels
from avjax.datasets.base import Clip, Corpus, Fold, Task
from avjax.datasets.metadata import metadata
from avjax.errors import AvjaxError
from avjax.utils import media_files, tables

_PARTS = {"train": "train_splits", "dev": "dev_splits_complete", "test": "output_repeated_splits_test"}
# A table must not lead out of the folder of videos.
_ID = re.compile(r"\w+/dia\d+_utt\d+", re.ASCII)
_MISSING = "set --config.data.root to the folder of MELD.Raw, tables beside videos"
_COLUMNS = ("Utterance", "Speaker", "Emotion", "Dialogue_ID", "Utterance_ID")
# The six main speakers; of the others the data give only a name.
_GENDER = dict.fromkeys(("Monica", "Phoebe", "Rachel"), "female") | dict.fromkeys(("Chandler", "Joey", "Ross"), "male")
# Control characters that the utterances have instead of typographic marks.
_MARKS = {code: bytes([code]).decode("cp1252", "ignore") for code in range(0x80, 0xA0)}


def index(root: Path) -> Corpus:
    """Reads the three tables. Videos that are in none of them are skipped.

    A row is rejected with a reason if its video is missing or known to be broken, or its label is not a class.
    Speakers are given by name and may be in several parts, as the split is by dialogue.

    Raises:
      AvjaxError: a table is missing, is not UTF-8 or lacks a column, or a part has no video.
    """
    facts = metadata("meld")
    classes = tuple(facts.classes)
    clips: dict[str, list[Clip]] = {}
    rejected: list[tuple[str, str]] = []
    for part, folder in _PARTS.items():
        table = root / f"{part}_sent_emo.csv"
        made = [_clip(root, part, folder, row) for row in tables.read(table, _COLUMNS, hint=_MISSING)]
        reasons = {c.id: facts.broken.get(c.id) or _trouble(c, classes) for c in made}
        rejected += [(clip_id, reason) for clip_id, reason in reasons.items() if reason]
        clips[part] = [c for c in made if not reasons[c.id]]
        if not clips[part]:
            first = ": ".join(rejected[-1]) if rejected else "it has no rows"
            raise AvjaxError(f"{table}: none of its rows has a video in {root / folder}; the last: {first}")
    train, val, test = (tuple(c.id for c in clips[part]) for part in _PARTS)
    every = tuple(c for part in clips.values() for c in part)
    return Corpus("meld", Task("single", classes), every, (Fold("official", train, test, val),), tuple(rejected))


def _trouble(clip: Clip, classes: tuple[str, ...]) -> str:
    if not _ID.fullmatch(clip.id):
        return "Dialogue_ID or Utterance_ID is no number"
    return labels.unknown_label(clip.label, classes) or media_files.trouble(clip.path)


def _clip(root: Path, part: str, folder: str, row: dict[str, str]) -> Clip:
    dialogue, turn, speaker = row["Dialogue_ID"], row["Utterance_ID"], row["Speaker"]
    name = f"dia{dialogue}_utt{turn}"
    return Clip(
        id=f"{part}/{name}",
        path=root / folder / f"{name}.mp4",
        label=row["Emotion"].lower(),
        speaker=speaker or None,
        gender=_GENDER.get(speaker),
        transcript=_fixed(row["Utterance"]) or None,
        dialogue=f"{part}/{dialogue}",
        turn=int(turn) if turn.isdecimal() else None,
    )


def _fixed(text: str) -> str:
    """Restores typographic marks that were decoded as control characters: U+0092 is the apostrophe of Windows-1252."""
    return " ".join(text.translate(_MARKS).split())
