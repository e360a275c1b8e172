"""Optical flow of the face, and flow rendered as images with the colours of Baker et al. 2011.

A flow is an array (…, h, w, 2) in pixels, x to the right and y down: the displacement of each pixel of the first frame
in the second.
"""

from collections.abc import Iterable

import numpy as np

# Magnitudes are clipped at this multiple of the clip's standard deviation.
MOST = 4.0
_EPS = 1e-3  # pixels: a clip without motion stays white
# Steps of the colour wheel from one of its six corners to the next: more where the eye distinguishes more hues (Baker
# et al. 2011, "A Database and Evaluation Methodology for Optical Flow", section 4.1).
_CORNERS = ((255, 0, 0), (255, 255, 0), (0, 255, 0), (0, 255, 255), (0, 0, 255), (255, 0, 255))
_STEPS = (15, 6, 4, 11, 13, 6)


def dis(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Computes flow by dense inverse search (Kroeger et al. 2016) with OpenCV's medium preset.

    Args:
      first: frames (n, h, w, 3) uint8 RGB, at least 12 pixels high and wide.
      second: the frames to which flow is computed, as `first`.

    Returns:
      (n, h, w, 2) float32; each pair is independent of the others.
    """
    import cv2

    search = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    out = np.empty((*first.shape[:3], 2), np.float32)
    for flow, *pair in zip(out, first, second, strict=True):
        flow[:] = search.calc(*(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in pair), None)
    return out


def ends(present: np.ndarray, window: int, stride: int) -> np.ndarray:
    """Returns the frames at which a flow ends, (k,) ascending indices: flow k is from ends[k] - window to ends[k].

    These are every `stride`-th frame that has a frame `window` before it and shows the face, as `present` (t,) states.
    """
    return np.arange(window + -window % stride, len(present), stride)[present[window + -window % stride :: stride]]


def held(ends: np.ndarray, count: int) -> np.ndarray:
    """Returns the index of the last flow that ended by each of `count` frames, (count,); -1, no motion, before any."""
    return np.searchsorted(ends, np.arange(count), side="right") - 1


def spread(flows: Iterable[np.ndarray]) -> float:
    """Computes the standard deviation of the magnitude over all pixels of a clip's flows, in parts (k, h, w, 2)."""
    count, total, squares = 0, 0.0, 0.0
    for part in flows:
        x, y = (part[..., i].astype(np.float32) for i in range(2))
        square = x * x + y * y
        count, squares = count + square.size, squares + square.sum(dtype=np.float64)
        total += np.sqrt(square).sum(dtype=np.float64)
    mean = total / max(count, 1)
    return float(np.sqrt(max(squares / max(count, 1) - mean * mean, 0)))


def draw(flow: np.ndarray, spread: float) -> np.ndarray:
    """Renders flow (…, h, w, 2) as images (…, h, w, 3) uint8 RGB: hue is direction, saturation is magnitude.

    Pixels without motion are white. Magnitudes are divided by `spread` and clipped at `MOST`, so that the same motion
    has the same colour in all frames of a clip, and near and distant faces look alike.
    """
    import cv2

    # As one tall image; red is to the right, as in Baker et al.
    x, y = (np.ascontiguousarray(flow[..., i], np.float32).reshape(-1, flow.shape[-2]) for i in range(2))
    strength, turn = cv2.cartToPolar(x, y)
    np.minimum(strength / ((spread + _EPS) * MOST), 1, out=strength)
    paleness = 255 - _wheel()
    hues = (turn * np.float32(len(paleness) / (2 * np.pi))).astype(np.int32) % len(paleness)
    return np.rint(255 - strength[..., None] * paleness[hues]).astype(np.uint8).reshape(*flow.shape[:-1], 3)


def grid(flow: np.ndarray, spread: float, cells: int = 7) -> np.ndarray:
    """Averages flow (n, h, w, 2) to the right, down and in magnitude over each of `cells` x `cells` cells.

    Flow is scaled and clipped as in `draw`. The result is (n, 3 · cells²) float32, between -1 and 1.
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
    """Returns the fully saturated colours around the wheel, (1024, 3) float32, beginning with red."""
    corners = np.array(_CORNERS + _CORNERS[:1], np.float32)
    positions = np.cumsum((0, *_STEPS)) / sum(_STEPS)
    return np.stack(
        [np.interp(np.arange(1024) / 1024, positions, channel) for channel in corners.T], -1, dtype=np.float32
    )
