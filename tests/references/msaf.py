"""The released MSAF block (Su et al., 2020): its names, and a plain re-statement in PyTorch."""

from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from avjax.models.fusions.msaf import MsafBlock
from tests.references import layouts

IGNORED: dict[str, str] = {}


class Maps(nn.Module):
    """Our block on feature maps (b, channels, ...), whose places are the steps of a sequence."""

    block: int

    @nn.compact
    def __call__(self, batch, train: bool = False) -> dict:
        steps = {name: jnp.moveaxis(x.reshape(*x.shape[:2], -1), 1, 2) for name, x in batch.items()}
        masks = {name: jnp.ones(x.shape[:2], bool) for name, x in steps.items()}
        out = MsafBlock(self.block, name="msaf")(steps, masks, train)
        return {name: jnp.moveaxis(x, 2, 1).reshape(batch[name].shape) for name, x in out.items()}


def _blocks(hyper: Mapping) -> range:
    return range(sum(-(-channels // hyper["block_channel"]) for channels in hyper["in_channels"]))


def convert(state: layouts.State, hyper: Mapping) -> dict:
    joint = layouts.folded(layouts.dense(state, "joint_features.0"), state, "joint_features.1", before=False)
    layers = [layouts.dense(state, f"dense_group.{i}") for i in _blocks(hyper)]
    attention = {k: np.stack([layer[k] for layer in layers], -1) for k in ("kernel", "bias")}
    return {"msaf": {"joint": joint, "attention": attention}}


def module(hyper: Mapping) -> Maps:
    return Maps(hyper["block_channel"])


def batch(inputs: Mapping[str, np.ndarray], hyper: Mapping) -> dict[str, np.ndarray]:
    return dict(inputs)


def answers(output: Mapping) -> dict:
    return {name.replace("x", "y"): x for name, x in output.items()}


def reference(state: Mapping, inputs: Mapping, hyper: Mapping) -> dict:
    """The released block in evaluation, on torch tensors."""
    import torch
    from torch.nn import functional

    linear = lambda x, n: functional.linear(x, state[f"{n}.weight"], state[f"{n}.bias"])  # noqa: E731
    block = hyper["block_channel"]
    maps = {name: x.flatten(2).unflatten(1, (-1, block)) for name, x in inputs.items()}  # b g block place
    joint = linear(sum(x.sum(1).mean(-1) for x in maps.values()), "joint_features.0")
    norm = [state[f"joint_features.1.{k}"] for k in ("running_mean", "running_var", "weight", "bias")]
    joint = functional.batch_norm(joint, *norm).relu()
    weights = torch.stack([linear(joint, f"dense_group.{i}") for i in _blocks(hyper)], 1).softmax(1)
    shares = weights.split([x.shape[1] for x in maps.values()], 1)
    return {
        name.replace("x", "y"): (x * share[..., None]).reshape(inputs[name].shape)
        for (name, x), share in zip(maps.items(), shares, strict=True)
    }
