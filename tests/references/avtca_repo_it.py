"""AVT-CA as released: MMER's intermediate transformer and a self-attention that both streams share."""

from collections.abc import Mapping

import numpy as np

from avjax.benches import torch_fusions
from avjax.models.fusion_frames import AvtCaReleased, TwoStages
from references import mmer_ia, mmer_it
from references.layouts import attention
from references.mmer_ia import BRANCHES as IGNORED
from references.mmer_ia import answers, batch, statistics

__all__ = ["IGNORED", "answers", "batch", "convert", "module", "reference", "statistics"]


def module(hyper) -> TwoStages:
    return AvtCaReleased(classes=hyper["num_classes"], heads=hyper["num_heads"], frames=True)


def convert(state: Mapping[str, np.ndarray], hyper) -> dict:
    final = attention(state, "finalAttention", hyper["num_heads"])
    return mmer_it.convert(state, hyper) | {"final": final}


def reference(state: Mapping, inputs: Mapping, hyper) -> dict:
    """The released network on torch tensors, in evaluation mode."""
    return torch_fusions.avtca_released(state, mmer_ia.torch_streams(state, inputs, hyper), hyper)
