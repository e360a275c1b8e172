"""Measures, describes, encodes and packs the clips of a data set: the work of `avjax.extract`.

Each step stages its results clip by clip in the feature store, so a killed extraction is resumed.
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
# A clip, and the keys of its staged features: feature → key.
Measured = tuple[Clip, dict[str, Key]]
# An incomplete clip: the clip, the keys of all its features, and the features that are not staged.
Job = tuple[Clip, dict[str, Key], list[str]]


class Extractor:
    """Measures and encodes clips on one machine.

    Args:
      settings: the preset.
      store: the feature store.
      clock: counts the seconds spent.

    Attributes:
      landmarker: path of the face landmarker.
      stages: feature → its encoder.
      made_by: feature → key of its provenance record.

    Raises:
      AvjaxError: a package or weights are missing.
    """

    def __init__(self, settings: Preset, store: stores.Store, clock: Stopwatch) -> None:
        need_media()
        from avjax.features import encode  # imported late: it imports JAX, which workers do not need

        self.settings, self.store, self.clock = settings, store, clock
        self.landmarker = clip_features.landmarker()
        weights = {"face_landmarker": sha256(self.landmarker)}
        self.stages = encode.stages(settings, store, clock, **weights)
        measured = {"video": weights, "audio": {}} | ({"window": weights} if settings.window else {})
        self.made_by = {f: store.record(provenance.described(f, settings, **w)) for f, w in measured.items()}
        self.made_by |= {feature: stage.key for feature, stage in self.stages.items()}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of an extraction.

    Attributes:
      processes: number of worker processes; 0 = one per core.
      clip_seconds: time limit of one clip, which is quarantined beyond it.
      runner: measures and encodes incomplete clips; None = `local_runner`.
      only_text: whether only the sentences of `sentences.csv` are encoded again, without opening any media.
    """

    processes: int = 0
    clip_seconds: float = CLIP_SECONDS
    runner: "Runner | None" = None
    only_text: bool = False


# (jobs, extractor, options, console) → (clip id, why it cannot be used, "" if it can) for each job, in any order, when
# its features are staged.
Runner = Callable[[Sequence[Job], Extractor, Options, Console], Iterator[tuple[str, str]]]


def measured(jobs: Sequence[Job], extractor: Extractor, options: Options) -> Iterator[tuple[str, str]]:
    """Runs jobs in worker processes, which decode and measure while this process encodes; see `Runner`."""
    if not jobs:
        return
    from avjax.features.encode import Unencoded

    # Workers that compile librosa's functions at the same time leave a cache file that crashes its readers.
    audio.analyse(np.sin(np.arange(audio.SAMPLE_RATE, dtype=np.float32)))
    done = worker_pool.each(
        _measure_one,
        jobs,
        count=options.processes or os.cpu_count() or 1,
        seconds=options.clip_seconds,
        setup=_set_up,
        arguments=(extractor.store.root, extractor.settings, extractor.landmarker),
    )
    for (clip, keys, lacks), outcome in done:
        if isinstance(outcome, worker_pool.Failure):
            yield clip.id, outcome.reason
            continue
        raw, present, seconds = outcome
        extractor.clock.update(seconds)
        for feature in extractor.stages.keys() & set(lacks):
            extractor.stages[feature].add(Unencoded(clip.id, keys[feature], raw, present))
        yield clip.id, ""
    for stage in extractor.stages.values():
        stage.close()


def local_runner(
    jobs: Sequence[Job], extractor: Extractor, options: Options, console: Console
) -> Iterator[tuple[str, str]]:
    """Runs jobs on this machine with a progress bar; a `Runner`."""
    return progress.bar(measured(jobs, extractor, options), len(jobs), "video and audio", console)


@dataclasses.dataclass(frozen=True)
class Extracted:
    """The clips of a data set: the measured ones, (clip id, reason) of the rejected ones, and the sentences by clip."""

    corpus: Corpus
    measured: Sequence[Measured]
    rejected: Sequence[tuple[str, str]]
    sentences: Mapping[str, Mapping[str, str]]


def extract(
    dataset: str, preset: str, *, root: str = "", out: str = "", random: bool = False, options: Options = Options()
) -> Path:
    """Extracts a data set into a feature store and returns the store's folder.

    Args:
      dataset: name of the data set.
      preset: name of the preset.
      root: folder of the data; "" = the data set's default.
      out: folder of the store; "" = the data set's default.
      random: whether the encoders get random weights; every result of such features is marked.
      options: further options.

    Raises:
      AvjaxError: the data set is missing, weights are not available, or no clip can be used.
    """
    console, clock, started = Console(soft_wrap=True, markup=False), Stopwatch(), time.perf_counter()
    folder = stores.path_of(dataset, out)
    settings = presets.preset(preset, random=random)
    with stores.Store(folder, dataset).locked() as store:
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
            raise AvjaxError(
                f"no clip of {corpus.name} can be used; {first} (all reasons: {folder / 'quarantine.csv'})"
            )
        facts = read_facts(measured, store)
        sentences = _sentences(measured, facts, store, console)
        # ---- Text encoder -----------------------------------------------------------------------------------------
        measured = encode_all(measured, sentences, settings, store, console, clock)
        # ---- Packed view ------------------------------------------------------------------------------------------
        with clock("packing"):
            extracted = Extracted(corpus, measured, rejected, sentences)
            _pack(extracted, (preset, settings), store, options.processes, console)
        _report(facts, store, preset, clock, time.perf_counter() - started, console)
    index = stores.read_index(folder, dataset)["presets"][preset]
    counts = index["counts"]
    console.print(
        f"{folder}: {counts['used']} clips; {counts['quarantined']} quarantined (quarantine.csv), "
        f"{counts['masked_audio']} without audio, {counts['masked_video']} without a face; "
        f"sentences in sentences.csv; content {index['content'][:12]}"
        + ("; RANDOM WEIGHTS in the encoders: to be tried, not to be believed" if random else "")
    )
    return folder


def measure_all(
    clips: Sequence[Clip], extractor: Extractor, options: Options, console: Console
) -> tuple[list[Measured], list[tuple[str, str]]]:
    """Measures and encodes video and audio of the `clips`, unless they are staged.

    Returns:
      the measured clips, and (clip id, reason) of each unusable clip, both in the order of the clips.

    Raises:
      AvjaxError: the store cannot be written.
    """
    planned, reasons = _planned(clips, extractor.made_by)
    has = extractor.store.has
    lacking = [(clip, keys, [f for f in keys if not has(clip.id, f, keys[f])]) for clip, keys in planned]
    jobs = [job for job in lacking if job[2]]
    if len(jobs) < len(planned):
        console.print(f"{len(planned)} clips, {len(planned) - len(jobs)} measured already")
    outcomes = (options.runner or local_runner)(jobs, extractor, options, console)
    reasons |= {clip_id: reason for clip_id, reason in outcomes if reason}
    # In the order of the clips, not of the workers, so that the same run gives the same tables.
    rejected = [(clip.id, reasons[clip.id]) for clip in clips if clip.id in reasons]
    return [p for p in planned if p[0].id not in reasons], rejected


def _planned(clips: Iterable[Clip], made_by: Mapping[str, str]) -> tuple[list[Measured], dict[str, str]]:
    """Returns the clips with the keys of their features, and clip id → reason of clips that are gone by now."""
    planned, reasons = [], {}
    for clip in clips:
        try:
            planned.append((clip, provenance.of_clip(made_by, clip)))
        except OSError as error:
            reasons[clip.id] = media_files.reason_of(error)
    return planned, reasons


_SHARED: tuple[stores.Store, Preset, FaceTracker]  # of a worker process


def _set_up(root: Path, settings: Preset, model: Path) -> None:
    """Sets up a worker process: the objects that all its clips share."""
    # Messages of native libraries about every start and file would flood the output; errors are returned as reasons.
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    global _SHARED
    _SHARED = stores.Store(root), settings, FaceTracker(model)


def _measure_one(job: Job) -> tuple[Raw, np.ndarray, dict[str, float]]:
    """Measures and stages a clip in a worker process.

    Returns:
      the inputs of encoders, which of its frames show the face (t,), and the seconds spent by activity.

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
    """Generates the sentences and writes sentences.csv; rows that were edited there are kept."""
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
    """Reads the facts of every clip once: all features of thousands of clips would fill the memory."""

    def read(clip: Clip, keys: Mapping[str, Key]) -> Facts:
        needed = clip_features.FACTS_OF.items()
        return clip_features.facts(*(store.get(clip.id, feature, keys[feature], *names) for feature, names in needed))

    return {clip.id: read(clip, keys) for clip, keys in measured}


def describe_all(measured: Sequence[Measured], facts: Mapping[str, Facts]) -> dict[str, dict[str, str]]:
    """Generates the sentences from the measurements: clip id → text source (`features.TEXTS`) → sentence."""
    usual = clip_features.speaker_pitch((c.speaker, float(facts[c.id].prosody[0])) for c, _ in measured)
    return {
        c.id: clip_features.describe(facts[c.id], c.transcript, usual.get(c.speaker)) | {"constant": template.CONSTANT}
        for c, _ in measured
    }


def _hash(sentences: dict[str, str]) -> str:
    """Hashes the sentences of a clip, to detect edited rows of sentences.csv."""
    digest = hashlib.sha256("\n".join(sentences[s] for s in template.SOURCES).encode()).hexdigest()
    # Begins with a letter: a spreadsheet reads 12 digits, or digits around an "e", as a number and rewrites them.
    return f"v{digest[:12]}"


def encode_all(
    measured: Sequence[Measured],
    sentences: Mapping[str, Mapping[str, str]],
    settings: Preset,
    store: stores.Store,
    console: Console,
    clock: Stopwatch,
) -> list[Measured]:
    """Encodes the sentences that are not staged yet, or tokenises them if the preset is raw.

    Returns:
      `measured` with the keys of the staged texts.

    Raises:
      AvjaxError: the text encoder's weights are not available, or the store cannot be written.
    """
    from avjax.features import encode

    load = encode.Loader(settings.random)
    encoder = load(settings.text, encode.precision(settings))
    made_by = store.record(provenance.described("text", settings, **encoder.provenance))
    keys = {i: provenance.of_sentences(made_by, s) for i, s in sentences.items()}
    missing = [i for i in sentences if not store.has(i, "text", keys[i])]
    made_of = encode.tokenize_texts if settings.raw else encode.encode_texts
    for clip_id in progress.bar(missing, len(missing), "sentences", console):
        # One clip at a time: the last bits depend on the batch, which must not depend on where a run was interrupted.
        flat = [sentences[clip_id][s] for s in clip_features.TEXTS]
        with clock(settings.text.source):
            tokens = made_of(encoder, flat, settings.max_tokens)
        if not settings.raw:
            exact = functools.partial(_exact, load, flat, settings)
            encode.note_precision(store, made_by, encoder, np.concatenate(tokens), exact)
            tokens = [x.astype(ENCODED) for x in tokens]
        with clock("writing"):
            store.put(clip_id, "text", keys[clip_id], dict(zip(clip_features.TEXTS, tokens, strict=True)))
    return [(clip, measured_keys | {"text": keys[clip.id]}) for clip, measured_keys in measured]


def _exact(load: Callable[..., "Encoder"], texts: Sequence[str], settings: Preset) -> np.ndarray:
    """Computes the token features of texts entirely in float32, (n, d)."""
    from avjax.features import encode

    return np.concatenate(encode.encode_texts(load(settings.text, "float32"), texts, settings.max_tokens))


def examples(
    measured: Iterable[Measured],
    sentences: Mapping[str, Mapping[str, str]],
    settings: Preset,
    store: stores.Store,
) -> Iterator[dict[str, object]]:
    """Yields the records of clips (see `features.example`) from staged features; `measured` is from `encode_all`."""
    for clip, keys in measured:
        staged = {feature: store.get(clip.id, feature, key) for feature, key in keys.items()}
        yield clip_features.example(clip, settings, staged, sentences[clip.id])


def _pack(
    extracted: Extracted, named: tuple[str, Preset], store: stores.Store, processes: int, console: Console
) -> None:
    """Packs the extracted features of a preset, given as (name, preset), unless they are packed."""
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
    entries = {"rejected": extracted.rejected, "keys": keys, "made_by": made_by(measured[0]), "random": settings.random}
    # Each part beyond the first is worth another process.
    side_by_side = min(len(parts), processes or os.cpu_count() or 1)
    shown = functools.partial(progress.bar, total=len(parts), what="packing", console=console, unit="parts")
    store.pack(extracted.corpus, clips, preset, parts, recipe, entries, processes=side_by_side, shown=shown)


def made_by(measured: Measured) -> dict[str, str]:
    """Returns the keys of the provenance records of a clip's features, which all clips share: feature → key."""
    return {feature: key.record for feature, key in measured[1].items()}


def _report(
    facts: Mapping[str, Facts],
    store: stores.Store,
    preset: str,
    clock: Stopwatch,
    wall_seconds: float,
    console: Console,
) -> None:
    """Prints and stores how the time was spent, if anything was measured."""
    if "decoding" not in clock:
        return
    audio_seconds = sum(facts_of_clip.seconds for facts_of_clip in facts.values())
    timings = {"preset": preset, "clips": len(facts), "seconds_of_sound": audio_seconds, "seconds": wall_seconds}
    write_text(store.root / "timings.json", json.dumps(timings | {"spent": dict(clock)}, indent=1))
    split = ", ".join(f"{what} {seconds:.1f}" for what, seconds in clock.most_common())
    console.print(
        f"{wall_seconds:.1f} s for {audio_seconds:.0f} s of audio: {audio_seconds / wall_seconds:.1f} x real time. "
        f"Seconds spent, worker processes added up: {split}"
    )
