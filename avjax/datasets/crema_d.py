"""CREMA-D: twelve sentences by 91 actors, with intended and crowd-sourced emotions (Cao et al. 2014).

The two kinds of labels agree on 82.2 % of the clips that have both, and are separate data sets: `crema_d` (intended),
`crema_d:crowd` (majority vote of the crowd), and `crema_d:soft` (the crowd's votes as soft labels).
"""

import bisect
import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from avjax.datasets.base import GENDERS, Clip, Corpus, Fold, make_corpus
from avjax.datasets.labels import numbers
from avjax.datasets.metadata import metadata
from avjax.errors import AvjaxError
from avjax.utils import media_files, tables

# For each class, in order: its code in file names, letter in the table of votes, column in the lists of soft labels.
_CODES = ("ANG", "DIS", "FEA", "HAP", "NEU", "SAD")
_LETTERS = ("A", "D", "F", "H", "N", "S")
_COLUMNS = ("angry", "disgust", "fear", "happy", "neutral", "sad")
_SENTENCES = {
    "IEO": "It's eleven o'clock",
    "TIE": "That is exactly what happened",
    "IOM": "I'm on my way to the meeting",
    "IWW": "I wonder what this is about",
    "TAI": "The airplane is almost full",
    "MTI": "Maybe tomorrow it will be cold",
    "IWL": "I would like a new alarm clock",
    "ITH": "I think I have a doctor's appointment",
    "DFA": "Don't forget a jacket",
    "ITS": "I think I've seen this before",
    "TSI": "The surface is slick",
    "WSI": "We'll stop in a couple of minutes",
}
# Actor, sentence, emotion, intensity.
_NAME = re.compile(
    rf"(10(?:0[1-9]|[1-8]\d|9[01]))_({'|'.join(_SENTENCES)})_({'|'.join(_CODES)})_(?:LO|MD|HI|XX)", re.ASCII
)
# The last actors of the first four blocks, of 18 actors each; the fifth block has the other 19.
_BLOCK_ENDS = ("1018", "1036", "1054", "1072")
_PARTITIONS = ("1", "2", "3", "4", "5")
_PARTS = {"train": "train", "development": "val", "test": "test"}

# A proportion for each class; they sum to 1.
SoftLabel = tuple[float, ...]


def intended(root: Path) -> Corpus:
    """Indexes CREMA-D as downloaded, `VideoFlash/*.flv` beside `AudioWAV/*.wav`, with the intended emotions.

    Audio is read from the WAV file if there is one, else from the video. `VideoDemographics.csv`, anywhere below
    `root`, gives the actors' genders. Folds are the five blocks of actors of HiCMAE's public lists (Sun et al. 2024),
    in the order of actor numbers: 7,437 clips.

    Raises:
      AvjaxError: there is no such video, or none can be used.
    """
    return make_corpus("crema_d", _clips(root, None), {}, f"{root}: no VideoFlash/1001_DFA_ANG_XX.flv")


def crowd(root: Path) -> Corpus:
    """Indexes CREMA-D with the emotion that most of the crowd perceived, in the five partitions of VAVL.

    The partitions are the files `label_consensus_{1..5}.csv` (Gonçalves et al. 2024), anywhere below `root`, with
    training, development and test parts of disjoint actors: 5,820 clips. They overlap: 55 actors are tested 70 times.
    A clip without a video, without votes or without a single majority is rejected with a reason. The lists include
    the clips that are left out of `intended`.

    Raises:
      AvjaxError: a list is missing or found twice, is not such a table, or has an unknown part; two lists differ in
        their clips or votes; or no clip can be used.
    """
    return _partitioned(root, "crema_d:crowd", "single", _majority)


def soft(root: Path) -> Corpus:
    """Indexes CREMA-D with the crowd's votes as soft labels, which sum to 1; otherwise as `crowd`."""
    return _partitioned(root, "crema_d:soft", "soft", lambda classes, label: (label, ""))


def votes(table: Path) -> dict[str, dict[str, float]]:
    """Reads the crowd's votes on clips with video and audio from `processedResults/summaryTable.csv`.

    Returns:
      id of each of the 7,442 clips → {emotion: proportion}: 1 for the emotion with most votes, equal proportions for
      a tie; {} where the table names none.

    Raises:
      AvjaxError: the file is not such a table.
    """
    names = dict(zip(_LETTERS, metadata("crema_d").classes, strict=True))
    votes_of = {row["FileName"]: row["MultiModalVote"] for row in tables.read(table, ("FileName", "MultiModalVote"))}
    most = {name: [names[letter] for letter in vote.split(":") if letter in names] for name, vote in votes_of.items()}
    return {name: dict.fromkeys(emotions, 1 / max(len(emotions), 1)) for name, emotions in most.items()}


def _clips(root: Path, names: Iterable[str] | None) -> list[Clip]:
    """Returns the clips of `names`, by default of all videos, with intended emotions and the blocks as folds."""
    videos, audio = _by_id(root / "VideoFlash", ".flv"), _by_id(root / "AudioWAV", ".wav")
    emotion_of, genders = dict(zip(_CODES, metadata("crema_d").classes, strict=True)), _genders(root)
    clips = []
    for name in videos if names is None else names:
        if not (match := _NAME.fullmatch(name)):
            continue
        actor, sentence, code = match.groups()
        clip = Clip(
            id=name,
            path=videos.get(name, root / "VideoFlash" / f"{name}.flv"),
            label=emotion_of[code],
            audio=audio.get(name),
            speaker=actor,
            gender=genders.get(actor),
            transcript=_SENTENCES[sentence],
            fold=str(1 + bisect.bisect_left(_BLOCK_ENDS, actor)),
        )
        clips.append(clip)
    return clips


def _by_id(folder: Path, suffix: str) -> dict[str, Path]:
    # One file of the download is named 1040_ITH_SAD_X.
    return {re.sub("_X$", "_XX", p.stem): p for p in media_files.files(folder, suffix)}


def _genders(root: Path) -> dict[str, str]:
    """Returns actor → gender from the first VideoDemographics.csv, {} if there is none."""
    paths = [p for p in media_files.files(root, ".csv") if p.name == "VideoDemographics.csv"]
    rows = tables.read(paths[0], ("ActorID", "Sex")) if paths else []
    return {row["ActorID"]: row["Sex"].lower() for row in rows if row["Sex"].lower() in GENDERS}


def _partitioned(
    root: Path, name: str, kind: str, label: Callable[[Sequence[str], SoftLabel], tuple[str | SoftLabel, str]]
) -> Corpus:
    """Indexes the clips of VAVL's lists; `label` maps (classes, votes) to a label and why it is unusable, or ""."""
    soft_labels, parts = _partitions(root)
    classes = tuple(metadata(name).classes)
    labels = {n: ((), reason) if reason else label(classes, s) for n, (s, reason) in soft_labels.items()}
    strange = tuple(
        (media_files.shown(n), "no name of a clip of CREMA-D") for n in soft_labels if not _NAME.fullmatch(n)
    )
    clips = [dataclasses.replace(c, label=labels[c.id][0], fold=None) for c in _clips(root, soft_labels)]
    corpus = make_corpus(
        name, clips, {n: reason for n, (_, reason) in labels.items()}, f"{root}: lists without clips", kind
    )
    usable = {c.id for c in corpus.clips}
    folds = tuple(
        Fold(
            f, *(tuple(n for n, part in part_of.items() if part == p and n in usable) for p in ("train", "test", "val"))
        )
        for f, part_of in parts.items()
    )
    return dataclasses.replace(corpus, folds=folds, rejected=corpus.rejected + strange, overlapping=True)


def _majority(classes: Sequence[str], label: SoftLabel) -> tuple[str, str]:
    best = [name for name, share in zip(classes, label, strict=True) if share == max(label)]
    return (best[0], "") if len(best) == 1 else ("", f"no majority: {' and '.join(best)} have as many votes")


def _partitions(root: Path) -> tuple[dict[str, tuple[SoftLabel, str]], dict[str, dict[str, str]]]:
    """Returns clip → (soft label, why it is unusable or ""), and partition → clip → its part."""
    lists = media_files.files(root, ".csv")
    soft_labels, parts = {}, {}
    for name in _PARTITIONS:
        path = _one(root, [p for p in lists if p.name.endswith(f"label_consensus_{name}.csv")], name)
        rows = _rows(path)
        soft_labels[name] = {clip: numbers("soft", {c: row[c] for c in _COLUMNS}) for clip, row in rows.items()}
        parts[name] = {clip: _part(path, row) for clip, row in rows.items()}
        for clip in sorted(soft_labels["1"].keys() | soft_labels[name].keys()):
            if soft_labels["1"].get(clip) != soft_labels[name].get(clip):
                raise AvjaxError(f"{path}: {clip} is not as in partition 1; expected one kind of votes in all five")
    return soft_labels["1"], parts


def _one(root: Path, paths: Sequence[Path], name: str) -> Path:
    if len(paths) != 1:
        got = " and ".join(map(str, paths)) or "none"
        raise AvjaxError(
            f"{root}: got {got}; expected one list label_consensus_{name}.csv below this folder. The five lists are in "
            "github.com/ilucasgoncalves/VAVL, VAVL/data/CREMA-D/labels_consensus_6class_M: put them beside VideoFlash"
        )
    return paths[0]


def _rows(path: Path) -> dict[str, dict[str, str]]:
    """Returns clip → its row of the list."""
    table = tables.read(path, ("FileName", *_COLUMNS, "Split_Set"))
    rows = {row["FileName"].removesuffix(".wav"): row for row in table}
    if len(rows) < len(table):
        raise AvjaxError(f"{path}: {len(table)} rows of {len(rows)} clips; expected each clip once")
    return rows


def _part(path: Path, row: Mapping[str, str]) -> str:
    if (word := row["Split_Set"].lower()) not in _PARTS:
        got = f"Split_Set of {row['FileName']} is {row['Split_Set']!r}"
        raise AvjaxError(f"{path}: {got}; expected Train, Development or Test")
    return _PARTS[word]
