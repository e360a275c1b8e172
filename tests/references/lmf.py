"""LMF (Liu et al., ACL 2018) as released: its names, and its tensors as parameters of ours."""

from collections.abc import Mapping

import numpy as np

from avjax.models.fusions.lmf import Lmf
from benchmarks.torch import fusions as torch_fusions
from tests.references import layouts

IGNORED: dict[str, str] = {}
reference = torch_fusions.lmf


def unimodal(state: layouts.State) -> dict:
    """The unimodal parts of LMF and TFN: the batch norms fold into the first dense layers."""
    params = {
        "text_states": layouts.lstm(state, "text_subnet.rnn", "_l0"),
        "text": layouts.dense(state, "text_subnet.linear_1"),
    }
    for stream in ("audio", "video"):
        first, *rest = (layouts.dense(state, f"{stream}_subnet.linear_{i}") for i in (1, 2, 3))
        first = layouts.folded(first, state, f"{stream}_subnet.norm", before=True)
        params |= {f"{stream}_{i}": layer for i, layer in enumerate((first, *rest))}
    return params


def convert(state: layouts.State, hyper: Mapping) -> dict:
    factors = {f"factor_{s}": state[f"{s}_factor"] for s in ("text", "audio", "video")}
    return factors | {
        "unimodal": unimodal(state),
        "weights": state["fusion_weights"],
        "bias": state["fusion_bias"][0],
    }


def module(hyper: Mapping) -> Lmf:
    widths = dict(zip(("text", "audio", "video"), hyper["hidden_dims"], strict=True))
    return Lmf(
        hyper["num_classes"], widths=widths, text_width=widths["text"] // 2, rank=hyper["rank"], as_released=True
    )


def batch(inputs: Mapping[str, np.ndarray], hyper: Mapping) -> dict[str, np.ndarray]:
    streams = {"text": inputs["text"], "audio": inputs["audio"], "video": inputs["vision"]}
    return streams | {f"{s}_mask": np.ones(x.shape[:2], bool) for s, x in streams.items()}


def answers(output) -> dict[str, np.ndarray]:
    logits, features = output.logits["fusion"], output.features
    vectors = {f"Feature_{s[0]}": features[s] for s in ("text", "audio", "video")}
    fused = features["fusion"].reshape(len(logits), -1, logits.shape[-1])
    return vectors | {"logits": logits, "Feature_f": fused}
