"""Released fusions in plain PyTorch, in evaluation mode: the reference for ours, in numbers and in time.

A system is a function of its tensors by their released names, its inputs (<stream> (b, n, w) without padding; some call
video "vision") and its released settings, of which only "num_heads" and "attn_mask" are read. It returns outputs by
name: "logits", or "logits_<stream>" of a stream's own head, and intermediate vectors.
Shapes: b clip, n step of a stream (q queries, k keys), d width, c class.
"""

import math
from collections.abc import Mapping
from typing import Any

from benchmarks.torch import states as torch_states
from benchmarks.torch.restated import Restated

Tensor = Any
State = Mapping[str, Tensor]


def linear(state: State, name: str, x: Tensor) -> Tensor:
    """Applies a linear layer, or a convolution over single steps."""
    from torch.nn import functional

    return functional.linear(x, state[f"{name}.weight"].flatten(1), state.get(f"{name}.bias"))


def layer_norm(state: State, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    """Applies a layer norm over the last axis."""
    from torch.nn import functional

    return functional.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def batch_norm(state: State, name: str, x: Tensor) -> Tensor:
    """Applies a batch norm by its running statistics; channels are axis 1."""
    from torch.nn import functional

    return functional.batch_norm(x, *(state[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias")))


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int, admitted: Tensor | None = None) -> Tensor:
    """Attends from query (b, q, d) to key (b, k, d) and value (b, k, e) where `admitted` (q, k): (b, q, e)."""
    from torch.nn import functional

    split = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    return functional.scaled_dot_product_attention(*split, attn_mask=admitted).transpose(1, 2).flatten(2)


def recurrent(state: State, name: str, suffix: str = "") -> list[Tensor]:
    """Returns the weights of an LSTM in the order of PyTorch's functions."""
    return [state[f"{name}.{k}{suffix}"] for k in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]


# ---- Products: LMF and TFN ------------------------------------------------------------------------------------------


def unimodal(state: State, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the vectors (b, d) of text, audio and video; audio and video are averaged over their steps."""
    import torch

    weights = recurrent(state, "text_subnet.rnn", "_l0")
    zeros = inputs["text"].new_zeros(1, len(inputs["text"]), weights[1].shape[1])
    _, last, _ = torch.lstm(inputs["text"], (zeros, zeros), weights, True, 1, 0.0, False, False, True)
    vectors = {"text": linear(state, "text_subnet.linear_1", last[0])}
    for stream, given in (("audio", "audio"), ("video", "vision")):
        x = batch_norm(state, f"{stream}_subnet.norm", inputs[given].mean(1))
        for i in (1, 2, 3):
            x = linear(state, f"{stream}_subnet.linear_{i}", x).relu()
        vectors[stream] = x
    return vectors


def with_one(x: Tensor) -> Tensor:
    """Prepends ones: (b, d) → (b, 1 + d)."""
    from torch.nn import functional

    return functional.pad(x, (1, 0), value=1.0)


def lmf(state: State, inputs: Mapping[str, Tensor], hyper: Mapping) -> dict[str, Tensor]:
    """Computes LMF (Liu et al., ACL 2018)."""
    import torch

    vectors = unimodal(state, inputs)
    fused = math.prod(torch.einsum("bi,ric->brc", with_one(x), state[f"{s}_factor"]) for s, x in vectors.items())
    logits = torch.einsum("r,brc->bc", state["fusion_weights"][0], fused) + state["fusion_bias"]
    return {f"Feature_{s[0]}": x for s, x in vectors.items()} | {"Feature_f": fused, "logits": logits}


def tfn(state: State, inputs: Mapping[str, Tensor], hyper: Mapping) -> dict[str, Tensor]:
    """Computes TFN (Zadeh et al., EMNLP 2017)."""
    import torch

    vectors = unimodal(state, inputs)
    text, audio, video = (with_one(x) for x in vectors.values())
    product = torch.einsum("ba,bv,bt->bavt", audio, video, text).flatten(1)
    hidden = product
    for i in (1, 2):
        hidden = linear(state, f"post_fusion_layer_{i}", hidden).relu()
    logits = linear(state, "post_fusion_layer_3", hidden)
    return {f"Feature_{s[0]}": x for s, x in vectors.items()} | {"Feature_f": product, "logits": logits}


# ---- Memory: MFN ----------------------------------------------------------------------------------------------------


def mfn(state: State, inputs: Mapping[str, Tensor], hyper: Mapping) -> dict[str, Tensor]:
    """Computes MFN (Zadeh et al., AAAI 2018) step by step; all streams have equally many."""
    import torch

    def two(x, name):
        return linear(state, f"{name}_fc2", linear(state, f"{name}_fc1", x).relu())

    streams = {"l": inputs["text"], "a": inputs["audio"], "v": inputs["vision"]}
    cells = {s: recurrent(state, f"lstm_{s}") for s in streams}
    zeros = lambda width: inputs["text"].new_zeros(len(inputs["text"]), width)  # noqa: E731
    hidden = {s: zeros(weights[1].shape[1]) for s, weights in cells.items()}
    cell, memory = dict(hidden), zeros(len(state["gamma1_fc2.weight"]))
    for t in range(inputs["text"].shape[1]):
        before = torch.cat(list(cell.values()), 1)
        for s, x in streams.items():
            hidden[s], cell[s] = torch.lstm_cell(x[:, t], (hidden[s], cell[s]), *cells[s])
        both = torch.cat([before, *cell.values()], 1)
        attended = two(both, "att1").softmax(1) * both
        joint = torch.cat([attended, memory], 1)
        retain, update = (two(joint, name).sigmoid() for name in ("gamma1", "gamma2"))
        memory = retain * memory + update * two(attended, "att2").tanh()
    states = torch.cat([*hidden.values(), memory], 1)
    return {"logits": linear(state, "out_fc2", linear(state, "out_fc1", states).relu()), "L": states}


# ---- Crossmodal transformers: MulT and AuxFormer --------------------------------------------------------------------


def embedded(x: Tensor, positioned: bool) -> Tensor:
    """Scales steps (b, n, d) and adds sinusoids of the positions of those whose first channel is not zero."""
    import torch

    width = x.shape[-1]
    if not positioned:
        return math.sqrt(width) * x
    position = (torch.arange(1, x.shape[1] + 1, device=x.device) * (x[..., 0] != 0))[..., None]
    rate = torch.exp(torch.arange(width // 2, device=x.device) * (-math.log(10000) / (width // 2 - 1)))
    waves = torch.cat([(position * rate).sin(), (position * rate).cos()], -1)
    return math.sqrt(width) * x + waves * (position > 0)


def encoder(
    state: State, name: str, hyper: Mapping, x: Tensor, source: Tensor | None = None, positioned: bool = True
) -> Tensor:
    """Attends from steps (b, q, d) to source (b, k, d), or to themselves, in all layers of the state."""
    import torch

    x, source = embedded(x, positioned), None if source is None else embedded(source, positioned)
    q, k = x.shape[1], (x if source is None else source).shape[1]
    admitted = torch.ones(q, k, dtype=torch.bool, device=x.device).tril(abs(k - q)) if hyper["attn_mask"] else None
    i = 0
    while (layer := f"{name}.layers.{i}") + ".fc1.weight" in state:
        keep, add = _residual_weights(state, layer)
        asking = layer_norm(state, f"{layer}.layer_norms.0", x)
        asked = asking if source is None else layer_norm(state, f"{layer}.layer_norms.0", source)
        x = keep * x + add * joint_attention(state, f"{layer}.self_attn", asking, asked, hyper["num_heads"], admitted)
        hidden = linear(state, f"{layer}.fc1", layer_norm(state, f"{layer}.layer_norms.1", x)).relu()
        x = keep * x + add * linear(state, f"{layer}.fc2", hidden)
        i += 1
    return layer_norm(state, f"{name}.layer_norm", x)


def _residual_weights(state: State, layer: str) -> tuple:
    """Returns the factors of a residual and of its branch: 1 and 1, except in AuxFormer's mixed layers."""
    keep = state.get(f"{layer}.alpha")
    return (1, 1) if keep is None else (keep, 1 - keep)


def joint_attention(state: State, name: str, x: Tensor, source: Tensor, heads: int, admitted: Tensor | None) -> Tensor:
    """Applies attention with query, key and value in one matrix."""
    from torch.nn import functional

    weight, bias = (state[f"{name}.in_proj_{k}"].chunk(3) for k in ("weight", "bias"))
    parts = (functional.linear(v, w, b) for v, w, b in zip((x, source, source), weight, bias, strict=True))
    return linear(state, f"{name}.out_proj", attention(*parts, heads, admitted))


def residual(state: State, x: Tensor, *names: str) -> Tensor:
    """Adds a vector and the output of a perceptron with ReLU between its layers."""
    *hidden, out = names
    y = x
    for name in hidden:
        y = linear(state, name, y).relu()
    return x + linear(state, out, y)


def mult(state: State, inputs: Mapping[str, Tensor], hyper: Mapping) -> dict[str, Tensor]:
    """Computes MulT (Tsai et al., ACL 2019)."""
    import torch

    raw = {"l": inputs["text"], "a": inputs["audio"], "v": inputs["vision"]}
    x = {s: linear(state, f"proj_{s}", v) for s, v in raw.items()}
    last = []
    for s in x:
        asked = [encoder(state, f"trans_{s}_with_{o}", hyper, x[s], x[o]) for o in x if o != s]
        last.append(encoder(state, f"trans_{s}_mem", hyper, torch.cat(asked, -1))[:, -1])
    hidden = torch.cat(last, -1)
    return {"logits": linear(state, "out_layer", residual(state, hidden, "proj1", "proj2")), "hidden": hidden}


def auxformer(state: State, inputs: Mapping[str, Tensor], hyper: Mapping) -> dict[str, Tensor]:
    """Computes AuxFormer (Goncalves and Busso, ICASSP 2022); video has the width of the system."""
    import torch

    def met(own, cross, x, source):
        x = encoder(state, cross, hyper, x, source)
        return encoder(state, own, hyper, x, positioned=False)[:, -1]

    audio, video = linear(state, "conv_1d_a", inputs["audio"]), inputs["video"]
    seen = met("trans_v_mem", "trans_v_with_a", video, audio)
    joint = torch.cat([met("trans_a_mem", "trans_a_with_v", audio, video), seen], -1)
    out = {"logits": linear(state, "out_layer", residual(state, joint, "proj1", "proj2"))}
    for stream, name, x in (("audio", "a_mem", audio), ("video", "v_mem", video)):
        for _ in range(3):
            x = encoder(state, name, hyper, x, positioned=False)
        hidden = residual(state, x[:, -1], "proj_aux1", "proj_aux2", "proj_aux3")
        out[f"logits_{stream}"] = linear(state, "out_layer_aux", hidden)
    return out


# ---- A shared transformer: UAVM -------------------------------------------------------------------------------------


def uavm(state: State, inputs: Mapping[str, Tensor], hyper: Mapping) -> dict[str, Tensor]:
    """Computes UAVM (Gong et al., IEEE Signal Processing Letters 2022); streams have as many steps as positions."""
    outputs = {}
    for stream, own in (("audio", "a_trans"), ("video", "v_trans")):
        x = inputs[stream]
        for stack in (own, "s_trans"):
            x = _positioned(state, stack, x, hyper["num_heads"])
        outputs[f"logits_{stream}"] = linear(
            state, "s_trans.mlp_head.1", layer_norm(state, "s_trans.mlp_head.0", x.mean(1), 1e-6)
        )
    return outputs


def _positioned(state: State, stack: str, x: Tensor, heads: int) -> Tensor:
    """Applies a norm, a projection where the width differs, positions, and the layers."""
    from torch.nn import functional

    positions = state[f"buffer/{stack}.pos_embed"]
    x = layer_norm(state, f"{stack}.in_layernorm", x, 1e-6)
    if x.shape[-1] != positions.shape[-1]:
        x = linear(state, f"{stack}.in_proj", x)
    x, i = x + positions, 0
    while (block := f"{stack}.blocks.{i}") + ".norm1.weight" in state:
        parts = linear(state, f"{block}.attn.qkv", layer_norm(state, f"{block}.norm1", x)).chunk(3, -1)
        x = x + linear(state, f"{block}.attn.proj", attention(*parts, heads))
        hidden = functional.gelu(linear(state, f"{block}.mlp.fc1", layer_norm(state, f"{block}.norm2", x)))
        x = x + linear(state, f"{block}.mlp.fc2", hidden)
        i += 1
    return x


# ---- Two convolutional stages: MMER and the released AVT-CA ---------------------------------------------------------


def mmer_ia(state: State, inputs: Mapping[str, Tensor], hyper: Mapping) -> dict[str, Tensor]:
    """Computes intermediate attention (Chumachenko et al., ICPR 2022) on vectors of frames."""
    import torch

    audio, video = _stage(state, 0, inputs["audio"], inputs["video"])
    gates = {}
    for block, x, other in (("av1", audio, video), ("va1", video, audio)):
        query = (x @ state[f"{block}.q.weight"].T).unflatten(-1, (hyper["num_heads"], -1))
        key = (other @ state[f"{block}.kv.weight"].chunk(2)[0].T).unflatten(-1, (hyper["num_heads"], -1))
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
        gates[block] = scores.softmax(-1).mean(1).sum(1)[..., None]  # b k 1
    return _classified(state, *_stage(state, 1, audio * gates["va1"], video * gates["av1"]))


def mmer_it(state: State, inputs: Mapping[str, Tensor], hyper: Mapping) -> dict[str, Tensor]:
    """Computes the intermediate transformer (the same paper)."""
    return _classified(state, *_met_between(state, inputs, hyper))


def mmer_lt(state: State, inputs: Mapping[str, Tensor], hyper: Mapping) -> dict[str, Tensor]:
    """Computes the late transformer (the same paper)."""
    audio, video = _stage(state, 1, *_stage(state, 0, inputs["audio"], inputs["video"]))
    asking = _cross_attention(state, "av", audio, video, hyper), _cross_attention(state, "va", video, audio, hyper)
    return _classified(state, *asking)


def avtca_released(state: State, inputs: Mapping[str, Tensor], hyper: Mapping) -> dict[str, Tensor]:
    """Computes AVT-CA's released code: the intermediate transformer, and a self-attention that both streams share."""
    streams = _met_between(state, inputs, hyper)
    heads = hyper["num_heads"]
    return _classified(state, *(joint_attention(state, "finalAttention", x, x, heads, None) for x in streams))


def _met_between(state: State, inputs: Mapping[str, Tensor], hyper: Mapping) -> tuple[Tensor, Tensor]:
    audio, video = _stage(state, 0, inputs["audio"], inputs["video"])
    heard, seen = (
        _cross_attention(state, "av1", audio, video, hyper),
        _cross_attention(state, "va1", video, audio, hyper),
    )
    return _stage(state, 1, audio + heard, video + seen)


def _stage(state: State, stage: int, audio: Tensor, video: Tensor) -> tuple[Tensor, Tensor]:
    """Applies two convolutions over time to each stream (b, n, d), in audio each with a maximum over two steps."""
    from torch.nn import functional

    def convolve(name, x, padding):
        x = functional.conv1d(x, state[f"{name}.0.weight"], state.get(f"{name}.0.bias"), padding=padding)
        return batch_norm(state, f"{name}.1", x).relu()

    audio, video = audio.mT, video.mT
    for i in (2 * stage, 2 * stage + 1):
        audio = functional.max_pool1d(convolve(f"audio_model.conv1d_{i}", audio, 0), 2, 1)
        video = convolve(f"visual_model.conv1d_{i}", video, 1)
    return audio.mT, video.mT


def _cross_attention(state: State, name: str, x: Tensor, other: Tensor, hyper: Mapping) -> Tensor:
    """Attends from x (b, q, d) to other (b, k, e): (b, q, d)."""
    from torch.nn import functional

    parts = linear(state, f"{name}.attn.kv", layer_norm(state, f"{name}.norm1_k", other)).chunk(2, -1)
    query = linear(state, f"{name}.attn.q", layer_norm(state, f"{name}.norm1_q", x))
    x = linear(state, f"{name}.attn.proj", attention(query, *parts, hyper["num_heads"]))
    hidden = functional.gelu(linear(state, f"{name}.mlp.fc1", layer_norm(state, f"{name}.norm2", x)))
    return x + linear(state, f"{name}.mlp.fc2", hidden)


def _classified(state: State, audio: Tensor, video: Tensor) -> dict[str, Tensor]:
    """Classifies the joined means over time of (b, n, d)."""
    import torch

    return {"logits": linear(state, "classifier_1.0", torch.cat((audio.mean(1), video.mean(1)), -1))}


# Equal steps in all streams; video as wide as the system, which does not project it; as many steps as positions.
_EQUAL = {"text": (20, 300), "audio": (20, 74), "video": (20, 35)}
_AS_WIDE = {"video": (50, 50)}
_POSITIONS = {"audio": (30, 74), "video": (30, 35)}
RESTATED: dict[str, Restated] = {
    "lmf": Restated(lmf, torch_states.lmf),
    "tfn": Restated(tfn, torch_states.tfn),
    "mfn": Restated(mfn, torch_states.mfn, _EQUAL),
    "mult": Restated(mult, torch_states.mult),
    "auxformer": Restated(auxformer, torch_states.auxformer, _AS_WIDE),
    "uavm": Restated(uavm, torch_states.uavm, _POSITIONS),
    "mmer_ia": Restated(mmer_ia, torch_states.mmer_ia),
    "mmer_it": Restated(mmer_it, torch_states.mmer_it),
    "mmer_lt": Restated(mmer_lt, torch_states.mmer_lt),
    "avtca_released": Restated(avtca_released, torch_states.avtca_released),
}
