"""TFN: one vector per stream, then all products of their entries.

Zadeh et al., "Tensor Fusion Network for Multimodal Sentiment Analysis", EMNLP 2017.
Shapes: b clip, n step of a stream, d width, c class.

The released system has a batch norm on averaged audio and video, which makes clips of a batch depend on each other. It
is left out: features are already standardised by the training clips, and a trained batch norm folds into the first
dense layer exactly. The last state of the text is that of its last real step; with `as_released` padding is read as
zeros, in text and averages, as in the released code.

A missing modality is an all-False mask. Its vector is zero, so that only products without it remain.
"""

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from avjax.layers import Dropout, Project, Recurrence, masked_mean, stream_inputs
from avjax.models.base import Batch, Fusion, Output
from avjax.models.fusions.base import FusionModule


class Unimodal(nn.Module):
    """One vector per stream (Zadeh et al. 2017, section 4.1), zero for a stream that a clip lacks.

    Text goes through an LSTM, whose last state is mapped to `text_width`; other streams are averaged over time and go
    through three dense layers with ReLU. `widths` are those of the LSTM and of the dense layers, by stream.
    """

    streams: tuple[str, ...]
    widths: Mapping[str, int]
    text_width: int
    dropout: float = 0.0
    as_released: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, batch: Batch, train: bool = False) -> dict[str, jax.Array]:
        """Maps `<stream> (b, n, w)` and `<stream>_mask (b, n)` to vectors: stream → (b, d)."""
        drop = Dropout(self.dropout, train)
        steps, masks = stream_inputs(batch, self.streams, self.dtype, self.as_released)
        vectors = {}
        for stream in self.streams:
            width = self.widths[stream]
            if stream == "text":
                hidden, _ = Recurrence(width, dtype=self.dtype, name="text_states")(steps[stream], masks[stream])
                vector = Project((self.text_width,), dtype=self.dtype, name="text")(drop(hidden[:, -1]))
            else:
                vector = drop(masked_mean(steps[stream], masks[stream]))
                for i in range(3):
                    vector = jax.nn.relu(Project((width,), dtype=self.dtype, name=f"{stream}_{i}")(vector))
            vectors[stream] = jnp.where(jnp.any(masks[stream], -1, keepdims=True), vector, 0)
        return vectors


def with_one(x: jax.Array) -> jax.Array:
    """Prepends 1 to each vector, so that products include those of fewer vectors: (b, d) → (b, 1 + d)."""
    return jnp.pad(x, ((0, 0), (1, 0)), constant_values=1)


class Tfn(FusionModule):
    """Tensor fusion network (Zadeh et al. 2017, section 4.2): the outer product of all streams' vectors, with ones.

    Attributes:
      streams: any of text, audio, video, in the order of the product.
      widths, text_width: of the streams' vectors, see `Unimodal`.
      hidden: width of the two layers before the head.
      dropout: rate on the averaged streams and on the text's last state; product_dropout: on the product.
      as_released: read padding as zeros, see the module docstring.
    """

    streams: tuple[str, ...] = ("audio", "video", "text")
    widths: Mapping[str, int] = dataclasses.field(default_factory=lambda: {"text": 128, "audio": 32, "video": 128})
    text_width: int = 32
    hidden: int = 64
    dropout: float = 0.3
    product_dropout: float = 0.5
    as_released: bool = False

    @nn.compact
    def __call__(self, batch: Batch, train: bool = False) -> Output:
        """Computes the head "fusion"; features hold the flat "product" (b, ∏ (1 + d)), and each stream's vector."""
        vectors = Unimodal(
            self.streams, self.widths, self.text_width, self.dropout, self.as_released, self.dtype, name="unimodal"
        )(batch, train)
        product = jnp.ones((1, 1), self.dtype)
        for vector in vectors.values():
            product = (product[:, :, None] * with_one(vector)[:, None, :]).reshape(len(vector), -1)
        fused = Dropout(self.product_dropout, train)(product)
        for i in range(2):
            fused = jax.nn.relu(Project((self.hidden,), dtype=self.dtype, name=f"hidden_{i}")(fused))
        return self.predict(fused, {"product": product} | vectors)


FUSIONS: dict[str, Fusion] = {
    "tfn": Fusion(
        module=Tfn,
        recipe={"optimizer": "adam", "learning_rate": 1e-3, "batch_size": 32, "weight_decay": 0.0},
        paper="Zadeh et al. 2017, EMNLP",
    ),
}
