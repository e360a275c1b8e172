"""Times a training's start up to its first step: as a process of its own, with an empty and with a filled cache.

python -m benchmarks.startup EVENTS [flags of avjax.train]

is that process: `avjax.train`, which also writes its timed events to the file EVENTS.
"""

import bisect
import builtins
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from avjax.errors import AvjaxError

CONFIG = "configs/etg_mafw.py"
EMPTY, FILLED = "empty cache", "filled cache"
KEY = ("benchmark", "config", "what", "machine", "cores", "device")
# Part → its events. Time of overlapping events counts for the first part.
PARTS = {
    "imports": ("imports",),
    "compiling": ("/jax/core/compile/backend_compile_duration",),  # or reading what was compiled
    "lowering": ("/jax/core/compile/jaxpr_to_mlir_module_duration",),
    "tracing": ("/jax/core/compile/jaxpr_trace_duration",),
    "features": ("features",),
}
TABLE = {
    "what": "start with",
    "first_step_seconds_median": "s",
    "first_epochs_seconds": "epochs",
    "imports_seconds": "import",
    "compiling_seconds": "compile",
    "lowering_seconds": "lower",
    "tracing_seconds": "trace",
    "features_seconds": "features",
    "other_seconds": "other",
}
_SHORTEST = 1e-3  # seconds of an import that is noted
_CALLED, _LOSSES = "called", "losses"  # a call of epochs begins; its losses have arrived


# Name, end (`time.monotonic`) and duration in seconds.
Event = tuple[str, float, float]


@dataclasses.dataclass(frozen=True)
class Start:
    """Seconds from the start of the process to its first step, and to the first line about epochs.

    Attributes:
      parts: seconds up to the first step, by PARTS and "other".
    """

    first_step: float
    first_epochs: float
    parts: dict[str, float]


def measure(flags: Sequence[str], repeats: int, say: Callable[[str], None]) -> list[dict[str, object]]:
    """Starts a training twice, `repeats` times, and ends it when it has printed two lines about epochs.

    Args:
      flags: of `avjax.train`, without a --workdir; the features must exist already.
      repeats: number of pairs of starts.
      say: called with progress messages.

    Returns:
      A row for each of EMPTY, FILLED: config, what, repeats, first_step_seconds_min, first_step_seconds_median,
      first_step_seconds_max, first_epochs_seconds, and seconds by part; all but the minimum and the maximum are of the
      median start (the lower of two).

    Raises:
      AvjaxError: the training ended early.
    """
    starts: dict[str, list[Start]] = {EMPTY: [], FILLED: []}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(1, repeats + 1):
            for what, runs in starts.items():
                run_folder = Path(folder) / f"{what} {repeat}"
                runs.append(start(flags, run_folder, cache=Path(folder) / f"programs {repeat}"))
                say(f"{what}, repeat {repeat}/{repeats}: first step after {runs[-1].first_step:.1f} s")
    return [row(" ".join(flags).removeprefix("--config="), what, runs) for what, runs in starts.items()]


def row(config: str, what: str, starts: Sequence[Start]) -> dict[str, object]:
    """Summarises starts of one kind as a row; see `measure`."""
    ordered = sorted(starts, key=lambda s: s.first_step)
    typical = ordered[(len(ordered) - 1) // 2]
    return {
        "config": config,
        "what": what,
        "repeats": len(starts),
        "first_step_seconds_min": ordered[0].first_step,
        "first_step_seconds_median": typical.first_step,
        "first_step_seconds_max": ordered[-1].first_step,
        "first_epochs_seconds": typical.first_epochs,
        **{f"{part}_seconds": seconds for part, seconds in typical.parts.items()},
    }


def start(flags: Sequence[str], run_folder: Path, cache: Path) -> Start:
    """Starts a training in the new folder `run_folder`, with compiled programs in `cache`.

    The steps of the first call of epochs take as long as the second call, which has nothing to prepare. So the first
    step begins that long before the first losses arrive.

    Raises:
      AvjaxError: the training ended before it printed two lines about epochs.
    """
    run_folder.mkdir()
    command = [sys.executable, "-m", "benchmarks.startup", str(run_folder / "events"), *flags]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    with (run_folder / "stderr").open("w") as errors:
        began = time.monotonic()
        with subprocess.Popen(
            [*command, f"--workdir={run_folder / 'run'}"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process:
            try:
                seen = _seen(process.stdout)
            finally:
                process.kill()
    if len(seen["epochs"]) < 2:
        last = (run_folder / "stderr").read_text().strip().splitlines()[-1:] or ["no message"]
        raise AvjaxError(f"the training ended before its second line about epochs: {last[0]}")
    events = [tuple(json.loads(line)) for line in (run_folder / "events").read_text().splitlines()]
    (_, called), losses = ([at for name, at, _ in events if name == what][:2] for what in (_CALLED, _LOSSES))
    stepped = losses[0] - (losses[1] - called)
    features = [("features", at, at - began) for at in seen["features"]]
    return Start(stepped - began, seen["epochs"][0] - began, split([*events, *features], began, stepped))


def _seen(lines: Iterable[str]) -> dict[str, list[float]]:
    """Returns the times of the line about the features and of the first two about epochs."""
    seen: dict[str, list[float]] = {"features": [], "epochs": []}
    for line in lines:
        if " classes; " in line:
            seen["features"].append(time.monotonic())
        if line.startswith("epoch "):
            seen["epochs"].append(time.monotonic())
            if len(seen["epochs"]) == 2:
                break
    return seen


def split(events: Iterable[Event], began: float, until: float) -> dict[str, float]:
    """Divides the time between `began` and `until` among PARTS and "other", in seconds."""
    cuts, inside = [began, until], {part: [] for part in PARTS}
    for name, end, seconds in events:
        for part in (part for part, names in PARTS.items() if name in names):
            span = max(end - seconds, began), min(end, until)
            if span[0] < span[1]:
                inside[part].append(span)
                cuts += span
    cuts = sorted(set(cuts))
    owner = ["other"] * (len(cuts) - 1)
    for part in reversed(PARTS):
        for a, b in inside[part]:
            first, last = bisect.bisect_left(cuts, a), bisect.bisect_left(cuts, b)
            owner[first:last] = [part] * (last - first)
    spent = dict.fromkeys((*PARTS, "other"), 0.0)
    for part, a, b in zip(owner, cuts[:-1], cuts[1:], strict=True):
        spent[part] += b - a
    return spent


# ---- The process that is measured -----------------------------------------------------------------------------------


def main() -> None:
    """Runs `avjax.train` and writes its events to the file given first; may be killed at any time."""
    with open(sys.argv.pop(1), "w", buffering=1) as file:

        def note(what: str, seconds: float, **_) -> None:
            print(json.dumps((what, time.monotonic(), seconds)), file=file)

        builtins.__import__ = timed(builtins.__import__, note)
        import jax

        jax.monitoring.register_event_duration_secs_listener(note)
        from avjax import cli, train
        from avjax.training import history
        from avjax.utils import multihost

        multihost.reached = telling(multihost.reached, lambda: note(_CALLED, 0.0))
        history.check_finite = telling(history.check_finite, lambda: note(_LOSSES, 0.0))
        cli.run(train.main)


def telling(function: Callable, tell: Callable[[], None]) -> Callable:
    """Wraps a function so that each call first calls `tell`."""

    def called(*args, **kwargs):
        tell()
        return function(*args, **kwargs)

    return called


def timed(load: Callable, note: Callable[[str, float], None]) -> Callable:
    """Wraps an `__import__` so that it notes the seconds of each outermost import."""
    depth = 0

    def loaded(*args, **kwargs):
        nonlocal depth
        depth, began = depth + 1, time.monotonic()
        try:
            return load(*args, **kwargs)
        finally:
            depth -= 1
            seconds = time.monotonic() - began
            if not depth and seconds > _SHORTEST:
                note("imports", seconds)

    return loaded


if __name__ == "__main__":
    main()
