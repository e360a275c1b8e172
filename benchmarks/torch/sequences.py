"""Baselines on sequences in plain PyTorch, by the conventions of `layers`.

Shapes: b clip, n step of a stream, d width.
"""

from collections.abc import Mapping

from benchmarks.torch.fusions import layer_norm, linear
from benchmarks.torch.layers import State, Tensor, attend, convolution, encoder, lstm, named, waves
from benchmarks.torch.restated import Restated, mean_of_heads

Inputs = Mapping[str, Tensor]
Outputs = dict[str, Tensor]


# ---- Three branches -----------------------------------------------------------------------------------------------


def three_branch(state: State, inputs: Inputs, settings: Mapping) -> Outputs:
    """Computes the model of John and Kawanishi, ICPR 2022."""
    import torch

    first, second = settings["streams"]
    x = {s: linear(state, f"project_{s}", inputs[s]) for s in (first, second)}
    alone = [encoder(state, s, settings, x[s]) for s in x]
    asking = [
        encoder(state, f"{s}_asks_{o}", settings, x[s], source=x[o]) for s, o in ((first, second), (second, first))
    ]
    return {"logits": linear(state, "head", torch.cat([steps.mean(1) for steps in (*alone, *asking)], -1))}


# ---- MMA-DFER -----------------------------------------------------------------------------------------------------


def mma_dfer(state: State, inputs: Inputs, settings: Mapping) -> Outputs:
    """Computes MMA-DFER (Chumachenko, Iosifidis, Gabbouj, CVPR Workshops 2024) on feature sequences."""
    import torch

    x = {s: linear(state, f"project_{s}", inputs[s]) for s in settings["streams"]}
    x = {s: steps + waves(steps) for s, steps in x.items()}
    for i in range(settings["layers"]):
        x = {s: _layer(state, f"{s}_{i}", settings["heads"], steps, eps=1e-6) for s, steps in x.items()}
        x = _bottleneck(state, f"bottleneck_{i}", x)
    x = {s: layer_norm(state, f"norm_{s}", steps, 1e-6) for s, steps in x.items()}
    *others, last = settings["streams"]
    token = state["class_token"].expand(len(x[last]), 1, -1)
    steps = torch.cat([token, x[last]], 1) + sum(x[s].mean(1, keepdim=True) for s in others)
    token = _layer(state, "temporal", settings["heads"], steps[:, :1], steps, approximate="tanh")
    return {"logits": linear(state, "head", token[:, 0])}


def _layer(  # noqa: PLR0913 - the settings of PyTorch's layer
    state: State,
    name: str,
    heads: int,
    x: Tensor,
    source: Tensor | None = None,
    eps: float = 1e-5,
    approximate: str = "none",
) -> Tensor:
    """Applies a layer with GELU and a norm before each branch, the same for its source."""
    from torch.nn import functional

    asking, asked = (
        None if steps is None else layer_norm(state, f"{name}.attention_norm", steps, eps) for steps in (x, source)
    )
    x = x + attend(state, f"{name}.attention", heads, asking, asked)
    hidden = linear(state, f"{name}.up", layer_norm(state, f"{name}.norm", x, eps))
    return x + linear(state, f"{name}.down", functional.gelu(hidden, approximate=approximate))


def _bottleneck(state: State, name: str, steps: Mapping[str, Tensor]) -> dict[str, Tensor]:
    from torch.nn import functional

    narrow = {s: layer_norm(state, f"{name}.norm_{s}", linear(state, f"{name}.down_{s}", x)) for s, x in steps.items()}
    means = {s: x.mean(1, keepdim=True) for s, x in narrow.items()}
    met = {s: x + sum(means[o] for o in steps if o != s) for s, x in narrow.items()}
    wide = {s: functional.gelu(linear(state, f"{name}.up_{s}", x)) for s, x in met.items()}
    return {s: x + state[f"{name}.gate_{s}"].tanh() * wide[s] for s, x in steps.items()}


# ---- C3D and LSTM -------------------------------------------------------------------------------------------------


def c3d_lstm(state: State, inputs: Inputs, settings: Mapping) -> Outputs:
    """Applies convolutions and LSTMs, on a video feature sequence."""
    import torch

    steps = {s: inputs[s] for s in settings["streams"]}
    for i in range(len(settings["widths"])):
        steps["video"] = convolution(state, f"stages.stage_{i}", steps["video"]).relu()
    last = [lstm(state, f"{s}_lstm", x=x)[1] for s, x in steps.items()]
    return {"logits": linear(state, "head", torch.cat(last, -1))}


# ---- LADDER -------------------------------------------------------------------------------------------------------


def ladder(state: State, inputs: Inputs, settings: Mapping) -> Outputs:
    """Computes LADDER (Goncalves and Busso, ICASSP 2023); without noise the decoders rebuild their own input."""
    import torch

    streams = settings["streams"]
    layers = {s: _climbed(state, s, inputs[s].mean(1), len(settings["widths"])) for s in streams}
    errors = []
    for s in streams:
        above = sum(layers[o][-1] for o in streams if o != s) / (len(streams) - 1)
        for i in reversed(range(len(layers[s]))):
            above = _denoised(state, f"{s}_denoise_{i}", layers[s][i], _standard(linear(state, f"{s}_down_{i}", above)))
            errors.append((above - layers[s][i].detach()).square().mean(-1))
    logits = linear(state, "head", torch.cat([layers[s][-1] for s in streams], -1))
    return {"logits": logits, "errors": torch.stack(errors, -1)}


def _climbed(state: State, stream: str, x: Tensor, count: int) -> list[Tensor]:
    """Returns the layers of a stream from its input up, each normalised."""
    layers = [_standard(x)]
    for i in range(count):
        below = layers[-1].relu() if i else layers[-1]
        layers.append(_standard(linear(state, f"{stream}_up_{i}", below)))
    return layers


def _standard(x: Tensor) -> Tensor:
    from torch.nn import functional

    return functional.layer_norm(x, x.shape[-1:])


def _denoised(state: State, name: str, x: Tensor, above: Tensor) -> Tensor:
    def curve(a: Tensor) -> Tensor:
        return a[0] * (a[1] * above + a[2]).sigmoid() + a[3] * above + a[4]

    mean = curve(state[f"{name}.mean"])
    return (x - mean) * curve(state[f"{name}.slope"]) + mean


def ladder_loss(outputs: Outputs, inputs: Inputs) -> Tensor:
    """Adds the reconstruction errors to the cross entropy."""
    return mean_of_heads(outputs, inputs) + outputs["errors"].mean()


RESTATED: dict[str, Restated] = {
    "three_branch": Restated(three_branch, named),
    "mma_dfer": Restated(mma_dfer, named),
    "c3d_lstm": Restated(c3d_lstm, named),
    "ladder": Restated(ladder, named, loss=ladder_loss),
}
