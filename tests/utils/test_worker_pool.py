"""Worker pools continue whatever an item does to its process; errors that no item caused stop them."""

import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from avjax.errors import AvjaxError, UnusableMedia
from avjax.utils import worker_pool

_SHARED = []


def note(text: str) -> None:
    _SHARED.append(text)


def die() -> None:
    os._exit(7)


def act(item: str) -> str:
    """Acts as the item specifies, in a worker."""
    verb, _, what = item.partition(" ")
    if verb == "hang":
        time.sleep(60)
    if verb == "exit":
        os._exit(int(what))
    if verb == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if verb == "raise":
        raise ZeroDivisionError(what)
    if verb == "touch":
        pathlib.Path(what).touch()
        return None
    if verb == "refuse":
        raise AvjaxError(what)
    if verb == "reason":
        raise UnusableMedia(what)
    return np.full(3, int(what)) if _SHARED == ["ready"] else f"setup not done: {_SHARED}"


def run(items, **changes):
    settings = {"count": 2, "seconds": 20, "setup": note, "arguments": ("ready",)} | changes
    return dict(worker_pool.each(act, items, **settings))


def test_each_item_ends_in_a_reason_and_the_others_go_on():
    items = ["ok 1", "hang", "exit 3", "raise it", "segfault", "reason no face", *(f"ok {i}" for i in range(2, 30))]
    results = run(items, seconds=1.5)
    assert set(results) == set(items)
    reasons = {item: a.reason for item, a in results.items() if isinstance(a, worker_pool.Failure)}
    assert reasons.pop("hang") == "took longer than 1.5 s"
    assert reasons.pop("exit 3") == "its decoder crashed (exit status 3)"
    assert reasons.pop("segfault") == f"its decoder crashed (exit status {-signal.SIGSEGV})"
    assert reasons.pop("raise it") == "ZeroDivisionError: it"
    assert reasons.pop("reason no face") == "no face"
    assert not reasons
    assert all(np.array_equal(results[f"ok {i}"], [i] * 3) for i in range(1, 30))


def test_work_does_not_run_far_ahead_of_whoever_takes_it(tmp_path):
    items = [f"touch {tmp_path / str(i)}" for i in range(40)]
    results = worker_pool.each(act, items, count=2, seconds=20, setup=note, arguments=("ready",))
    next(results)
    time.sleep(2)
    assert len(list(tmp_path.iterdir())) <= 2 * worker_pool._UNDER_WAY
    assert len(list(results)) == 39


def test_nothing_to_do_starts_nothing():
    assert run([]) == {}


def test_a_fault_of_the_surroundings_stops_the_run():
    with pytest.raises(AvjaxError, match="disk is full"):
        run(["ok", "refuse disk is full", "ok 2"])


def test_a_setup_that_fails_is_reported_and_blames_no_item():
    with pytest.raises(AvjaxError, match="cannot start: FileNotFoundError"):
        run(["ok"], setup=os.stat, arguments=("/no/such/file",))


def test_a_setup_that_crashes_stops_the_run():
    with pytest.raises(AvjaxError, match="end by themselves"):
        run(["ok"], setup=die, arguments=())


def test_workers_end_when_the_parent_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent("""
        import os, pathlib, sys, time
        from avjax.utils import worker_pool as workers

        def setup(): pass

        def hang(item):
            pathlib.Path(item).write_text(str(os.getpid()))
            time.sleep(60)

        if __name__ == "__main__":
            list(workers.each(hang, sys.argv[1:], count=2, seconds=60, setup=setup))
        """)
    )
    files = [tmp_path / "a", tmp_path / "b"]
    root = pathlib.Path(__file__).resolve().parents[2]
    parent = subprocess.Popen([sys.executable, str(script), *map(str, files)], env=os.environ | {"PYTHONPATH": root})
    try:
        assert soon(lambda: all(f.exists() and f.read_text() for f in files), 20)
    finally:
        parent.kill()
        parent.wait()
    assert soon(lambda: not any(alive(int(f.read_text())) for f in files), 5)


def alive(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def soon(true, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if true():
            return True
        time.sleep(0.02)
    return False
