"""C3D with an LSTM over its frames, concatenated with an LSTM of every other stream.

C3D: Tran et al., "Learning Spatiotemporal Features with 3D Convolutional Networks", ICCV 2015; with an LSTM over time a
baseline of Liu et al., "MAFW: A Large-scale, Multi-modal, Compound Affective Database", ACM MM 2022.
Shapes: b clip, n step of a stream, t frame, h row, w column, d width, c class.

Every convolution reads zeros at masked frames, as beyond the ends of a clip, and keeps the number of frames, so padding
changes nothing. A missing modality is an all-False mask, its vector zero; without any, the head's bias predicts.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from avjax.errors import AvjaxError
from avjax.layers import Dropout, Recurrence, TimeConvolution, zero_masked
from avjax.models.base import Batch, Fusion, Output
from avjax.models.fusions.base import FusionModule


class Stages(nn.Module):
    """Convolutions with kernel size 3, each followed by ReLU and 2 x 2 max pooling; then the mean over pixels.

    On frames these are 3-d convolutions; C3D also pools over time, which would mix frames with padding. On feature
    sequences they are 1-d convolutions over time, without pooling.
    """

    widths: tuple[int, ...]
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Maps x (b, t, h, w, d) or (b, t, d) under mask (b, t) to (b, t, widths[-1])."""
        space = x.ndim - 3
        keeps_scale = nn.initializers.variance_scaling(2.0, "fan_in", "truncated_normal")
        for i, width in enumerate(self.widths):
            x, common = zero_masked(x, mask), {"dtype": self.dtype, "name": f"stage_{i}"}
            if space:
                x = nn.relu(nn.Conv(width, (3, 3, 3), kernel_init=keeps_scale, **common)(x))
                x = nn.max_pool(x, (1, 2, 2), (1, 2, 2), "SAME")
            else:
                x = nn.relu(TimeConvolution(width, 3, kernel_init=keeps_scale, **common)(x))
        return jnp.mean(x, tuple(range(2, 2 + space)))


class C3dLstm(FusionModule):
    """C3D and an LSTM over its frames, with late fusion with an LSTM of every other stream.

    The video stream is frames (b, t, h, w, 3) with values 0 to 255, or a feature sequence (b, t, w), see `Stages`.
    Every other stream is a feature sequence.

    Attributes:
      streams: video and any others.
      widths: of the five convolutions; C3D's are four times as wide, for pretraining on a million clips.
      hidden: width of the LSTMs.
      dropout: rate on the concatenated states.
    """

    streams: tuple[str, ...] = ("audio", "video")
    widths: tuple[int, ...] = (16, 32, 64, 128, 128)
    hidden: int = 128
    dropout: float = 0.5

    @nn.compact
    def __call__(self, batch: Batch, train: bool = False) -> Output:
        """Reads `<stream>` and `<stream>_mask (b, n)` of its streams; features hold each LSTM's last state (b, hidden).

        Raises:
          AvjaxError: the video stream is neither frames nor a feature sequence.
        """
        steps = {s: self._frames(batch) if s == "video" else batch[s].astype(self.dtype) for s in self.streams}
        vectors = {s: self._last_state(s, x, batch[f"{s}_mask"]) for s, x in steps.items()}
        joined = jnp.concatenate(list(vectors.values()), -1)
        fused = Dropout(self.dropout, train)(joined)
        return self.predict(fused, vectors)

    def _frames(self, batch: Batch) -> jax.Array:
        x = batch["video"].astype(self.dtype)
        if x.ndim not in (3, 5):
            raise AvjaxError(
                f"the video stream has shape {x.shape}; C3D and LSTM read frames (clip, frame, row, column, 3) or "
                "feature sequences (clip, frame, width): give one of them"
            )
        if x.ndim == 5:
            x = x / 127.5 - 1
        return Stages(self.widths, self.dtype, name="stages")(x, batch["video_mask"])

    def _last_state(self, stream: str, x: jax.Array, mask: jax.Array) -> jax.Array:
        hidden, _ = Recurrence(self.hidden, dtype=self.dtype, name=f"{stream}_lstm")(x, mask)
        return hidden[:, -1]


FUSIONS: dict[str, Fusion] = {
    "c3d_lstm": Fusion(
        module=C3dLstm,
        needs=("video",),
        paper="Tran et al. 2015, ICCV; Liu et al. 2022, ACM MM",
    ),
}
