"""What every model gives back, and what the trainer needs to know of it."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax


@flax.struct.dataclass
class Output:
    """A model's answer for a batch; what is not used costs nothing under jit.

    Attributes:
      logits: head name → (b, c). The first head is the one that predicts.
      features: name → (b, d), the vector each head reads.
      attention: name → weights, for pictures.
    """

    logits: dict[str, jax.Array]
    features: dict[str, jax.Array]
    attention: dict[str, jax.Array]


@flax.struct.dataclass
class Model:
    """A registry entry made concrete by a configuration.

    Attributes:
      module: `module.apply(variables, batch, train=..., rngs=...)` → `Output`.
      loss: (output, batch, class_prior (c,)) → {term: (b,)}, unreduced and already weighted; their sum is minimised.
      heads: head names, the predicting one first.
      streams: the batch streams that the model reads, such as `("text", "audio", "video")`.
    """

    module: nn.Module = flax.struct.field(pytree_node=False)
    loss: Callable[[Output, Mapping[str, jax.Array], jax.Array], dict[str, jax.Array]] = flax.struct.field(
        pytree_node=False
    )
    heads: tuple[str, ...] = flax.struct.field(pytree_node=False)
    streams: tuple[str, ...] = flax.struct.field(pytree_node=False)


Build = Callable[[Any, int], Model]
