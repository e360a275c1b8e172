"""MulT: every modality attends to the others, then goes through its own transformer.

Tsai et al., "Multimodal Transformer for Unaligned Multimodal Language Sequences", ACL 2019.
Shapes: b clip, n step of a stream, d width, c class.

The released system has no masks: see `avjax.layers.crossmodal`, whose `as_released` restores its behaviour. By default
the last real step of a clip predicts. A missing modality is an all-False mask: its own vector is zero.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from avjax.layers import CrossmodalEncoder, Dropout, Project, last_step, stream_inputs
from avjax.models.base import Batch, Fusion, Output, Streams
from avjax.models.fusions.base import FusionModule


class Residual(nn.Module):
    """A perceptron of the given widths with ReLU, and a residual: (b, d) → (b, d)."""

    widths: tuple[int, ...]
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps x (b, d) to the same shape."""
        hidden = x
        for i, width in enumerate(self.widths):
            hidden = Project((width,), dtype=self.dtype, name=f"hidden_{i}")(hidden)
            hidden = Dropout(self.dropout, train)(jax.nn.relu(hidden))
        return x + Project(x.shape[-1:], dtype=self.dtype, name="out")(hidden)


class MulT(FusionModule):
    """Multimodal Transformer (Tsai et al. 2019, section 3).

    Every stream attends to each of the others in a crossmodal transformer; the concatenated results go through a
    transformer per stream, whose last step is the stream's vector. The defaults are those of Table 5 for IEMOCAP.

    Attributes:
      width: d of a projected stream; heads: divides it.
      layers: blocks of a crossmodal transformer; the transformers per stream have at least 3, as in the released code.
      causal: whether to hide the future, as the released code does.
      dropout: rate in the residual branches; attention_dropout: on the weights; embedding_dropout: on the embedded
        streams; out_dropout: in the last perceptron.
      as_released: treat padding like the released code, see the module docstring.
    """

    width: int = 40
    heads: int = 10
    layers: int = 4
    causal: bool = True
    dropout: float = 0.1
    attention_dropout: float = 0.25
    embedding_dropout: float = 0.3
    out_dropout: float = 0.1
    as_released: bool = False

    @nn.compact
    def __call__(self, batch: Batch, train: bool = False) -> Output:
        """Reads `<stream> (b, n, w)` and `<stream>_mask (b, n)` of its streams.

        Features also hold the concatenated vectors as "joint".
        """
        steps, masks = stream_inputs(batch, self.streams, self.dtype, self.as_released)
        steps = {s: Project((self.width,), dtype=self.dtype, bias=False, name=f"project_{s}")(steps[s]) for s in steps}
        joint = jnp.concatenate([self._vector(s, steps, masks, train) for s in self.streams], -1)
        fused = Residual(joint.shape[-1:], self.out_dropout, self.dtype, name="fuse")(joint, train)
        return self.predict(fused, {"joint": joint})

    def _vector(self, stream: str, steps: Streams, masks: Streams, train: bool) -> jax.Array:
        """Returns the last step of a stream after attending to all others: (b, (streams - 1)·d)."""
        attended = []
        for other in self.streams:
            if other != stream:
                encoder = self._encoder(self.layers, f"{stream}_with_{other}")
                attended.append(encoder(steps[stream], masks[stream], steps[other], masks[other], train))
        own = self._encoder(max(self.layers, 3), f"{stream}_memory")
        return last_step(own(jnp.concatenate(attended, -1), masks[stream], train=train), masks[stream])

    def _encoder(self, layers: int, name: str) -> CrossmodalEncoder:
        return CrossmodalEncoder(
            layers, self.heads, self.causal, dropout=self.dropout, attention_dropout=self.attention_dropout,
            embedding_dropout=self.embedding_dropout, as_released=self.as_released, dtype=self.dtype, name=name,
        )  # fmt: skip


FUSIONS: dict[str, Fusion] = {
    "mult": Fusion(
        module=MulT,
        small={"layers": 1},
        least=2,
        recipe={"optimizer": "adam", "learning_rate": 2e-3, "batch_size": 32, "epochs": 30, "weight_decay": 0.0},
        paper="Tsai et al. 2019, ACL",
    ),
}
