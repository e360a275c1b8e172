"""Times the optical flow of DE-III: pairs of faces to flow, flow to images, images to features.

Faces are made up, weights random and of the true size, everything as `avjax.extract` runs it; steps in turn.
"""

import functools
from collections.abc import Callable

import jax
import numpy as np

from avjax.encoders import Encoder, default_dtype, load, perceiver
from avjax.features import presets
from avjax.media import flow
from benchmarks.ways import Way, interleaved

KEY = ("benchmark", "source", "side", "dtype", "machine", "cores", "device")
TABLE = {
    "source": "flow",
    "side": "side",
    "flow_per_second": "pairs to flow /s",
    "drawing_per_second": "drawn /s",
    "seeing_per_second": "seen by B2 /s",
    "pairs_per_second": "all three /s",
}
SOURCES = {"dis": "deiii_dis", "perceiver": "deiii"}


def measure(name: str, repeats: int, say: Callable[[str], None]) -> dict[str, object]:
    """Returns the row of one of SOURCES: seconds of `pairs` pairs and pairs per second, of each step and of all."""
    settings = presets.preset(SOURCES[name])
    few = settings.flow.source != "dis" and jax.default_backend() == "cpu"
    first, second = faces(count := 1 if few else 16, settings.flow.side)
    move = mover(settings.flow)
    flows = move(first, second)
    images = flow.draw(flows, flow.spread([flows]))
    image_encoder = load(settings.image.source, pool=settings.image.pool, random=True)
    work = {
        "flow": functools.partial(move, first, second),
        "drawing": functools.partial(flow.draw, flows, flow.spread([flows])),
        "seeing": lambda: image_encoder(*image_encoder.prepare(images)),
    }
    work["seeing"]()
    ways = [Way(step, run, None) for step, run in work.items()]
    taken = interleaved(ways, repeats, lambda repeat, step, s: say(f"{name}, repeat {repeat}: {step} {s:.3g} s"))
    row: dict[str, object] = {
        "source": name,
        "side": settings.flow.side,
        "dtype": default_dtype(),
        "pairs": count,
        "repeats": repeats,
    }
    for step, seconds in taken.items():
        typical = float(np.median(seconds))
        row |= {f"{step}_seconds_min": min(seconds), f"{step}_seconds_median": typical}
        row |= {f"{step}_seconds_max": max(seconds), f"{step}_per_second": count / typical}
    return row | {"pairs_per_second": count / sum(float(np.median(s)) for s in taken.values())}


def faces(count: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Makes pairs of images (count, side, side, 3) uint8 of blots that move by two pixels."""
    blots = np.random.default_rng(0).integers(0, 256, (count, -(-side // 8), -(-side // 8), 3), np.uint8)
    first = blots.repeat(8, 1).repeat(8, 2)[:, :side, :side]
    return first, np.roll(first, 2, 2)


def mover(settings: presets.Flow) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Returns the function from pairs to flow, compiled where possible."""
    if settings.source == "dis":
        return flow.dis
    encoder: Encoder = load(settings.source, random=True)
    return functools.partial(perceiver.optical_flow, encoder)
