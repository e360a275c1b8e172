"""Optimizers with a schedule over the share of a run that is done: lanes of unequal length keep their own schedule.

Of a model that trains its encoders, parts may move at rates of their own, told by the paths of their parameters: names
joined by "/", as in `video/block_0/attention/query/kernel`.
"""

import re
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from avjax.errors import AvjaxError
from avjax.settings import TrainSettings

# What stands before `/block_<i>/` is an encoder; of its other parameters only the last norm comes after its blocks.
_BLOCK = re.compile(r"^(.+)/block_(\d+)/")
_AFTER = "norm"


def transform(settings: TrainSettings) -> optax.GradientTransformation:
    """Makes clipped directions without the learning rate.

    Weight decay acts on the weights alone in "adamw"; in "adam" and "sgd" (momentum 0.9) it is added to the gradient
    first, as PyTorch's optimizers of these names do. In the end directions are multiplied by `factors`, weight decay
    with them. A `clip_norm` of 0 clips nothing.
    """
    decay = optax.add_decayed_weights(settings.weight_decay)
    order = {
        "adamw": (optax.scale_by_adam(), decay),
        "adam": (decay, optax.scale_by_adam()),
        "sgd": (decay, optax.trace(0.9)),
    }
    clip = optax.clip_by_global_norm(settings.clip_norm) if settings.clip_norm else optax.identity()
    return optax.chain(clip, *order[settings.optimizer], *_scaled(settings))


def _scaled(settings: TrainSettings) -> tuple[optax.GradientTransformation, ...]:
    if not settings.rates and settings.layer_decay == 1:
        return ()

    def scale(directions: Any, params: Any) -> Any:
        known = factors(settings, flatten_dict(params, sep="/"))
        flat = {path: known[path] * direction for path, direction in flatten_dict(directions, sep="/").items()}
        return unflatten_dict(flat, sep="/")

    return (optax.stateless(scale),)


def factors(settings: TrainSettings, paths: Iterable[str]) -> dict[str, float]:
    """What the learning rate is multiplied by, for each of the `paths` of the parameters.

    `settings.rates` are pairs of a pattern and a factor, of which the first counts whose pattern is found in the path.
    It is multiplied with layer-wise decay (Bao et al. 2022, "BEiT", appendix): of an encoder with L blocks that are
    trained, block i, from 0, has `settings.layer_decay` to the power of L − i, what comes before the blocks to that of
    L + 1, and what comes after them, or is no part of an encoder, has 1.

    Raises:
      AvjaxError: a pattern is found in no path, or layers are to decay and there are none.
    """
    paths = list(paths)
    for pattern, _ in settings.rates:
        if not any(re.search(pattern, path) for path in paths):
            raise AvjaxError(f"train.rates: {pattern!r} is found in no path of what is trained, such as {paths[0]}")
    depths: dict[str, int] = {}
    for found in filter(None, map(_BLOCK.match, paths)):
        depths[found[1]] = max(depths.get(found[1], 0), int(found[2]) + 1)
    if settings.layer_decay != 1 and not depths:
        raise AvjaxError(
            f"train.layer_decay is {settings.layer_decay}, but no block of an encoder is trained: set it to 1.0"
        )
    return {path: _rate(settings.rates, path) * settings.layer_decay ** _steps_down(depths, path) for path in paths}


def _rate(rates: Iterable[tuple[str, float]], path: str) -> float:
    return next((factor for pattern, factor in rates if re.search(pattern, path)), 1.0)


def _steps_down(depths: dict[str, int], path: str) -> int:
    """How many layers lie between a parameter and the head; `depths` has the number of blocks of each encoder."""
    if block := _BLOCK.match(path):
        return depths[block[1]] - int(block[2])
    for encoder, depth in depths.items():
        if path.startswith(f"{encoder}/") and not path.startswith(f"{encoder}/{_AFTER}/"):
            return depth + 1
    return 0


def learning_rate(settings: TrainSettings, progress: jax.Array) -> jax.Array:
    """Linear warm-up over the share `settings.warmup` of the run, then cosine decay to 0, or constant.

    Args:
      progress: share of the run's steps already done, in [0, 1].
    """
    rise = jnp.minimum(progress / settings.warmup, 1.0) if settings.warmup else 1.0
    done = jnp.clip((progress - settings.warmup) / max(1 - settings.warmup, 1e-9), 0.0, 1.0)
    fall = 0.5 * (1 + jnp.cos(jnp.pi * done)) if settings.schedule == "cosine" else 1.0
    return settings.learning_rate * rise * fall


def cut(batch: dict[str, Any], pieces: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Cuts a batch into `pieces` of equal size for gradients that are added up; rows that are filled in weigh 0.

    Returns:
      what is of clips, with masks False and zeros in rows filled in, (pieces, rows, …); and what the batch has whole.
    """
    named = {"label", "weight", *(key for key in batch if key.endswith("_mask") or f"{key}_mask" in batch)}
    size = -(-batch["weight"].shape[0] // pieces)

    def cut_one(rows: jax.Array) -> jax.Array:
        fill = [(0, pieces * size - rows.shape[0]), *[(0, 0)] * (rows.ndim - 1)]
        return jnp.pad(rows, fill).reshape(pieces, size, *rows.shape[1:])

    return {k: cut_one(batch[k]) for k in named}, {k: v for k, v in batch.items() if k not in named}
