"""The description of a PyTorch version of one of our modules, so that `step` can compare the two."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

Tensor = Any
# Kernels of layers to heads have the axes of heads last, those from heads have them first.
_TO_HEADS, _FROM_HEADS = ("query", "key", "value", "position", "input"), ("out",)


def mean_of_heads(outputs: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
    """Returns the mean of the cross entropies of all "logits…" (b, c), or of conversations (b, u, c)."""
    logits = [x for name, x in outputs.items() if name.startswith("logits")]
    return sum_of_heads(outputs, inputs) / len(logits)


def sum_of_heads(outputs: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
    """Returns the sum of these cross entropies."""
    from torch.nn import functional

    label = inputs["label"].flatten()
    logits = (x for name, x in outputs.items() if name.startswith("logits"))
    return sum(functional.cross_entropy(x.flatten(0, -2), label) for x in logits)


@dataclasses.dataclass(frozen=True)
class Restated:
    """One of our modules in PyTorch.

    Attributes:
      forward: maps (tensors by name, inputs, settings) to outputs by name: "logits" of the head "fusion",
        "logits_<head>" of others, and what else the loss reads. Inputs are the batch, `label` int64, and video also as
        "vision"; settings are the fields of our module, with heads and causal also as "num_heads" and "attn_mask".
      state: maps our variables, a keyword per collection, to the tensors of `forward`; those that `states.trains`
        excludes are not trained.
      shapes: steps and widths of the streams that it requires.
      loss: maps outputs and inputs to the loss.
    """

    forward: Callable[..., dict[str, Tensor]]
    state: Callable[..., dict[str, np.ndarray]]
    shapes: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    loss: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensor] = mean_of_heads


def tensors(params: Mapping, batch_stats: Mapping | None = None) -> dict[str, np.ndarray]:
    """Converts our variables, nested dictionaries, to PyTorch's layout, named by their dotted path, kernels transposed.

    A kernel (…, i, o) becomes `weight` (o, i, …), one to or from heads (o, i); so does a `scale`. The statistics of a
    batch norm become `running_mean` and `running_var`; others keep their names.
    """
    names = {"kernel": "weight", "scale": "weight"}
    named = {(*path[:-1], names.get(path[-1], path[-1])): _tensor(path, x) for path, x in flatten_dict(params).items()}
    named |= {(*path[:-1], f"running_{path[-1]}"): x for path, x in flatten_dict(batch_stats or {}).items()}
    return {".".join(path): x for path, x in named.items()}


def _tensor(path: tuple[str, ...], x: np.ndarray) -> np.ndarray:
    *_, layer, kind = ("", *path)
    if kind == "bias":
        return x.reshape(-1)
    if kind != "kernel":
        return x
    if layer in _TO_HEADS:
        x = x.reshape(len(x), -1)
    if layer in _FROM_HEADS:
        x = x.reshape(-1, x.shape[-1])
    return np.ascontiguousarray(np.moveaxis(x, (-1, -2), (0, 1)))
