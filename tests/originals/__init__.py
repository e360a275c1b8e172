"""The PyTorch originals of the encoders: small random and true-size architectures, and what they answer.

One module a family, each with `KINDS`: name → `Original`. `tests/encoders/test_parity.py` runs all of them.
"""

import dataclasses
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Original:
    """How to make one kind of encoder in PyTorch, and how to ask it.

    Attributes:
      draw: a small architecture drawn at random (widths, heads, layers, activation, norm placement, kernels): a
        configuration of transformers.
      build: configuration → the model in PyTorch, for evaluation, on whatever device is the default.
      inputs: (generator, configuration) → a batch whose rows differ in length, and its mask, as our encoder takes them;
        garbage under the mask.
      reference: (model, inputs, mask, layer) → features (b, s, d) and mask (b, s) of the original; layer None =
        last_hidden_state, else hidden_states[layer]. Where the original lets padding change an answer, it is asked row
        by row without padding.
      full: name → (configuration of the true size, number of parameters of what we compute).
      tolerance: the bound on float32 parity at true size, as a share of the output's standard deviation.
    """

    draw: Callable[[random.Random], Any]
    build: Callable[[Any], Any]
    inputs: Callable[[np.random.Generator, Any], tuple[np.ndarray, np.ndarray]]
    reference: Callable[[Any, np.ndarray, np.ndarray, int | None], tuple[np.ndarray, np.ndarray]]
    full: Mapping[str, tuple[Callable[[], Any], int]]
    tolerance: Mapping[str, float] = dataclasses.field(default_factory=dict)


def stirred(model: Any, seed: int) -> Any:
    """Every parameter of a PyTorch model moved off its initial value, so that none can be mistaken for another."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model.eval()
