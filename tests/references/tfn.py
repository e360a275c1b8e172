"""TFN (Zadeh et al., EMNLP 2017) as released: its names, and its tensors as parameters of ours."""

from collections.abc import Mapping

from avjax.models.fusions.tfn import Tfn
from benchmarks.torch import fusions as torch_fusions
from tests.references import layouts
from tests.references.lmf import batch, unimodal

__all__ = ["IGNORED", "answers", "batch", "convert", "module", "reference"]
IGNORED = {
    "output_range": "scales the answer of regression, which classification does not",
    "output_shift": "shifts the answer of regression, which classification does not",
}
reference = torch_fusions.tfn


def convert(state: layouts.State, hyper: Mapping) -> dict:
    names = {"hidden_0": "post_fusion_layer_1", "hidden_1": "post_fusion_layer_2", "head": "post_fusion_layer_3"}
    return {"unimodal": unimodal(state)} | {ours: layouts.dense(state, theirs) for ours, theirs in names.items()}


def module(hyper: Mapping) -> Tfn:
    return Tfn(
        hyper["num_classes"],
        widths=dict(zip(("text", "audio", "video"), hyper["hidden_dims"], strict=True)),
        text_width=hyper["text_out"],
        hidden=hyper["post_fusion_dim"],
        as_released=True,
    )


def answers(output) -> dict:
    features = output.features
    vectors = {f"Feature_{s[0]}": features[s] for s in ("text", "audio", "video")}
    return vectors | {"logits": output.logits["fusion"], "Feature_f": features["product"]}
