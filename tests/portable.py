"""Runs with made-up weights, and clips for them, to try portable programs with."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from test_fusions import CLASSES, SMALL, WIDTHS

from avjax import models, pipeline, prediction
from avjax.datasets.store import Features
from avjax.models import fusions
from avjax.models.base import Model

NAMES = tuple(f"class{c}" for c in range(CLASSES))


def features(clips: int, seed: int = 0, more: int = 0) -> Features:
    """Clips of many lengths up to those of WIDTHS and `more` steps of padding, with NaN in it; clip 0 has no sound."""
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
    clips = len(next(iter(arrays.values())))
    blank = {"folds": (), "content": "", "clips": [], "sentences": {}, "counts": {}, "made_by": {}}
    ids, label = [str(i) for i in range(clips)], np.zeros(clips, np.int32)
    speakers = [""] * clips
    return Features("made up", names, ids=ids, label=label, speakers=speakers, arrays=arrays, masks=masks, **blank)


@functools.cache
def fusion(name: str, task: str = "single", **changes) -> prediction.Run:
    """Two lanes of a fusion of `SMALL` size; `changes` of the model's configuration."""
    chosen = fusions.model_config(name)
    chosen.streams = fusions.FUSIONS[name].streams
    chosen.settings.update(SMALL.get(name, {}))
    chosen.update(changes)
    return run_of(models.build(chosen, CLASSES), features(2), task=task)


def run_of(model: Model, few: Features, **more) -> prediction.Run:
    """Two lanes of a model that reads features like these, with weights and statistics drawn at random."""
    rng, data = np.random.default_rng(7), pipeline.resident(few, "both", "train", model.constants)
    stats = {s: _statistics(rng, data.streams[s].shape[-1]) for s in pipeline.standardised(data)}
    index = jnp.zeros((1, 1) if model.turns else 1, int)
    batch = pipeline.gather(data, {s: (m[0], d[0]) for s, (m, d) in stats.items()}, index, jnp.ones(index.shape))
    best = jax.eval_shape(model.module.init, jax.random.key(0), batch)
    return prediction.Run(
        name="made up",
        dataset="made up",
        protocol="none",
        classes=few.classes,
        preset="lite",
        text_source="both",
        model=model,
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
    """For two lanes: no bias is zero, no scale one."""
    spread = np.prod(leaf.shape[:-1]) ** -0.5 if leaf.ndim > 1 else 0.1
    centre = float(path[-1].key in ("scale", "var"))
    return (centre + spread * rng.normal(size=(2, *leaf.shape))).astype(leaf.dtype)


def streams_of(run: prediction.Run, clips: Features, multiple: int = 1) -> dict[str, np.ndarray]:
    """The streams that a program reads, with padding up to a multiple of steps."""
    named, out = {s: "text_both" if s == "text" else s for s in run.model.streams}, {}
    for stream, name in named.items():
        for key, array in ((stream, clips.arrays[name]), (f"{stream}_mask", clips.masks[name])):
            more = -array.shape[1] % multiple
            out[key] = np.pad(array, [(0, more if axis == 1 else 0) for axis in range(array.ndim)])
    return out
