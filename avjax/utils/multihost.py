"""Runs of several processes: how they find each other, agree, wait, and detect that one of them is lost.

The environment defines such a run: `AVJAX_COORDINATOR` (host:port of process 0), `AVJAX_PROCESSES` and `AVJAX_PROCESS`,
set by `launch/local.sh`; or the environment of Slurm, Cloud TPU or GKE, which JAX reads itself. `AVJAX_DETECT=1`
(`launch/tpu_vm.sh`) is for machines where JAX detects the processes without such variables.
"""

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from avjax.errors import AvjaxError
from avjax.settings import ProcessSettings

_EXPLICIT = ("AVJAX_COORDINATOR", "AVJAX_PROCESSES", "AVJAX_PROCESS")
_BEAT = 2.0  # seconds between heartbeats
_LONG = 7 * 24 * 3600  # seconds that the first process may take for feature extraction
_LOST = 3  # exit status of a process that ends because another one is lost
_LATE = (
    "the processes of this run did not all join within {wait} s; start them all, check that they reach the address of "
    "process 0, or raise processes.wait"
)
_watch: "Watch | None" = None


def wanted(environment: Mapping[str, str] = os.environ) -> bool:
    """Returns whether the environment defines several processes.

    Raises:
      AvjaxError: only some of the three variables of avjax are set.
    """
    present = [name for name in _EXPLICIT if environment.get(name)]
    if present and len(present) < len(_EXPLICIT):
        missing = ", ".join(name for name in _EXPLICIT if name not in present)
        raise AvjaxError(f"{', '.join(present)} is set, {missing} is not; set all three, or none")
    hosts = [h for h in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if h]
    tasks = environment.get("SLURM_NTASKS", "1") if "SLURM_PROCID" in environment else "1"
    flags = ("MEGASCALE_COORDINATOR_ADDRESS", "AVJAX_DETECT")
    return bool(present or int(tasks) > 1 or len(hosts) > 1 or any(environment.get(name) for name in flags))


def join(settings: ProcessSettings) -> None:
    """Joins the other processes, if the environment defines any; called before anything is computed.

    Args:
      settings: `wait`, seconds for all to join; `patience`, seconds without a heartbeat, or behind the others, until a
        process is considered lost.

    Raises:
      AvjaxError: not all processes joined in time.
    """
    import jax

    global _watch
    if not wanted() or jax.distributed.is_initialized():
        return
    explicit = {}
    if os.environ.get("AVJAX_COORDINATOR"):
        explicit = {
            "coordinator_address": os.environ["AVJAX_COORDINATOR"],
            "num_processes": _number("AVJAX_PROCESSES"),
            "process_id": _number("AVJAX_PROCESS"),
        }
    # JAX's own time-outs end the process without a helpful message; ours come first.
    late = threading.Timer(settings.wait, _end, [_LATE.format(wait=settings.wait)])
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            **explicit,
            initialization_timeout=2 * settings.wait + 60,
            heartbeat_timeout_seconds=2 * settings.patience + 60,
            shutdown_timeout_seconds=30,
        )
    except (RuntimeError, ValueError) as error:
        raise AvjaxError(f"the processes of this run could not join ({str(error).splitlines()[0]})") from error
    finally:
        late.cancel()
    _watch = Watch(settings.patience)


def _end(reason: str) -> None:
    """Ends this process immediately, whatever it waits for."""
    print(f"error: {reason}", file=sys.stderr)
    sys.stderr.flush()
    os._exit(_LOST)


def _number(name: str) -> int:
    text = os.environ[name]
    if not text.isdecimal():
        raise AvjaxError(f"{name} is {text!r}; expected a number")
    return int(text)


def is_writer() -> bool:
    """Returns whether this process writes files and prints messages."""
    import jax

    return jax.process_index() == 0


@contextlib.contextmanager
def writer_first() -> Iterator[None]:
    """Lets process 0 run the body first, and the others when it has finished."""
    import jax

    if jax.process_count() > 1 and not is_writer():
        _barrier("first")
    yield
    if jax.process_count() > 1 and is_writer():
        _barrier("first")


def end() -> None:
    """Waits for all processes at the end of a run."""
    import jax

    if jax.process_count() > 1:
        _barrier("end")
        _watch.stop()


def agree(flag: bool) -> bool:
    """Returns whether `flag` is true in any process; all processes must call it at the same point."""
    import jax

    if jax.process_count() == 1:
        return flag
    import numpy as np
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.array(flag)).any())


def summed(tree: Any) -> Any:
    """Returns the sums of the processes' arrays, added in the order of the processes."""
    import jax

    if jax.process_count() == 1:
        return tree
    from jax.experimental import multihost_utils

    return jax.tree.map(lambda v: v.sum(0), multihost_utils.process_allgather(tree))


def reached(point: str) -> None:
    """Reports to the others that this process has reached the next point of the run, such as a step."""
    if _watch:
        _watch.reached(point)


def leave(reason: str) -> bool:
    """Reports to the others why this process ends, and gives them time to read it; False if there are none."""
    if _watch:
        _watch.leave(reason)
    return _watch is not None


def _barrier(name: str) -> None:
    _client().wait_at_barrier(f"avjax/{name}", _LONG * 1000)


def _client() -> Any:
    # There is no public API for it; Orbax does the same.
    from jax._src import distributed

    return distributed.global_state.client


class Watch:
    """Detects lost processes: each process sends heartbeats and reports its progress."""

    def __init__(self, patience: float) -> None:
        import jax

        self._patience = patience
        self._me, self._count = jax.process_index(), jax.process_count()
        self._at, self._since, self._ending = 0, time.monotonic(), False
        self._seen: dict[int, tuple[str, float]] = {}
        self._say("host", socket.gethostname())
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def reached(self, point: str) -> None:
        """Reports the next point of the run."""
        self._at, self._since = self._at + 1, time.monotonic()
        self._say("at", f"{self._at} {point}")

    def leave(self, reason: str) -> None:
        """Reports why this process ends."""
        self._ending = True
        self._say("left", reason)
        if self._me == 0:  # it hosts the messages that the others read
            time.sleep(2 * _BEAT)

    def stop(self) -> None:
        """Stops watching."""
        self._ending = True

    def _run(self) -> None:
        beat = 0
        while not self._ending:
            beat += 1
            try:
                self._say("beat", str(beat))
                lost = self._lost()
            except Exception:  # the process that hosts the messages is gone: it is lost, or the run has ended
                lost = "" if self._ending else f"{self._name(0)} is gone"
            if lost and not self._ending:
                _end(f"{lost}; this process ends. The same command continues from the last checkpoint")
            time.sleep(_BEAT)

    def _lost(self) -> str:
        """Returns which process is lost, and how; "" if none is."""
        messages = {key.removeprefix("avjax/"): value for key, value in _client().key_value_dir_get("avjax/")}
        now = time.monotonic()
        for peer in (p for p in range(self._count) if p != self._me):
            name = self._name(peer, messages.get(f"host/{peer}"))
            if reason := messages.get(f"left/{peer}"):
                return f"{name} has ended: {reason}"
            beat = messages.get(f"beat/{peer}", "")
            if self._seen.get(peer, ("", 0))[0] != beat:
                self._seen[peer] = beat, now
            if now - self._seen.setdefault(peer, (beat, now))[1] > self._patience:
                return f"{name} has sent no heartbeat for {self._patience} s"
            at, _, point = messages.get(f"at/{peer}", "0").partition(" ")
            if int(at) < self._at and now - self._since > self._patience:
                where = point or "before the first step"
                return f"{name} hangs: this process has waited {self._patience} s for it, last heard of at {where}"
        return ""

    def _name(self, peer: int, host: str | None = None) -> str:
        return f"process {peer} of {self._count}" + (f" ({host})" if host else "")

    def _say(self, what: str, text: str) -> None:
        _client().key_value_set(f"avjax/{what}/{self._me}", text, allow_overwrite=True)
