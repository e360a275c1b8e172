"""Work in processes that may crash or hang without taking the run with them."""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, TimeoutError, wait


def each(
    function: Callable,
    items: Sequence,
    *,
    count: int,
    seconds: float,
    setup: Callable,
    arguments: Sequence = (),
) -> Iterator[tuple[object, str]]:
    """Calls `function(item)` for every item in `count` processes; yields (item, reason), "" where it went well.

    An item that takes longer than `seconds`, or at which the process dies, is given up with a reason; the others go
    on. A process whose parent is gone ends itself.

    Args:
      function: returns a reason, "" for success.
      setup: called once in each process with `arguments`.
    """
    from pebble import ProcessExpired, ProcessPool

    pool = ProcessPool(
        max_workers=max(1, min(count, len(items))),
        context=multiprocessing.get_context("spawn"),
        initializer=_begin,
        initargs=(os.getpid(), setup, arguments),
    )
    with pool:
        try:
            pending = {pool.schedule(function, args=[item], timeout=seconds): item for item in items}
            while pending:
                done, _ = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    item = pending.pop(future)
                    try:
                        yield item, future.result()
                    except TimeoutError:
                        yield item, f"took longer than {seconds:g} s"
                    except ProcessExpired as error:
                        yield item, f"its decoder crashed (exit status {error.exitcode})"
                    except Exception as error:
                        yield item, f"{type(error).__name__}: {error}"
        finally:
            pool.stop()


def _begin(parent: int, setup: Callable, arguments: Sequence) -> None:
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    setup(*arguments)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
