"""Bounds the scaling of training steps from the collectives in their compiled programs.

python -m benchmarks.scaling CLIPS MODEL PRESET...

is the process that compiles, for as many devices as it has: one row of JSON for each preset. Nothing is executed, and
no weights are needed.
"""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from avjax import config as configs
from avjax import encoders, models
from avjax.errors import AvjaxError
from avjax.features import presets
from avjax.models.base import Model
from avjax.models.end_to_end import PRETRAINED
from avjax.settings import Settings
from avjax.training import sharding
from avjax.training.dry_run import compile_step
from avjax.training.lanes import Lane, LanePlan
from avjax.training.streamed_batches import Streamed
from benchmarks import collectives

KEY = ("benchmark", "model", "preset", "devices", "clips", "machine", "cores", "device")
TABLE = {
    "model": "model",
    "preset": "preset",
    "devices": "devices",
    "gflop": "GFLOP",
    "calls": "collectives",
    "all_reduce_mb": "all-reduce MB",
    "all_gather_mb": "all-gather MB",
    "sent_mb": "in all MB",
    "h100_efficiency": "H100 ≤",
    "h100_efficiency_overlapped": "overlapped ≤",
    "v5e_efficiency": "v5e ≤",
    "v5e_efficiency_overlapped": "overlapped ≤",
}
CLASSES = 7
SHARED = ("dp", "fsdp", "tp")
_ALONE = "single"
# Fraction of a device's peak that a well-written step of dense layers reaches.
UTILISATION = 0.4
# Compiles faster, without machine code optimisations, which change neither collectives nor FLOPs.
_FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


@dataclasses.dataclass(frozen=True)
class Case:
    """A model to compile.

    Attributes:
      config: its configuration.
      streams: shape and dtype of a clip's streams.
      settings: those that differ from the configuration.
      presets: of the mesh.
    """

    config: str
    streams: Mapping[str, tuple[tuple[int, ...], str]]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    presets: tuple[str, ...] = SHARED


_PAPER = {"model__width": 768, "model__summary": "first"}
# Streams of the papers' encoders (`avjax.features.presets`), of a clip with a sentence of 48 tokens.
CASES: dict[str, Case] = {
    "etg_aver": Case(
        "configs/etg_mafw.py",
        {"text": ((48, 768), "float32"), "audio": ((50, 768), "float32"), "video": ((8, 768), "float32")},
        _PAPER,
        (*SHARED, "lanes"),
    ),
    "de_iii": Case(
        "configs/deiii_crema_d.py",
        {"audio": ((125, 1024), "float32"), "video": ((75, 1408), "float32"), "flow": ((75, 1408), "float32")},
    ),
    "etg_aver_raw": Case(
        "configs/etg_mafw.py:finetune",
        {"text": ((48, 1), "int32"), "audio": ((160_000, 1), "float32"), "video": ((8, 224, 224, 3), "uint8")},
    ),
}


@dataclasses.dataclass(frozen=True)
class Machine:
    """Devices and their links.

    Attributes:
      peak: FLOP/s of a device in products of float32 at JAX's default precision.
      node: number of devices that are linked to each other.
      inside: most bytes per second that a device sends within its node, by the number of devices in use: that of the
        first number not below it.
      beyond: most bytes per second that a device sends to other nodes.
    """

    peak: float
    node: int
    inside: Mapping[int, float]
    beyond: float

    def seconds(self, ops: Sequence[collectives.Collective], devices: int) -> float:
        """Returns the time of the collectives one after another; traffic within and between nodes overlaps."""
        inside = next(speed for most, speed in self.inside.items() if devices <= most)
        both = ((c.sent(), c.beyond(self.node)) for c in ops)
        return sum(max((sent - far) / inside, far / self.beyond) for sent, far in both)


# Sources: docs/scaling.md.
MACHINES = {
    # TF32, dense. Eight GPUs with 18 links of NVLink, 25 GB/s each way; beyond, an InfiniBand port of 400 Gb/s each.
    "h100": Machine(494.7e12, 8, {2**30: 450e9}, 50e9),
    # bfloat16. Four links of 50 GB/s each way; an axis shorter than 16 is open, and chips at its ends have one less: of
    # slices up to 8 x 8, of 8 x 16 and of 16 x 16 those with the fewest have two, three and four.
    "v5e": Machine(197e12, 256, {64: 100e9, 128: 150e9, 2**30: 200e9}, 3.125e9),
}


def measure(
    names: Sequence[str], devices: Sequence[int], clips: int, say: Callable[[str], None]
) -> Iterator[list[dict[str, object]]]:
    """Compiles a training step of each model, for each number of devices and under each preset.

    Args:
      names: of the models, from CASES.
      devices: numbers of devices.
      clips: of each device, so that the batch grows with the devices.
      say: called with progress messages.

    Yields:
      For each model and number of devices rows: model, preset, devices, clips, parameters, gflop (of a device),
      gflop_alone (of a single device with the same clips), calls (collectives), megabytes (10⁶) that a device sends by
      each kind, sent_mb in total, beyond_mb (to other nodes of eight); for each of MACHINES the seconds of the work and
      of the links, and the bounds on the efficiency (`bounds`) without and with overlap.

    Raises:
      AvjaxError: a step cannot be compiled, or as `collectives.read`.
    """
    for name in names:
        (alone,) = _compiled(name, 1, clips, [_ALONE])
        say(f"{name}: one device {alone['gflop']:.3g} GFLOP")
        for count in devices:
            report = _compiled(name, count, clips, CASES[name].presets)
            say(f"{name}: compiled for {count} devices")
            yield [_row(name, clips, row, alone["gflop"]) for row in report]


def _row(name: str, clips: int, report: Mapping[str, Any], alone: float) -> dict[str, object]:
    ops = [collectives.Collective(c["kind"], c["size"], c["groups"], c["times"]) for c in report["collectives"]]
    sent = {kind: sum(c.sent() for c in ops if c.kind == kind) / 1e6 for kind in collectives.KINDS}
    row = {
        "model": name,
        "preset": report["preset"],
        "devices": report["devices"],
        "clips": clips,
        "parameters": report["parameters"],
        "gflop": report["gflop"],
        "gflop_alone": alone,
        "calls": sum(c.times for c in ops),
        **{f"{kind.replace('-', '_')}_mb": float(mb) for kind, mb in sent.items()},
        "sent_mb": float(sum(sent.values())),
        "beyond_mb": float(sum(c.beyond(MACHINES["h100"].node) for c in ops) / 1e6),
    }
    for machine, spec in MACHINES.items():
        rate = spec.peak * UTILISATION / 1e9
        work, links = report["gflop"] / rate, spec.seconds(ops, report["devices"])
        plain, overlapped = bounds(alone / rate, work, links)
        row |= {f"{machine}_work_seconds": work, f"{machine}_link_seconds": links}
        row |= {f"{machine}_efficiency": plain, f"{machine}_efficiency_overlapped": overlapped}
    return row


def bounds(alone: float, work: float, links: float) -> tuple[float, float]:
    """Returns upper bounds on a device's efficiency: with communication after computation, and overlapped with it.

    Args:
      alone: seconds of the work for its clips on a single device.
      work: seconds of a device's work in a step on several.
      links: seconds of the links in that step.
    """
    return min(1.0, alone / (work + links)), min(1.0, alone / max(work, links))


# ---- The process that compiles --------------------------------------------------------------------------------------


def _compiled(name: str, devices: int, clips: int, chosen: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the rows that `main` prints for a model, run in a process with `devices` devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices} {_FLAGS}"
    environment = os.environ | {"XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "benchmarks.scaling", str(clips), name, *chosen]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise AvjaxError(f"{name} on {devices} devices ({', '.join(chosen)}) was not compiled: {last[0]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def main(clips: str, name: str, *chosen: str) -> None:
    """Prints a row of JSON for each preset in `chosen`."""
    jax.lax.platform_dependent = as_on_accelerators
    for preset in chosen:
        print(json.dumps(compiled(CASES[name], preset, int(clips))), flush=True)


def as_on_accelerators(*arguments, default: Callable, **ways: Callable) -> Any:
    """Replaces `jax.lax.platform_dependent`: on CPUs some layers are computed differently, such as head by head."""
    return default(*arguments)


def compiled(case: Case, preset: str, clips: int) -> dict[str, Any]:
    """Compiles a step on all devices of this process.

    With the preset "lanes" it has as many lanes as devices, else one.

    Returns:
      preset, devices, parameters, gflop of a device, and the fields of its collectives.
    """
    count = jax.device_count()
    lanes = count if preset == "lanes" else 1
    batch = clips * count // lanes
    config = configs.settings(case.config, **case.settings, mesh__preset=preset, train__batch_size=batch)
    model, placement = models.build(config.model, CLASSES), sharding.placement(config, lanes)
    step = compile_step(model, config, placement, _plan(lanes), _clips(case, config, model))
    return {
        "preset": preset,
        "devices": count,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(step.state.params)) // lanes,
        "gflop": step.flops / 1e9,
        "collectives": [dataclasses.asdict(c) for c in collectives.read(step.compiled.as_text())],
    }


def _plan(lanes: int) -> LanePlan:
    """Makes lanes that train on one clip: a compiled step does not depend on their number of clips."""
    index, weight = np.zeros((lanes, 1), np.int32), np.ones((lanes, 1), np.float32)
    prior, seed = np.full((lanes, CLASSES), 1 / CLASSES, np.float32), np.arange(lanes, dtype=np.uint32)
    made = Lane(index, weight, index, weight, index, weight, counted=weight, prior=prior, seed=seed)
    return LanePlan(made, [("paper", i) for i in range(lanes)], [], [])


def _clips(case: Case, config: Settings, model: Model) -> Streamed:
    clip = {stream: np.zeros(shape, dtype) for stream, (shape, dtype) in case.streams.items()}
    clip |= {f"{stream}_mask": np.ones(shape[0], bool) for stream, (shape, _) in case.streams.items()}
    groups = int(config.protocol.standardise != "none")
    one = np.zeros(1, np.int32)
    return Streamed([clip], one, one, groups, _pretrained(config) if model.constants else {})


class _Shape(jax.ShapeDtypeStruct):
    """The shape of an array that is on every device."""

    def addressable_data(self, index: int) -> "_Shape":
        """Returns itself."""
        return self


def _pretrained(config: Settings) -> dict[str, Any]:
    """Returns the shapes of the encoders' weights."""
    preset = presets.preset(config.preset)
    out = {}
    for stream, encoding in {"video": preset.image, "audio": preset.speech, "text": preset.text}.items():
        family, module, _ = encoders.architecture(encoding.source, layer=encoding.layer, dtype="float32")
        out[stream] = jax.tree.map(lambda s: _Shape(s.shape, s.dtype), family.shapes(module.config))
    return {PRETRAINED: out}


if __name__ == "__main__":
    main(*sys.argv[1:])
