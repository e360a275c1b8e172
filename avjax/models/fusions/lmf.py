"""LMF: all products of the streams' entries, by low-rank factors.

Liu et al., "Efficient Low-rank Multimodal Fusion with Modality-Specific Factors", ACL 2018.
Shapes: b clip, n step of a stream, d width, r rank, c class. The streams' vectors, padding and missing modalities are
as in `avjax.models.fusions.tfn`.
"""

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from avjax.models.base import Batch, Fusion, Output
from avjax.models.fusions.base import FusionModule
from avjax.models.fusions.tfn import Unimodal, with_one


class Lmf(FusionModule):
    """Low-rank multimodal fusion (Liu et al. 2018, Eqs. 6–8): all products of the streams by factors of rank r.

    The ranks are weighted by learned numbers rather than summed, as in the released code.

    Attributes:
      widths, text_width: of the streams' vectors, see `Unimodal`.
      rank: r.
      dropout: rate on the averaged streams and on the text's last state.
      as_released: read padding as zeros, as in `Tfn`.
    """

    widths: Mapping[str, int] = dataclasses.field(default_factory=lambda: {"text": 128, "audio": 16, "video": 128})
    text_width: int = 64
    rank: int = 4
    dropout: float = 0.2
    as_released: bool = False

    @nn.compact
    def __call__(self, batch: Batch, train: bool = False) -> Output:
        """Computes the head "fusion"; features are the products (b, r·c) that it weights, and each stream's vector."""
        vectors = Unimodal(
            self.streams, self.widths, self.text_width, self.dropout, self.as_released, self.dtype, name="unimodal"
        )(batch, train)
        fused = 1.0
        for stream, vector in vectors.items():
            fused = fused * self._factor(stream, with_one(vector)).astype(jnp.float32)  # b r c
        weights = self.param("weights", nn.initializers.glorot_normal(), (1, self.rank))
        bias = self.param("bias", nn.initializers.zeros, (self.classes,))
        logits = jnp.einsum("or,brc->boc", weights, fused)[:, 0] + bias[None]
        return Output({"fusion": logits}, {"fusion": fused.reshape(len(fused), -1)} | vectors, {})

    def _factor(self, stream: str, x: jax.Array) -> jax.Array:
        init = nn.initializers.variance_scaling(1.0, "fan_avg", "normal", in_axis=1, out_axis=2, batch_axis=0)
        factor = self.param(f"factor_{stream}", init, (self.rank, x.shape[-1], self.classes))
        return jnp.einsum("bi,ric->brc", x, factor.astype(self.dtype))


FUSIONS: dict[str, Fusion] = {
    "lmf": Fusion(
        module=Lmf,
        recipe={"optimizer": "adam", "learning_rate": 1e-3, "batch_size": 32, "weight_decay": 1e-3},
        paper="Liu et al. 2018, ACL",
    ),
}
