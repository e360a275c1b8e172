"""Times one training step of each model as avjax compiles it, against an equivalent module in PyTorch.

A step is the forward pass, the model's own loss, its gradient and Adam's update, in float32, on a batch of made-up
features without padding that lies on the device. Both sides have the same weights and make the same step: without
dropout, and with norms by their running statistics. PyTorch runs eagerly, and on accelerators also under
`torch.compile`, which compiles all but Adam. Models without a PyTorch counterpart have empty columns for it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from avjax import config as configs
from avjax import models
from avjax.errors import AvjaxError
from avjax.models.base import Model
from avjax.models.fusions import registry as fusions
from avjax.settings import EtgAverSettings, FusionSettings
from benchmarks import encoders, record
from benchmarks.encoders import AVJAX, COMPILED, PYTORCH
from benchmarks.torch import baselines as torch_baselines
from benchmarks.torch import fusions as torch_fusions
from benchmarks.torch import sequences as torch_sequences
from benchmarks.torch import states as torch_states
from benchmarks.torch import systems as torch_systems
from benchmarks.torch import towers as torch_towers
from benchmarks.torch.restated import Restated
from benchmarks.ways import Way, no_pytorch, torch_device

KEY = ("benchmark", "model", "size", "streams", "batch", "machine", "cores", "device")
TABLE = {
    "model": "model",
    "size": "size",
    "parameters": "parameters",
    "avjax_seconds_median": "avjax s",
    "pytorch_seconds_median": "PyTorch s",
    "compiled_seconds_median": "compiled s",
    "speed_up_over_pytorch": "× PyTorch",
    "speed_up_over_compiled": "× compiled",
    "avjax_compile_seconds": "compile s",
}
_FILES = (torch_fusions, torch_baselines, torch_towers, torch_sequences, torch_systems)
RESTATED: dict[str, Restated] = {name: restated for file in _FILES for name, restated in file.RESTATED.items()}
# Without the model whose weights are files.
MODELS = tuple(name for name in models.REGISTRY if name != "etg_aver_raw")
CLASSES, BATCH, TURNS = 7, 32, 8
# Steps and width of each stream.
SHAPES = {"text": (20, 300), "audio": (50, 74), "video": (50, 35), "flow": (50, 35)}
_RATE = 1e-4
# Bounds on the difference between ways, relative to the standard deviation: of logits, and of what an update changes in
# them. Adam's first updates are as large where a gradient is rounding error alone.
_TOLERANCE, _UPDATE_TOLERANCE = 1e-3, 1e-2
# Makes a step and returns the logits before its update, by head, once everything is computed.
Step = Callable[[], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Size:
    """A size in which a model is measured.

    Attributes:
      name: of the row.
      settings: those that differ from the model's configuration.
      shapes: steps and width of each stream that differs from SHAPES.
      more: further arrays of its batch: name → shape.
    """

    name: str = "default"
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    more: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)


# Streams of the systems' presets (`avjax.features.presets`): the papers', for clips of CREMA-D, MELD and RAVDESS, and
# `lite`.
_ETG = {"text": (48, 768), "audio": (50, 768), "video": (8, 768)}
_LITE = {"text": (40, 384), "audio": (30, 56), "video": (16, 79)}
_DE_III = {"audio": (125, 1024), "video": (75, 1408), "flow": (75, 1408)}
_EMOASST = {"text": (1, 512), "audio": (150, 768), "video": (24, 512)}
# Models that are measured in other sizes than the default.
SIZES: dict[str, tuple[Size, ...]] = {
    "etg_aver": (Size("paper", {"width": 768, "summary": "first"}, _ETG), Size("lite", {"width": 128}, _LITE)),
    "emoasst": (
        Size("paper", {}, _EMOASST, {"classes": (CLASSES, 512)}),
        Size("small", {"width": 128, "heads": 4, "inner": 256}, _LITE, {"classes": (CLASSES, 384)}),
    ),
    "de_iii": (Size(), Size("paper", {}, _DE_III)),
    "avt_ca": (Size(), Size("mfcc", {}, {"audio": (156, 10), "video": (15, 1024)})),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """The inputs of all ways, arrays on the host; `restated` is None where PyTorch cannot be measured."""

    name: str
    model: Model
    batch: dict[str, np.ndarray]
    variables: dict[str, Any]
    restated: Restated | None


def measure(name: str, repeats: int, say: Callable[[str], None]) -> list[dict[str, object]]:
    """Times training steps of one of MODELS in each way, in turn, after checking that they compute the same.

    Args:
      name: of the model.
      repeats: how often each way is timed.
      say: called with progress messages.

    Returns:
      A row for each of its sizes: model, size, streams with their shapes, batch (clips), parameters (ours), repeats,
      calls (per timing). For each way (avjax; pytorch; compiled = by torch.compile): seconds_min, seconds_median and
      seconds_max of one step, per_second (clips), compile_seconds (first step minus second step); and our two speed-ups
      (ratios of medians). Missing figures are "".

    Raises:
      AvjaxError: the ways do not compute the same.
    """
    return [measure_size(name, size, repeats, say) for size in sizes(name)]


def sizes(name: str) -> tuple[Size, ...]:
    """Returns the sizes in which a model is measured."""
    return SIZES.get(name, (Size(),))


def measure_size(name: str, size: Size, repeats: int, say: Callable[[str], None]) -> dict[str, object]:
    """Returns the row of one size; see `measure`."""
    case, who = make_case(name, size), f"{name} ({size.name})"
    say(f"{who}: compiling")
    with jax.default_matmul_precision("float32"):
        ways = make_ways(case)
        if len(ways) > 1:
            say(f"{who}: {', '.join(w.name for w in ways)} compute the same")
        calls, seconds = encoders.timed_calls(ways, repeats, functools.partial(_tell, say, who))
    facts = {
        "model": name,
        "size": size.name,
        "streams": " ".join(f"{s} {'x'.join(map(str, case.batch[s].shape[-2:]))}" for s in case.model.streams),
        "batch": BATCH,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(case.variables["params"])),
        "repeats": repeats,
        "calls": calls,
    }
    figures = encoders.figures(ways, seconds, BATCH, None, 0.0)
    return facts | {c: v for c, v in figures.items() if not c.endswith(("_times_real_time", "_mfu"))}


def _tell(say: Callable[[str], None], who: str, repeat: str, name: str, seconds: float) -> None:
    say(f"{who}, repeat {repeat}: {name} {seconds:.3g} s")


# ---- The task -----------------------------------------------------------------------------------------------------


def make_case(name: str, size: Size) -> Case:
    """Builds the model of that size, with random weights and a batch."""
    model = models.build(_model_settings(name, size.settings), CLASSES)
    restated = RESTATED.get(name)
    batch = made_up(model, SHAPES | (restated.shapes if restated else {}) | size.shapes, size.more)
    shapes = jax.eval_shape(model.module.init, jax.random.key(0), batch)
    return Case(name, model, batch, random_variables(shapes), None if no_pytorch() else restated)


def _model_settings(name: str, given: Mapping[str, Any]) -> EtgAverSettings | FusionSettings:
    """Returns the settings of a model: the paper's, updated by `given`."""
    if name == "etg_aver":
        return dataclasses.replace(configs.settings("configs/etg_mafw.py").model, **given)
    if name == "emoasst":
        model = configs.settings("configs/emoasst_meld.py").model
        return dataclasses.replace(model, settings={**model.settings, **given})
    own = {**fusions.settings(name), **given}
    return FusionSettings(name, streams=fusions.FUSIONS[name].streams, settings=own)


def made_up(
    model: Model, shapes: Mapping[str, tuple[int, ...]], more: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """Makes noise with labels, no step padded; models of conversations get clips in conversations of `TURNS` turns."""
    rng = np.random.default_rng(0)
    clips = (BATCH // TURNS, TURNS) if model.turns else (BATCH,)
    batch = {s: rng.standard_normal((*clips, *shapes[s]), np.float32) for s in model.streams}
    batch |= {f"{s}_mask": np.ones((*clips, shapes[s][0]), bool) for s in model.streams}
    batch |= {"label": rng.integers(0, CLASSES, clips).astype(np.int32), "weight": np.ones(clips, np.float32)}
    batch |= {key: rng.standard_normal(shape, np.float32) for key, shape in more.items()}
    return batch | ({"turn_mask": np.ones(clips, bool)} if model.turns else {})


def random_variables(shapes: Any) -> Any:
    """Draws weights that keep the signal's scale; no bias is zero and no scale one, so that any mix-up shows."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        scale = math.prod(leaf.shape[:-1]) ** -0.5 if leaf.ndim > 1 else 0.1
        noise = np.float32(scale) * rng.standard_normal(leaf.shape, np.float32)
        return noise + np.float32(path[-1].key in ("scale", "var"))

    return jax.tree_util.tree_map_with_path(draw, shapes)


def check_agreement(who: str, ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> None:
    """Checks that the logits of the first two steps are the same, for the heads that `theirs` has.

    Raises:
      AvjaxError: they are not.
    """
    for head in theirs[0]:
        (a, b), (c, d) = ([np.asarray(output[head]) for output in outputs] for outputs in (ours, theirs))
        _same(f"{who}: the logits of {head!r}", a, c, _TOLERANCE)
        _same(f"{who}: what an update changes in the logits of {head!r}", b - a, d - c, _UPDATE_TOLERANCE)


def _same(what: str, ours: np.ndarray, theirs: np.ndarray, tolerance: float) -> None:
    difference = np.abs(ours - theirs).max() / theirs.std()
    if not difference < tolerance:
        raise AvjaxError(
            f"{what} differ from avjax's by {difference:.2g} of the standard deviation, expected less than "
            f"{tolerance}; they do not compute the same, so their times cannot be compared"
        )


# ---- The ways -----------------------------------------------------------------------------------------------------


def make_ways(case: Case) -> list[Way]:
    """Makes the available ways, ours first, each after two steps that are checked to be ours.

    Raises:
      AvjaxError: as of `check_agreement`.
    """
    ours, outputs = started(AVJAX, our_step(case), compiles=True)
    ways = [ours]
    for name in torch_ways(case):
        way, others = started(name, torch_step(case, compiled=name == COMPILED), compiles=name == COMPILED)
        check_agreement(f"{case.name}: {name}", outputs, others)
        ways.append(way)
    return ways


def torch_ways(case: Case) -> list[str]:
    """Returns the names of the available ways in PyTorch."""
    if case.restated is None:
        return []
    return [PYTORCH] if torch_device() == "cpu" else [PYTORCH, COMPILED]


def started(name: str, step: Step, *, compiles: bool) -> tuple[Way, list[Mapping[str, Any]]]:
    """Makes two steps in a new way; returns it and their logits."""
    outputs: list[Mapping[str, Any]] = []
    way = encoders.started(name, lambda: outputs.append(step()), compiles=compiles)
    return dataclasses.replace(way, run=step), outputs


def our_step(case: Case) -> Step:
    """Makes our step on the case's batch."""
    program, state, given = our_program(case)

    def run():
        nonlocal state
        state, logits = jax.block_until_ready(program(state, *given))
        return logits

    return run


def our_program(case: Case) -> tuple[Callable[..., tuple[Any, Mapping[str, jax.Array]]], Any, tuple]:
    """Returns our jitted step, (state, *given) → (state, logits), which donates the state; a first state; `given`."""
    adam = optax.adam(_RATE)
    given = jax.device_put((case.batch, np.full(CLASSES, 1 / CLASSES, np.float32)))
    fixed = {k: v for k, v in case.variables.items() if k != "params"}

    def mean_loss(params, batch, prior):
        output = case.model.module.apply({"params": params, **fixed}, batch)
        return jnp.mean(sum(case.model.loss(output, batch, prior).values())), output.logits

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, batch, prior):
        params, opt_state = state
        grads, logits = jax.grad(mean_loss, has_aux=True)(params, batch, prior)
        updates, opt_state = adam.update(grads, opt_state)
        return (optax.apply_updates(params, updates), opt_state), logits

    params = jax.device_put(case.variables["params"])
    return step, (params, adam.init(params)), given


def torch_step(case: Case, *, compiled: bool) -> Step:
    """Makes the step of the PyTorch counterpart."""
    import torch

    torch.set_num_threads(record.cores())
    # By default GPUs round the factors of convolutions and LSTMs to fewer bits.
    torch.backends.cudnn.allow_tf32 = False
    to_device = lambda x: torch.tensor(x, device=torch_device())  # noqa: E731
    state = {name: to_device(x) for name, x in case.restated.state(**case.variables).items()}
    trained = [x.requires_grad_() for name, x in state.items() if torch_states.trains(name)]
    inputs = {key: to_device(x) for key, x in case.batch.items()}
    inputs |= {"label": inputs["label"].long()} | ({"vision": inputs["video"]} if "video" in inputs else {})
    settings, adam = _settings(case.model.module), torch.optim.Adam(trained, _RATE)

    def forward():
        outputs = case.restated.forward(state, inputs, settings)
        logits = {_head(name): x for name, x in outputs.items() if name.startswith("logits")}
        return case.restated.loss(outputs, inputs), logits

    forward = torch.compile(forward, dynamic=False) if compiled else forward

    def run():
        adam.zero_grad()
        loss, logits = forward()
        loss.backward()
        adam.step()
        return {head: x.detach().cpu() for head, x in logits.items()}

    return run


def _settings(module: nn.Module) -> dict[str, Any]:
    """Returns all fields of the module, some also by the names in `torch.fusions`."""
    fields = {field.name: getattr(module, field.name) for field in dataclasses.fields(module)}
    released = {"num_heads": "heads", "attn_mask": "causal"}
    return fields | {theirs: fields[ours] for theirs, ours in released.items() if ours in fields}


def _head(output: str) -> str:
    """Returns our head of an output: "fusion" of "logits", <head> of "logits_<head>"."""
    return output.removeprefix("logits").removeprefix("_") or "fusion"
