"""Ways to do the same work, their timing in turn, and whether PyTorch is available."""

import dataclasses
import importlib.util
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from avjax.errors import AvjaxError


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to do the work.

    Attributes:
      run: does all of it.
      compile_seconds: None where nothing is compiled.
    """

    name: str
    run: Callable[[], Any]
    compile_seconds: float | None


def interleaved(ways: Sequence[Way], repeats: int, tell: Callable[[str, str, float], None]) -> dict[str, list[float]]:
    """Times each run of each way, A B C A B C, so that a busy minute affects all alike; returns seconds by way."""
    seconds: dict[str, list[float]] = {way.name: [] for way in ways}
    for repeat in range(1, repeats + 1):
        for way in ways:
            start = time.perf_counter()
            way.run()
            seconds[way.name].append(time.perf_counter() - start)
            tell(f"{repeat}/{repeats}", way.name, seconds[way.name][-1])
    return seconds


def chosen(flag: str, names: Sequence[str] | None, available: Iterable[str]) -> list[str]:
    """Returns the `names` that a flag gives, or all `available` where it gives none.

    Raises:
      AvjaxError: a name is not available.
    """
    available = list(available)
    if unknown := [name for name in names or () if name not in available]:
        raise AvjaxError(f"{flag}: {', '.join(unknown)} is not among {', '.join(available)}")
    return list(names or available)


def no_pytorch() -> str:
    """Returns why PyTorch cannot be measured on the device that JAX uses; "" where it can."""
    if importlib.util.find_spec("torch") is None:
        return "not installed"
    import torch

    if jax.default_backend() != "cpu" and not torch.cuda.is_available():
        return f"has no CUDA, while JAX uses {jax.default_backend()}"
    return ""


def torch_device() -> str:
    """Returns PyTorch's name of the device that JAX uses."""
    return "cpu" if jax.default_backend() == "cpu" else "cuda"
