"""MAG: text steps are shifted by the aligned steps of the other modalities.

Rahman et al., "Integrating Multimodal Information in Large Pretrained Transformers", ACL 2020.
Shapes: b clip, l token, n step of a stream, d width, c class.

A missing modality is an all-False mask. Missing audio or video shifts nothing; without text the prediction is the
head's bias.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from avjax.layers import Dropout, Project, align, masked_mean, stream_inputs
from avjax.models.base import Batch, Fusion, Output, Streams
from avjax.models.fusions.base import FusionModule


class MagBlock(nn.Module):
    """Multimodal adaptation gate (Rahman et al. 2020, Eqs. 1–5): text steps shifted by aligned ones.

    The length of the shift is at most `shift` (β) times that of the step itself.
    """

    shift: float
    dropout: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, text: jax.Array, others: Streams, masks: Streams, train: bool = False) -> jax.Array:
        """Maps text (b, l, d) and other streams aligned with it (b, l, w), with masks (b, l), to (b, l, d)."""
        project = lambda name: Project(text.shape[-1:], dtype=self.dtype, name=name)  # noqa: E731
        moved = jnp.zeros_like(text)
        for stream, x in others.items():
            gate = jax.nn.relu(project(f"gate_{stream}")(jnp.concatenate([x, text], -1)))
            moved += jnp.where(masks[stream][..., None], gate * project(f"shift_{stream}")(x), 0)
        length = lambda x: optax.safe_norm(x.astype(jnp.float32), 0.0, axis=-1, keepdims=True)  # noqa: E731
        size = length(moved)
        scale = jnp.minimum(self.shift * length(text) / (jnp.where(size > 0, size, 1.0) + 1e-6), 1.0)
        norm = nn.LayerNorm(1e-5, self.dtype, use_fast_variance=False, name="norm")
        return Dropout(self.dropout, train)(norm(text + scale.astype(text.dtype) * moved))


class Mag(FusionModule):
    """`MagBlock` on the text features, then their mean over real tokens and a head.

    The paper puts the gate inside BERT, with streams aligned by words. This module reads text features, and each
    other stream is averaged over the time span of each token (`layers.align`).

    Attributes:
      streams: text and any others.
      shift: β.
      dropout: rate on the gated text.
    """

    shift: float = 1.0
    dropout: float = 0.5

    @nn.compact
    def __call__(self, batch: Batch, train: bool = False) -> Output:
        """Reads `<stream> (b, n, w)` and `<stream>_mask (b, n)` of its streams."""
        steps, masks = stream_inputs(batch, self.streams, self.dtype)
        aligned = {s: align(steps[s], masks[s], masks["text"]) for s in self.streams if s != "text"}
        others = {s: x for s, (x, _) in aligned.items()}
        present = {s: mask for s, (_, mask) in aligned.items()}
        text = MagBlock(self.shift, self.dropout, self.dtype, name="gate")(steps["text"], others, present, train)
        fused = masked_mean(text, masks["text"])
        return self.predict(fused)


FUSIONS: dict[str, Fusion] = {
    "mag": Fusion(
        module=Mag,
        needs=("text",),
        recipe={"learning_rate": 1e-5, "batch_size": 48, "epochs": 40},
        paper="Rahman et al. 2020, ACL",
    ),
}
