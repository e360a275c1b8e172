"""AuxFormer (Goncalves and Busso, ICASSP 2022) as released: its names, and its tensors as parameters of ours."""

from collections.abc import Mapping

import numpy as np

from avjax.models.fusions.auxformer import AuxFormer
from benchmarks.torch import fusions as torch_fusions
from tests.references import layouts
from tests.references.mult import encoder

ENCODERS = {
    "a_mem": "audio_alone",
    "v_mem": "video_alone",
    "trans_a_mem": "audio_memory",
    "trans_v_mem": "video_memory",
    "trans_v_with_a": "video_with_audio",
    "trans_a_with_v": "audio_with_video",
}
IGNORED = {f"{name}.version": "a format number kept as a buffer" for name in ENCODERS}
reference = torch_fusions.auxformer


def convert(state: layouts.State, hyper: Mapping) -> dict:
    params = {ours: encoder(state, theirs, hyper["num_heads"]) for theirs, ours in ENCODERS.items()}
    return params | {
        "project_audio": layouts.dense(state, "conv_1d_a"),
        "fuse": {"hidden_0": layouts.dense(state, "proj1"), "out": layouts.dense(state, "proj2")},
        "auxiliary": {
            name: layouts.dense(state, f"proj_aux{i}") for i, name in enumerate(("hidden_0", "hidden_1", "out"), 1)
        },
        "head_fusion": layouts.dense(state, "out_layer"),
        "head_auxiliary": layouts.dense(state, "out_layer_aux"),
    }


def module(hyper: Mapping) -> AuxFormer:
    return AuxFormer(
        hyper["output_dim"],
        heads=hyper["num_heads"],
        layers=hyper["layers"],
        causal=hyper["attn_mask"],
        as_released=True,
    )


def batch(inputs: Mapping[str, np.ndarray], hyper: Mapping) -> dict[str, np.ndarray]:
    return dict(inputs) | {f"{s}_mask": np.ones(x.shape[:2], bool) for s, x in inputs.items()}


def answers(output) -> dict[str, np.ndarray]:
    logits = output.logits
    return {"logits": logits["fusion"], "logits_audio": logits["audio"], "logits_video": logits["video"]}
