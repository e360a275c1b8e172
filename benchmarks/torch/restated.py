"""What a restatement in PyTorch says of itself, so that `step` can measure one of our modules against it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

Tensor = Any
# Layers to heads have their axes last in a kernel, those from heads first.
_TO_HEADS, _FROM_HEADS = ("query", "key", "value", "position", "input"), ("out",)


def mean_of_heads(answers: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
    """The mean of the cross entropies of all "logits…" (b, c), or of conversations (b, u, c)."""
    logits = [x for name, x in answers.items() if name.startswith("logits")]
    return sum_of_heads(answers, inputs) / len(logits)


def sum_of_heads(answers: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
    """The sum of what `mean_of_heads` is the mean of."""
    from torch.nn import functional

    label = inputs["label"].flatten()
    logits = (x for name, x in answers.items() if name.startswith("logits"))
    return sum(functional.cross_entropy(x.flatten(0, -2), label) for x in logits)


@dataclasses.dataclass(frozen=True)
class Restated:
    """One of our modules in PyTorch.

    Attributes:
      answers: maps (tensors by their names, inputs, settings) to answers by name: "logits" of the head "fusion",
        "logits_<head>" of others, and what else the loss reads. Inputs are the batch, `label` int64, and video again as
        "vision"; settings are the fields of our module, and heads and causal as "num_heads" and "attn_mask" too.
      state: our variables, a keyword for each collection, as the tensors of `answers`; what `states.trains`
        denies is not trained.
      shapes: steps and widths of the streams that it takes no others of.
      loss: maps answers and inputs to what is minimised.
    """

    answers: Callable[..., dict[str, Tensor]]
    state: Callable[..., dict[str, np.ndarray]]
    shapes: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    loss: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensor] = mean_of_heads


def tensors(params: Mapping, batch_stats: Mapping | None = None) -> dict[str, np.ndarray]:
    """Our variables, nested dictionaries, as PyTorch holds them: by their path with dots between, kernels turned.

    A kernel (…, i, o) becomes `weight` (o, i, …), one to or from heads (o, i); so does a `scale`. The statistics of a
    batch norm become `running_mean` and `running_var`; all else keeps its name.
    """
    names = {"kernel": "weight", "scale": "weight"}
    found = {(*path[:-1], names.get(path[-1], path[-1])): _tensor(path, x) for path, x in flatten_dict(params).items()}
    found |= {(*path[:-1], f"running_{path[-1]}"): x for path, x in flatten_dict(batch_stats or {}).items()}
    return {".".join(path): x for path, x in found.items()}


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
