"""A talking face from one portrait: the image is warped along its landmarks, one facial action unit at a time.

The portrait is of Eileen Collins, NASA, in the public domain; `data/demo/portrait.json` holds its source and the
landmarks that are moved or fixed. A unit is a field of displacements over the image, linear in its strength, so an
expression is a weighted sum of fields and one remapping of the pixels.
"""

import dataclasses
import functools
from collections.abc import Mapping

import numpy as np

from avjax.utils import paths
from avjax.utils.storage import read_json

# Landmarks of the MediaPipe mesh by the part of the face that they move with: those on the left of the image, and their
# mirror images. Points on the midline are in both.
_PARTS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "mouth_corner": ((61, 185, 146), (291, 409, 375)),
    "mouth_side": ((40, 91, 57), (270, 321, 287)),
    "upper_lip": ((39, 37, 0), (269, 267, 0)),
    "upper_lip_inside": ((191, 80, 81, 82, 13), (415, 310, 311, 312, 13)),
    "lower_lip_inside": ((95, 88, 178, 87, 14), (324, 318, 402, 317, 14)),
    "lower_lip": ((91, 181, 84, 17), (321, 405, 314, 17)),
    "below_lip": ((182, 83, 18, 200), (406, 313, 18, 200)),
    "chin": ((176, 148, 152), (400, 377, 152)),
    "jaw": ((150, 149, 136), (379, 378, 365)),
    "brow_inner": ((107, 55, 66), (336, 285, 296)),
    "brow_middle": ((65, 105, 52), (295, 334, 282)),
    "brow_outer": ((63, 53, 70, 46), (293, 283, 300, 276)),
    "upper_lid": ((159, 158, 160, 161, 157), (386, 385, 387, 388, 384)),
    "lower_lid": ((145, 144, 153, 163, 154), (374, 380, 373, 390, 381)),
    "nostril": ((98, 48, 64), (327, 278, 294)),
    "above_lip": ((165, 164), (391, 164)),
    "cheek": ((205, 50, 101), (425, 280, 330)),
    "held": (
        (33, 133, 168, 6, 4, 1, 2, 172, 58, 132, 93, 234, 127, 162, 21, 54, 103, 67, 109, 10),
        (263, 362, 168, 6, 4, 1, 2, 397, 288, 361, 323, 454, 356, 389, 251, 284, 332, 297, 338, 10),
    ),
}

# Displacements of a unit at strength 1: part → (outwards, down), in widths of the face. Tuned by eye and by MediaPipe's
# blendshapes of the result; the numbers in comments are those of the Facial Action Coding System.
_SMILE = {
    "mouth_corner": (0.07, -0.07),
    "mouth_side": (0.045, -0.04),
    "upper_lip": (0.02, -0.01),
    "upper_lip_inside": (0.03, -0.01),
    "lower_lip_inside": (0.03, -0.02),
    "lower_lip": (0.02, -0.01),
    "cheek": (0.01, -0.03),
}
UNITS: dict[str, dict[str, tuple[float, float]]] = {
    "inner_brow_raiser": {"brow_inner": (-0.01, -0.07), "brow_middle": (0, -0.03)},  # 1
    "outer_brow_raiser": {"brow_outer": (0, -0.06), "brow_middle": (0, -0.06)},  # 2
    "brow_lowerer": {"brow_inner": (-0.03, 0.05), "brow_middle": (-0.02, 0.05), "brow_outer": (-0.01, 0.03)},  # 4
    "upper_lid_raiser": {"upper_lid": (0, -0.03), "lower_lid": (0, 0.01)},  # 5
    "lid_tightener": {"lower_lid": (0, -0.025), "upper_lid": (0, 0.01), "cheek": (0, -0.02)},  # 7
    "upper_lip_raiser": {  # 9, 10
        "upper_lip": (0, -0.045),
        "mouth_side": (0, -0.02),
        "upper_lip_inside": (0, -0.04),
        "nostril": (0.01, -0.03),
        "above_lip": (0, -0.03),
        "cheek": (0, -0.02),
    },
    "lip_corner_puller": _SMILE,  # 12
    "one_lip_corner_puller": _SMILE,  # 12, only on the right of the image
    "lip_corner_depressor": {  # 15
        "mouth_corner": (0.01, 0.07),
        "mouth_side": (0.01, 0.045),
        "lower_lip": (0, 0.02),
        "lower_lip_inside": (0, 0.015),
    },
    "lip_pucker": {  # 18
        "mouth_corner": (-0.09, 0),
        "mouth_side": (-0.07, 0),
        "upper_lip": (-0.04, -0.012),
        "lower_lip": (-0.04, 0.012),
        "upper_lip_inside": (-0.04, 0),
        "lower_lip_inside": (-0.04, 0),
    },
    "lip_stretcher": {  # 20
        "mouth_corner": (0.09, 0.02),
        "mouth_side": (0.06, 0.02),
        "upper_lip": (0.03, 0),
        "lower_lip": (0.03, 0.02),
        "upper_lip_inside": (0.04, 0),
        "lower_lip_inside": (0.04, 0.01),
    },
    "lip_pressor": {  # 24
        "upper_lip": (0, 0.028),
        "lower_lip": (0, -0.033),
        "upper_lip_inside": (0, 0.01),
        "lower_lip_inside": (0, -0.01),
    },
    "jaw_drop": {  # 26
        "lower_lip_inside": (0, 0.11),
        "lower_lip": (0, 0.11),
        "below_lip": (0, 0.105),
        "chin": (0, 0.095),
        "jaw": (-0.01, 0.07),
        "mouth_corner": (-0.03, 0.04),
        "mouth_side": (-0.02, 0.04),
        "upper_lip_inside": (-0.01, -0.01),
    },
    "blink": {"upper_lid": (0, 0.065)},  # 45
    "lips_together": {  # hides the portrait's teeth
        "upper_lip_inside": (0, 0.033),
        "lower_lip_inside": (0, -0.033),
        "lower_lip": (0, -0.02),
        "upper_lip": (0, 0.01),
    },
}
_ONE_SIDED = ("one_lip_corner_puller",)
# The portrait smiles: these units bring it to rest.
_REST = {"lip_corner_puller": -0.9, "lips_together": 1.0}
_MOUTH = (191, 80, 81, 82, 13, 312, 311, 310, 415, 324, 318, 402, 317, 14, 87, 178, 88, 95)  # around the inner lips
_MOUTH_COLOUR = (58, 22, 24)


@dataclasses.dataclass(frozen=True)
class Portrait:
    """A face that can be moved.

    Attributes:
      image: (s, s, 3) uint8 RGB.
      fields: (units, s/2, s/2, 2) float32, displacement in pixels at strength 1, in the order of `UNITS`; of every
        second pixel, as they are smooth.
      mouth: the ring of the inner lips (m, 2), and its displacements (units, m, 2).
    """

    image: np.ndarray
    fields: np.ndarray
    mouth: tuple[np.ndarray, np.ndarray]

    def render(self, strengths: Mapping[str, float], affine: np.ndarray | None = None) -> np.ndarray:
        """Renders the face with units at `strengths` beyond rest, transformed by `affine` (2, 3): (s, s, 3) uint8 RGB.

        Raises:
          KeyError: there is no such unit.
        """
        import cv2

        weight = np.zeros(len(UNITS), np.float32)
        order = {name: i for i, name in enumerate(UNITS)}
        for part in (_REST, strengths):
            for name, strength in part.items():
                weight[order[name]] += strength
        size = self.image.shape[1::-1]
        grid = _grid(size[0])
        forward = cv2.resize(np.tensordot(weight, self.fields, 1), size)
        backward = forward
        # The source of a pixel is where the field moves it from: a fixed point, approximated in a few steps.
        for _ in range(3):
            backward = cv2.remap(forward, grid - backward, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        image = cv2.remap(self.image, grid - backward, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        image = self._open_mouth(image, weight)
        if affine is None:
            return image
        return cv2.warpAffine(image, affine, size, borderMode=cv2.BORDER_REPLICATE)

    def _open_mouth(self, image: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """Darkens the area between the lips as they part: otherwise only the teeth would be stretched."""
        import cv2

        ring, fields = self.mouth
        gap = max(0.0, float(weight[list(UNITS).index("jaw_drop")]))
        if gap == 0:
            return image
        shape = np.zeros(image.shape[:2], np.float32)
        cv2.fillPoly(shape, [np.round(ring + np.tensordot(weight, fields, 1)).astype(np.int32)], 1.0)
        alpha = cv2.GaussianBlur(shape, (0, 0), 1.2)[..., None] * np.float32(min(1.0, 1.4 * gap) * 0.9)
        return np.round(image + (np.array(_MOUTH_COLOUR, np.float32) - image) * alpha).astype(np.uint8)


@functools.cache
def portrait() -> Portrait:
    """Loads the portrait and computes its fields, once per process."""
    import cv2
    from scipy.interpolate import RBFInterpolator

    content = read_json(paths.path("data/demo/portrait.json"))
    image = cv2.cvtColor(cv2.imread(str(paths.path("data/demo/portrait.png"))), cv2.COLOR_BGR2RGB)
    size = len(image)
    points = {int(i): p for i, p in content["landmarks"].items()}
    names = sorted(points)
    moves = _displacements(names, content["face_width"])
    edge = np.linspace(0, size - 1, 8)
    frame = np.array([(x, y) for x in edge for y in edge if {x, y} & {0, size - 1}])
    centres = np.concatenate([np.array([points[i] for i in names]), frame])
    values = np.concatenate([moves, np.zeros((len(UNITS), len(frame), 2))], 1)
    flat = values.transpose(1, 0, 2).reshape(len(centres), -1)
    half = size // 2
    fields = RBFInterpolator(centres, flat, kernel="linear")(2 * _grid(half).reshape(-1, 2) + 0.5)
    fields = fields.reshape(half, half, len(UNITS), 2).transpose(2, 0, 1, 3).astype(np.float32)
    # Smooths the kinks at the landmarks.
    fields = np.stack([cv2.GaussianBlur(field, (0, 0), 1) for field in fields])
    ring = [names.index(i) for i in _MOUTH]
    return Portrait(image, fields, (centres[ring].astype(np.float32), moves[:, ring].astype(np.float32)))


def _displacements(names: list[int], width: float) -> np.ndarray:
    """Returns the displacements (units, landmarks, 2) in pixels."""
    out = np.zeros((len(UNITS), len(names), 2))
    at = {landmark: i for i, landmark in enumerate(names)}
    for unit, (name, moved) in enumerate(UNITS.items()):
        for part, (outwards, down) in moved.items():
            left, right = _PARTS[part]
            for side, landmarks in ((-1, left), (1, right)):
                if name in _ONE_SIDED and side < 0:
                    continue
                for landmark in landmarks:
                    middle = landmark in left and landmark in right
                    out[unit, at[landmark]] = (0 if middle else side * outwards * width, down * width)
    return out


@functools.cache
def _grid(size: int) -> np.ndarray:
    """Returns the x and y of each pixel, (size, size, 2) float32."""
    return np.stack(np.meshgrid(np.arange(size), np.arange(size)), -1).astype(np.float32)
