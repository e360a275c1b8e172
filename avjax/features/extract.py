"""A data set's clips measured, described, encoded and packed: what `avjax.extract` runs.

Each stage stages its work clip by clip in the feature store, so a killed extraction goes on where it was.
"""

import dataclasses
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console

from avjax.datasets import registry
from avjax.datasets.base import Clip, Corpus
from avjax.errors import AvjaxError
from avjax.features import clip as clip_features
from avjax.features import presets, provenance
from avjax.features import store as stores
from avjax.features.clip import Facts
from avjax.features.face_video import ENCODED, Raw
from avjax.features.presets import Preset
from avjax.features.provenance import Key
from avjax.media import audio
from avjax.media.faces import FaceTracker
from avjax.media.requirements import need_media
from avjax.text import template
from avjax.utils import media_files, progress, worker_pool
from avjax.utils.progress import Stopwatch
from avjax.utils.storage import sha256, write_text

if TYPE_CHECKING:
    from avjax.encoders import Encoder

CLIP_SECONDS = 120.0
_PART = 256  # clips in a file of the packed view
# A clip, and the keys under which its features are staged: feature → key.
Measured = tuple[Clip, dict[str, Key]]
# A clip that lacks something: the clip, the keys of all its features, and the features that are not staged.
Job = tuple[Clip, dict[str, Key], list[str]]


class Extractor:
    """What measures clips on one machine.

    Args:
      settings: the preset; store: where features are staged; clock: counts the seconds spent.
    Attributes:
      landmarker: the face model; stages: encoder by feature; made_by: feature → key of its provenance record.
    Raises:
      AvjaxError: a package or weights are missing.
    """

    def __init__(self, settings: Preset, store: stores.Store, clock: Stopwatch) -> None:
        need_media()
        from avjax.features import encode  # here: it brings JAX, which the workers do not need

        self.settings, self.store, self.clock = settings, store, clock
        self.landmarker = clip_features.landmarker()
        weights = {"face_landmarker": sha256(self.landmarker)}
        self.stages = encode.stages(settings, store, clock, **weights)
        measured = {"video": weights, "audio": {}} | ({"window": weights} if settings.window else {})
        self.made_by = {f: store.record(provenance.described(f, settings, **w)) for f, w in measured.items()}
        self.made_by |= {feature: stage.key for feature, stage in self.stages.items()}


@dataclasses.dataclass(frozen=True)
class Options:
    """How an extraction is done.

    Attributes:
      processes: 0 = one per core; clip_seconds: time limit of one clip, which is quarantined beyond it.
      runner: measures and encodes the clips that lack something; None = `local_runner`.
      only_text: encode the sentences of `sentences.csv` again, without opening any media.
    """

    processes: int = 0
    clip_seconds: float = CLIP_SECONDS
    runner: "Runner | None" = None
    only_text: bool = False


# (jobs, extractor, options, console) → (clip id, why it cannot be used, "" if it can) of each job, in any order, its
# features staged.
Runner = Callable[[Sequence[Job], Extractor, Options, Console], Iterator[tuple[str, str]]]


def measured(jobs: Sequence[Job], extractor: Extractor, options: Options) -> Iterator[tuple[str, str]]:
    """Does jobs in worker processes of this machine, which decode and measure while this one encodes; see `Runner`."""
    if not jobs:
        return
    from avjax.features.encode import Unencoded

    # Workers that compile librosa's functions side by side leave a file of them that crashes whoever loads it.
    audio.analyse(np.sin(np.arange(audio.SAMPLE_RATE, dtype=np.float32)))
    done = worker_pool.each(
        _measure_one,
        jobs,
        count=options.processes or os.cpu_count() or 1,
        seconds=options.clip_seconds,
        setup=_set_up,
        arguments=(extractor.store.root, extractor.settings, extractor.landmarker),
    )
    for (clip, keys, lacks), answer in done:
        if isinstance(answer, worker_pool.Failure):
            yield clip.id, answer.reason
            continue
        raw, found, seconds = answer
        extractor.clock.update(seconds)
        for feature in extractor.stages.keys() & set(lacks):
            extractor.stages[feature].add(Unencoded(clip.id, keys[feature], raw, found))
        yield clip.id, ""
    for stage in extractor.stages.values():
        stage.close()


def local_runner(
    jobs: Sequence[Job], extractor: Extractor, options: Options, console: Console
) -> Iterator[tuple[str, str]]:
    """The `Runner` of one machine, under a progress bar."""
    return progress.bar(measured(jobs, extractor, options), len(jobs), "picture and sound", console)


@dataclasses.dataclass(frozen=True)
class Extracted:
    """The clips of a data set: those measured, (clip id, reason) of the rejected ones, and the sentences by clip."""

    corpus: Corpus
    measured: Sequence[Measured]
    rejected: Sequence[tuple[str, str]]
    sentences: Mapping[str, Mapping[str, str]]


def extract(
    dataset: str, preset: str, *, root: str = "", out: str = "", random: bool = False, options: Options = Options()
) -> Path:
    """Extracts a data set into a feature store and returns the store's folder.

    Args:
      root: where the data are, out: where the store is; "" = the data set's default places.
      random: give the encoders weights drawn at random; whatever is made of such features says so.
    Raises:
      AvjaxError: the data set is not there, weights cannot be had, or no clip can be used.
    """
    console, clock, begun = Console(soft_wrap=True, markup=False), Stopwatch(), time.perf_counter()
    place = stores.path_of(dataset, out)
    settings = presets.preset(preset, random=random)
    with stores.Store(place, dataset).locked() as store:
        # ---- Video and audio --------------------------------------------------------------------------------------
        if options.only_text:
            corpus, measured = store.read_measured(preset)
            rejected = [(r["clip_id"], r["reason"]) for r in store.read_table("quarantine.csv", ("clip_id", "reason"))]
        else:
            corpus = registry.index(dataset, root)
            measured, failed = measure_all(corpus.clips, Extractor(settings, store, clock), options, console)
            rejected = [*corpus.rejected, *failed]
            store.write_table("quarantine.csv", ("clip_id", "reason"), rejected)
        # ---- Sentences --------------------------------------------------------------------------------------------
        if not measured:
            first = f"{rejected[0][0]}: {rejected[0][1]}" if rejected else "it has no clips"
            raise AvjaxError(f"no clip of {corpus.name} can be used; {first} (all reasons: {place / 'quarantine.csv'})")
        facts = read_facts(measured, store)
        sentences = _sentences(measured, facts, store, console)
        # ---- Text encoder -----------------------------------------------------------------------------------------
        measured = encode_all(measured, sentences, settings, store, console, clock)
        # ---- Packed view ------------------------------------------------------------------------------------------
        with clock("packing"):
            extracted = Extracted(corpus, measured, rejected, sentences)
            _pack(extracted, (preset, settings), store, options.processes, console)
        _report(facts, store, preset, clock, time.perf_counter() - begun, console)
    index = stores.read_index(place, dataset)["presets"][preset]
    counts = index["counts"]
    console.print(
        f"{place}: {counts['used']} clips; {counts['quarantined']} quarantined (quarantine.csv), "
        f"{counts['masked_audio']} without sound, {counts['masked_video']} without a face; "
        f"sentences in sentences.csv; content {index['content'][:12]}"
        + ("; RANDOM WEIGHTS in the encoders: to be tried, not to be believed" if random else "")
    )
    return place


def measure_all(
    clips: Sequence[Clip], extractor: Extractor, options: Options, console: Console
) -> tuple[list[Measured], list[tuple[str, str]]]:
    """Measures and encodes video and audio of what is not staged yet.

    Args:
      clips: those without `Clip.trouble`.
    Returns:
      what was measured, and (clip id, reason) of each clip that cannot be used, both in the order of the clips.
    Raises:
      AvjaxError: the store cannot be written.
    """
    planned, reasons = _planned(clips, extractor.made_by)
    has = extractor.store.has
    lacking = [(clip, keys, [f for f in keys if not has(clip.id, f, keys[f])]) for clip, keys in planned]
    jobs = [job for job in lacking if job[2]]
    if len(jobs) < len(planned):
        console.print(f"{len(planned)} clips, {len(planned) - len(jobs)} measured already")
    answers = (options.runner or local_runner)(jobs, extractor, options, console)
    reasons |= {clip_id: reason for clip_id, reason in answers if reason}
    # In the order of the clips, not in that of the workers, so that the same run gives the same tables.
    rejected = [(clip.id, reasons[clip.id]) for clip in clips if clip.id in reasons]
    return [p for p in planned if p[0].id not in reasons], rejected


def _planned(clips: Iterable[Clip], made_by: Mapping[str, str]) -> tuple[list[Measured], dict[str, str]]:
    """The clips with the keys of what is to be staged; and clip id → reason of those that are gone by now."""
    planned, reasons = [], {}
    for clip in clips:
        try:
            planned.append((clip, provenance.of_clip(made_by, clip)))
        except OSError as error:
            reasons[clip.id] = media_files.reason_of(error)
    return planned, reasons


_SHARED: tuple[stores.Store, Preset, FaceTracker]  # of a worker process


def _set_up(root: Path, settings: Preset, model: Path) -> None:
    """In a worker: what all its clips share."""
    # What native libraries say of every start and every odd file would drown the progress; faults come back as reasons.
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    global _SHARED
    _SHARED = stores.Store(root), settings, FaceTracker(model)


def _measure_one(job: Job) -> tuple[Raw, np.ndarray, dict[str, float]]:
    """In a worker: measures and stages a clip.

    Returns:
      what encoders are to see of the clip, which of its frames show the face (t,), and seconds by what they were spent
      on.
    Raises:
      UnusableMedia: the clip cannot be used.
    """
    clip, keys, lacks = job
    store, settings, tracker = _SHARED
    clock = Stopwatch()
    staged = {f: store.get(clip.id, f, keys[f]) for f in keys.keys() & {"video", "audio", "window"} if f not in lacks}
    instruments = clip_features.Instruments(settings, tracker, clock, store.scratch)
    made, raw = clip_features.measure(clip, instruments, staged, lacks)
    with clock("writing"):
        for feature in made.keys() & set(lacks):
            store.put(clip.id, feature, keys[feature], made[feature])
    return raw, made["video"]["video_mask"], dict(clock)


def _sentences(
    measured: Sequence[Measured], facts: Mapping[str, Facts], store: stores.Store, console: Console
) -> dict[str, dict[str, str]]:
    """Makes the sentences and writes sentences.csv; rows that were edited there are kept."""
    columns = ("clip_id", *template.SOURCES, "generated")
    before = store.read_table("sentences.csv", columns)
    edited = {row["clip_id"]: row for row in before if _hash(row) != row["generated"]}
    made = {i: {"clip_id": i, "generated": _hash(s)} | s for i, s in describe_all(measured, facts).items()}
    if edited:
        others = len(edited.keys() - made.keys())
        console.print(f"{len(edited)} edited rows of sentences.csv kept, {others} of them for clips not in this run")
    rows = made | edited
    store.write_table("sentences.csv", columns, [[row[c] for c in columns] for row in rows.values()])
    return {i: {s: (made[i] | rows[i])[s] for s in clip_features.TEXTS} for i in made}


def read_facts(measured: Sequence[Measured], store: stores.Store) -> dict[str, Facts]:
    """Reads of every clip what sentences and reports need, once: all features of thousands would fill the memory."""

    def read(clip: Clip, keys: Mapping[str, Key]) -> Facts:
        needed = clip_features.FACTS_OF.items()
        return clip_features.facts(*(store.get(clip.id, feature, keys[feature], *names) for feature, names in needed))

    return {clip.id: read(clip, keys) for clip, keys in measured}


def describe_all(measured: Sequence[Measured], facts: Mapping[str, Facts]) -> dict[str, dict[str, str]]:
    """The sentences that the measurements make: clip id → text source (`features.TEXTS`) → sentence."""
    usual = clip_features.speaker_pitch((c.speaker, float(facts[c.id].prosody[0])) for c, _ in measured)
    return {
        c.id: clip_features.describe(facts[c.id], c.transcript, usual.get(c.speaker)) | {"constant": template.CONSTANT}
        for c, _ in measured
    }


def _hash(sentences: dict[str, str]) -> str:
    """By which a row of sentences.csv is seen to be as it was generated."""
    digest = hashlib.sha256("\n".join(sentences[s] for s in template.SOURCES).encode()).hexdigest()
    # With a letter before it: a spreadsheet takes 12 digits, or digits about an "e", for a number and rewrites them.
    return f"v{digest[:12]}"


def encode_all(
    measured: Sequence[Measured],
    sentences: Mapping[str, Mapping[str, str]],
    settings: Preset,
    store: stores.Store,
    console: Console,
    clock: Stopwatch,
) -> list[Measured]:
    """Encodes the sentences that are not staged yet, or cuts them into tokens where the preset is raw.

    Returns:
      `measured` with the keys of the staged texts.
    Raises:
      AvjaxError: the text encoder's weights cannot be had, or the store cannot be written.
    """
    from avjax.features import encode

    load = encode.Loader(settings.random)
    encoder = load(settings.text, encode.precision(settings))
    made_by = store.record(provenance.described("text", settings, **encoder.provenance))
    keys = {i: provenance.of_sentences(made_by, s) for i, s in sentences.items()}
    todo = [i for i in sentences if not store.has(i, "text", keys[i])]
    made_of = encode.tokenize_texts if settings.raw else encode.encode_texts
    for clip_id in progress.bar(todo, len(todo), "sentences", console):
        # One clip at a time: the last bits depend on the batch, which must not depend on where a run was stopped.
        flat = [sentences[clip_id][s] for s in clip_features.TEXTS]
        with clock(settings.text.source):
            tokens = made_of(encoder, flat, settings.max_tokens)
        if not settings.raw:
            exact = functools.partial(_exact, load, flat, settings)
            encode.note_precision(store, made_by, encoder, np.concatenate(tokens), exact)
            tokens = [x.astype(ENCODED) for x in tokens]
        with clock("writing"):
            store.put(clip_id, "text", keys[clip_id], dict(zip(clip_features.TEXTS, tokens, strict=True)))
    return [(clip, known | {"text": keys[clip.id]}) for clip, known in measured]


def _exact(load: Callable[..., "Encoder"], texts: Sequence[str], settings: Preset) -> np.ndarray:
    """The token features of texts in float32 all the way, (n, d)."""
    from avjax.features import encode

    return np.concatenate(encode.encode_texts(load(settings.text, "float32"), texts, settings.max_tokens))


def examples(
    measured: Iterable[Measured],
    sentences: Mapping[str, Mapping[str, str]],
    settings: Preset,
    store: stores.Store,
) -> Iterator[dict[str, object]]:
    """The staged features put together clip by clip (see `features.example`); `measured` as `encode_all` gives it."""
    for clip, keys in measured:
        staged = {feature: store.get(clip.id, feature, key) for feature, key in keys.items()}
        yield clip_features.example(clip, settings, staged, sentences[clip.id])


def _pack(
    extracted: Extracted, named: tuple[str, Preset], store: stores.Store, processes: int, console: Console
) -> None:
    """Packs what was extracted by a preset, given with its name, unless that was done."""
    (preset, settings), measured, sentences = named, extracted.measured, extracted.sentences
    clips, keys = [c for c, _ in measured], {c.id: keys for c, keys in measured}
    recipe = stores.recipe(extracted.corpus, clips, [extracted.rejected, keys, settings.face])
    if store.is_packed(preset, recipe):
        return
    console.print(f"packing {len(clips)} clips")
    parts = []
    for at in range(0, len(measured), _PART):
        some = measured[at : at + _PART]
        parts.append(functools.partial(examples, some, {c.id: sentences[c.id] for c, _ in some}, settings, store))
    about = {"rejected": extracted.rejected, "keys": keys, "made_by": made_by(measured[0]), "random": settings.random}
    # A process more is worth its start from the second part on.
    side_by_side = min(len(parts), processes or os.cpu_count() or 1)
    shown = functools.partial(progress.bar, total=len(parts), what="packing", console=console, unit="parts")
    store.pack(extracted.corpus, clips, preset, parts, recipe, about, processes=side_by_side, shown=shown)


def made_by(measured: Measured) -> dict[str, str]:
    """The keys of the provenance records that the features of a clip have, and all of its set: feature → key."""
    return {feature: key.record for feature, key in measured[1].items()}


def _report(
    facts: Mapping[str, Facts], store: stores.Store, preset: str, clock: Stopwatch, wall: float, console: Console
) -> None:
    """Prints and keeps what the time was spent on, where anything was measured."""
    if "decoding" not in clock:
        return
    played = sum(known.seconds for known in facts.values())
    about = {"preset": preset, "clips": len(facts), "seconds_of_sound": played, "seconds": wall}
    write_text(store.root / "timings.json", json.dumps(about | {"spent": dict(clock)}, indent=1))
    split = ", ".join(f"{what} {seconds:.1f}" for what, seconds in clock.most_common())
    console.print(
        f"{wall:.1f} s for {played:.0f} s of sound: {played / wall:.1f} x real time. Seconds spent, "
        f"worker processes added up: {split}"
    )
