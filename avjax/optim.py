"""AdamW with a schedule over the share of a run that is done: lanes of unequal length keep their own schedule."""

import jax
import jax.numpy as jnp
import optax

from avjax.errors import AvjaxError

SCHEDULES = ("cosine", "constant")


def transform(config) -> optax.GradientTransformation:
    """Clipped AdamW directions without the learning rate; `config` is the `train` part of a configuration.

    Raises:
      AvjaxError: the schedule's name is unknown.
    """
    if config.schedule not in SCHEDULES:
        raise AvjaxError(f"train.schedule is {config.schedule!r}; choose one of {', '.join(SCHEDULES)}")
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(),
        optax.add_decayed_weights(config.weight_decay),
    )


def learning_rate(config, progress: jax.Array) -> jax.Array:
    """Linear warm-up over the share `config.warmup` of the run, then cosine decay to 0, or constant.

    Args:
      progress: share of the run's steps already done, in [0, 1].
    """
    rise = jnp.minimum(progress / config.warmup, 1.0) if config.warmup else 1.0
    done = jnp.clip((progress - config.warmup) / max(1 - config.warmup, 1e-9), 0.0, 1.0)
    fall = 0.5 * (1 + jnp.cos(jnp.pi * done)) if config.schedule == "cosine" else 1.0
    return config.learning_rate * rise * fall
