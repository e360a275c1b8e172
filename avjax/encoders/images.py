"""Preprocessing of images: resizing, cropping, rescaling and normalisation by preprocessor_config.json; and patches.

Results equal those of the image processors of transformers (their Pillow backend). `prepare` is `framed`, whose results
are uint8, followed by the rescaling and normalisation that `normalised` does on the device.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from avjax.errors import AvjaxError

_HALF = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}
_CLIP = {
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
_BILINEAR, _BICUBIC = 2, 3  # the hub's files number Pillow's filters
_ALWAYS = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "rescale_factor": 1 / 255,
    "rescale_offset": False,
    "include_top": False,
}
_SQUARE = {"size": 224, "default_to_square": True, "resample": _BILINEAR, "do_center_crop": False}
_SHORTEST = {
    "size": 224,
    "default_to_square": False,
    "resample": _BICUBIC,
    "do_center_crop": True,
    "crop_size": 224,
}
# Settings that each step needs.
_NEEDED = {
    "do_resize": ("size", "resample"),
    "do_center_crop": ("crop_size",),
    "do_rescale": ("rescale_factor",),
    "do_normalize": ("image_mean", "image_std"),
    "include_top": ("image_std",),
}
# Defaults of each processor for settings missing in its file.
DEFAULTS: dict[str, dict[str, Any]] = {
    "ViTImageProcessor": _ALWAYS | _SQUARE | _HALF,
    "BitImageProcessor": _ALWAYS | _SHORTEST | _CLIP,
    "CLIPImageProcessor": _ALWAYS | _SHORTEST | _CLIP,
    "EfficientNetImageProcessor": _ALWAYS
    | _HALF
    | {"size": 346, "default_to_square": True, "resample": _BICUBIC, "do_center_crop": False, "crop_size": 289}
    | {"include_top": True},
}


def prepare(
    images: np.ndarray | Sequence[np.ndarray], settings: Mapping[str, Any], processor: str = "ViTImageProcessor"
) -> np.ndarray:
    """Preprocesses images.

    Args:
      images: RGB images, uint8: (n, height, width, 3), or n arrays (height, width, 3) of any sizes.
      settings: the contents of preprocessor_config.json.
      processor: the key of DEFAULTS to use if `settings` do not name their processor.

    Returns:
      (n, height, width, 3) float32.

    Raises:
      AvjaxError: there are no images, they are not RGB uint8, or their final sizes differ; or unsupported settings.
    """
    return _scaled(framed(images, settings, processor), _filled(settings, processor))


def framed(
    images: np.ndarray | Sequence[np.ndarray], settings: Mapping[str, Any], processor: str = "ViTImageProcessor"
) -> np.ndarray:
    """Resizes and crops images, still (n, height, width, 3) uint8; arguments and errors as for `prepare`."""
    settings = _filled(settings, processor)
    for image in images:
        _check(image)
    pixels = [_framed(image, settings) for image in images]
    if len(sizes := {p.shape for p in pixels}) != 1:
        raise AvjaxError(f"{len(pixels)} images, after resizing of sizes {sorted(sizes)}: expected one size for all")
    return np.stack(pixels)


def normalised(pixels: jax.Array, settings: Mapping[str, Any], processor: str = "ViTImageProcessor") -> jax.Array:
    """Rescales and normalises `framed` pixels (..., 3) as `prepare` does, but on the device.

    Each channel is one product and one sum in float32. Results within ±4, as with the usual means and deviations,
    differ from those of `prepare` by at most 2e-6.

    Raises:
      AvjaxError: unsupported settings, as for `prepare`.
    """
    black, white = _scaled(np.array([[0] * 3, [255] * 3], np.uint8), _filled(settings, processor))
    axes = tuple(range(pixels.ndim - 1))
    factor, offset = (jnp.expand_dims(channel, axes) for channel in ((white - black) / 255, black))
    return pixels.astype(jnp.float32) * factor + offset


def _filled(settings: Mapping[str, Any], processor: str) -> dict[str, Any]:
    """Fills `settings` with the defaults of their processor; a null in them stays, and turns a step off."""
    named = settings.get("image_processor_type") or settings.get("feature_extractor_type") or processor
    kind = named.removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")
    if kind not in DEFAULTS:
        raise AvjaxError(f"image processor {named!r} is not known; known are {', '.join(DEFAULTS)}")
    if settings.get("do_pad"):
        raise AvjaxError("preprocessor_config.json asks for do_pad, which is not supported; images are only cropped")
    filled = DEFAULTS[kind] | dict(settings)
    missing = [key for step, keys in _NEEDED.items() if filled[step] for key in keys if filled.get(key) is None]
    if missing:
        raise AvjaxError(f"preprocessor_config.json of a {kind} lacks {', '.join(missing)}")
    return filled


def _check(image: np.ndarray) -> None:
    if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8 or not image.size:
        raise AvjaxError(
            f"an image {image.shape} {image.dtype}: expected RGB (height, width, 3) uint8; repeat the channel of a "
            "grey image three times, drop the fourth channel of one with transparency"
        )


def _framed(image: np.ndarray, settings: Mapping[str, Any]) -> np.ndarray:
    """Resizes and crops an image, still uint8."""
    if settings["do_resize"]:
        image = _resized(image, _target(image.shape[:2], settings), settings["resample"])
    if settings["do_center_crop"]:
        image = _cropped(image, _sides(settings["crop_size"]))
    return image


def _target(size: tuple[int, int], settings: Mapping[str, Any]) -> tuple[int, int]:
    """Returns the (height, width) to which an image of `size` is resized."""
    target = settings["size"]
    if isinstance(target, int) and not settings["default_to_square"]:
        target = {"shortest_edge": target}
    if isinstance(target, int) or set(target) != {"shortest_edge"}:
        return _sides(target)
    short, (height, width) = target["shortest_edge"], size
    if width <= height:
        return int(short * height / width), short
    return short, int(short * width / height)


def _sides(size: int | Mapping[str, int]) -> tuple[int, int]:
    """Returns the (height, width) of a size in preprocessor_config.json."""
    if isinstance(size, int):
        return size, size
    if set(size) != {"height", "width"}:
        raise AvjaxError(f"size {size} in preprocessor_config.json: expected height and width, or shortest_edge alone")
    return size["height"], size["width"]


def _resized(image: np.ndarray, size: tuple[int, int], resample: int) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling(resample)))


def _cropped(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Crops the centre of an image, padded with black if it is too small."""
    missing = [max(want - have, 0) for want, have in zip(size, image.shape[:2], strict=True)]
    image = np.pad(image, [*((n - n // 2, n // 2) for n in missing), (0, 0)])
    top, left = ((have - want) // 2 for want, have in zip(size, image.shape[:2], strict=True))
    return image[top : top + size[0], left : left + size[1]]


def _scaled(pixels: np.ndarray, settings: Mapping[str, Any]) -> np.ndarray:
    factor = settings["rescale_factor"] if settings["do_rescale"] else 1
    levels = (np.arange(256) * factor).astype(np.float32)  # one product a level, not a pixel
    if settings["do_rescale"] and settings["rescale_offset"]:
        levels -= 1
    scaled = levels[pixels]
    if settings["do_normalize"]:
        scaled = (scaled - np.float32(settings["image_mean"])) / np.float32(settings["image_std"])
    # EfficientNet's processor divides once more if the classifier follows.
    return scaled / np.float32(settings["image_std"]) if settings["include_top"] else scaled


def unfold(pixels: Any, grid: tuple[int, int]) -> Any:
    """Cuts images into the patches of a grid of (rows, columns), row by row.

    A convolution whose stride equals its window is one matrix product of these patches.
    (b, h, w, 3) → (b, patches, patch height, patch width, 3), NumPy or JAX.
    """
    b, height, width, channels = pixels.shape
    rows, columns = grid
    tiles = pixels.reshape(b, rows, height // rows, columns, width // columns, channels)
    return tiles.swapaxes(2, 3).reshape(b, rows * columns, height // rows, width // columns, channels)
