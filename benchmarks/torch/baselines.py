"""Our baselines of averages, states and gates in plain PyTorch, by the conventions of `layers`.

Each is a function of tensors, inputs (<stream> (b, n, w), of a conversation (b, u, n, w)) and settings, and returns
outputs by name: "logits", "logits_<stream>", and vectors for its loss. A loss takes outputs and inputs.
Shapes: b clip or conversation, u turn, n step, s stream, d width, c class.
"""

import itertools
from collections.abc import Mapping

from avjax.models.fusions.amh import ROUND
from avjax.models.fusions.mfm import PRIOR, REBUILT
from avjax.models.fusions.misa import DIFFERENCE, MOMENT_ORDERS, RECONSTRUCTION, SIMILARITY
from benchmarks.torch import fusions as torch_fusions
from benchmarks.torch import states as torch_states
from benchmarks.torch.fusions import layer_norm, linear
from benchmarks.torch.layers import STREAMS, State, Tensor, lstm, named, post_norm, spans
from benchmarks.torch.restated import Restated, mean_of_heads, sum_of_heads

Inputs = Mapping[str, Tensor]
Outputs = dict[str, Tensor]
_PAIRS = tuple(itertools.combinations(STREAMS, 2))

# ---- Averages -----------------------------------------------------------------------------------------------------


def _averages(state: State, inputs: Inputs) -> Tensor:
    """Returns the projected means (b, s, d)."""
    import torch

    return torch.stack([linear(state, f"project_{s}", inputs[s].mean(1)) for s in STREAMS], 1)


def _headed(state: State, joint: Tensor) -> Outputs:
    return {"logits": linear(state, "head", linear(state, "hidden", joint).relu())}


def _weighed(state: State, vectors: Tensor, weights: Tensor) -> Outputs:
    """Classifies the sum of vectors (b, s, d), weighted by (s) or (b, s)."""
    return _headed(state, (weights[..., None] * vectors).sum(1))


def concat(state: State, inputs: Inputs, settings: Mapping) -> Outputs:
    """Concatenates the averages."""
    return _headed(state, _averages(state, inputs).flatten(1))


def additive(state: State, inputs: Inputs, settings: Mapping) -> Outputs:
    """Weighs the averages by additive attention."""
    vectors = _averages(state, inputs)
    scores = linear(state, "score", linear(state, "attention", vectors).tanh())
    return _weighed(state, vectors, scores[..., 0].softmax(-1))


def weighted_sum(state: State, inputs: Inputs, settings: Mapping) -> Outputs:
    """Weighs the averages by learned scores."""
    return _weighed(state, _averages(state, inputs), state["scores"].softmax(-1))


# ---- States: AMH and bc-LSTM --------------------------------------------------------------------------------------


def amh(state: State, inputs: Inputs, settings: Mapping) -> Outputs:
    """Computes AMH (Yoon et al., ICASSP 2020)."""
    import torch

    encoded = {s: lstm(state, f"{s}_states.forth", x=inputs[s]) for s in STREAMS}
    vectors = {s: last for s, (_, last) in encoded.items()}
    for i, s in zip(range(settings["hops"]), itertools.cycle(ROUND), strict=False):
        query = linear(state, f"hop_{i + 1}", torch.cat([vectors[o] for o in STREAMS if o != s], -1))
        states = encoded[s][0]
        weights = (states @ query[..., None])[..., 0].softmax(-1)  # b n
        vectors[s] = (weights[:, None] @ states)[:, 0]
    return {"logits": linear(state, "head", torch.cat(list(vectors.values()), -1))}


def bc_lstm(state: State, inputs: Inputs, settings: Mapping) -> Outputs:
    """Computes bc-LSTM (Poria et al., ACL 2017); the upper LSTM passes no gradient to the lower ones."""
    import torch

    def context(name, x):
        states, _ = lstm(state, f"{name}.forward", f"{name}.backward", x=x)
        return linear(state, f"{name}.dense", states).tanh()

    contexts = {s: context(f"{s}_context", inputs[s].mean(2)) for s in STREAMS}
    fused = context("context", torch.cat(list(contexts.values()), -1).detach())
    outputs = {f"logits_{s}": linear(state, f"head_{s}", x) for s, x in contexts.items()}
    return {"logits": linear(state, "head_fusion", fused)} | outputs


# ---- A gate: MAG --------------------------------------------------------------------------------------------------


def mag(state: State, inputs: Inputs, settings: Mapping) -> Outputs:
    """Computes MAG (Rahman et al., ACL 2020) on the text's features; tokens cover equal spans of the clip."""
    import torch

    text = inputs["text"]
    moved = 0
    for s in STREAMS[1:]:
        other = spans(inputs[s], text.shape[1])
        gate = linear(state, f"gate.gate_{s}", torch.cat([other, text], -1)).relu()
        moved = moved + gate * linear(state, f"gate.shift_{s}", other)
    share = settings["shift"] * text.norm(dim=-1, keepdim=True) / (moved.norm(dim=-1, keepdim=True) + 1e-6)
    shifted = layer_norm(state, "gate.norm", text + share.clamp(max=1.0) * moved)
    return {"logits": linear(state, "head", shifted.mean(1))}


# ---- Factors: MISA and MFM ----------------------------------------------------------------------------------------


def misa(state: State, inputs: Inputs, settings: Mapping) -> Outputs:
    """Computes MISA (Hazarika et al., ACM MM 2020): logits, and the vectors "<kind>_<stream>" for its loss."""
    import torch

    utterance = {s: _utterance(state, s, inputs[s]) for s in STREAMS}
    private = {s: linear(state, f"private_{s}", x).sigmoid() for s, x in utterance.items()}
    shared = {s: linear(state, "shared", x).sigmoid() for s, x in utterance.items()}
    rebuilt = {s: linear(state, f"rebuild_{s}", private[s] + shared[s]) for s in STREAMS}
    vectors = torch.stack([*private.values(), *shared.values()], 1)  # b 2s d
    joint = post_norm(state, "transformer", settings["heads"], vectors).flatten(1)
    outputs = {"logits": linear(state, "head", linear(state, "fuse", joint).relu())}
    kinds = {"utterance": utterance, "private": private, "shared": shared, "rebuilt": rebuilt}
    return outputs | {f"{kind}_{s}": x for kind, of in kinds.items() for s, x in of.items()}


def _utterance(state: State, stream: str, x: Tensor) -> Tensor:
    """Returns one vector (b, d) of a stream: the mean of text, the last states of two bidirectional LSTMs of others."""
    import torch

    if stream == "text":
        vector = x.mean(1)
    else:
        ways = [[f"{stream}_{layer}.{way}" for way in ("forth", "back")] for layer in ("first", "second")]
        states, first = lstm(state, *ways[0], x=x)
        _, second = lstm(state, *ways[1], x=layer_norm(state, f"{stream}_states_norm", states))
        vector = torch.cat([first, second], -1)
    return layer_norm(state, f"{stream}_norm", linear(state, f"project_{stream}", vector).relu())


def misa_loss(outputs: Outputs, inputs: Inputs) -> Tensor:
    """Adds the weighted similarity, difference and reconstruction losses to the cross entropy."""
    private, shared = ({s: outputs[f"{kind}_{s}"] for s in STREAMS} for kind in ("private", "shared"))
    similarity = sum(_moment_discrepancy(shared[s], shared[o]) for s, o in _PAIRS) / len(_PAIRS)
    difference = sum(_overlap(private[s], shared[s]) for s in STREAMS)
    difference = difference + sum(_overlap(private[s], private[o]) for s, o in _PAIRS)
    rebuilt = sum(_squared(outputs[f"rebuilt_{s}"], outputs[f"utterance_{s}"]) for s in STREAMS) / len(STREAMS)
    weighted = SIMILARITY * similarity + DIFFERENCE * difference + RECONSTRUCTION * rebuilt
    return mean_of_heads(outputs, inputs) + weighted


def _moment_discrepancy(x: Tensor, y: Tensor) -> Tensor:
    """Returns the central moment discrepancy () of vectors (b, d)."""
    means = x.mean(0), y.mean(0)
    x, y = x - means[0], y - means[1]
    differences = [(x**order).mean(0) - (y**order).mean(0) for order in range(2, MOMENT_ORDERS + 1)]
    return sum(difference.norm() for difference in differences) + (means[0] - means[1]).norm()


def _overlap(x: Tensor, y: Tensor) -> Tensor:
    """Returns the overlap () of vectors (b, d), centred and of unit length."""
    x, y = (v - v.mean(0) for v in (x, y))
    x, y = (v / (v.detach().norm(dim=-1, keepdim=True) + 1e-6) for v in (x, y))
    return (x.T @ y).square().mean()


def _squared(x: Tensor, y: Tensor) -> Tensor:
    from torch.nn import functional

    return functional.mse_loss(x, y)


def mfm(state: State, inputs: Inputs, settings: Mapping) -> Outputs:
    """Computes MFM (Tsai et al., ICLR 2019): logits, "latent_…" of label and streams, and "rebuilt_…"."""
    import torch

    memory = {name.removeprefix(_MEMORY): x for name, x in state.items() if name.startswith(_MEMORY)}
    clocked = {s: spans(inputs[s], settings["segment_count"]) for s in STREAMS}
    latents = {"label": torch_fusions.mfn(memory, clocked | {"vision": clocked["video"]}, settings)["logits"]}
    latents |= {s: linear(state, f"{s}_latent", lstm(state, f"{s}_states", x=inputs[s])[1]) for s in STREAMS}
    factors = {name: _perceptron(state, f"{name}_factor", z).relu() for name, z in latents.items()}
    outputs = {"logits": linear(state, "head", linear(state, "fuse", factors["label"]).relu())}
    for s in STREAMS:
        both = torch.cat([factors["label"], factors[s]], -1)
        outputs[f"rebuilt_{s}"] = _perceptron(state, f"rebuild_{s}", both)
    return outputs | {f"latent_{name}": z for name, z in latents.items()}


_MEMORY = "memory_network."


def _perceptron(state: State, name: str, x: Tensor) -> Tensor:
    return linear(state, f"{name}.out", linear(state, f"{name}.hidden", x).relu())


def mfm_state(params: Mapping) -> dict:
    """Converts our parameters, the memory network by its released names."""
    rest = {name: part for name, part in params.items() if name != "memory_network"}
    memory = torch_states.mfn(params["memory_network"])
    return named(rest) | {f"{_MEMORY}{name}": values for name, values in memory.items()}


def mfm_loss(outputs: Outputs, inputs: Inputs) -> Tensor:
    """Adds the reconstruction and prior losses to the cross entropy."""
    rebuilt = sum(REBUILT[s] * _squared(outputs[f"rebuilt_{s}"], inputs[s].mean(1)) for s in STREAMS)
    prior = sum(_normal_discrepancy(outputs[f"latent_{name}"]) for name in ("label", *STREAMS))
    return mean_of_heads(outputs, inputs) + rebuilt + PRIOR * prior


def _normal_discrepancy(z: Tensor) -> Tensor:
    """Returns the discrepancy () of latent variables (b, d) from the standard normal distribution."""
    width = z.shape[-1]
    among = (-(z[:, None] - z).square().sum(-1) / width**2).exp().mean()
    near = (-z.square().sum(-1) / (width**2 + 2)).exp().mean()
    across = (width**2 / (width**2 + 2)) ** (width / 2) * near
    return among - 2 * across + (width**2 / (width**2 + 4)) ** (width / 2)


RESTATED: dict[str, Restated] = {
    "concat": Restated(concat, named),
    "additive": Restated(additive, named),
    "weighted_sum": Restated(weighted_sum, named),
    "amh": Restated(amh, named),
    "bc_lstm": Restated(bc_lstm, named, loss=sum_of_heads),
    "mag": Restated(mag, named),
    "misa": Restated(misa, named, loss=misa_loss),
    "mfm": Restated(mfm, mfm_state, loss=mfm_loss),
}
