"""Optical flow of the face, and flow drawn as pictures with the colours of Baker et al. 2011.

A flow is an array (…, h, w, 2) in pixels, x to the right and y down: where what is seen at a pixel of the first frame
is in the second, relative to there.
"""

from collections.abc import Iterable

import numpy as np

# Magnitudes are drawn up to so many times the clip's standard deviation: beyond that all are one colour.
MOST = 4.0
_EPS = 1e-3  # pixels: a clip that stands still stays white
# Steps of the colour wheel from one of its six corners to the next: more where the eye tells more hues apart (Baker et
# al. 2011, "A Database and Evaluation Methodology for Optical Flow", section 4.1).
_CORNERS = ((255, 0, 0), (255, 255, 0), (0, 255, 0), (0, 255, 255), (0, 0, 255), (255, 0, 255))
_STEPS = (15, 6, 4, 11, 13, 6)


def dis(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Flow by dense inverse search (Kroeger et al. 2016), OpenCV's medium preset.

    Args:
      first, second: frames (n, h, w, 3) uint8 RGB, of 12 pixels a side at least.
    Returns:
      (n, h, w, 2) float32; that of a pair does not depend on the others.
    """
    import cv2

    search = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    out = np.empty((*first.shape[:3], 2), np.float32)
    for flow, *pair in zip(out, first, second, strict=True):
        flow[:] = search.calc(*(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in pair), None)
    return out


def ends(found: np.ndarray, window: int, stride: int) -> np.ndarray:
    """The frames at which a flow ends: each `stride`-th, where there is a frame `window` before it and a face in it.

    Args:
      found: (t,) bool, which frames show the face.
    Returns:
      (k,) indices, ascending; flow k is that from frame ends[k] - window to frame ends[k].
    """
    return np.arange(window + -window % stride, len(found), stride)[found[window + -window % stride :: stride]]


def held(ends: np.ndarray, count: int) -> np.ndarray:
    """Which flow each of `count` frames has, (count,): the last one that ended by then; -1, no motion, before any."""
    return np.searchsorted(ends, np.arange(count), side="right") - 1


def spread(flows: Iterable[np.ndarray]) -> float:
    """The standard deviation of the magnitude over all pixels of a clip's flows, which come in parts (k, h, w, 2)."""
    count, total, squares = 0, 0.0, 0.0
    for part in flows:
        x, y = (part[..., i].astype(np.float32) for i in range(2))
        square = x * x + y * y
        count, squares = count + square.size, squares + square.sum(dtype=np.float64)
        total += np.sqrt(square).sum(dtype=np.float64)
    mean = total / max(count, 1)
    return float(np.sqrt(max(squares / max(count, 1) - mean * mean, 0)))


def draw(flow: np.ndarray, spread: float) -> np.ndarray:
    """Flow as pictures: the direction as hue, the magnitude as saturation, white where nothing moves.

    Magnitudes are divided by `spread` and clipped at `MOST`: the same motion has the same colour in all frames of a
    clip, and clips of faces near and far look alike.

    Args:
      flow: (…, h, w, 2).
    Returns:
      (…, h, w, 3) uint8 RGB.
    """
    import cv2

    # As one tall picture; red is to the right, as Baker et al. draw it.
    x, y = (np.ascontiguousarray(flow[..., i], np.float32).reshape(-1, flow.shape[-2]) for i in range(2))
    strength, turn = cv2.cartToPolar(x, y)
    np.minimum(strength / ((spread + _EPS) * MOST), 1, out=strength)
    paleness = 255 - _wheel()
    hues = (turn * np.float32(len(paleness) / (2 * np.pi))).astype(np.int32) % len(paleness)
    return np.rint(255 - strength[..., None] * paleness[hues]).astype(np.uint8).reshape(*flow.shape[:-1], 3)


def grid(flow: np.ndarray, spread: float, cells: int = 7) -> np.ndarray:
    """Flow as numbers: its mean to the right, down and in magnitude over each of `cells` x `cells` cells.

    Scaled and clipped as in `draw`.

    Args:
      flow: (n, h, w, 2).
    Returns:
      (n, 3 · cells²) float32, between -1 and 1.
    """
    scale = np.float32(1 / ((spread + _EPS) * MOST))
    strength = np.linalg.norm(flow.astype(np.float32), axis=-1, keepdims=True) * scale
    x = np.concatenate([flow * scale / np.maximum(strength, 1), np.minimum(strength, 1)], -1, dtype=np.float32)
    edges = [np.linspace(0, length, cells + 1).astype(int)[:-1] for length in flow.shape[1:3]]
    sums = np.add.reduceat(np.add.reduceat(x, edges[0], 1), edges[1], 2)
    sizes = [np.diff(first, append=length) for first, length in zip(edges, flow.shape[1:3], strict=True)]
    means = sums / (sizes[0][:, None] * sizes[1])[..., None]
    return means.reshape(len(flow), 3 * cells**2).astype(np.float32)


def _wheel() -> np.ndarray:
    """(1024, 3) float32: the fully saturated colours around the wheel, beginning with red."""
    corners = np.array(_CORNERS + _CORNERS[:1], np.float32)
    places = np.cumsum((0, *_STEPS)) / sum(_STEPS)
    return np.stack([np.interp(np.arange(1024) / 1024, places, channel) for channel in corners.T], -1, dtype=np.float32)
