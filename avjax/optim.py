"""Optimizers with a schedule over the share of a run that is done: lanes of unequal length keep their own schedule."""

import jax
import jax.numpy as jnp
import optax

from avjax.errors import AvjaxError

SCHEDULES = ("cosine", "constant")
OPTIMIZERS = ("adamw", "adam", "sgd")


def transform(config) -> optax.GradientTransformation:
    """Clipped directions without the learning rate; `config` is the `train` part of a configuration.

    Weight decay acts on the weights alone in "adamw"; in "adam" and "sgd" (momentum 0.9) it is added to the gradient
    first, as PyTorch's optimizers of these names do.

    Raises:
      AvjaxError: the name of the schedule or of the optimizer is unknown.
    """
    for key, choices in (("schedule", SCHEDULES), ("optimizer", OPTIMIZERS)):
        if config[key] not in choices:
            raise AvjaxError(f"train.{key} is {config[key]!r}; choose one of {', '.join(choices)}")
    decay = optax.add_decayed_weights(config.weight_decay)
    order = {
        "adamw": (optax.scale_by_adam(), decay),
        "adam": (decay, optax.scale_by_adam()),
        "sgd": (decay, optax.trace(0.9)),
    }
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), *order[config.optimizer])


def learning_rate(config, progress: jax.Array) -> jax.Array:
    """Linear warm-up over the share `config.warmup` of the run, then cosine decay to 0, or constant.

    Args:
      progress: share of the run's steps already done, in [0, 1].
    """
    rise = jnp.minimum(progress / config.warmup, 1.0) if config.warmup else 1.0
    done = jnp.clip((progress - config.warmup) / max(1 - config.warmup, 1e-9), 0.0, 1.0)
    fall = 0.5 * (1 + jnp.cos(jnp.pi * done)) if config.schedule == "cosine" else 1.0
    return config.learning_rate * rise * fall
