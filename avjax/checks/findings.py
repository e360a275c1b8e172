"""Verdicts on a data set: what is wrong with its clips, its folds and its labels, and how bad that is.

invalid: results on these folds would mean nothing, or not what they claim. loss: a clip, its picture or its sound
cannot be used. note: to be known.
"""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath

from avjax.checks.clip_facts import FACE_FRAMES, SILENT, Facts
from avjax.datasets.base import Clip, Corpus, Fold
from avjax.datasets.folds import overlaps, repeated, some
from avjax.datasets.metadata import Metadata, corpus

SEVERITIES = ("invalid", "loss", "note")
_SHORT_SECONDS = 0.5
# Public sets whose systems take 16 frames of a clip, in the way of their publishers.
_IN_FRAMES, _SHORT_FRAMES = ("dfew", "mafw"), 16
_FULL_SHARE = 0.01
_FPS = (10.0, 120.0)
_RATE = 8000
_APART = 0.5  # seconds between the lengths of sound and picture
_CUT = 0.5, 0.05  # a clip is cut short when that many seconds lack, and that share of it
_DECODED = 0.9  # of the frames that the header states
# Divided by dialogues, as published: the same persons speak in all parts.
_SHARED_SPEAKERS = ("meld",)


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing found: `severity` (of SEVERITIES), `kind`, id of the `clip` ("" where it is of all), and `reason`."""

    severity: str
    kind: str
    clip: str
    reason: str


# ---- Clips -----------------------------------------------------------------------------------------------------------


def of_rejected(rejected: Iterable[tuple[str, str]], known: Metadata | None) -> Iterator[Finding]:
    """What the index of the data set left out: rows of its tables that name no usable clip, clips known as unusable."""
    for clip, reason in rejected:
        kind = "known broken" if known and clip in known.broken else _kind(reason, "rejected")
        yield Finding("loss", kind, clip, reason)


def _kind(reason: str, otherwise: str) -> str:
    return "missing" if reason.startswith("no such file") else otherwise


def of_clip(facts: Facts, dataset: str, apart: bool = False) -> Iterator[Finding]:
    """What is wrong with a clip.

    Args:
      apart: whether its sound is in a file of its own.
    """
    found = _unusable(facts) or (*_of_picture(facts, dataset), *_of_sound(facts), *_of_times(facts, apart))
    for severity, kind, reason in found:
        yield Finding(severity, kind, facts.id, reason)


def _unusable(facts: Facts) -> list[tuple[str, str, str]]:
    if facts.failed:
        return [("loss", _kind(facts.failed, "broken"), facts.failed)]
    if facts.no_picture and facts.no_sound:
        return [("loss", "broken", "; ".join(dict.fromkeys((facts.no_picture, facts.no_sound))))]
    return []


def _of_picture(facts: Facts, dataset: str) -> Iterator[tuple[str, str, str]]:
    if facts.no_picture:
        yield "loss", "no video", facts.no_picture
        return
    begin, end = facts.picture
    if facts.black >= end - begin:
        yield "loss", "black", "black from the first frame to the last"
    elif facts.black and facts.speaks is not None and facts.speaks < begin + facts.black:
        yield "note", "black lead-in", f"black for {facts.black:.2f} s; audio from {facts.speaks:.2f} s on"
    if facts.face is False:
        yield "loss", "no face", f"no face in any of {min(FACE_FRAMES, facts.frames)} evenly spaced frames"
    if facts.fps is not None and not _FPS[0] <= facts.fps <= _FPS[1]:
        yield "note", "frame rate", f"{facts.fps:.3g} frames a second; expected {_FPS[0]:g} to {_FPS[1]:g}"
    if corpus(dataset) in _IN_FRAMES and facts.frames < _SHORT_FRAMES:
        yield "note", "short", f"{facts.frames} frames; systems on this data set take {_SHORT_FRAMES}"


def _of_sound(facts: Facts) -> Iterator[tuple[str, str, str]]:
    if facts.no_sound:
        yield "loss", "no audio", facts.no_sound
        return
    if facts.peak < SILENT:
        yield "loss", "silent", "below -60 dB of full scale throughout" if facts.peak else "digital silence throughout"
    if facts.full > _FULL_SHARE:
        yield "note", "clipped", f"{facts.full:.1%} of its samples within 1 dB of full scale"
    if facts.rate < _RATE:
        yield "note", "sample rate", f"{facts.rate} samples a second; expected {_RATE} at least"


def _of_times(facts: Facts, apart: bool) -> Iterator[tuple[str, str, str]]:
    there = [span for span in (facts.picture, facts.sound) if span]
    lengths = [end - begin for begin, end in there]
    over = max(end for _, end in ([facts.picture] if apart and facts.picture else there))
    stated = [(facts.stated, over)]
    stated += [(facts.picture_stated, facts.picture[1])] if facts.picture else []
    stated += [(facts.sound_stated, facts.sound[1])] if facts.sound else []
    cut = [(by, end) for by, end in stated if by and by - end > max(_CUT[0], _CUT[1] * by)]
    if cut:
        yield "loss", "truncated", f"ends after {cut[0][1]:.2f} s of the {cut[0][0]:.2f} s that it should last"
    elif facts.frames and facts.frames < _DECODED * facts.stated_frames:
        yield "loss", "damaged", f"{facts.frames} of its {facts.stated_frames} frames decode"
    if len(there) == 2 and abs(lengths[0] - lengths[1]) > _APART:
        yield "note", "lengths", f"{lengths[0]:.2f} s of video, {lengths[1]:.2f} s of audio"
    if max(lengths) < _SHORT_SECONDS:
        yield "note", "short", f"{max(lengths):.2f} s"


def of_known(clips: Iterable[Clip], known: Metadata | None) -> Iterator[Finding]:
    """Clips that are used although they are known as unusable."""
    for clip in clips:
        if known and clip.id in known.broken:
            yield Finding("loss", "known broken", clip.id, known.broken[clip.id])


# ---- Folds -----------------------------------------------------------------------------------------------------------


def of_folds(data: Corpus, folds: Sequence[Fold]) -> Iterator[Finding]:
    """What two parts of a fold share, clips or speakers, and what a test asks that nothing in training answers."""
    clip = {c.id: c for c in data.clips}
    # What the data set brings itself may be divided otherwise; a division made or given here must keep speakers apart.
    by_design = list(folds) == list(data.folds) and corpus(data.name) in _SHARED_SPEAKERS
    if again := repeated(i for fold in folds for i in fold.test):
        how = "note" if data.overlapping else "invalid"
        reason = f"{len(again)} clips are tested in more than one fold, which must not be pooled: {some(again)}"
        yield Finding(how, "tested twice", "", reason)
    for fold in folds:
        yield from _of_shared_clips(fold)
        yield from _of_shared_speakers(fold, clip, by_design)
        if data.task.kind == "single":
            yield from _of_unseen_classes(fold, clip)


def _of_shared_clips(fold: Fold) -> Iterator[Finding]:
    for one, other, both in overlaps(fold.parts):
        severity = "invalid" if other == "test" else "note"
        if set(fold.parts[one]) == set(fold.parts[other]):
            yield Finding(severity, "equal parts", "", f"fold {fold.name}: {one} equals {other}, {len(both)} clips")
        else:
            reason = f"fold {fold.name}: {len(both)} clips are in {one} and {other}: {some(both)}"
            yield Finding(severity, "overlap", "", reason)


def _of_shared_speakers(fold: Fold, clip: Mapping[str, Clip], by_design: bool) -> Iterator[Finding]:
    for one, other, both in overlaps({part: speakers(ids, clip) for part, ids in fold.parts.items()}):
        how = "; so the data set was published" if by_design else ""
        severity = "invalid" if other == "test" and not by_design else "note"
        reason = f"fold {fold.name}: {len(both)} speakers are in {one} and {other}: {some(both)}{how}"
        yield Finding(severity, "shared speakers", "", reason)


def _of_unseen_classes(fold: Fold, clip: Mapping[str, Clip]) -> Iterator[Finding]:
    train, test = ({clip[i].label for i in part if i in clip} for part in (fold.train, fold.test))
    if unseen := sorted(test - train):
        yield Finding("note", "unseen class", "", f"fold {fold.name}: tested but not trained on: {', '.join(unseen)}")


def speakers(ids: Iterable[str], clip: Mapping[str, Clip]) -> set[str]:
    """The known speakers of clips."""
    return {clip[i].speaker for i in ids if i in clip} - {None}


def of_copies(clips: Sequence[Clip], facts: Mapping[str, Facts], folds: Sequence[Fold]) -> Iterator[Finding]:
    """Clips with the same content, byte for byte: invalid where a fold trains on one and tests another."""
    groups = defaultdict(list)
    for clip in clips:
        if clip.id in facts and facts[clip.id].sha256:
            groups[facts[clip.id].sha256, clip.start, clip.end].append(clip)
    sides = [(f.name, {*f.train, *f.val}, set(f.test)) for f in folds]
    for first, *others in (group for group in groups.values() if len(group) > 1):
        ids = {c.id for c in (first, *others)}
        across = [name for name, train, test in sides if ids & train and ids & test]
        labelled = "" if {c.label for c in others} == {first.label} else "; their labels differ"
        reason = f"same content as {some([c.id for c in others])}{labelled}"
        if across:
            yield Finding("invalid", "copy in test", first.id, f"{reason}; both sides of fold {some(across)}")
        else:
            yield Finding("note", "copy", first.id, reason)


# ---- Labels ----------------------------------------------------------------------------------------------------------


def class_table(data: Corpus, known: Metadata | None) -> list[dict[str, object]]:
    """Class, number of clips in public (None where unknown) and here; [] of tasks without classes."""
    if data.task.kind != "single":
        return []
    published, here = known.classes if known else {}, Counter(c.label for c in data.clips)
    names = dict.fromkeys((*data.task.classes, *published))
    return [{"class": n, "published": published.get(n), "here": here[n]} for n in names]


def of_counts(data: Corpus, known: Metadata | None) -> Iterator[Finding]:
    """Where the number of clips is not the published one."""
    for row in class_table(data, known):
        if row["published"] not in (None, row["here"]):
            reason = f"{row['class']}: {row['here']} clips; published are {row['published']}"
            yield Finding("note", "class count", "", reason)
    if known and known.clips and len(data.clips) != known.clips:
        yield Finding("note", "clip count", "", f"{len(data.clips)} clips; published are {known.clips}")


def of_lists(clips: Sequence[Clip], lists: Sequence, problems: Iterable[str]) -> Iterator[Finding]:
    """How public lists disagree with the data set.

    A label in a list that is no class here, such as a number, stands for the class that most of its clips have here.

    Args:
      lists: of parts of folds, with `clips`: name → label; problems: what is wrong with the lists alone.
    """
    for problem in problems:
        yield Finding("invalid", "list", "", problem)
    # A name that several clips have says nothing of either.
    names = Counter(_name(c.id) for c in clips)
    here = {_name(c.id): c for c in clips if names[_name(c.id)] == 1}
    pairs = dict.fromkeys((_name(name), label) for part in lists for name, label in part.clips.items())
    stands_for = _meanings([(label, here[name].label) for name, label in pairs if name in here])
    for name, label in pairs:
        if name in here and isinstance(here[name].label, str) and stands_for[label] != here[name].label:
            says = str(label) if label == stands_for[label] else f"{label} ({stands_for[label]})"
            reason = f"labelled {here[name].label} here, {says} in the list"
            yield Finding("invalid", "label", here[name].id, reason)
    listed = dict.fromkeys(name for name, _ in pairs)
    for called, names in (
        ("in the lists but not here", [n for n in listed if n not in here]),
        ("here but in no list", [c.id for n, c in here.items() if n not in listed]),
    ):
        if names:
            yield Finding("note", "list coverage", "", f"{len(names)} clips are {called}: {some(names)}")


def _meanings(pairs: Sequence[tuple[object, str]]) -> dict[object, str]:
    """Label of a list → class here."""
    classes, votes = {label for _, label in pairs}, defaultdict(Counter)
    for theirs, ours in pairs:
        votes[theirs][ours] += 1
    return {theirs: theirs if theirs in classes else most.most_common(1)[0][0] for theirs, most in votes.items()}


def _name(name: str) -> str:
    """What is the same of a clip's name in all lists: without folder, and without zeros before a number."""
    last = PurePosixPath(name).name
    return str(int(last)) if last.isascii() and last.isdecimal() else last
