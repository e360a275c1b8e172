"""Optimizers with a schedule over the fraction of a run that is done: lanes of unequal length keep their own schedule.

Parts of a model may train at learning rates of their own, chosen by the paths of their parameters: names joined by "/",
as in `video/block_0/attention/query/kernel`.
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
    """Returns the optimizer without the learning rate: its directions are yet to be scaled.

    Weight decay is decoupled in "adamw"; in "adam" and "sgd" (momentum 0.9) it is added to the gradient first, as
    PyTorch's optimizers of these names do. Directions, with weight decay, are multiplied by `factors` last. Gradients
    are clipped first; a `clip_norm` of 0 clips nothing.
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
        by_path = factors(settings, flatten_dict(params, sep="/"))
        flat = {path: by_path[path] * direction for path, direction in flatten_dict(directions, sep="/").items()}
        return unflatten_dict(flat, sep="/")

    return (optax.stateless(scale),)


def factors(settings: TrainSettings, paths: Iterable[str]) -> dict[str, float]:
    """Computes the factor of the learning rate for each of the `paths` of the parameters.

    `settings.rates` are pairs of a pattern and a factor; the first pattern found in the path applies. Its factor is
    multiplied by layer-wise decay (Bao et al. 2022, "BEiT", appendix). In an encoder with L trained blocks, block i,
    from 0, has `settings.layer_decay` to the power of L − i, and what comes before the blocks to the power of L + 1;
    what comes after them, or is not part of an encoder, has 1.

    Raises:
      AvjaxError: no path has a pattern in it, or `layer_decay` is set and no block is trained.
    """
    paths = list(paths)
    for pattern, _ in settings.rates:
        if not any(re.search(pattern, path) for path in paths):
            raise AvjaxError(f"train.rates: {pattern!r} matches no path of a trained parameter, such as {paths[0]}")
    depths: dict[str, int] = {}
    for block in filter(None, map(_BLOCK.match, paths)):
        depths[block[1]] = max(depths.get(block[1], 0), int(block[2]) + 1)
    if settings.layer_decay != 1 and not depths:
        raise AvjaxError(
            f"train.layer_decay is {settings.layer_decay}, but no block of an encoder is trained: set it to 1.0"
        )
    return {path: _rate(settings.rates, path) * settings.layer_decay ** _steps_down(depths, path) for path in paths}


def _rate(rates: Iterable[tuple[str, float]], path: str) -> float:
    return next((factor for pattern, factor in rates if re.search(pattern, path)), 1.0)


def _steps_down(depths: dict[str, int], path: str) -> int:
    """Returns the number of layers between a parameter and the head; `depths`: blocks of each encoder."""
    if block := _BLOCK.match(path):
        return depths[block[1]] - int(block[2])
    for encoder, depth in depths.items():
        if path.startswith(f"{encoder}/") and not path.startswith(f"{encoder}/{_AFTER}/"):
            return depth + 1
    return 0


def learning_rate(settings: TrainSettings, progress: jax.Array) -> jax.Array:
    """Returns the learning rate at `progress`, the fraction of the run's steps already done, in [0, 1].

    It rises linearly over the fraction `settings.warmup` of the run, then decays to 0 by a cosine, or stays constant.
    """
    rise = jnp.minimum(progress / settings.warmup, 1.0) if settings.warmup else 1.0
    done = jnp.clip((progress - settings.warmup) / max(1 - settings.warmup, 1e-9), 0.0, 1.0)
    fall = 0.5 * (1 + jnp.cos(jnp.pi * done)) if settings.schedule == "cosine" else 1.0
    return settings.learning_rate * rise * fall


def cut(batch: dict[str, Any], pieces: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits a batch into `pieces` of equal size for gradient accumulation; rows of padding have weight 0.

    Returns:
      arrays with an axis of clips, (pieces, rows, …), padded with zeros and masks False; and the remaining arrays.
    """
    named = {"label", "weight", *(key for key in batch if key.endswith("_mask") or f"{key}_mask" in batch)}
    size = -(-batch["weight"].shape[0] // pieces)

    def cut_one(rows: jax.Array) -> jax.Array:
        fill = [(0, pieces * size - rows.shape[0]), *[(0, 0)] * (rows.ndim - 1)]
        return jnp.pad(rows, fill).reshape(pieces, size, *rows.shape[1:])

    return {k: cut_one(batch[k]) for k in named}, {k: v for k, v in batch.items() if k not in named}
