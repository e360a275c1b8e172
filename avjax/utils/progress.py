"""Long work: the bar that shows how far it is, and the clock that tells what it spends its time on."""

import collections
import contextlib
import time
from collections.abc import Iterable, Iterator

from rich import progress
from rich.console import Console


def bar(items: Iterable, total: int, what: str, console: Console, unit: str = "clips") -> Iterator:
    """Passes `items` on under a bar with `unit`/s and time left; no bar where there is nothing to do."""
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
    """Seconds by what they were spent on: `with clock("decoding"): …`."""

    @contextlib.contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            self[what] += time.perf_counter() - begun
