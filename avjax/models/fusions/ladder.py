"""LADDER: layers of each stream are reconstructed from the other streams' top and its own noisy layers.

Goncalves and Busso 2023, "Learning Cross-modal Audiovisual Representations with Ladder Networks for Emotion
Recognition", ICASSP. Shapes: b clip, n step of a stream, d width, c class.

A missing stream is an all-False mask: it enters the fused prediction as zeros, and costs nothing. Without any stream
only biases predict.
"""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from avjax.layers import masked_mean
from avjax.models.base import Batch, Fusion, Output, Streams, head_loss
from avjax.models.fusions.base import FusionModule, has_stream


class Denoise(nn.Module):
    """The ladder's combination of a corrupted layer with the signal from above (Rasmus et al. 2015, Eq. 2)."""

    @nn.compact
    def __call__(self, corrupted: jax.Array, above: jax.Array) -> jax.Array:
        """Maps both inputs (b, d) to the estimate (b, d) of the clean layer."""
        mean, slope = (self._curve(name, above, first) for name, first in (("mean", 0.0), ("slope", 1.0)))
        return (corrupted - mean) * slope + mean

    def _curve(self, name: str, u: jax.Array, first: float) -> jax.Array:
        """Computes a₁·sigmoid(a₂u + a₃) + a₄u + a₅ per unit, initially the constant `first`."""
        start = lambda _, shape: jnp.zeros(shape).at[1].set(1.0).at[4].set(first)  # noqa: E731
        a = self.param(name, start, (5, u.shape[-1]))[:, None]  # 5 1 d
        return a[0] * nn.sigmoid(a[1] * u + a[2]) + a[3] * u + a[4]


class Ladder(FusionModule):
    """LADDER: layers of each stream are reconstructed from the other streams' top and its own noisy layers.

    Goncalves and Busso (2023) describe cross-modal ladder networks, after Rasmus et al. (2015), in words; this is our
    reading. Each stream's masked mean goes up layers of `widths`. In training noise is added to every layer that the
    classifier and the decoders read. A stream's decoder starts at the other streams' mean top layer and goes down,
    combined at each layer with the stream's own noisy layer (`Denoise`). Layers are normalised within the clip, as
    norms over the batch would let clips change each other's predictions.

    Attributes:
      widths: of the layers above the input.
      noise: standard deviation of the noise, training only (rng "dropout").
    """

    streams: tuple[str, ...] = ("audio", "video")
    widths: tuple[int, ...] = (512, 256)
    noise: float = 0.3

    @nn.compact
    def __call__(self, batch: Batch, train: bool = False) -> Output:
        """Computes the head "fusion"; features also hold the decoders' squared "errors" (b, streams · layers)."""
        present = {s: has_stream(batch, s) for s in self.streams}
        clean, noisy = {}, {}
        for s in self.streams:
            bottom = masked_mean(batch[s].astype(jnp.float32), batch[f"{s}_mask"])
            layers = [nn.Dense(w, dtype=self.dtype, name=f"{s}_up_{i}") for i, w in enumerate(self.widths)]
            clean[s] = _climb(layers, bottom, lambda x: x)
            noisy[s] = _climb(layers, bottom, self._corrupt if train else lambda x: x)
        tops = {s: jnp.where(present[s][:, None], noisy[s][-1], 0) for s in self.streams}
        errors = [self._errors(s, clean[s], noisy[s], tops, present) for s in self.streams]
        joined = jnp.concatenate(list(tops.values()), -1)
        return self.predict(joined, {"errors": jnp.concatenate(errors, -1)})

    def _corrupt(self, x: jax.Array) -> jax.Array:
        return x + self.noise * jax.random.normal(self.make_rng("dropout"), x.shape, x.dtype)

    def _errors(
        self, stream: str, clean: Sequence[jax.Array], noisy: Sequence[jax.Array], tops: Streams, present: Streams
    ) -> jax.Array:
        """Computes errors (b, layers) from the top down; zeros for clips without the stream or without any other."""
        others = [s for s in self.streams if s != stream]
        has = jnp.stack([present[s] for s in others], -1)
        estimate = masked_mean(jnp.stack([tops[s] for s in others], 1), has)
        errors = []
        for i in reversed(range(len(clean))):
            dense = nn.Dense(clean[i].shape[-1], dtype=self.dtype, name=f"{stream}_down_{i}")
            above = _standard(dense(estimate).astype(jnp.float32))
            estimate = Denoise(name=f"{stream}_denoise_{i}")(noisy[i], above)
            errors.append(jnp.mean((estimate - jax.lax.stop_gradient(clean[i])) ** 2, -1))
        both = present[stream] & has.any(-1)
        return jnp.where(both[:, None], jnp.stack(errors, -1), 0.0)


def _standard(x: jax.Array) -> jax.Array:
    """Normalises each clip to zero mean and unit variance: (b, d) → (b, d)."""
    return nn.standardize(x, epsilon=1e-5)


def _climb(layers: list[nn.Dense], bottom: jax.Array, corrupt: Callable[[jax.Array], jax.Array]) -> list[jax.Array]:
    """Returns the layers of one stream from its input up, each normalised and then corrupted, float32."""
    outputs = [corrupt(_standard(bottom))]
    for dense in layers:
        below = outputs[-1] if len(outputs) == 1 else nn.relu(outputs[-1])
        outputs.append(corrupt(_standard(dense(below).astype(jnp.float32))))
    return outputs


def ladder_loss(output: Output, batch: Batch, task: str) -> dict[str, jax.Array]:
    """Computes the cross entropy and the decoders' mean error over streams and layers, with weight 1 each."""
    cost = jnp.mean(output.features["errors"], -1)
    return {"fusion": head_loss(output, batch, "fusion", task), "reconstruction": cost}


FUSIONS: dict[str, Fusion] = {
    "ladder": Fusion(
        module=Ladder,
        loss=ladder_loss,
        least=2,
        recipe={"optimizer": "adam", "learning_rate": 5e-5, "batch_size": 32, "weight_decay": 5e-7, "epochs": 20},
        paper="Goncalves, Busso 2023, ICASSP",
    ),
}
