"""AVT-CA as released: MMER's intermediate transformer and a self-attention that both streams share."""

from collections.abc import Mapping

import numpy as np

from avjax.models.fusions.avtca_released import AvtCaReleased
from avjax.models.fusions.mmer import TwoStages
from benchmarks.torch import fusions as torch_fusions
from tests.references import mmer_ia, mmer_it
from tests.references.layouts import attention
from tests.references.mmer_ia import BRANCHES as IGNORED
from tests.references.mmer_ia import answers, batch, statistics

__all__ = ["IGNORED", "answers", "batch", "convert", "module", "reference", "statistics"]


def module(hyper) -> TwoStages:
    return AvtCaReleased(classes=hyper["num_classes"], heads=hyper["num_heads"], frames=True)


def convert(state: Mapping[str, np.ndarray], hyper) -> dict:
    final = attention(state, "finalAttention", hyper["num_heads"])
    return mmer_it.convert(state, hyper) | {"final": final}


def reference(state: Mapping, inputs: Mapping, hyper) -> dict:
    """The released network on torch tensors, in evaluation mode."""
    return torch_fusions.avtca_released(state, mmer_ia.torch_streams(state, inputs, hyper), hyper)
