"""Runs with made-up weights, and clips for them, to test portable programs."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from avjax import config as configs
from avjax import models
from avjax.evaluation import fewshot_cache as caches
from avjax.evaluation.predictor import Caches, Heads
from avjax.features.store import Features
from avjax.inference import run as runs
from avjax.models.base import Model
from avjax.models.fusions import registry as fusions
from avjax.settings import FusionSettings
from avjax.training import batches, run_directory
from avjax.training.checkpoint import Checkpoints
from tests.models.fusions.test_all import CLASSES, SMALL, WIDTHS

NAMES = tuple(f"class{c}" for c in range(CLASSES))


def features(clips: int, seed: int = 0, more: int = 0) -> Features:
    """Makes clips of many lengths up to those of WIDTHS, with `more` steps of NaN padding; clip 0 has no audio."""
    rng, arrays, masks = np.random.default_rng(seed), {}, {}
    for stream, (most, width) in WIDTHS.items():
        name = "text_both" if stream == "text" else stream
        mask = np.arange(most + more)[None] < rng.integers(2, most + 1, clips)[:, None]
        mask[0] &= stream != "audio"
        x = rng.normal(size=(clips, most, width)).astype(np.float32)
        arrays[name] = np.where(mask[..., None], np.pad(x, ((0, 0), (0, more), (0, 0))), np.nan)
        masks[name] = mask
    return of_arrays(arrays, masks)


def of_arrays(arrays, masks, names: tuple[str, ...] = NAMES) -> Features:
    """Makes features of these arrays and masks."""
    clips = len(next(iter(arrays.values())))
    blank = {"folds": (), "content": "", "clips": [], "sentences": {}, "counts": {}, "made_by": {}}
    ids, label = [str(i) for i in range(clips)], np.zeros(clips, np.int32)
    speakers = [""] * clips
    return Features("made up", names, ids=ids, label=label, speakers=speakers, arrays=arrays, masks=masks, **blank)


@functools.cache
def fusion(name: str, task: str = "single", **changes) -> runs.Run:
    """Makes two lanes of a fusion of `SMALL` size, with `changes` of the model's configuration."""
    own = fusions.settings(name) | SMALL.get(name, {})
    chosen = FusionSettings(name, streams=fusions.FUSIONS[name].streams, settings=own)
    return run_of(models.build(dataclasses.replace(chosen, **changes), CLASSES, task), features(2))


def run_of(model: Model, few: Features, **more) -> runs.Run:
    """Makes two lanes of a model that reads such features, with random weights and statistics."""
    rng, data = np.random.default_rng(7), batches.resident(few, "both", "train", model.constants)
    stats = {s: _statistics(rng, data.streams[s].shape[-1]) for s in batches.standardised(data)}
    index = jnp.zeros((1, 1) if model.turns else 1, int)
    batch = batches.gather(data, {s: (m[0], d[0]) for s, (m, d) in stats.items()}, index, jnp.ones(index.shape))
    best = jax.eval_shape(model.module.init, jax.random.key(0), batch)
    return runs.Run(
        name="made up",
        dataset="made up",
        protocol="none",
        classes=few.classes,
        preset="lite",
        text_source="both",
        model=model,
        predictor=Heads(model),
        best=jax.tree_util.tree_map_with_path(functools.partial(_drawn, rng), best),
        best_head=np.array([len(model.heads) - 1, 0], np.int32),
        stats=stats,
        lanes=(("1", 1), ("2", 1)),
        made_by={},
        streams={s: (data.streams[s].shape[1:], data.streams[s].dtype.name) for s in model.streams},
        **more,
    )


def _statistics(rng, width: int) -> tuple[np.ndarray, np.ndarray]:
    return tuple(rng.uniform(0.5, 1.5, (2, 1, width)).astype(np.float32) for _ in range(2))


def _drawn(rng, path, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    """Draws weights of two lanes: no bias is zero, no scale one."""
    spread = np.prod(leaf.shape[:-1]) ** -0.5 if leaf.ndim > 1 else 0.1
    centre = float(path[-1].key in ("scale", "var"))
    return (centre + spread * rng.normal(size=(2, *leaf.shape))).astype(leaf.dtype)


def streams_of(run: runs.Run, clips: Features, multiple: int = 1) -> dict[str, np.ndarray]:
    """Returns the streams that a program reads, padded to a multiple of steps."""
    named, out = {s: "text_both" if s == "text" else s for s in run.model.streams}, {}
    for stream, name in named.items():
        for key, array in ((stream, clips.arrays[name]), (f"{stream}_mask", clips.masks[name])):
            more = -array.shape[1] % multiple
            out[key] = np.pad(array, [(0, more if axis == 1 else 0) for axis in range(array.ndim)])
    return out


def recalled(few: Features, sizes: tuple[int, ...]) -> runs.Run:
    """Makes EmoAsst of two lanes, whose caches have so many entries, the first of them without audio."""
    rng, width = np.random.default_rng(2), few.arrays["text_both"].shape[-1]
    unit = lambda x: (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)  # noqa: E731
    text = unit(rng.normal(size=(len(few.classes), width)))
    model = models.build(emoasst().model, len(few.classes)).replace(constants={"classes": text})
    own = []
    for lane, size in enumerate(sizes, 1):
        cache = caches.empty(few.classes, text, ("video", "audio"), "made up")
        keys = {m: unit(rng.normal(size=(size, width))) for m in cache.modalities}
        keys["audio"][:1] = 0
        names = [few.classes[i % len(few.classes)] for i in range(size)]
        cache = caches.add(cache, [str(i) for i in range(size)], names, keys)
        own.append(dataclasses.replace(cache, alpha={"video": 3.0, "audio": 1.0 * lane}, beta=5.5 * lane))
    return dataclasses.replace(run_of(model, few), predictor=Caches(tuple(own)))


def emoasst():
    """Returns the configuration of `recalled`."""
    small = {"width": 8, "heads": 2, "inner": 8}
    return configs.settings("configs/emoasst_folder.py", **{f"model__settings__{k}": v for k, v in small.items()})


def finished(run: runs.Run, config, workdir: pathlib.Path, **made_by: str) -> pathlib.Path:
    """Writes the run directory of a run with these weights, as far as it is read."""
    lane = {"n_train": 4, "n_val": 1, "n_test": 2, "speaker_overlap": 0, "best_epoch": 1, "war": 0.5, "uar": 0.5}
    lanes = [{"fold": fold, "seed": seed} | lane for fold, seed in run.lanes]
    scores = {key: {"war": 0.5, "uar": 0.5} for key in ("mean", "std", "pooled")}
    counts = {"used": 7, "quarantined": 0, "masked_audio": 0, "masked_video": 0}
    description = {"dataset": run.dataset, "protocol": run.protocol, "task": "single", "classes": list(run.classes)}
    confusion = np.eye(len(run.classes), dtype=int).tolist()
    named = {f"text_{run.text_source}" if s == "text" else s: steps for s, steps in run.streams.items()}
    features = {"content": "made up", "made_by": made_by, "random": run.random, "streams": named}
    files = {
        "config": config.to_dict() | {"data": {"features": str(workdir / "F")}},
        "metrics": description | scores | {"counts": counts, "folds": lanes, "confusion": confusion, "reference": {}},
        "environment": run_directory.environment() | {"features": features},
        "protocol": {"dataset": "folder", "folds": lanes},
    }
    for name, content in files.items():
        workdir.mkdir(exist_ok=True)
        (workdir / f"{name}.json").write_text(json.dumps(content))
    run.predictor.save(workdir, run.lanes)
    with Checkpoints(workdir / "checkpoints") as kept:
        kept.save(1, {"best": run.best, "best_head": run.best_head, "stats": run.stats})
    (workdir / "report.html").write_text("")
    return workdir
