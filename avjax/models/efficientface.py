"""EfficientFace (Zhao, Liu, Zhou 2021), the frame network of MMER and of the released AVT-CA: image → vector.

ShuffleNetV2 units (Ma et al. 2018), whose first stage is weighted by a channel and a spatial gate and summed with local
features of the four quarters of the image. Shapes: n image, h row, w column, d width.

Batch norms run in inference mode: running statistics are state (collection "batch_stats"), which comes with pretrained
weights and is never updated. Without pretrained weights they are 0 and 1, and the initialisation of the convolutions
keeps the scale. So no video's vector depends on other images.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from avjax.errors import AvjaxError
from avjax.layers import FrameConvolution

_KEEPS_SCALE = nn.initializers.variance_scaling(2.0, "fan_in", "truncated_normal")


class ConvNorm(nn.Module):
    """Convolution, batch norm in inference mode and, unless `linear`, ReLU; padded on all sides, as in PyTorch."""

    width: int
    kernel: int = 1
    stride: int = 1
    dilation: int = 1
    channelwise: bool = False
    bias: bool = False
    linear: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x (n, h, w, d) to (n, h / stride, w / stride, width)."""
        x = FrameConvolution(
            self.width,
            self.kernel,
            self.stride,
            self.dilation,
            self.channelwise,
            self.bias,
            _KEEPS_SCALE,
            self.dtype,
            name="conv",
        )(x)
        x = nn.BatchNorm(use_running_average=True, dtype=self.dtype, name="norm")(x)
        return x if self.linear else nn.relu(x)


class ShuffleUnit(nn.Module):
    """A ShuffleNetV2 unit (Ma et al. 2018, figure 3c and d): two branches whose channels are interleaved.

    With stride 1 half of the channels pass unchanged; with stride 2 both branches read all of them.
    """

    width: int
    stride: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x (n, h, w, d) to (n, h / stride, w / stride, width)."""
        half = self.width // 2
        if self.stride == 1:
            left, x = jnp.split(x, 2, -1)
        else:
            left = self._point("left_out", half)(self._depthwise("left_depthwise", x.shape[-1])(x))
        x = self._depthwise("depthwise", half)(self._point("point", half)(x))
        x = self._point("out", half)(x)
        return jnp.stack([left, x], -1).reshape(*x.shape[:-1], self.width)

    def _point(self, name: str, width: int) -> ConvNorm:
        return ConvNorm(width, dtype=self.dtype, name=name)

    def _depthwise(self, name: str, width: int) -> ConvNorm:
        return ConvNorm(width, 3, self.stride, channelwise=True, linear=True, dtype=self.dtype, name=name)


class Modulator(nn.Module):
    """Multiplies x by the sigmoid of a channel gate times a spatial gate; `reduction` narrows both."""

    reduction: int = 16
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x (n, h, w, d) to the same shape."""
        width = x.shape[-1]
        narrow = width // self.reduction
        pooled = jnp.mean(x, (1, 2), keepdims=True)
        channel = ConvNorm(narrow, bias=True, dtype=self.dtype, name="channel")(pooled)
        channel = FrameConvolution(width, 1, dtype=self.dtype, name="channel_out")(channel)  # n 1 1 d
        spatial = ConvNorm(narrow, bias=True, dtype=self.dtype, name="place")(x)
        for i in range(2):
            spatial = ConvNorm(narrow, 3, dilation=4, bias=True, dtype=self.dtype, name=f"place_{i}")(spatial)
        spatial = FrameConvolution(1, 1, dtype=self.dtype, name="place_out")(spatial)  # n h w 1
        return nn.sigmoid(channel * spatial) * x


class LocalFeatures(nn.Module):
    """Two depthwise convolutions with separate weights for each quarter of the image, put together again."""

    width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x (n, h, w, d) to (n, h / 2, w / 2, width)."""
        rows = []
        for upper, row in zip(("top", "bottom"), jnp.split(x, 2, 1), strict=True):
            quarters = zip(("left", "right"), jnp.split(row, 2, 2), strict=True)
            rows.append(jnp.concatenate([self._quarter(f"{upper}_{side}", part) for side, part in quarters], 2))
        return jnp.concatenate(rows, 1)

    def _quarter(self, name: str, x: jax.Array) -> jax.Array:
        x = ConvNorm(self.width, 3, 2, channelwise=True, dtype=self.dtype, name=f"{name}_0")(x)
        return ConvNorm(self.width, 3, channelwise=True, dtype=self.dtype, name=f"{name}_1")(x)


class EfficientFace(nn.Module):
    """The frame network without its classifier.

    Attributes:
      stem: width of the first convolution; stages: widths of the three stages of units; repeats: units in each.
      width: of the output vector.
    """

    stem: int = 29
    stages: tuple[int, ...] = (116, 232, 464)
    repeats: tuple[int, ...] = (4, 8, 4)
    width: int = 1024
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images (n, h, w, 3), RGB in [0, 1], to (n, width).

        Raises:
          AvjaxError: height or width is not a multiple of 16, so that quarters and stages do not align.
        """
        if images.shape[1] % 16 or images.shape[2] % 16:
            raise AvjaxError(
                f"frames of {images.shape[1]} x {images.shape[2]} pixels do not fit EfficientFace: "
                "resize them to multiples of 16, such as the paper's 224 x 224"
            )
        x = ConvNorm(self.stem, 3, 2, dtype=self.dtype, name="stem")(images)
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        local = LocalFeatures(self.stages[0], self.dtype, name="local")(x)
        x = Modulator(dtype=self.dtype, name="modulator")(self._stage(0, x)) + local
        for i in range(1, len(self.stages)):
            x = self._stage(i, x)
        x = ConvNorm(self.width, dtype=self.dtype, name="out")(x)
        return jnp.mean(x, (1, 2))

    def _stage(self, i: int, x: jax.Array) -> jax.Array:
        for unit in range(self.repeats[i]):
            stride = 1 if unit else 2
            x = ShuffleUnit(self.stages[i], stride, self.dtype, name=f"stage_{i}_{unit}")(x)
        return x
