"""The Conformer with Transformer-XL's positions in plain PyTorch, by the conventions of `layers`.

Shapes: b clip, n step (r offset between two), h head, d width.
"""

import functools

import numpy as np

from avjax.layers import interleaved_sinusoids
from benchmarks.torch.fusions import batch_norm, layer_norm, linear
from benchmarks.torch.layers import State, Tensor, convolution, joint_projections


def conformer(state: State, name: str, heads: int, x: Tensor) -> Tensor:
    """Computes one block (Gulati et al. 2020, Eq. 1): (b, n, d) → (b, n, d)."""
    x = x + 0.5 * _feed_forward(state, f"{name}.first", x)
    x = x + _relative_attention(state, f"{name}.attention", heads, layer_norm(state, f"{name}.attention_norm", x))
    x = x + _convolved(state, f"{name}.convolution", x)
    x = x + 0.5 * _feed_forward(state, f"{name}.second", x)
    return layer_norm(state, f"{name}.norm", x)


def _feed_forward(state: State, name: str, x: Tensor) -> Tensor:
    from torch.nn import functional

    hidden = functional.silu(linear(state, f"{name}.up", layer_norm(state, f"{name}.norm", x)))
    return linear(state, f"{name}.down", hidden)


def _convolved(state: State, name: str, x: Tensor) -> Tensor:
    from torch.nn import functional

    x = functional.glu(linear(state, f"{name}.gate", layer_norm(state, f"{name}.norm", x)))
    x = convolution(state, f"{name}.depthwise", x, groups=x.shape[-1])
    x = functional.silu(batch_norm(state, f"{name}.depthwise_norm", x.mT)).mT
    return linear(state, f"{name}.out", x)


def _relative_attention(state: State, name: str, heads: int, x: Tensor) -> Tensor:
    """Computes Transformer-XL's attention (Dai et al. 2019, section 3.3) over x (b, n, d)."""
    split = lambda x: x.unflatten(-1, (heads, -1)).transpose(-3, -2)  # noqa: E731
    query, key, value = (split(part) for part in joint_projections(state, name, x, None))  # b h n d
    relative_key = split(linear(state, f"{name}.position", _offsets(*x.shape[1:], x.device)))  # h r d
    content = (query + state[f"{name}.content_bias"][:, None]) @ key.mT
    position = _shifted((query + state[f"{name}.position_bias"][:, None]) @ relative_key.mT)
    weights = ((content + position) * query.shape[-1] ** -0.5).softmax(-1)
    return linear(state, f"{name}.out", (weights @ value).transpose(1, 2).flatten(2))


@functools.cache
def _offsets(steps: int, width: int, device) -> Tensor:
    """Returns sinusoids (r, d) of the offsets from n − 1 down to 1 − n."""
    import torch

    return torch.from_numpy(interleaved_sinusoids(np.arange(steps - 1, -steps, -1), width)).to(device)


def _shifted(scores: Tensor) -> Tensor:
    """Shifts scores of offsets (b, h, n, r) to scores of steps (b, h, n, n) (appendix B)."""
    from torch.nn import functional

    b, h, n, r = scores.shape
    return functional.pad(scores, (1, 0)).view(b, h, r + 1, n)[:, :, 1:].reshape(b, h, n, r)[..., :n]
