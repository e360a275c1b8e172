"""ETG-AVER, EmoAsst, DE-III and AVT-CA in plain PyTorch, by the conventions of `layers`.

Shapes: b clip, n step of a stream (q queries, k keys), d width, c class.
"""

import functools
import types
from collections.abc import Mapping

import numpy as np

from avjax.models.emoasst import TEMPERATURE
from benchmarks.torch.conformer import conformer
from benchmarks.torch.fusions import batch_norm, layer_norm, linear
from benchmarks.torch.layers import State, Tensor, attend, joint_projections, named, post_norm
from benchmarks.torch.restated import Restated, sum_of_heads

Inputs = Mapping[str, Tensor]
Outputs = dict[str, Tensor]

# ---- ETG-AVER -----------------------------------------------------------------------------------------------------

_ETG_WEIGHTS = {"fusion": 2.0, "text": 2.0, "audio": 1.0, "video": 1.0}  # Table V


def etg_aver(state: State, inputs: Inputs, settings: Mapping) -> Outputs:
    """Computes `etg_aver.EtgAver` with these tensors as its parameters."""
    import torch

    read = ("classes", "width", "segment_count", "temperature", "summary")
    widths = {s: inputs[s].shape[-1] for s in settings["streams"]}
    module = _etg_module(tuple(widths.items()), *(settings[name] for name in read))
    outputs = torch.func.functional_call(module, dict(state), (inputs,))
    return {f"logits_{head}".removesuffix("_fusion"): x for head, x in outputs.items()}


@functools.cache
def _etg_module(widths: tuple, classes: int, width: int, segment_count: int, temperature: float, summary: str):
    from benchmarks.torch import etg_aver as torch_etg

    config = types.SimpleNamespace(width=width, segment_count=segment_count, temperature=temperature, summary=summary)
    return torch_etg.EtgAver(dict(widths), classes, config)


def etg_state(params: Mapping) -> dict[str, np.ndarray]:
    """Converts our parameters to those of `etg_aver.EtgAver`."""
    from benchmarks.torch import etg_aver as torch_etg

    return {name: x.numpy() for name, x in torch_etg.from_flax(params).items()}


def etg_loss(outputs: Outputs, inputs: Inputs) -> Tensor:
    """Returns the mean of the loss over clips, with the weights of Table V."""
    from benchmarks.torch import etg_aver as torch_etg

    logits = {name.removeprefix("logits").removeprefix("_") or "fusion": x for name, x in outputs.items()}
    return torch_etg.loss(logits, inputs, _ETG_WEIGHTS).mean()


# ---- EmoAsst ------------------------------------------------------------------------------------------------------


def emoasst(state: State, inputs: Inputs, settings: Mapping) -> Outputs:
    """Computes both branches; texts are those of the clips, as in evaluation."""
    heads, text = settings["heads"], _unit(inputs["text"].mean(1))
    frames = _fitting(state, "project_video", inputs["video"])
    alone = post_norm(state, "vfm.frame", heads, frames.flatten(0, 1)[:, None]).view_as(frames)
    query = state["query"] + _fitting(state, "project_text", text)[:, None]
    for i in range(2):
        query = post_norm(state, f"vfm.decoder_{i}", heads, query, alone)
    audio = _fitting(state, "project_audio", inputs["audio"])
    for i in range(3):
        audio = post_norm(state, f"aa.block_{i}", heads, audio)
    branches = {"video": query.mean(1), "audio": audio.mean(1)}
    features = {m: _unit(_fitting(state, f"express_{m}", x)) for m, x in branches.items()}
    classes = _unit(inputs["classes"])
    scores = {f"logits_{m}_zero": x @ classes.T / TEMPERATURE for m, x in features.items()}
    return scores | {"logits_both_zero": sum(scores.values()) / 2, "text": text} | features


def _fitting(state: State, name: str, x: Tensor) -> Tensor:
    """Applies a linear layer where there is one."""
    return linear(state, name, x) if f"{name}.weight" in state else x


def _unit(x: Tensor) -> Tensor:
    from torch.nn import functional

    return functional.normalize(x, dim=-1)


def emoasst_loss(outputs: Outputs, inputs: Inputs) -> Tensor:
    """Returns the sum of both branches' losses."""
    return _clip_loss(outputs["video"], outputs["text"]) + _supcon(outputs["audio"], outputs["text"], inputs["label"])


def _clip_loss(x: Tensor, y: Tensor) -> Tensor:
    """Returns the symmetric contrastive loss of pairs (b, d)."""
    import torch
    from torch.nn.functional import cross_entropy

    scores, own = x @ y.T / TEMPERATURE, torch.arange(len(x), device=x.device)
    return (cross_entropy(scores, own) + cross_entropy(scores.T, own)) / 2


def _supcon(x: Tensor, y: Tensor, label: Tensor) -> Tensor:
    """Computes Khosla et al. 2020, Eq. 2, over the features (b, d) of both modalities."""
    import torch

    z, label = torch.cat([x, y]), torch.cat([label, label])
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    scores = (z @ z.T / TEMPERATURE).masked_fill(itself, -torch.inf)
    positive = (label[:, None] == label) & ~itself
    log_share = scores.log_softmax(-1).masked_fill(~positive, 0)
    return -(log_share.sum(-1) / positive.sum(-1)).mean()


# ---- DE-III -------------------------------------------------------------------------------------------------------


def de_iii(state: State, inputs: Inputs, settings: Mapping) -> Outputs:
    """Computes DE-III on sequences of features."""
    import torch

    encoded = {s: _encoded(state, s, inputs[s], settings) for s in settings["streams"]}
    sequences = {"video": _pae(state, encoded["flow"], encoded["video"]), "audio": encoded["audio"]}
    asking = (("video", "audio"), ("audio", "video"))
    vectors = {s: _ife(state, f"{s}_ife", sequences[s], sequences[o]).max(1).values for s, o in asking}
    vectors["fusion"] = torch.cat(list(vectors.values()), -1)
    hidden = {head: linear(state, f"{head}_hidden", x).relu() for head, x in vectors.items()}
    return {f"logits_{h}".removesuffix("_fusion"): linear(state, f"{h}_head", x) for h, x in hidden.items()}


def _encoded(state: State, stream: str, x: Tensor, settings: Mapping) -> Tensor:
    """Computes Eq. 1 for one stream."""
    x = linear(state, f"{stream}_input", x)
    for i in range(settings["depths"][stream]):
        x = conformer(state, f"{stream}_block_{i}", settings["heads"], x)
    return linear(state, f"{stream}_output", x)


def _pae(state: State, flow: Tensor, video: Tensor) -> Tensor:
    """Computes Eqs. 2–3."""
    import torch

    share = linear(state, "pae.weights", torch.cat([flow, video], -1)).softmax(-1)
    return share[..., :1] * linear(state, "pae.flow", flow) + share[..., 1:] * linear(state, "pae.video", video)


def _ife(state: State, name: str, x: Tensor, other: Tensor) -> Tensor:
    """Computes Eqs. 4–6: attends from x (b, q, d) to other (b, k, d)."""
    query, key, value = joint_projections(state, name, x, other)
    x = x + (_unit(query) @ _unit(key).mT).softmax(-1) @ value
    return linear(state, f"{name}.down", linear(state, f"{name}.up", x).relu())


# ---- AVT-CA -------------------------------------------------------------------------------------------------------


def avt_ca(state: State, inputs: Inputs, settings: Mapping) -> Outputs:
    """Computes AVT-CA as in its paper, on a video feature sequence."""
    heads = settings["heads"]
    audio = _avt_block(state, "audio_block", heads, _pooled(state, inputs["audio"]))
    video = _avt_block(state, "video_block", heads, linear(state, "video", inputs["video"]))
    asked = (
        audio + attend(state, "audio_asks", heads, audio, video),
        video + attend(state, "video_asks", heads, video, audio),
    )
    return {"logits": linear(state, "head", sum(x.max(1).values for x in asked))}


def _pooled(state: State, x: Tensor) -> Tensor:
    """Computes Eqs. 1a–1d: (b, n, w) → (b, ceil(n / 4), d)."""
    from torch.nn import functional

    x = x.mT
    for i in range(2):
        x = functional.conv1d(x, state[f"audio_{i}.conv.weight"], state[f"audio_{i}.conv.bias"], padding=1)
        x = functional.max_pool1d(batch_norm(state, f"audio_{i}.norm", x).relu(), 2, ceil_mode=True)
    return x.mT


def _avt_block(state: State, name: str, heads: int, x: Tensor) -> Tensor:
    """Computes Eqs. 2–6."""
    from torch.nn import functional

    x = layer_norm(state, f"{name}.norm", x + attend(state, f"{name}.attention", heads, x))
    return x + linear(state, f"{name}.down", functional.gelu(linear(state, f"{name}.up", x)))


RESTATED: dict[str, Restated] = {
    "etg_aver": Restated(etg_aver, etg_state, loss=etg_loss),
    "emoasst": Restated(emoasst, named, loss=emoasst_loss),
    "de_iii": Restated(de_iii, named, loss=sum_of_heads),
    "avt_ca": Restated(avt_ca, named),
}
