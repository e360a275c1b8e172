"""The progress bar of long work."""

from collections.abc import Iterable, Iterator

from rich import progress
from rich.console import Console


def bar(items: Iterable, total: int, what: str, console: Console) -> Iterator:
    """Passes `items` on under a bar with clips/s and time left; no bar where there is nothing to do."""
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
            shown.update(task, rate=f"{speed:.1f} clips/s" if speed else "")
