"""MMER's intermediate attention, and what its three fusions and the released AVT-CA share: tensors and frames."""

from collections.abc import Mapping

import numpy as np

from avjax.models.base import Output
from avjax.models.fusions.mmer import MmerIa, TwoStages
from benchmarks.torch import fusions as torch_fusions
from tests.references.layouts import dense, norm

BRANCHES = {
    f"{branch}.classifier_1.0.{kind}": "a branch's own classifier; the answer comes from the joined one"
    for branch in ("audio_model", "visual_model")
    for kind in ("weight", "bias")
}
# Of av1.kv.weight and va1.kv.weight only the upper half, the keys, is read.
IGNORED = BRANCHES | {
    f"{block}.proj.{kind}": "the fusion uses the attention's weights, not what it sums"
    for block in ("av1", "va1")
    for kind in ("weight", "bias")
}

REPEATS = (4, 8, 4)


def module(hyper) -> TwoStages:
    return MmerIa(classes=hyper["num_classes"], heads=hyper["num_heads"], frames=True)


def batch(inputs: Mapping[str, np.ndarray], hyper) -> dict[str, np.ndarray]:
    audio, pictures = inputs["audio"].transpose(0, 2, 1), inputs["video_uint8"].transpose(0, 2, 3, 1)
    video = pictures.reshape(len(audio), hyper["seq_length"], *pictures.shape[1:])
    masks = {"audio_mask": np.ones(audio.shape[:2], bool), "video_mask": np.ones(video.shape[:2], bool)}
    return {"audio": audio, "video": video} | masks


def answers(output: Output) -> dict:
    return {"logits": output.logits["fusion"]}


def convert(state: Mapping[str, np.ndarray], hyper) -> dict:
    asks = {
        name: {
            "query": {"kernel": heads(state[f"{block}.q.weight"], hyper)},
            "key": {"kernel": heads(np.split(state[f"{block}.kv.weight"], 2)[0], hyper)},
        }
        for name, block in (("first_asks", "av1"), ("second_asks", "va1"))
    }
    return branches(state) | asks


def statistics(state: Mapping[str, np.ndarray], hyper) -> dict:
    """The collection "batch_stats", for any of the four."""
    steps = {ours: {"norm": _running(state, f"{at}.1.")} for ours, at in _STEPS.items()}
    frames: dict = {}
    for path, (_, at) in _frame_layers().items():
        _put(frames, path, {"norm": _running(state, f"{at}.")})
    return steps | {"frame_network": frames}


def branches(state: Mapping[str, np.ndarray]) -> dict:
    """What all four share: the frame network, the convolutions over time, and the classifier."""
    steps = {ours: {"conv": _conv(state, f"{at}.0."), "norm": norm(state, f"{at}.1")} for ours, at in _STEPS.items()}
    frames: dict = {}
    for path, (conv, at) in _frame_layers().items():
        _put(frames, path, {"conv": _conv(state, f"{conv}."), "norm": norm(state, f"{at}")})
    for ours, at in (("channel_out", "channel_att.gate_c.gate_c_fc_final"), ("place_out", f"{_PLACE}conv_final")):
        _put(frames, ("modulator", ours), _conv(state, f"visual_model.modulator.{at}."))
    return steps | {"frame_network": frames, "head": dense(state, "classifier_1.0")}


def cross_block(state: Mapping[str, np.ndarray], at: str, hyper) -> dict:
    """One cross-attention block."""
    key, value = np.split(state[f"{at}attn.kv.weight"], 2)
    query, out = heads(state[f"{at}attn.q.weight"], hyper), dense(state, f"{at}attn.proj")
    return {
        "query_norm": norm(state, f"{at}norm1_q"),
        "key_norm": norm(state, f"{at}norm1_k"),
        "query": {"kernel": query},
        "key": {"kernel": heads(key, hyper)},
        "value": {"kernel": heads(value, hyper)},
        "out": {"kernel": out["kernel"].reshape(*query.shape[1:], -1), "bias": out["bias"]},
        "norm": norm(state, f"{at}norm2"),
        "up": dense(state, f"{at}mlp.fc1"),
        "down": dense(state, f"{at}mlp.fc2"),
    }


def heads(weight: np.ndarray, hyper) -> np.ndarray:
    """(out, in) → (in, heads, out / heads)."""
    return weight.T.reshape(weight.shape[1], hyper["num_heads"], -1)


_STEPS = {f"audio_{i // 2}_{i % 2}": f"audio_model.conv1d_{i}" for i in range(4)} | {
    f"video_{i // 2}_{i % 2}": f"visual_model.conv1d_{i}" for i in range(4)
}
_PLACE = "spatial_att.gate_s.gate_s_"
_CHANNEL = "channel_att.gate_c.gate_c_"
_QUARTERS = ("top_left", "bottom_left", "top_right", "bottom_right")


def _frame_layers() -> dict[tuple[str, ...], tuple[str, str]]:
    """Path in `EfficientFace` of each convolution with a norm → reference names of the two."""
    names = {("stem",): ("conv1.0", "conv1.1"), ("out",): ("conv5.0", "conv5.1")}
    for i, quarter in enumerate(_QUARTERS, 1):
        for j in (0, 1):
            names["local", f"{quarter}_{j}"] = (f"local.conv{i}_{j + 1}", f"local.bn{i}_{j + 1}")
    for ours, conv, bn in (
        ("channel", f"{_CHANNEL}fc_0", f"{_CHANNEL}bn_1"),
        ("place", f"{_PLACE}conv_reduce0", f"{_PLACE}bn_reduce0"),
        ("place_0", f"{_PLACE}conv_di_0", f"{_PLACE}bn_di_0"),
        ("place_1", f"{_PLACE}conv_di_1", f"{_PLACE}bn_di_1"),
    ):
        names["modulator", ours] = (f"modulator.{conv}", f"modulator.{bn}")
    for stage, repeats in enumerate(REPEATS):
        for unit in range(repeats):
            right = (("point", "branch2", 0), ("depthwise", "branch2", 3), ("out", "branch2", 5))
            left = (("left_depthwise", "branch1", 0), ("left_out", "branch1", 2))
            for ours, branch, i in right if unit else right + left:
                at = f"stage{stage + 2}.{unit}.{branch}."
                names[f"stage_{stage}_{unit}", ours] = (f"{at}{i}", f"{at}{i + 1}")
    return {path: (f"visual_model.{conv}", f"visual_model.{bn}") for path, (conv, bn) in names.items()}


def _put(tree: dict, path: tuple[str, ...], leaf: dict) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf


def _conv(state, at: str) -> dict:
    """(out, in, k...) → (k..., in, out); a linear layer on pooled pictures is a convolution over 1 x 1."""
    weight = state[f"{at}weight"]
    weight = weight[..., None, None] if weight.ndim == 2 else weight
    kernel = {"kernel": np.moveaxis(weight, (0, 1), (-1, -2))}
    return kernel | ({"bias": state[f"{at}bias"]} if f"{at}bias" in state else {})


def _running(state, at: str) -> dict:
    return {"mean": state[f"{at}running_mean"], "var": state[f"{at}running_var"]}


# ---- In PyTorch -----------------------------------------------------------------------------------------------------


def reference(state: Mapping, inputs: Mapping, hyper) -> dict:
    """The published network on torch tensors, in evaluation mode."""
    return torch_fusions.mmer_ia(state, torch_streams(state, inputs, hyper), hyper)


def torch_streams(state: Mapping, inputs: Mapping, hyper) -> dict:
    """MFCCs and the vectors of frames, (b, n, d)."""
    frames = torch_frames(state, inputs["video_uint8"].float() / 255)
    return {"audio": inputs["audio"].mT, "video": frames.unflatten(0, (-1, hyper["seq_length"]))}


def torch_frames(state: Mapping, x):
    """Pictures (n, 3, h, w) → (n, 1024)."""
    import torch
    from torch.nn import functional as F

    def layer(at, x, conv=0, norm=1, relu=True, **how):
        x = _torch_conv(state, f"visual_model.{at}{conv}", f"visual_model.{at}{norm}", x, **how)
        return F.relu(x) if relu else x

    def depthwise(at, x, i, stride):
        return layer(at, x, i, i + 1, False, stride=stride, padding=1, groups=x.shape[1])

    def unit(at, x, stride):
        left, right = (x, x) if stride == 2 else x.chunk(2, 1)
        if stride == 2:
            left = layer(f"{at}branch1.", depthwise(f"{at}branch1.", x, 0, 2), 2, 3)
        right = depthwise(f"{at}branch2.", layer(f"{at}branch2.", right), 3, stride)
        return torch.stack((left, layer(f"{at}branch2.", right, 5, 6)), 2).flatten(1, 2)

    def quarter(i, x):
        for j in (1, 2):
            how = {"stride": 3 - j, "padding": 1, "groups": x.shape[1]}
            x = layer("local.", x, f"conv{i}_{j}", f"bn{i}_{j}", **how)
        return x

    def modulate(x):
        channel = layer(f"modulator.{_CHANNEL}", x.mean((2, 3)), "fc_0", "bn_1")
        final = f"visual_model.modulator.{_CHANNEL}fc_final."
        channel = F.linear(channel, state[f"{final}weight"], state[f"{final}bias"])[..., None, None]
        at = f"modulator.{_PLACE}"
        place = layer(at, x, "conv_reduce0", "bn_reduce0")
        for i in (0, 1):
            place = layer(at, place, f"conv_di_{i}", f"bn_di_{i}", padding=4, dilation=4)
        final = f"visual_model.{at}conv_final."
        return torch.sigmoid(channel * F.conv2d(place, state[f"{final}weight"], state[f"{final}bias"])) * x

    x = F.max_pool2d(layer("conv1.", x, stride=2, padding=1), 3, 2, 1)
    columns = [c.chunk(2, 2) for c in x.chunk(2, 3)]  # left and right, each of top and bottom
    quarters = [quarter(i, part) for i, part in enumerate((p for c in columns for p in c), 1)]
    local = torch.cat([torch.cat(quarters[:2], 2), torch.cat(quarters[2:], 2)], 3)
    for stage, repeats in enumerate(REPEATS):
        for i in range(repeats):
            x = unit(f"stage{stage + 2}.{i}.", x, 1 if i else 2)
        if stage == 0:
            x = modulate(x) + local
    return layer("conv5.", x).mean((2, 3))


def _torch_conv(state, conv: str, norm: str, x, **how):
    """Convolution of pictures or linear layer of vectors, then batch norm by its running statistics."""
    from torch.nn import functional as F

    apply = {2: F.linear, 4: F.conv2d}[x.ndim]
    x = apply(x, state[f"{conv}.weight"], state.get(f"{conv}.bias"), **how)
    return torch_fusions.batch_norm(state, norm, x)
