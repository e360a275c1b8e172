"""Findings about a data set: what is wrong with its clips, folds and labels, and how severe it is.

invalid: results on these folds are meaningless or misleading. loss: a clip, its video or its audio cannot be used.
note: for information.
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
# Public data sets of which systems take 16 frames per clip, as their publishers did.
_IN_FRAMES, _SHORT_FRAMES = ("dfew", "mafw"), 16
_FULL_SHARE = 0.01
_FPS = (10.0, 120.0)
_RATE = 8000
_APART = 0.5  # seconds between the durations of audio and video
_CUT = 0.5, 0.05  # a clip is truncated if so many seconds are missing, and such a fraction of it
_DECODED = 0.9  # of the frames that the header states
# Split by dialogues, as published: all parts have the same speakers.
_SHARED_SPEAKERS = ("meld",)


@dataclasses.dataclass(frozen=True)
class Finding:
    """A finding: `severity` (of SEVERITIES), `kind`, id of the `clip` ("" if it concerns all of them), and `reason`."""

    severity: str
    kind: str
    clip: str
    reason: str


# ---- Clips -----------------------------------------------------------------------------------------------------------


def of_rejected(rejected: Iterable[tuple[str, str]], published: Metadata | None) -> Iterator[Finding]:
    """Yields what the index left out: rows of tables without a usable clip, and clips that are known to be broken."""
    for clip, reason in rejected:
        kind = "known broken" if published and clip in published.broken else _kind(reason, "rejected")
        yield Finding("loss", kind, clip, reason)


def _kind(reason: str, otherwise: str) -> str:
    return "missing" if reason.startswith("no such file") else otherwise


def of_clip(facts: Facts, dataset: str, apart: bool = False) -> Iterator[Finding]:
    """Yields what is wrong with a clip; `apart`: whether its audio is in a file of its own."""
    problems = _unusable(facts) or (*_of_video(facts, dataset), *_of_audio(facts), *_of_times(facts, apart))
    for severity, kind, reason in problems:
        yield Finding(severity, kind, facts.id, reason)


def _unusable(facts: Facts) -> list[tuple[str, str, str]]:
    if facts.failed:
        return [("loss", _kind(facts.failed, "broken"), facts.failed)]
    if facts.no_video and facts.no_audio:
        return [("loss", "broken", "; ".join(dict.fromkeys((facts.no_video, facts.no_audio))))]
    return []


def _of_video(facts: Facts, dataset: str) -> Iterator[tuple[str, str, str]]:
    if facts.no_video:
        yield "loss", "no video", facts.no_video
        return
    begin, end = facts.video
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


def _of_audio(facts: Facts) -> Iterator[tuple[str, str, str]]:
    if facts.no_audio:
        yield "loss", "no audio", facts.no_audio
        return
    if facts.peak < SILENT:
        yield "loss", "silent", "below -60 dB of full scale throughout" if facts.peak else "digital silence throughout"
    if facts.full > _FULL_SHARE:
        yield "note", "clipped", f"{facts.full:.1%} of its samples within 1 dB of full scale"
    if facts.rate < _RATE:
        yield "note", "sample rate", f"{facts.rate} samples a second; expected {_RATE} at least"


def _of_times(facts: Facts, apart: bool) -> Iterator[tuple[str, str, str]]:
    spans = [span for span in (facts.video, facts.audio) if span]
    lengths = [end - begin for begin, end in spans]
    over = max(end for _, end in ([facts.video] if apart and facts.video else spans))
    stated = [(facts.stated, over)]
    stated += [(facts.video_stated, facts.video[1])] if facts.video else []
    stated += [(facts.audio_stated, facts.audio[1])] if facts.audio else []
    cut = [(by, end) for by, end in stated if by and by - end > max(_CUT[0], _CUT[1] * by)]
    if cut:
        yield "loss", "truncated", f"ends after {cut[0][1]:.2f} s of the {cut[0][0]:.2f} s that it should last"
    elif facts.frames and facts.frames < _DECODED * facts.stated_frames:
        yield "loss", "damaged", f"{facts.frames} of its {facts.stated_frames} frames decode"
    if len(spans) == 2 and abs(lengths[0] - lengths[1]) > _APART:
        yield "note", "lengths", f"{lengths[0]:.2f} s of video, {lengths[1]:.2f} s of audio"
    if max(lengths) < _SHORT_SECONDS:
        yield "note", "short", f"{max(lengths):.2f} s"


def of_broken(clips: Iterable[Clip], published: Metadata | None) -> Iterator[Finding]:
    """Yields the clips that are used although they are known to be broken."""
    for clip in clips:
        if published and clip.id in published.broken:
            yield Finding("loss", "known broken", clip.id, published.broken[clip.id])


# ---- Folds -----------------------------------------------------------------------------------------------------------


def of_folds(data: Corpus, folds: Sequence[Fold]) -> Iterator[Finding]:
    """Yields clips or speakers that two parts of a fold share, and classes that are tested but not trained."""
    clip = {c.id: c for c in data.clips}
    # Folds of the publisher may be split otherwise; folds made by avjax or given by the user must separate speakers.
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
        how = "; the data set was published so" if by_design else ""
        severity = "invalid" if other == "test" and not by_design else "note"
        reason = f"fold {fold.name}: {len(both)} speakers are in {one} and {other}: {some(both)}{how}"
        yield Finding(severity, "shared speakers", "", reason)


def _of_unseen_classes(fold: Fold, clip: Mapping[str, Clip]) -> Iterator[Finding]:
    train, test = ({clip[i].label for i in part if i in clip} for part in (fold.train, fold.test))
    if unseen := sorted(test - train):
        yield Finding("note", "unseen class", "", f"fold {fold.name}: tested but not trained on: {', '.join(unseen)}")


def speakers(ids: Iterable[str], clip: Mapping[str, Clip]) -> set[str]:
    """Returns the speakers of clips, if known."""
    return {clip[i].speaker for i in ids if i in clip} - {None}


def of_copies(clips: Sequence[Clip], facts: Mapping[str, Facts], folds: Sequence[Fold]) -> Iterator[Finding]:
    """Yields clips with the same content, byte for byte: invalid if a fold trains on one and tests the other."""
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


def class_table(data: Corpus, published: Metadata | None) -> list[dict[str, object]]:
    """Tabulates the classes: published number of clips (None if unknown) and number in the data; [] without classes."""
    if data.task.kind != "single":
        return []
    stated, clips = published.classes if published else {}, Counter(c.label for c in data.clips)
    names = dict.fromkeys((*data.task.classes, *stated))
    return [{"class": n, "published": stated.get(n), "clips": clips[n]} for n in names]


def of_counts(data: Corpus, published: Metadata | None) -> Iterator[Finding]:
    """Yields the classes whose number of clips differs from the published one."""
    for row in class_table(data, published):
        if row["published"] not in (None, row["clips"]):
            reason = f"{row['class']}: {row['clips']} clips; published: {row['published']}"
            yield Finding("note", "class count", "", reason)
    if published and published.clips and len(data.clips) != published.clips:
        yield Finding("note", "clip count", "", f"{len(data.clips)} clips; published: {published.clips}")


def of_lists(clips: Sequence[Clip], lists: Sequence, problems: Iterable[str]) -> Iterator[Finding]:
    """Yields disagreements between public fold lists and the data set.

    A label in a list that is not a class of the data, such as a number, stands for the class that most of its clips
    have in the data.

    Args:
      clips: of the data set.
      lists: parts of folds, with `clips`: name → label.
      problems: what is wrong with the lists themselves.
    """
    for problem in problems:
        yield Finding("invalid", "list", "", problem)
    # A name that several clips share identifies neither.
    names = Counter(_name(c.id) for c in clips)
    own = {_name(c.id): c for c in clips if names[_name(c.id)] == 1}
    pairs = dict.fromkeys((_name(name), label) for part in lists for name, label in part.clips.items())
    stands_for = _meanings([(label, own[name].label) for name, label in pairs if name in own])
    for name, label in pairs:
        if name in own and isinstance(own[name].label, str) and stands_for[label] != own[name].label:
            theirs = str(label) if label == stands_for[label] else f"{label} ({stands_for[label]})"
            reason = f"labelled {own[name].label} in the data, {theirs} in the list"
            yield Finding("invalid", "label", own[name].id, reason)
    listed = dict.fromkeys(name for name, _ in pairs)
    for called, names in (
        ("in the lists but not in the data", [n for n in listed if n not in own]),
        ("in the data but in no list", [c.id for n, c in own.items() if n not in listed]),
    ):
        if names:
            yield Finding("note", "list coverage", "", f"{len(names)} clips are {called}: {some(names)}")


def _meanings(pairs: Sequence[tuple[object, str]]) -> dict[object, str]:
    """Maps the labels of a list to classes of the data."""
    classes, votes = {label for _, label in pairs}, defaultdict(Counter)
    for theirs, ours in pairs:
        votes[theirs][ours] += 1
    return {theirs: theirs if theirs in classes else most.most_common(1)[0][0] for theirs, most in votes.items()}


def _name(name: str) -> str:
    """Returns what a clip's name has in common in all lists: no folder, and no zeros before a number."""
    last = PurePosixPath(name).name
    return str(int(last)) if last.isascii() and last.isdecimal() else last
