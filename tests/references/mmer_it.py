"""MMER's intermediate transformer."""

from collections.abc import Mapping

import numpy as np

from avjax.models.fusions.mmer import MmerIt, TwoStages
from benchmarks.torch import fusions as torch_fusions
from tests.references import mmer_ia
from tests.references.mmer_ia import BRANCHES as IGNORED
from tests.references.mmer_ia import answers, batch, statistics

__all__ = ["IGNORED", "answers", "batch", "convert", "module", "reference", "statistics"]


def module(hyper) -> TwoStages:
    return MmerIt(classes=hyper["num_classes"], heads=hyper["num_heads"], frames=True)


def convert(state: Mapping[str, np.ndarray], hyper) -> dict:
    blocks = {
        name: mmer_ia.cross_block(state, at, hyper) for name, at in (("first_asks", "av1."), ("second_asks", "va1."))
    }
    return mmer_ia.branches(state) | blocks


def reference(state: Mapping, inputs: Mapping, hyper) -> dict:
    """The published network on torch tensors, in evaluation mode."""
    return torch_fusions.mmer_it(state, mmer_ia.torch_streams(state, inputs, hyper), hyper)
