"""A data set's clips measured, described, encoded and packed: what `avjax.extract` runs.

Each stage stages its work clip by clip in the feature store, so a killed extraction goes on where it was.
"""

import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from avjax.datasets import registry
from avjax.datasets.base import Clip
from avjax.errors import AvjaxError
from avjax.features import clip as clip_features
from avjax.features import presets
from avjax.features import store as stores
from avjax.features.presets import Preset
from avjax.media import audio
from avjax.media.faces import FaceTracker
from avjax.text import template
from avjax.utils import progress, worker_pool
from avjax.utils.media_files import trouble
from avjax.utils.progress import Stopwatch
from avjax.utils.storage import sha256, write_text

CLIP_SECONDS = 120.0
_PART = 256  # clips in a file of the packed view
# A clip, and the keys under which its features are staged: feature → key.
Measured = tuple[Clip, dict[str, str]]
_MEDIA = ("av", "mediapipe", "pebble")  # packages of avjax[media] without which nothing can be measured


# A clip that lacks something: the clip, the keys of all its features, and the features that are not staged.
Job = tuple[Clip, dict[str, str], list[str]]


@dataclasses.dataclass(frozen=True)
class Bench:
    """What measures clips on one machine.

    Attributes:
      settings: the preset; store: where features are staged; clock: is told the seconds spent.
      landmarker: the face model; stages: encoder by feature; made_by: feature → key of its provenance record.
    """

    settings: Preset
    store: stores.Store
    clock: Stopwatch
    landmarker: Path
    stages: Mapping[str, Any]
    made_by: Mapping[str, str]


# (jobs, bench, processes, clip_seconds, console) → (clip id, why it cannot be used, "" if it can) of each job, in any
# order, its features staged; `processes`, `clip_seconds` as in `extract`.
Runner = Callable[[Sequence[Job], Bench, int, float, Console], Iterator[tuple[str, str]]]


def bench(settings: Preset, store: stores.Store, clock: Stopwatch) -> Bench:
    """Loads what measures clips.

    Raises:
      AvjaxError: a package or weights are missing.
    """
    need_media()
    from avjax.features import encode  # here: it brings JAX, which the workers do not need

    model = clip_features.landmarker()
    landmarker = sha256(model)
    stages = encode.stages(settings, store, clock, landmarker)
    made_by = {
        "video": store.record(clip_features.provenance("video", settings, face_landmarker=landmarker)),
        "audio": store.record(clip_features.provenance("audio", settings)),
    }
    if settings.window:
        made_by["window"] = store.record(clip_features.provenance("window", settings, face_landmarker=landmarker))
    made_by |= {feature: stage.key for feature, stage in stages.items()}
    return Bench(settings, store, clock, model, stages, made_by)


def measured(jobs: Sequence[Job], on: Bench, processes: int, clip_seconds: float) -> Iterator[tuple[str, str]]:
    """Does jobs in worker processes of this machine, which decode and measure while this one encodes; see `Runner`."""
    if not jobs:
        return
    # Workers that compile librosa's functions side by side leave a file of them that crashes whoever loads it.
    audio.analyse(np.sin(np.arange(audio.SAMPLE_RATE, dtype=np.float32)))
    done = worker_pool.each(
        _measure_one,
        jobs,
        count=processes or os.cpu_count() or 1,
        seconds=clip_seconds,
        setup=_set_up,
        arguments=(on.store.root, on.settings, on.landmarker),
    )
    for (clip, keys, lacks), answer in done:
        if isinstance(answer, worker_pool.Failure):
            yield clip.id, answer.reason
            continue
        made, seconds = answer
        on.clock.update(seconds)
        for feature in on.stages.keys() & set(lacks):
            raw, known = made[feature]
            finish = functools.partial(_FINISH[feature], on.settings, *known)
            on.stages[feature].add(clip.id, keys[feature], raw, finish)
        yield clip.id, ""
    for stage in on.stages.values():
        stage.close()


def here(
    jobs: Sequence[Job], on: Bench, processes: int, clip_seconds: float, console: Console
) -> Iterator[tuple[str, str]]:
    """The `Runner` of one machine, under a progress bar."""
    return progress.bar(measured(jobs, on, processes, clip_seconds), len(jobs), "picture and sound", console)


def extract(
    dataset: str,
    preset: str,
    *,
    root: str = "",
    out: str = "",
    processes: int = 0,
    clip_seconds: float = CLIP_SECONDS,
    runner: Runner = here,
    only_text: bool = False,
    random: bool = False,
) -> Path:
    """Extracts a data set into a feature store and returns the store's folder.

    Args:
      root: where the data are, out: where the store is; "" = the data set's default places.
      processes: 0 = one per core; clip_seconds: time limit of one clip, which is quarantined beyond it.
      runner: what measures and encodes the clips that lack something.
      only_text: encode the sentences of `sentences.csv` again, without opening any media.
      random: give the encoders weights drawn at random; whatever is made of such features says so.
    Raises:
      AvjaxError: the data set is not there, weights cannot be had, or no clip can be used.
    """
    console, clock, begun = Console(soft_wrap=True, markup=False), Stopwatch(), time.perf_counter()
    place = stores.place(dataset, out)
    settings = presets.preset(preset, random=random)
    with stores.Store(place, dataset).locked() as store:
        # ---- Picture and sound ------------------------------------------------------------------------------------
        if only_text:
            corpus, measured = store.read_measured(preset)
            rejected = [(r["clip_id"], r["reason"]) for r in store.read_table("quarantine.csv", ("clip_id", "reason"))]
        else:
            corpus = registry.index(dataset, root)
            measured, failed = measure_all(
                corpus.clips, settings, store, console, clock, processes, clip_seconds, runner
            )
            rejected = [*corpus.rejected, *failed]
            store.write_table("quarantine.csv", ("clip_id", "reason"), rejected)
        # ---- Sentences --------------------------------------------------------------------------------------------
        if not measured:
            first = f"{rejected[0][0]}: {rejected[0][1]}" if rejected else "it has no clips"
            raise AvjaxError(f"no clip of {corpus.name} can be used; {first} (all reasons: {place / 'quarantine.csv'})")
        sentences = _sentences(measured, store, console)
        # ---- Text encoder -----------------------------------------------------------------------------------------
        measured = encode_all(measured, sentences, settings, store, console, clock)
        # ---- Packed view ------------------------------------------------------------------------------------------
        with clock("packing"):
            _pack(corpus, measured, rejected, sentences, settings, store, preset, processes, console)
        _report(measured, store, preset, clock, time.perf_counter() - begun, console)
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
    clips: Sequence[Clip],
    settings: Preset,
    store: stores.Store,
    console: Console,
    clock: Stopwatch,
    processes: int = 0,
    clip_seconds: float = CLIP_SECONDS,
    runner: Runner = here,
) -> tuple[list[Measured], list[tuple[str, str]]]:
    """Measures and encodes picture and sound of what is not staged yet; arguments as of `extract`.

    Returns:
      what was measured, and (clip id, reason) of each clip that cannot be used, both in the order of the clips.
    Raises:
      AvjaxError: a package or weights are missing, or the store cannot be written.
    """
    on = bench(settings, store, clock)
    planned, reasons = _planned(clips, on.made_by)
    lacking = [(clip, keys, [f for f in keys if not store.has(clip.id, f, keys[f])]) for clip, keys in planned]
    jobs = [job for job in lacking if job[2]]
    if len(jobs) < len(planned):
        console.print(f"{len(planned)} clips, {len(planned) - len(jobs)} measured already")
    answers = runner(jobs, on, processes, clip_seconds, console)
    reasons |= {clip_id: reason for clip_id, reason in answers if reason}
    # In the order of the clips, not in that of the workers, so that the same run gives the same tables.
    rejected = [(clip.id, reasons[clip.id]) for clip in clips if clip.id in reasons]
    return [p for p in planned if p[0].id not in reasons], rejected


def _planned(clips: Iterable[Clip], made_by: Mapping[str, str]) -> tuple[list[Measured], dict[str, str]]:
    """The clips whose files can be read, with the keys of what is to be staged; and clip id → reason of the others."""
    planned, reasons = [], {}
    for clip in clips:
        source, reason = _source(clip)
        if reason:
            reasons[clip.id] = reason
        else:
            planned.append((clip, {feature: f"{key}-{source}" for feature, key in made_by.items()}))
    return planned, reasons


def _source(clip: Clip) -> tuple[str, str]:
    """The key of a clip's files, or why they cannot be read."""
    for path in filter(None, (clip.path, clip.audio)):
        if reason := trouble(path):
            return "", reason
    try:
        return clip_features.source_key(clip), ""
    except OSError as error:  # it was there a moment ago
        return "", f"cannot be read: {error.strerror}"


def _finish_image(settings, shown: np.ndarray, encoded: np.ndarray, real: np.ndarray) -> dict[str, np.ndarray]:
    return clip_features.of_frames(encoded, shown)


def _finish_flow(settings, found, ends, encoded: np.ndarray, real: np.ndarray) -> dict[str, np.ndarray]:
    return clip_features.of_flow(encoded, found, ends)


def _finish_sound(settings, seconds: float, encoded: np.ndarray, real: np.ndarray) -> dict[str, np.ndarray]:
    if settings.raw:
        return {"steps": encoded}
    return clip_features.of_sound(encoded[real], seconds, settings.sound.per_second)


_FINISH = {"image": _finish_image, "flow": _finish_flow, "sound": _finish_sound}


def need_media() -> None:
    """Raises AvjaxError where packages are missing that reading media takes."""
    missing = [name for name in _MEDIA if importlib.util.find_spec(name) is None]
    if missing:
        raise AvjaxError(f"extraction needs {', '.join(missing)}; install with: pip install 'avjax[media]'")


def _set_up(root: Path, settings, model: Path) -> None:
    """In a worker: what all its clips share."""
    # What native libraries say of every start and every odd file would drown the progress; faults come back as reasons.
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    global _SHARED
    _SHARED = stores.Store(root), settings, FaceTracker(model)


def _measure_one(job) -> tuple[dict[str, tuple], dict[str, float]]:
    """In a worker: measures and stages a clip.

    Returns:
      for each encoder that is still to see the clip, its raw input and what else its features need: the frames that
      are seen, those with a face and those that flows lead to, the seconds of sound; and seconds by what they were
      spent on.
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
    found, samples = made["video"]["video_mask"], raw.samples
    seconds = 0.0 if samples is None else len(samples) / clip_features.audio.SAMPLE_RATE
    needed = {
        "image": (raw.pictures, (clip_features.seen(found, settings),)),
        "flow": (raw.flows, (found, clip_features.flow_ends(found, settings))),
        "sound": (None if samples is None else [samples], (seconds,)),
    }
    return needed, dict(clock)


def _sentences(measured: Sequence[Measured], store, console) -> dict[str, dict[str, str]]:
    """Makes the sentences and writes sentences.csv; rows that were edited there are kept."""
    columns = ("clip_id", *template.SOURCES, "generated")
    before = store.read_table("sentences.csv", columns)
    edited = {row["clip_id"]: row for row in before if _hash(row) != row["generated"]}
    made = {i: {"clip_id": i, "generated": _hash(s)} | s for i, s in describe_all(measured, store).items()}
    if edited:
        others = len(edited.keys() - made.keys())
        console.print(f"{len(edited)} edited rows of sentences.csv kept, {others} of them for clips not in this run")
    rows = made | edited
    store.write_table("sentences.csv", columns, [[row[c] for c in columns] for row in rows.values()])
    return {i: {s: (made[i] | rows[i])[s] for s in clip_features.TEXTS} for i in made}


def describe_all(measured: Sequence[Measured], store: stores.Store) -> dict[str, dict[str, str]]:
    """The sentences that the measurements make: clip id → text source (`features.TEXTS`) → sentence."""
    # Only what sentences need: all features of thousands of clips would fill the memory.
    pictures = {c.id: store.get(c.id, "video", keys["video"], "au", "video_mask") for c, keys in measured}
    sounds = {c.id: store.get(c.id, "audio", keys["audio"], "prosody") for c, keys in measured}
    usual = clip_features.speaker_pitch((c.speaker, float(sounds[c.id]["prosody"][0])) for c, _ in measured)
    return {
        c.id: clip_features.describe(pictures[c.id], sounds[c.id], c.transcript, usual.get(c.speaker))
        | {"constant": template.CONSTANT}
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
    made_by = store.record(clip_features.provenance("text", settings, **encoder.provenance))
    keys = {
        i: f"{made_by}-{hashlib.sha256(repr(sorted(s.items())).encode()).hexdigest()[:12]}"
        for i, s in sentences.items()
    }
    todo = [i for i in sentences if not store.has(i, "text", keys[i])]
    made_of = clip_features.tokenize_texts if settings.raw else clip_features.encode_texts
    for clip_id in progress.bar(todo, len(todo), "sentences", console):
        # One clip at a time: the last bits depend on the batch, which must not depend on where a run was stopped.
        flat = [sentences[clip_id][s] for s in clip_features.TEXTS]
        with clock(settings.text.source):
            tokens = made_of(encoder, flat, settings.max_tokens)
        if not settings.raw:
            exact = functools.partial(_exact, load, flat, settings)
            encode.note_precision(store, made_by, encoder, np.concatenate(tokens), exact)
            tokens = [x.astype(clip_features.ENCODED) for x in tokens]
        with clock("writing"):
            store.put(clip_id, "text", keys[clip_id], dict(zip(clip_features.TEXTS, tokens, strict=True)))
    return [(clip, known | {"text": keys[clip.id]}) for clip, known in measured]


def _exact(load, texts: Sequence[str], settings: Preset) -> np.ndarray:
    """The token features of texts in float32 all the way, (n, d)."""
    return np.concatenate(clip_features.encode_texts(load(settings.text, "float32"), texts, settings.max_tokens))


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


def _pack(corpus, measured, rejected, sentences, settings, store, preset: str, processes: int, console) -> None:
    clips, staged = [c for c, _ in measured], {c.id: keys for c, keys in measured}
    recipe = stores.recipe(corpus, clips, [rejected, staged, settings.face])
    if store.is_packed(preset, recipe):
        return
    console.print(f"packing {len(clips)} clips")
    parts = []
    for at in range(0, len(measured), _PART):
        some = measured[at : at + _PART]
        parts.append(functools.partial(examples, some, {c.id: sentences[c.id] for c, _ in some}, settings, store))
    about = {"rejected": rejected, "staged": staged, "made_by": made_by(measured[0]), "random": settings.random}
    # A process more is worth its start from the second part on.
    side_by_side = min(len(parts), processes or os.cpu_count() or 1)
    shown = functools.partial(progress.bar, total=len(parts), what="packing", console=console, unit="parts")
    store.pack(corpus, clips, preset, parts, recipe, about, processes=side_by_side, shown=shown)


def made_by(measured: Measured) -> dict[str, str]:
    """The keys of the provenance records that the features of a clip have, and all of its set: feature → key."""
    return {feature: key.partition("-")[0] for feature, key in measured[1].items()}


def _report(measured: Sequence[Measured], store, preset: str, clock: Stopwatch, wall: float, console) -> None:
    """Prints and keeps what the time was spent on, where anything was measured."""
    if "decoding" not in clock:
        return
    played = sum(float(store.get(c.id, "audio", keys["audio"], "seconds")["seconds"]) for c, keys in measured)
    about = {"preset": preset, "clips": len(measured), "seconds_of_sound": played, "seconds": wall}
    write_text(store.root / "timings.json", json.dumps(about | {"spent": dict(clock)}, indent=1))
    split = ", ".join(f"{what} {seconds:.1f}" for what, seconds in clock.most_common())
    console.print(
        f"{wall:.1f} s for {played:.0f} s of sound: {played / wall:.1f} x real time. Seconds spent, "
        f"worker processes added up: {split}"
    )
