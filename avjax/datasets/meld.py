"""MELD as it was downloaded (Poria et al. 2019): utterances of a television series, three tables, one division.

`train_splits/`, `dev_splits_complete/` and `output_repeated_splits_test/` hold `dia{D}_utt{U}.mp4`, and
`{train,dev,test}_sent_emo.csv` say what they are. Numbers of dialogues begin anew in each part.
"""

import csv
from pathlib import Path

from avjax import source
from avjax.datasets import labels
from avjax.datasets.base import Clip, Corpus, Fold, Task
from avjax.errors import AvjaxError

CLASSES = ("anger", "disgust", "fear", "joy", "neutral", "sadness", "surprise")
_PARTS = {"train": "train_splits", "dev": "dev_splits_complete", "test": "output_repeated_splits_test"}
_COLUMNS = ("Utterance", "Speaker", "Emotion", "Dialogue_ID", "Utterance_ID")
# The six who speak most; of the others the data say no more than a name.
_GENDER = dict.fromkeys(("Monica", "Phoebe", "Rachel"), "female") | dict.fromkeys(("Chandler", "Joey", "Ross"), "male")


def index(root: Path) -> Corpus:
    """Reads the three tables. A row whose film is missing or whose label is no class is rejected with a reason.

    The speaker is there by name, who may be in several parts: the division is by dialogues.

    Raises:
      AvjaxError: a table is missing, is not UTF-8 or lacks a column, or a part has no film.
    """
    clips: dict[str, list[Clip]] = {}
    rejected: list[tuple[str, str]] = []
    for part, folder in _PARTS.items():
        table = root / f"{part}_sent_emo.csv"
        made = [_clip(root, part, folder, row) for row in _read(table)]
        reasons = {c.id: labels.trouble(c.label, CLASSES) or source.trouble(c.path) for c in made}
        rejected += [(clip_id, reason) for clip_id, reason in reasons.items() if reason]
        clips[part] = [c for c in made if not reasons[c.id]]
        if not clips[part]:
            first = ": ".join(rejected[-1]) if rejected else "it has no rows"
            raise AvjaxError(f"{table}: none of its rows has a film in {root / folder}; the last: {first}")
    train, val, test = (tuple(c.id for c in clips[part]) for part in _PARTS)
    every = tuple(c for part in clips.values() for c in part)
    return Corpus("meld", Task("single", CLASSES), every, (Fold("official", train, test, val),), tuple(rejected))


def _read(table: Path) -> list[dict[str, str]]:
    if not table.is_file():
        raise AvjaxError(f"{table}: not found; set --config.data.root to the folder of MELD.Raw, tables beside films")
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restval="")
            if missing := [c for c in _COLUMNS if c not in (reader.fieldnames or ())]:
                raise AvjaxError(f"{table}: no column {', '.join(missing)}; expected {', '.join(_COLUMNS)}")
            return list(reader)
    except UnicodeDecodeError as error:
        raise AvjaxError(f"{table}: not UTF-8 (byte {error.start}); take the table of the download") from error


def _clip(root: Path, part: str, folder: str, row: dict[str, str]) -> Clip:
    dialogue, turn = row["Dialogue_ID"].strip(), row["Utterance_ID"].strip()
    name = f"dia{dialogue}_utt{turn}"
    speaker = row["Speaker"].strip()
    return Clip(
        id=f"{part}/{name}",
        path=root / folder / f"{name}.mp4",
        label=row["Emotion"].strip().lower(),
        speaker=speaker or None,
        gender=_GENDER.get(speaker),
        transcript=_mended(row["Utterance"]) or None,
        dialogue=f"{part}/{dialogue}",
        turn=int(turn) if turn.isdecimal() else None,
    )


def _mended(text: str) -> str:
    """An utterance whose typographic marks were read as control characters: U+0092 is the apostrophe of Windows."""
    marks = {code: bytes([code]).decode("cp1252", "ignore") for code in range(0x80, 0xA0)}
    return " ".join(text.translate(marks).split())
