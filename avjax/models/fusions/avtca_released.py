"""AVT-CA as its authors released it, which differs from their paper (`avjax.models.avt_ca`).

The code builds on that of MMER: shapes, missing streams and padding are as in `avjax.models.fusions.mmer`.
"""

import jax

from avjax.layers import SelfAttention
from avjax.models.base import Fusion, Stream
from avjax.models.fusions.mmer import MmerIt


class AvtCaReleased(MmerIt):
    """AVT-CA as its authors released it, which differs from their paper: `MmerIt`, then one shared self-attention.

    The attention has no residual. The released class always uses 8 heads, whatever its settings; modality dropout is an
    option of its training.
    """

    heads: int = 8
    softhard: bool = False

    def after(self, first: Stream, second: Stream) -> tuple[Stream, Stream, dict[str, jax.Array]]:
        """Applies the same self-attention to both streams."""
        attention = SelfAttention(self.heads, self.dtype, name="final")
        return (attention(*first), first[1]), (attention(*second), second[1]), {}


FUSIONS: dict[str, Fusion] = {
    "avtca_released": Fusion(
        module=AvtCaReleased,
        least=2,
        most=2,
        # The authors' rate is 0.06, with MMER's damped momentum.
        recipe={"optimizer": "sgd", "learning_rate": 0.006, "batch_size": 8, "weight_decay": 1e-3, "epochs": 128},
        paper="Venkatraman et al. 2024, Audio-Video Transformer Fusion with Cross Attention: the released code",
    ),
}
