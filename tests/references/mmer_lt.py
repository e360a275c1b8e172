"""MMER's late transformer."""

from collections.abc import Mapping

import numpy as np

from avjax.models.fusions.mmer import MmerLt, TwoStages
from benchmarks.torch import fusions as torch_fusions
from tests.references import mmer_ia
from tests.references.mmer_ia import BRANCHES as IGNORED
from tests.references.mmer_ia import answers, batch, statistics

__all__ = ["IGNORED", "answers", "batch", "convert", "module", "reference", "statistics"]


def module(hyper) -> TwoStages:
    return MmerLt(classes=hyper["num_classes"], heads=hyper["num_heads"], frames=True)


def convert(state: Mapping[str, np.ndarray], hyper) -> dict:
    blocks = {
        name: mmer_ia.cross_block(state, at, hyper) for name, at in (("first_asks", "av."), ("second_asks", "va."))
    }
    return mmer_ia.branches(state) | blocks


def reference(state: Mapping, inputs: Mapping, hyper) -> dict:
    """The published network on torch tensors, in evaluation mode."""
    return torch_fusions.mmer_lt(state, mmer_ia.torch_streams(state, inputs, hyper), hyper)
