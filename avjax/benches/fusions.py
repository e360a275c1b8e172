"""Fusions: one training step of each as avjax compiles it, against the released system restated in PyTorch.

A step is the answer, the loss, its gradient and Adam's update, on a batch of made-up features without padding that lies
on the device, in float32. Both sides are given the same weights and make the same step: without dropout, and with norms
by their running statistics. PyTorch runs eagerly, and on accelerators by `torch.compile` too, which compiles all but
Adam. Only what was released under a name of ours is restated; the columns of the others are empty.
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

from avjax.benches import encoders, record, torch_fusions, torch_states
from avjax.benches.encoders import AVJAX, COMPILED, PYTORCH
from avjax.benches.ways import Way, no_pytorch, torch_device
from avjax.errors import AvjaxError
from avjax.models.base import Fusion
from avjax.models.fusions import FUSIONS

KEY = ("benchmark", "fusion", "streams", "batch", "machine", "cores", "device")
TABLE = {
    "fusion": "fusion",
    "parameters": "parameters",
    "avjax_seconds_median": "avjax s",
    "pytorch_seconds_median": "PyTorch s",
    "compiled_seconds_median": "compiled s",
    "speed_up_over_pytorch": "× PyTorch",
    "speed_up_over_compiled": "× compiled",
    "avjax_compile_seconds": "compile s",
}
CLASSES, BATCH, TURNS = 7, 32, 8
# Steps and width of each stream.
SHAPES = {"text": (20, 300), "audio": (50, 74), "video": (50, 35), "flow": (50, 35)}
_RATE = 1e-4
# The bounds on the difference of ways, as shares of the standard deviation: of logits, and of what an update changes in
# them. Adam's first updates are as large where a gradient is rounding alone.
_TOLERANCE, _UPDATE_TOLERANCE = 1e-3, 1e-2
# Makes a step and gives the logits that it began with, by head, when all is there.
Step = Callable[[], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Restated:
    """A released system in PyTorch.

    Attributes:
      answers: as of `torch_fusions`; state: our variables as its tensors.
      shapes: steps and widths of the streams that it takes no others of.
    """

    answers: Callable[..., dict[str, Any]]
    state: Callable[..., dict[str, np.ndarray]]
    shapes: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)


RESTATED = {
    "lmf": Restated(torch_fusions.lmf, torch_states.lmf),
    "tfn": Restated(torch_fusions.tfn, torch_states.tfn),
    "mfn": Restated(torch_fusions.mfn, torch_states.mfn, {s: (20, width) for s, (_, width) in SHAPES.items()}),
    "mult": Restated(torch_fusions.mult, torch_states.mult),
    "auxformer": Restated(torch_fusions.auxformer, torch_states.auxformer, {"video": (50, 50)}),
    "uavm": Restated(torch_fusions.uavm, torch_states.uavm, {"audio": (30, 74), "video": (30, 35)}),
    "mmer_ia": Restated(torch_fusions.mmer_ia, torch_states.mmer_ia),
    "mmer_it": Restated(torch_fusions.mmer_it, torch_states.mmer_it),
    "mmer_lt": Restated(torch_fusions.mmer_lt, torch_states.mmer_lt),
    "avtca_released": Restated(torch_fusions.avtca_released, torch_states.avtca_released),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """What all ways are given, arrays on the host; `restated` is None where PyTorch cannot be measured."""

    name: str
    fusion: Fusion
    module: nn.Module
    batch: dict[str, np.ndarray]
    variables: dict[str, Any]
    restated: Restated | None


def measure(name: str, repeats: int, say: Callable[[str], None]) -> dict[str, object]:
    """Times training steps of one of FUSIONS in each way, in turn, after checking that they compute the same.

    Args:
      repeats: how often each way is timed; say: is told about the progress.
    Returns:
      Its row: fusion, streams with their shapes, batch (clips), parameters (ours), repeats, calls (the number timed at
      once). For each way (avjax; pytorch; compiled = by torch.compile): seconds_min, seconds_median and seconds_max of
      one step, per_second (clips), compile_seconds (what a first step takes longer than the next); and two speed-ups of
      ours (ratios of medians). Figures that do not exist are "".
    Raises:
      AvjaxError: the ways do not compute the same.
    """
    case = make_case(name)
    say(f"{name}: compiling")
    with jax.default_matmul_precision("float32"):
        ways = make_ways(case)
        if len(ways) > 1:
            say(f"{name}: {', '.join(w.name for w in ways)} compute the same")
        calls, seconds = encoders.timed_calls(ways, repeats, functools.partial(_tell, say, name))
    facts = {
        "fusion": name,
        "streams": " ".join(f"{s} {'x'.join(map(str, case.batch[s].shape[-2:]))}" for s in case.fusion.streams),
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


def make_case(name: str) -> Case:
    """The fusion with its default settings, random weights and a batch."""
    fusion = FUSIONS[name]
    restated = None if no_pytorch() else RESTATED.get(name)
    module = fusion.module(classes=CLASSES, streams=fusion.streams)
    batch = made_up(fusion, SHAPES | (RESTATED[name].shapes if name in RESTATED else {}))
    shapes = jax.eval_shape(module.init, jax.random.key(0), batch)
    return Case(name, fusion, module, batch, random_variables(shapes), restated)


def made_up(fusion: Fusion, shapes: Mapping[str, tuple[int, int]]) -> dict[str, np.ndarray]:
    """Noise with labels, no step padded; for a fusion of conversations the clips are those of `TURNS` turns each."""
    rng = np.random.default_rng(0)
    clips = (BATCH // TURNS, TURNS) if fusion.turns else (BATCH,)
    batch = {s: rng.standard_normal((*clips, *shapes[s]), np.float32) for s in fusion.streams}
    batch |= {f"{s}_mask": np.ones((*clips, shapes[s][0]), bool) for s in fusion.streams}
    batch |= {"label": rng.integers(0, CLASSES, clips).astype(np.int32), "weight": np.ones(clips, np.float32)}
    return batch | ({"turn_mask": np.ones(clips, bool)} if fusion.turns else {})


def random_variables(shapes: Any) -> Any:
    """Weights that let a signal through, and no bias zero, no factor one: what is mistaken for another shows."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        scale = math.prod(leaf.shape[:-1]) ** -0.5 if leaf.ndim > 1 else 0.1
        noise = np.float32(scale) * rng.standard_normal(leaf.shape, np.float32)
        return noise + np.float32(path[-1].key in ("scale", "var"))

    return jax.tree_util.tree_map_with_path(draw, shapes)


def check_agreement(who: str, ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> None:
    """The logits of the first two steps are the same, as far as theirs have our heads.

    Raises:
      AvjaxError: they are not.
    """
    for head in theirs[0]:
        (a, b), (c, d) = ([np.asarray(answer[head]) for answer in answers] for answers in (ours, theirs))
        _same(f"{who}: the logits of {head!r}", a, c, _TOLERANCE)
        _same(f"{who}: what an update changes in the logits of {head!r}", b - a, d - c, _UPDATE_TOLERANCE)


def _same(what: str, ours: np.ndarray, theirs: np.ndarray, tolerance: float) -> None:
    found = np.abs(ours - theirs).max() / theirs.std()
    if not found < tolerance:
        raise AvjaxError(
            f"{what} differ from avjax's by {found:.2g} of the standard deviation, expected less than {tolerance}; "
            "they do not compute the same, so their times cannot be compared"
        )


# ---- The ways -----------------------------------------------------------------------------------------------------


def make_ways(case: Case) -> list[Way]:
    """The ways that can be measured here, ours first, each two steps old and checked to make ours.

    Raises:
      AvjaxError: as of `check_agreement`.
    """
    ours, answers = started(AVJAX, our_step(case), compiles=True)
    ways = [ours]
    for name in torch_ways(case):
        way, others = started(name, torch_step(case, compiled=name == COMPILED), compiles=name == COMPILED)
        check_agreement(f"{case.name}: {name}", answers, others)
        ways.append(way)
    return ways


def torch_ways(case: Case) -> list[str]:
    if case.restated is None:
        return []
    return [PYTORCH] if torch_device() == "cpu" else [PYTORCH, COMPILED]


def started(name: str, step: Step, *, compiles: bool) -> tuple[Way, list[Mapping[str, Any]]]:
    """A way that has made two steps, and what they gave."""
    answers: list[Mapping[str, Any]] = []
    way = encoders.started(name, lambda: answers.append(step()), compiles=compiles)
    return dataclasses.replace(way, run=step), answers


def our_step(case: Case) -> Step:
    adam = optax.adam(_RATE)
    given = jax.device_put((case.batch, np.full(CLASSES, 1 / CLASSES, np.float32)))
    fixed = {k: v for k, v in case.variables.items() if k != "params"}

    def mean_loss(params, batch, prior):
        output = case.module.apply({"params": params, **fixed}, batch)
        return jnp.mean(sum(case.fusion.loss(output, batch, prior).values())), output.logits

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, batch, prior):
        params, moments = state
        grads, logits = jax.grad(mean_loss, has_aux=True)(params, batch, prior)
        updates, moments = adam.update(grads, moments)
        return (optax.apply_updates(params, updates), moments), logits

    params = jax.device_put(case.variables["params"])
    state = params, adam.init(params)

    def run():
        nonlocal state
        state, logits = jax.block_until_ready(step(state, *given))
        return logits

    return run


def torch_step(case: Case, *, compiled: bool) -> Step:
    """The step of the released system. Its loss is the mean of its heads' cross entropies, as our fusion's is."""
    import torch

    torch.set_num_threads(record.cores())
    # GPUs round the factors of convolutions and LSTMs to fewer bits unless told not to.
    torch.backends.cudnn.allow_tf32 = False
    place = lambda x: torch.tensor(x, device=torch_device())  # noqa: E731
    state = {name: place(x) for name, x in case.restated.state(**case.variables).items()}
    trained = [x.requires_grad_() for name, x in state.items() if torch_states.trains(name)]
    inputs = {s: place(case.batch[s]) for s in case.fusion.streams}
    inputs |= {"vision": inputs["video"]}
    label, hyper = place(case.batch["label"]).long(), _released_settings(case.module)
    adam = torch.optim.Adam(trained, _RATE)

    def forward():
        answers = case.restated.answers(state, inputs, hyper)
        logits = {_head(name): x for name, x in answers.items() if name.startswith("logits")}
        losses = [torch.nn.functional.cross_entropy(x, label) for x in logits.values()]
        return sum(losses) / len(losses), logits

    forward = torch.compile(forward, dynamic=False) if compiled else forward

    def run():
        adam.zero_grad()
        loss, logits = forward()
        loss.backward()
        adam.step()
        return {head: x.detach().cpu() for head, x in logits.items()}

    return run


def _released_settings(module: nn.Module) -> dict[str, Any]:
    """Those of `torch_fusions`, where the fusion has them."""
    named = {"num_heads": "heads", "attn_mask": "causal"}
    return {theirs: getattr(module, ours) for theirs, ours in named.items() if hasattr(module, ours)}


def _head(answer: str) -> str:
    """Our name of a released answer: "logits" is the fusion's, "logits_<stream>" the stream's."""
    return answer.removeprefix("logits").removeprefix("_") or "fusion"
