"""Runs work in processes that may crash or hang without ending the run."""

import dataclasses
import multiprocessing
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import TimeoutError
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any

from avjax.errors import AvjaxError, UnusableMedia

# Items in flight per process: enough that none waits for work.
_UNDER_WAY = 4


@dataclasses.dataclass(frozen=True)
class Failure:
    """The reason why an item was given up."""

    reason: str


def each(
    function: Callable,
    items: Sequence,
    *,
    count: int,
    seconds: float,
    setup: Callable,
    arguments: Sequence = (),
) -> Iterator[tuple[object, object]]:
    """Calls `function(item)` for every item in `count` processes; yields (item, result), or (item, Failure).

    An item that takes longer than `seconds`, or that crashes its process, is given up with a reason; the others
    continue. The number of items in flight is limited, so that results do not pile up before they are consumed. A
    process whose parent is gone ends itself.

    Args:
      function: what it raises becomes a Failure, with the message alone for an UnusableMedia.
      items: its arguments.
      count: number of processes.
      seconds: time limit of an item.
      setup: called once in each process with `arguments`.
      arguments: of `setup`.

    Raises:
      AvjaxError: `function` raised one, `setup` raised anything, or the processes die without an item, so that no item
        is to blame and the others would fail as well.
    """
    from pebble import ProcessPool

    pool = ProcessPool(
        max_workers=max(1, min(count, len(items))),
        context=multiprocessing.get_context("spawn"),
        initializer=_begin,
        initargs=(os.getpid(), setup, arguments),
    )
    # A queue of finished items: `concurrent.futures.wait` would go through all others every time.
    done = queue.SimpleQueue()
    with pool:
        try:
            waiting, item_of = iter(items), {}

            def schedule(more: int) -> None:
                for item in islice(waiting, more):
                    future = pool.schedule(_call, args=[function, item], timeout=seconds)
                    item_of[future] = item
                    future.add_done_callback(done.put)

            schedule(_UNDER_WAY * count)
            for _ in items:
                future = done.get()
                yield item_of.pop(future), _result(future, seconds)
                schedule(1)
        finally:
            pool.stop()


def _result(future: Any, seconds: float) -> object:
    from pebble import ProcessExpired

    try:
        return future.result()
    except TimeoutError:
        return Failure(f"took longer than {seconds:g} s")
    except ProcessExpired as error:
        return Failure(f"its decoder crashed (exit status {error.exitcode})")
    except BrokenProcessPool as error:
        raise AvjaxError(
            f"the worker processes end by themselves ({error}); if memory is short, use fewer of them; a script that "
            'starts them needs the line: if __name__ == "__main__":'
        ) from error
    except UnusableMedia as error:
        return Failure(str(error))
    except AvjaxError:
        raise
    except Exception as error:
        return Failure(f"{type(error).__name__}: {error}")


_unready = ""  # why a worker process cannot work


def _begin(parent: int, setup: Callable, arguments: Sequence) -> None:
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    global _unready
    _unready = ""
    try:
        setup(*arguments)
    except Exception as error:
        # Kept for the first item to report: the pool itself only sees that the process ended.
        _unready = f"a worker process cannot start: {type(error).__name__}: {error}"


def _call(function: Callable, item: object) -> object:
    if _unready:
        raise AvjaxError(_unready)
    return function(item)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
