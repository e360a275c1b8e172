"""Times a protocol of 5 folds x 5 seeds as one program, as 25 compiled runs in turn, and as 25 runs of eager PyTorch.

The task is ETG-AVER (`configs/etg_mafw.py`) on made-up features with the classes of MAFW, in the shapes of the preset
`lite`, or 768 wide in those of the paper's encoders. Each way makes the same number of updates with the same batch size
in float32, validates after every epoch, keeps the best epoch and predicts the test clips. Each starts with features on
the device and ends with logits on the host; no files are written.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from avjax import config as configs
from avjax import models
from avjax.datasets.base import Clip
from avjax.datasets.folds import natural_folds
from avjax.errors import AvjaxError
from avjax.features.store import Features
from avjax.models.base import Model
from avjax.training import batches, history, loop
from avjax.training import lanes as lane_plans
from avjax.training.dry_run import compile_step
from avjax.training.sharding import ALONE as SINGLE_DEVICE
from benchmarks import encoders, record
from benchmarks.ways import Way, interleaved, no_pytorch, torch_device

LANES, ALONE, PYTORCH = "lanes", "one after another", "pytorch"
CONFIG = "configs/etg_mafw.py"
SEEDS = (1, 2, 3, 4, 5)
KEY = ("benchmark", "what", "width", "lanes", "clips", "epochs", "batch", "machine", "cores", "device")
TABLE = {
    "width": "width",
    "what": "what",
    "seconds_min": "min s",
    "seconds_median": "median s",
    "seconds_max": "max s",
    "compile_seconds": "compile s",
    "speed_up_over_one_after_another": "× alone",
    "speed_up_over_pytorch": "× PyTorch",
    "gflop_per_update": "GFLOP an update",
    "gflops": "GFLOP/s",
    "matrix_product_gflops": "matrix product",
}
# Fewest and most steps, width. `lite`: video at 16 frames, audio at 10 Hz, the sentence's tokens.
LITE = {"video": (12, 16, 79), "audio": (20, 30, 56), "text_both": (30, 45, 384)}
ENCODED = {"video": (8, 8, 768), "audio": (30, 50, 768), "text_both": (30, 48, 768)}
_CLASSES = 11
# Epochs after which the ways are compared: later, rounding errors exceed the tolerance.
_COMPARED = 2
# Lanes and single runs add in different orders: the bound on their difference, relative to the parameters' norm and to
# the predictions' standard deviation.
_TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Case:
    """The inputs of all ways: configuration, model, clips on the device and the lanes to train."""

    config: Any
    model: Model
    features: Features
    data: batches.Resident
    plan: lane_plans.LanePlan


@dataclasses.dataclass(frozen=True)
class Ended:
    """The result of a compiled run: the state of its lanes and their test logits, (lanes, n, c) on the host."""

    state: loop.State
    logits: np.ndarray


def measure(
    width: int, clips: int, epochs: int, batch: int, repeats: int, say: Callable[[str], None]
) -> list[dict[str, object]]:
    """Times the three ways in turn, `repeats` times, after checking that they compute the same.

    Args:
      width: of the model.
      clips: of the made-up corpus.
      epochs: of each run.
      batch: clips per update.
      repeats: how often each way is timed.
      say: called with progress messages.

    Returns:
      One row per way: what, width, lanes, clips, epochs, batch, steps (updates, all lanes together), parameters (of one
      lane), repeats, seconds_min, seconds_median, seconds_max, compile_seconds, two speed-ups (ratios of medians),
      gflop_per_update (ours as XLA counts it; PyTorch's: matrix products alone), gflops (per second), and those of a
      plain matrix product, for comparison. Missing figures are "".

    Raises:
      AvjaxError: the ways do not compute the same.
    """
    case = make_case(width, clips, epochs, batch)
    count = len(case.plan.names)
    names = check_ways(make_case(width, clips, min(epochs, _COMPARED), batch))
    say(f"width {width}: {', '.join(names)} compute the same; {count} lanes, {clips} clips, {epochs} epochs; compiling")
    ways = [MAKE[name](case) for name in names]
    ours = our_gflop(case)
    work = {LANES: ours, ALONE: ours} | ({PYTORCH: torch_gflop(case)} if PYTORCH in names else {})
    seconds = interleaved(ways, repeats, functools.partial(_tell, say, width))
    steps = updates(case)
    facts = {
        "width": width,
        "lanes": count,
        "clips": clips,
        "epochs": epochs,
        "batch": batch,
        "steps": steps,
        "parameters": parameters(case),
        "repeats": repeats,
    }
    peak = {"matrix_product_gflops": encoders.peak("float32").flops / 1e9}
    return [facts | row | _work(row, work, steps) | peak for row in timing_rows(ways, seconds)]


def check_ways(case: Case) -> list[str]:
    """Returns the available ways, after checking that they compute the same.

    Raises:
      AvjaxError: they do not.
    """
    together, alone = (MAKE[name](case).run() for name in (LANES, ALONE))
    check_agreement(together, alone)
    if no_pytorch():
        return [LANES, ALONE]
    check_pytorch(case, together[0])
    return [LANES, ALONE, PYTORCH]


def _work(row: Mapping[str, Any], work: Mapping[str, float], steps: int) -> dict[str, float | str]:
    one = work.get(row["what"], "")
    return {"gflop_per_update": one, "gflops": one * steps / row["seconds_median"] if one else ""}


def updates(case: Case) -> int:
    """Returns the number of updates, all lanes together."""
    sizes = np.asarray(case.plan.lanes.train_weight).sum(-1)
    return int(np.ceil(sizes / case.config.train.batch_size).sum()) * case.config.train.epochs


def parameters(case: Case) -> int:
    """Returns the number of parameters of a lane."""
    state = jax.eval_shape(loop.make(case.model, case.config).init, case.plan.lanes, case.data)
    return sum(v.size for v in jax.tree.leaves(state.params)) // len(case.plan.names)


def our_gflop(case: Case) -> float:
    """Returns the work of one lane's update, as XLA counts it in the step of all lanes."""
    return compile_step(case.model, case.config, SINGLE_DEVICE, case.plan, case.data).flops / len(case.plan.names) / 1e9


def torch_gflop(case: Case) -> float:
    """Returns the work of an update in PyTorch, matrix products alone, forward and backward."""
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks.torch import etg_aver as torch_etg

    streams, run = torch_etg.streams(case.data, torch_device()), torch_etg.runs(case.plan, torch_device())[0]
    model = torch_etg.new_model(streams, _CLASSES, run.seed, case.config.model)
    batch = torch_etg.take(torch_etg.standardised(streams, run.train), run.train[: case.config.train.batch_size])
    with FlopCounterMode(display=False) as counter:
        torch_etg.loss(model(batch), batch, torch_etg.head_weights(case.config.model)).mean().backward()
    return counter.get_total_flops() / 1e9


def _tell(say: Callable[[str], None], width: int, repeat: str, name: str, seconds: float) -> None:
    say(f"width {width}, repeat {repeat}: {name} {seconds:.2f} s")


# ---- The task -----------------------------------------------------------------------------------------------------


def make_case(width: int, clips: int, epochs: int, batch: int) -> Case:
    """Builds a case without early stopping, so that every lane makes all its updates; the epochs are one call."""
    config = configs.settings(
        CONFIG,
        model__width=width,
        train__batch_size=batch,
        train__seeds=SEEDS,
        train__epochs=epochs,
        train__epochs_per_call=epochs,
        train__patience=0,
    )
    features = made_up(clips, ENCODED if width == ENCODED["video"][-1] else LITE)
    folds, _ = natural_folds(features.clips, (), config.protocol.folds, config.protocol.fold_count)
    return Case(
        config=config,
        model=models.build(config.model, _CLASSES),
        features=features,
        data=batches.resident(features, config.model.text_source, config.protocol.standardise),
        plan=lane_plans.plan(features, folds, SEEDS, config.protocol),
    )


def made_up(clips: int, shapes: Mapping[str, tuple[int, int, int]], seed: int = 0) -> Features:
    """Makes noise of varying lengths with a hint of the class in each stream."""
    rng = np.random.default_rng(seed)
    label = rng.permutation(np.arange(clips) % _CLASSES).astype(np.int32)
    classes = tuple(f"class{c}" for c in range(_CLASSES))
    ids = [f"clip{i:05d}" for i in range(clips)]
    arrays, masks = {}, {}
    for name, (fewest, most, width) in shapes.items():
        masks[name] = np.arange(most) < rng.integers(fewest, most + 1, (clips, 1))
        hint = 0.3 * rng.normal(size=(_CLASSES, 1, width))
        noise = rng.normal(size=(clips, most, width))
        arrays[name] = np.where(masks[name][..., None], noise + hint[label], 0).astype(np.float32)
    return Features(
        dataset="made up",
        classes=classes,
        folds=(),
        content=f"made up, seed {seed}",
        ids=ids,
        clips=[Clip(id=i, path=Path(i), label=classes[y]) for i, y in zip(ids, label, strict=True)],
        label=label,
        speakers=[""] * clips,
        arrays=arrays,
        masks=masks,
        sentences={},
        counts={"used": clips, "quarantined": 0, "masked_audio": 0, "masked_video": 0},
        made_by={},
    )


# ---- Compiled -----------------------------------------------------------------------------------------------------


def lanes_way(case: Case) -> Way:
    """Makes the way of all lanes as one program, as `avjax.train` runs them."""
    trainer, seconds = compiled(case, case.plan)
    return Way(LANES, lambda: [protocol(case, trainer, case.plan)], seconds)


def alone_way(case: Case) -> Way:
    """Makes the way of one lane at a time: a program for one lane, compiled once and run for each."""
    lanes = [jax.tree.map(lambda v, i=i: v[i : i + 1], case.plan.lanes) for i in range(len(case.plan.names))]
    plans = [case.plan.replace(lanes=v, names=[n]) for v, n in zip(lanes, case.plan.names, strict=True)]
    trainer, seconds = compiled(case, plans[0])
    return Way(ALONE, lambda: [protocol(case, trainer, plan) for plan in plans], seconds)


def compiled(case: Case, plan: lane_plans.LanePlan) -> tuple[loop.Trainer, float]:
    """Returns the trainer for lanes of these shapes, and the seconds to trace and compile it."""
    trainer = loop.make(case.model, case.config)
    arguments = plan.lanes, case.data
    start = time.perf_counter()
    state = jax.eval_shape(trainer.init, *arguments)
    # By default JAX rounds the factors of products on GPUs to fewer bits; PyTorch does not.
    with jax.default_matmul_precision("float32"):
        trainer = loop.Trainer(
            init=trainer.init.lower(*arguments).compile(),
            epochs=trainer.epochs.lower(state, *arguments, jnp.int32(1)).compile(),
            predict=trainer.predict.lower(state, *arguments).compile(),
        )
    return trainer, time.perf_counter() - start


def protocol(case: Case, trainer: loop.Trainer, plan: lane_plans.LanePlan) -> Ended:
    """Trains the lanes of a plan and predicts their test clips."""
    state = trainer.init(plan.lanes, case.data)
    state, sums = trainer.epochs(state, plan.lanes, case.data, jnp.int32(1))
    history.check_finite(sums, plan, case.features.ids, 1, case.config.train.batch_size)
    history.epoch_rows(sums, plan.names, 1, case.model)
    logits = trainer.predict(state, plan.lanes, case.data)[case.model.heads[0]]
    return Ended(state, jax.device_get(logits))


def check_agreement(together: Sequence[Ended], alone: Sequence[Ended]) -> None:
    """Checks that lanes and single runs end in the same parameters and predictions, after as many updates.

    Raises:
      AvjaxError: they do not.
    """
    (joint,) = together
    steps = [joint.state.step.tolist(), [int(s) for e in alone for s in e.state.step]]
    if steps[0] != steps[1]:
        raise AvjaxError(f"lanes made {steps[0]} updates, single runs {steps[1]}; the comparison would not be fair")
    ours, others = _parameters(together), _parameters(alone)
    # The norm: Adam blows up single gradients that are zero but for rounding, such as the key's bias.
    _same("lanes and single runs: parameters", np.linalg.norm(ours - others) / np.linalg.norm(ours))
    _same_predictions("lanes and single runs", joint.logits, np.concatenate([e.logits for e in alone]))


def _parameters(ended: Sequence[Ended]) -> np.ndarray:
    """Returns the parameters (lanes, parameters) on the host."""
    leaves = zip(*(jax.tree.leaves(jax.device_get(e.state.params)) for e in ended), strict=True)
    return np.concatenate([np.concatenate(v).reshape(sum(map(len, v)), -1) for v in leaves], -1)


def _same_predictions(who: str, ours: np.ndarray, others: np.ndarray) -> None:
    _same(f"{who}: predictions", np.abs(ours - others).max() / ours.std())


def _same(what: str, difference: float) -> None:
    if not difference < _TOLERANCE:
        raise AvjaxError(
            f"{what} differ by {difference:.1e} of their size, expected less than {_TOLERANCE:.0e}; "
            "they do not compute the same, so their times cannot be compared"
        )


# ---- PyTorch ------------------------------------------------------------------------------------------------------


def pytorch_way(case: Case) -> Way:
    """Makes the way of plain eager runs, one per lane, on all cores or the GPU, after an untimed one."""
    import torch

    from benchmarks.torch import etg_aver as torch_etg

    torch.set_num_threads(record.cores())
    streams = torch_etg.streams(case.data, torch_device())
    runs = torch_etg.runs(case.plan, torch_device())

    def one(run: torch_etg.Run) -> torch_etg.Trained:
        model = torch_etg.new_model(streams, _CLASSES, run.seed, case.config.model)
        return torch_etg.fit(model, streams, run, case.config)

    one(runs[0])
    return Way(PYTORCH, lambda: [one(run) for run in runs], None)


def check_pytorch(case: Case, together: Ended) -> None:
    """Checks that the first lane's parameters give the same test predictions in the PyTorch module.

    Raises:
      AvjaxError: they do not.
    """
    from benchmarks.torch import etg_aver as torch_etg

    streams, run = torch_etg.streams(case.data, torch_device()), torch_etg.runs(case.plan, torch_device())[0]
    model = torch_etg.new_model(streams, _CLASSES, run.seed, case.config.model)
    model.load_state_dict(torch_etg.from_flax(jax.tree.map(lambda v: v[0], together.state.best["params"])))
    logits = torch_etg.predict(model, torch_etg.standardised(streams, run.train), run.test)["fusion"].cpu().numpy()
    _same_predictions("the Flax and the PyTorch model", together.logits[0, : len(logits)], logits)


MAKE = {LANES: lanes_way, ALONE: alone_way, PYTORCH: pytorch_way}


# ---- Times --------------------------------------------------------------------------------------------------------


def timing_rows(ways: Sequence[Way], seconds: Mapping[str, Sequence[float]]) -> list[dict[str, object]]:
    """Returns a row of figures for each of the three ways; "" where one was not measured."""
    compile_seconds = {way.name: way.compile_seconds for way in ways}
    median = {name: float(np.median(values)) for name, values in seconds.items()}
    return [
        {
            "what": name,
            "seconds_min": min(seconds[name]) if name in seconds else "",
            "seconds_median": median.get(name, ""),
            "seconds_max": max(seconds[name]) if name in seconds else "",
            "compile_seconds": compile_seconds.get(name) or "",
            "speed_up_over_one_after_another": _ratio(median, ALONE, name),
            "speed_up_over_pytorch": _ratio(median, PYTORCH, name),
        }
        for name in (LANES, ALONE, PYTORCH)
    ]


def _ratio(median: Mapping[str, float], base: str, name: str) -> float | str:
    return median[base] / median[name] if base in median and name in median else ""
