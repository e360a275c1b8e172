"""A data set's clips measured, described, encoded and packed: what `avjax.extract` runs.

Each stage stages its work clip by clip in the feature store, so a killed extraction goes on where it was.
"""

import hashlib
import importlib.util
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console

from avjax import datasets, features, progress, workers
from avjax.datasets import store as stores
from avjax.datasets.base import Clip
from avjax.errors import AvjaxError, UnusableMedia
from avjax.media.faces import FaceTracker
from avjax.source import trouble
from avjax.text import template

CLIP_SECONDS = 120.0
# A clip, and the keys under which its video and its audio are staged.
Measured = tuple[Clip, str, str]
_MEDIA = ("av", "mediapipe", "pebble")  # packages of avjax[media] without which nothing can be measured


def extract(
    dataset: str,
    preset: str,
    *,
    root: str = "",
    out: str = "",
    processes: int = 0,
    clip_seconds: float = CLIP_SECONDS,
    only_text: bool = False,
) -> Path:
    """Extracts a data set into a feature store and returns the store's folder.

    Args:
      root: where the data are, out: where the store is; "" = the data set's default places.
      processes: 0 = one per core; clip_seconds: time limit of one clip, which is quarantined beyond it.
      only_text: encode the sentences of `sentences.csv` again, without opening any media.
    Raises:
      AvjaxError: the data set is not there, weights cannot be had, or no clip can be used.
    """
    console = Console(soft_wrap=True, markup=False)
    place = stores.place(dataset, out)
    settings = features.preset(preset)
    with stores.Store(place).locked(dataset) as store:
        # ---- Picture and sound ------------------------------------------------------------------------------------
        if only_text:
            corpus, measured = store.read_measured(preset)
            rejected = [(r["clip_id"], r["reason"]) for r in store.read_table("quarantine.csv", ("clip_id", "reason"))]
        else:
            corpus = datasets.index(dataset, root)
            measured, failed = measure_all(corpus.clips, settings, store, console, processes, clip_seconds)
            rejected = [*corpus.rejected, *failed]
            store.write_table("quarantine.csv", ("clip_id", "reason"), rejected)
        # ---- Sentences --------------------------------------------------------------------------------------------
        if not measured:
            first = f"{rejected[0][0]}: {rejected[0][1]}" if rejected else "it has no clips"
            raise AvjaxError(f"no clip of {corpus.name} can be used; {first} (all reasons: {place / 'quarantine.csv'})")
        sentences = _sentences(measured, store, console)
        # ---- Text encoder -----------------------------------------------------------------------------------------
        texts = encode_all(sentences, settings, store, console)
        # ---- Packed view ------------------------------------------------------------------------------------------
        _pack(corpus, measured, rejected, sentences, texts, store, preset, console)
    index = stores.read_index(place)["presets"][preset]
    counts = index["counts"]
    console.print(
        f"{place}: {counts['used']} clips; {counts['quarantined']} quarantined (quarantine.csv), "
        f"{counts['masked_audio']} without sound, {counts['masked_video']} without a face; "
        f"sentences in sentences.csv; content {index['content'][:12]}"
    )
    return place


def measure_all(
    clips: Sequence[Clip],
    settings: features.Preset,
    store: stores.Store,
    console: Console,
    processes: int = 0,
    clip_seconds: float = CLIP_SECONDS,
) -> tuple[list[Measured], list[tuple[str, str]]]:
    """Measures picture and sound of what is not staged yet; `processes` and `clip_seconds` as in `extract`.

    Returns:
      what was measured, and (clip id, reason) of each clip that cannot be used, both in the order of the clips.
    Raises:
      AvjaxError: a package or the face landmarker is missing, or the store cannot be written.
    """
    need_media()
    model = features.landmarker()
    planned, reasons = _planned(clips, settings, store, model)
    todo = [p for p in planned if not (store.has(p[0].id, "video", p[1]) and store.has(p[0].id, "audio", p[2]))]
    if len(todo) < len(planned):
        console.print(f"{len(planned)} clips, {len(planned) - len(todo)} measured already")
    done = workers.each(
        _measure_one,
        todo,
        count=processes or os.cpu_count() or 1,
        seconds=clip_seconds,
        setup=_set_up,
        arguments=(store.root, settings, model),
    )
    for (clip, *_), reason in progress.bar(done, len(todo), "picture and sound", console):
        if reason:
            reasons[clip.id] = reason
    # In the order of the clips, not in that of the workers, so that the same run gives the same tables.
    rejected = [(clip.id, reasons[clip.id]) for clip in clips if clip.id in reasons]
    return [p for p in planned if p[0].id not in reasons], rejected


def _planned(clips: Iterable[Clip], settings, store, model: Path) -> tuple[list[Measured], dict[str, str]]:
    """The clips whose files can be read, with the keys of what is to be staged; and clip id → reason of the others."""
    from avjax.encoders import weights  # here: it brings JAX, which the workers do not need

    video = store.record(features.provenance("video", settings, face_landmarker=weights.sha256(model)))
    audio = store.record(features.provenance("audio", settings))
    planned, reasons = [], {}
    for clip in clips:
        source, reason = _source(clip)
        if reason:
            reasons[clip.id] = reason
        else:
            planned.append((clip, f"{video}-{source}", f"{audio}-{source}"))
    return planned, reasons


def _source(clip: Clip) -> tuple[str, str]:
    """The key of a clip's files, or why they cannot be read."""
    for path in filter(None, (clip.path, clip.audio)):
        if reason := trouble(path):
            return "", reason
    try:
        return features.source_key(clip), ""
    except OSError as error:  # it was there a moment ago
        return "", f"cannot be read: {error.strerror}"


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


def _measure_one(planned) -> str:
    """In a worker: measures and stages a clip; returns why it cannot be used, or ""."""
    clip, video_key, audio_key = planned
    store, settings, tracker = _SHARED
    try:
        made = features.measure(clip, settings, tracker)
    except UnusableMedia as error:
        return str(error)
    store.put(clip.id, "video", video_key, made["video"])
    store.put(clip.id, "audio", audio_key, made["audio"])
    return ""


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
    return {i: {s: (made[i] | rows[i])[s] for s in features.TEXTS} for i in made}


def describe_all(measured: Sequence[Measured], store: stores.Store) -> dict[str, dict[str, str]]:
    """The sentences that the measurements make: clip id → text source (`features.TEXTS`) → sentence."""
    # Only what sentences need: all features of thousands of clips would fill the memory.
    pictures = {c.id: store.get(c.id, "video", v, "au", "video_mask") for c, v, _ in measured}
    sounds = {c.id: store.get(c.id, "audio", a, "prosody") for c, _, a in measured}
    usual = features.speaker_pitch((c.speaker, float(sounds[c.id]["prosody"][0])) for c, *_ in measured)
    return {
        c.id: features.describe(pictures[c.id], sounds[c.id], c.transcript, usual.get(c.speaker))
        | {"constant": template.CONSTANT}
        for c, *_ in measured
    }


def _hash(sentences: dict[str, str]) -> str:
    """By which a row of sentences.csv is seen to be as it was generated."""
    digest = hashlib.sha256("\n".join(sentences[s] for s in template.SOURCES).encode()).hexdigest()
    # With a letter before it: a spreadsheet takes 12 digits, or digits about an "e", for a number and rewrites them.
    return f"v{digest[:12]}"


def encode_all(
    sentences: Mapping[str, Mapping[str, str]], settings: features.Preset, store: stores.Store, console: Console
) -> dict[str, str]:
    """Encodes the sentences that are not staged yet; returns clip id → key of its staged text.

    Raises:
      AvjaxError: the text encoder's weights cannot be had, or the store cannot be written.
    """
    from avjax.encoders import load

    encoder = load(settings.text_encoder)
    made_by = store.record(features.provenance("text", settings, **encoder.provenance))
    keys = {
        i: f"{made_by}-{hashlib.sha256(repr(sorted(s.items())).encode()).hexdigest()[:12]}"
        for i, s in sentences.items()
    }
    todo = [i for i in sentences if not store.has(i, "text", keys[i])]
    for clip_id in progress.bar(todo, len(todo), "sentences", console):
        # One clip at a time: the last bits depend on the batch, which must not depend on where a run was stopped.
        flat = [sentences[clip_id][s] for s in features.TEXTS]
        tokens = features.encode_texts(encoder, flat, settings.max_tokens)
        store.put(clip_id, "text", keys[clip_id], dict(zip(features.TEXTS, tokens, strict=True)))
    return keys


def examples(
    measured: Iterable[Measured],
    sentences: Mapping[str, Mapping[str, str]],
    texts: Mapping[str, str],
    store: stores.Store,
) -> Iterator[dict[str, object]]:
    """The staged features put together clip by clip (see `features.example`); `texts` as `encode_all` gives them."""
    for clip, video, audio in measured:
        yield features.example(
            clip,
            store.get(clip.id, "video", video),
            store.get(clip.id, "audio", audio),
            store.get(clip.id, "text", texts[clip.id]),
            sentences[clip.id],
        )


def _pack(corpus, measured, rejected: list, sentences: dict, texts: dict, store, preset: str, console) -> None:
    clips = [c for c, *_ in measured]
    staged = {c.id: [v, a, texts[c.id]] for c, v, a in measured}
    recipe = stores.recipe(corpus, clips, [len(rejected), staged])
    if store.is_packed(preset, recipe):
        return
    console.print(f"packing {len(clips)} clips")
    counts = {
        "used": len(clips),
        "quarantined": len(rejected),
        "masked_audio": sum(not store.get(c.id, "audio", a, "audio_mask")["audio_mask"].any() for c, _, a in measured),
        "masked_video": sum(not store.get(c.id, "video", v, "video_mask")["video_mask"].any() for c, v, _ in measured),
    }
    records = examples(measured, sentences, texts, store)
    about = {"counts": counts, "staged": staged, "made_by": made_by(measured[0], texts)}
    store.pack(corpus, clips, preset, records, recipe, about)


def made_by(measured: Measured, texts: Mapping[str, str]) -> dict[str, str]:
    """The keys of the provenance records that the features of a clip have, and all of its set: feature → key."""
    clip, video, audio = measured
    keys = {"video": video, "audio": audio, "text": texts[clip.id]}
    return {feature: key.partition("-")[0] for feature, key in keys.items()}
