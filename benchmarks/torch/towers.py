"""Our baselines of transformers in plain PyTorch, by the conventions of `baselines`.

Shapes: b clip or conversation, u turn, n step, d width, c class.
"""

import itertools
from collections.abc import Mapping

import numpy as np

from benchmarks.torch.conformer import conformer
from benchmarks.torch.fusions import attention, layer_norm, linear
from benchmarks.torch.layers import STREAMS, State, Tensor, convolution, encoder, named, pre_norm
from benchmarks.torch.restated import Restated, mean_of_heads, sum_of_heads

Inputs = Mapping[str, Tensor]
Outputs = dict[str, Tensor]
_PAIR = ("audio", "video")


# ---- Towers: MMTM and MSAF ----------------------------------------------------------------------------------------


def mmtm(state: State, inputs: Inputs, settings: Mapping) -> Outputs:
    """Computes MMTM (Joze et al., CVPR 2020) between transformers."""
    return _towers(state, inputs, settings, _excited)


def msaf(state: State, inputs: Inputs, settings: Mapping) -> Outputs:
    """Computes MSAF (Su et al. 2020) between transformers, with blocks that divide the width."""
    return _towers(state, inputs, settings, _split_attention)


def _towers(state: State, inputs: Inputs, settings: Mapping, gate) -> Outputs:
    import torch

    steps = {s: linear(state, f"project_{s}", inputs[s]) for s in STREAMS}
    for i in range(settings["layers"]):
        if i:
            steps = gate(state, f"gate_{i}", steps, settings)
        steps = {s: pre_norm(state, f"{s}_{i}", settings["heads"], x) for s, x in steps.items()}
    return {"logits": linear(state, "head", torch.cat([x.mean(1) for x in steps.values()], -1))}


def _excited(state: State, name: str, steps: Outputs, settings: Mapping) -> Outputs:
    import torch

    squeezed = torch.cat([x.mean(1) for x in steps.values()], -1)
    joint = linear(state, f"{name}.squeeze", squeezed).relu()
    excited = {s: 2 * linear(state, f"{name}.excite_{s}", joint).sigmoid() for s in steps}
    return {s: x * excited[s][:, None] for s, x in steps.items()}


def _split_attention(state: State, name: str, steps: Outputs, settings: Mapping) -> Outputs:
    block = settings["block"]
    joint = sum(x.mean(1).unflatten(-1, (-1, block)).sum(1) for x in steps.values())
    joint = linear(state, f"{name}.joint", joint).relu()
    scores = linear(state, f"{name}.attention", joint).unflatten(-1, (-1, block))  # b g block
    weights = scores.softmax(1).chunk(len(steps), 1)
    return {s: x * weight.flatten(1)[:, None] for (s, x), weight in zip(steps.items(), weights, strict=True)}


def msaf_state(params: Mapping) -> dict[str, np.ndarray]:
    """Converts our parameters; the layer of the blocks' weights has blocks outside and their channels inside."""

    def turned(name: str, part: Mapping) -> Mapping:
        if not name.startswith("gate_"):
            return part
        kernel, bias = part["attention"]["kernel"], part["attention"]["bias"]
        flat = np.swapaxes(kernel, 1, 2).reshape(len(kernel), -1)
        return {**part, "attention": {"kernel": flat, "bias": bias.T.reshape(-1)}}

    return named({name: turned(name, part) for name, part in params.items()})


# ---- Conversations: M2FNet ----------------------------------------------------------------------------------------


def m2fnet(state: State, inputs: Inputs, settings: Mapping) -> Outputs:
    """Computes M2FNet (Chudasama et al., CVPRW 2022): logits, and the turns (b, u, d) of each stream by its name."""
    import torch

    alone = {s: _turns(state, s, inputs[s].mean(2), settings) for s in STREAMS}
    main = alone["text"]
    for i, s in itertools.product(range(settings["fusion_layers"]), STREAMS[1:]):
        main = _fused(state, f"fuse_{i}_{s}", settings["heads"], main, alone[s])
    joined = torch.cat([main, *(alone[s] for s in STREAMS[1:])], -1)
    return {"logits": linear(state, "head", linear(state, "join", joined).relu())} | alone


def _turns(state: State, stream: str, x: Tensor, settings: Mapping) -> Tensor:
    projected = x = linear(state, f"project_{stream}", x)
    for i in range(settings["layers"]):
        x = pre_norm(state, f"{stream}_{i}", settings["heads"], x)
    return projected + x


def _fused(state: State, name: str, heads: int, main: Tensor, other: Tensor) -> Tensor:
    """Attends with queries and values of the main stream and keys of the other."""
    import torch
    from torch.nn import functional

    weights, biases = (state[f"{name}.in_proj_{kind}"].chunk(3) for kind in ("weight", "bias"))
    parts = map(functional.linear, (main, other, main), weights, biases)
    attended = linear(state, f"{name}.out", attention(*parts, heads))
    return linear(state, f"{name}.join", torch.cat([attended, main], -1)).relu()


def m2fnet_loss(outputs: Outputs, inputs: Inputs) -> Tensor:
    """Adds the triplet losses of the streams to the cross entropy."""
    triplets = sum(_triplet(outputs[s].flatten(0, 1), inputs["label"].flatten()) for s in STREAMS)
    return mean_of_heads(outputs, inputs) + 0.05 * triplets


def _triplet(x: Tensor, label: Tensor) -> Tensor:
    """Returns the loss () of x (n, d) and label (n,): the farthest of a class against the nearest of another."""
    import torch

    x = x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
    distance = (2 - 2 * x @ x.T).clamp(min=1e-6).sqrt()
    alike, same = label[:, None] == label, torch.eye(len(x), dtype=torch.bool, device=x.device)
    far = distance.masked_fill(~alike | same, 0).amax(-1)
    near = distance.masked_fill(alike, 4).amin(-1)
    p, q = far.detach(), near.detach()
    margin = 2 + 2 / ((4 * p).exp() + 1e-5) + 2 / ((4 - 4 * q).exp() + 1e-5)
    both = (alike & ~same).any(-1) & ~alike.all(-1)
    return ((far - near + margin).relu() * both).mean()


# ---- All streams: T-MEP -------------------------------------------------------------------------------------------


def tmep(state: State, inputs: Inputs, settings: Mapping) -> Outputs:
    """Computes T-MEP (Zhang et al., IEEE TCSVT 2024)."""
    import torch

    steps = {s: encoder(state, s, settings, linear(state, f"project_{s}", inputs[s])) for s in STREAMS}
    for i in range(settings["joint_layers"]):
        others = {s: torch.cat([x for o, x in steps.items() if o != s], 1) for s in STREAMS}
        asked = [pre_norm(state, f"joint_{i}.{s}_asks", settings["heads"], x, others[s]) for s, x in steps.items()]
        joint = pre_norm(state, f"joint_{i}.together", settings["heads"], torch.cat(asked, 1))
        steps = dict(zip(STREAMS, joint.split([x.shape[1] for x in asked], 1), strict=True))
    vectors = [layer_norm(state, "norm", x).mean(1) for x in steps.values()]
    return {"logits": linear(state, "head", torch.stack(vectors).mean(0))}


# ---- Neighbouring steps: CFN-SR and VAVL --------------------------------------------------------------------------


def cfn_sr(state: State, inputs: Inputs, settings: Mapping) -> Outputs:
    """Computes CFN-SR (Fu et al. 2021) on features: audio weighs the steps of video."""
    import torch

    audio, video = (_residual_blocks(state, s, inputs[s], settings) for s in _PAIR)
    causal = torch.ones(audio.shape[1], audio.shape[1], dtype=torch.bool, device=audio.device).tril()
    summary = encoder(state, "memory", settings, audio, causal)[:, -1]
    hidden = linear(state, "audio_tells_video.steps", video) + linear(state, "audio_tells_video.said", summary)[:, None]
    weights = linear(state, "audio_tells_video.score", hidden.tanh()).softmax(1)  # b n 1
    video = video * (1 + weights * video.shape[1])
    return {"logits": linear(state, "head", torch.cat([audio.mean(1), video.mean(1)], -1))}


def _residual_blocks(state: State, stream: str, x: Tensor, settings: Mapping) -> Tensor:
    for block in (f"{stream}_{i}" for i in range(settings["blocks"])):
        hidden = layer_norm(state, f"{block}.first_norm", convolution(state, f"{block}.first", x)).relu()
        hidden = layer_norm(state, f"{block}.second_norm", convolution(state, f"{block}.second", hidden))
        x = linear(state, f"{block}.shortcut", x) if f"{block}.shortcut.weight" in state else x
        x = (x + hidden).relu()
    return x


def vavl(state: State, inputs: Inputs, settings: Mapping) -> Outputs:
    """Computes VAVL (Goncalves et al. 2023) with Transformer-XL's positions: logits, and "rebuilt_<stream>"."""
    import torch

    features = {}
    for s in _PAIR:
        x = linear(state, f"{s}_project", linear(state, f"{s}_bottleneck", inputs[s]))
        own = _conformers(state, s, settings["depth"], settings["heads"], x)
        shared = _conformers(state, "shared", settings["shared_depth"], settings["heads"], own)
        features[s] = layer_norm(state, "norm", shared + own).mean(1)
    joined = torch.cat(list(features.values()), -1).detach()
    outputs = {"logits": _head(state, "head_fusion", joined)}
    outputs |= {f"logits_{s}": _head(state, f"head_{s}", x) for s, x in features.items()}
    return outputs | {f"rebuilt_{s}": _head(state, f"rebuild_{s}", x) for s, x in features.items()}


def _conformers(state: State, name: str, depth: int, heads: int, x: Tensor) -> Tensor:
    for i in range(depth):
        x = conformer(state, f"{name}_{i}", heads, x)
    return x


def _head(state: State, name: str, x: Tensor) -> Tensor:
    # Flax numbers the last layer before the one that it reads.
    hidden = linear(state, f"{name}.Dense_2", linear(state, f"{name}.Dense_0", x).relu())
    return linear(state, f"{name}.Dense_1", hidden)


def vavl_loss(outputs: Outputs, inputs: Inputs) -> Tensor:
    """Adds the reconstruction loss to the cross entropies."""
    from torch.nn import functional

    rebuilt = sum(functional.mse_loss(outputs[f"rebuilt_{s}"], inputs[s].mean(1)) for s in _PAIR)
    return sum_of_heads(outputs, inputs) + 2 * rebuilt


RESTATED: dict[str, Restated] = {
    "mmtm": Restated(mmtm, named),
    "msaf": Restated(msaf, msaf_state),
    "m2fnet": Restated(m2fnet, named, loss=m2fnet_loss),
    "tmep": Restated(tmep, named),
    "cfn_sr": Restated(cfn_sr, named),
    "vavl": Restated(vavl, named, loss=vavl_loss),
}
