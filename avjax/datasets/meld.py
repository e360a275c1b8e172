"""MELD as it was downloaded (Poria et al. 2019): utterances of a television series, three tables, one division.

`train_splits/`, `dev_splits_complete/` and `output_repeated_splits_test/` hold `dia{D}_utt{U}.mp4`, and
`{train,dev,test}_sent_emo.csv` say what they are. Numbers of dialogues begin anew in each part.
"""

import re
from pathlib import Path

from avjax.datasets import labels
from avjax.datasets.base import Clip, Corpus, Fold, Task
from avjax.datasets.metadata import metadata
from avjax.errors import AvjaxError
from avjax.utils import media_files, tables

_PARTS = {"train": "train_splits", "dev": "dev_splits_complete", "test": "output_repeated_splits_test"}
# A table is not to lead out of the folder of films.
_ID = re.compile(r"\w+/dia\d+_utt\d+", re.ASCII)
_MISSING = "set --config.data.root to the folder of MELD.Raw, tables beside films"
_COLUMNS = ("Utterance", "Speaker", "Emotion", "Dialogue_ID", "Utterance_ID")
# The six who speak most; of the others the data say no more than a name.
_GENDER = dict.fromkeys(("Monica", "Phoebe", "Rachel"), "female") | dict.fromkeys(("Chandler", "Joey", "Ross"), "male")
# What the utterances have in the place of typographic marks.
_MARKS = {code: bytes([code]).decode("cp1252", "ignore") for code in range(0x80, 0xA0)}


def index(root: Path) -> Corpus:
    """Reads the three tables. Films that are in none of them are passed over.

    A row whose film is missing or known to be broken, or whose label is no class, is rejected with a reason.
    The speaker is there by name, who may be in several parts: the division is by dialogues.

    Raises:
      AvjaxError: a table is missing, is not UTF-8 or lacks a column, or a part has no film.
    """
    known = metadata("meld")
    classes = tuple(known.classes)
    clips: dict[str, list[Clip]] = {}
    rejected: list[tuple[str, str]] = []
    for part, folder in _PARTS.items():
        table = root / f"{part}_sent_emo.csv"
        made = [_clip(root, part, folder, row) for row in tables.read(table, _COLUMNS, hint=_MISSING)]
        reasons = {c.id: known.broken.get(c.id) or _trouble(c, classes) for c in made}
        rejected += [(clip_id, reason) for clip_id, reason in reasons.items() if reason]
        clips[part] = [c for c in made if not reasons[c.id]]
        if not clips[part]:
            first = ": ".join(rejected[-1]) if rejected else "it has no rows"
            raise AvjaxError(f"{table}: none of its rows has a film in {root / folder}; the last: {first}")
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
        transcript=_mended(row["Utterance"]) or None,
        dialogue=f"{part}/{dialogue}",
        turn=int(turn) if turn.isdecimal() else None,
    )


def _mended(text: str) -> str:
    """An utterance whose typographic marks were read as control characters: U+0092 is the apostrophe of Windows."""
    return " ".join(text.translate(_MARKS).split())
