"""A progress bar, and a stopwatch that sums up time by activity."""

import collections
import contextlib
import time
from collections.abc import Iterable, Iterator

from rich import progress
from rich.console import Console


def bar(items: Iterable, total: int, what: str, console: Console, unit: str = "clips") -> Iterator:
    """Yields `items` under a progress bar with `unit`/s and remaining time; no bar if `total` is 0."""
    if not total:
        return
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[rate]}"),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console) as shown:
        task = shown.add_task(what, total=total, rate="")
        for item in items:
            yield item
            shown.advance(task)
            speed = shown.tasks[0].speed
            shown.update(task, rate=f"{speed:.1f} {unit}/s" if speed else "")


class Stopwatch(collections.Counter):
    """Seconds by activity: `with clock("decoding"): …`."""

    @contextlib.contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        """Adds the time that the body takes to activity `what`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self[what] += time.perf_counter() - start
