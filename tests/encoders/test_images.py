"""Preprocessing of images, which equals that of the image processors of transformers."""

import numpy as np
import pytest

from avjax.encoders import images
from avjax.errors import AvjaxError

# Portrait, landscape, smaller and larger than the target, of exactly its size, with odd sides.
SIZES = [(37, 53), (480, 641), (641, 479), (224, 224), (256, 256), (90, 700), (225, 223), (1, 2)]
DINO = {
    "size": {"shortest_edge": 256},
    "crop_size": {"height": 224, "width": 224},
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
}
EFFICIENTNET_B2 = {
    "size": {"height": 260, "width": 260},
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.47853944, 0.4732864, 0.47434163],
    "resample": 0,
    "rescale_offset": False,
    "include_top": True,
}
OFF = {"do_resize": False, "do_center_crop": False, "do_rescale": False, "do_normalize": False}


def frames(sizes=SIZES):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]


def theirs(processor, settings, raw):
    """The output of transformers through Pillow, channels last."""
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.efficientnet.image_processing_pil_efficientnet import EfficientNetImageProcessorPil
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    classes = (ViTImageProcessorPil, BitImageProcessorPil, CLIPImageProcessorPil, EfficientNetImageProcessorPil)
    made = {c.__name__.removesuffix("Pil"): c for c in classes}[processor](**settings)
    return made(raw, return_tensors="np", input_data_format="channels_last")["pixel_values"].transpose(0, 2, 3, 1)


@pytest.mark.parametrize(
    ("processor", "settings"),
    [
        ("ViTImageProcessor", {}),
        ("ViTImageProcessor", {"size": 64}),
        ("ViTImageProcessor", {"size": {"height": 30, "width": 50}, "resample": 3}),
        ("ViTImageProcessor", {"size": 50, "default_to_square": False, "do_center_crop": True, "crop_size": 40}),
        ("ViTImageProcessor", {"do_normalize": False, "rescale_factor": 0.007}),
        ("ViTImageProcessor", {"do_rescale": False}),
        ("BitImageProcessor", {}),
        ("BitImageProcessor", DINO),
        ("BitImageProcessor", {"do_center_crop": None, "size": {"height": 44, "width": 33}}),
        ("CLIPImageProcessor", {}),
        ("CLIPImageProcessor", {"size": 336, "crop_size": 336}),
        ("CLIPImageProcessor", {"size": 100, "crop_size": {"height": 111, "width": 90}, "resample": 0}),
        ("CLIPImageProcessor", {"image_mean": 0.5, "image_std": 0.25}),
        ("EfficientNetImageProcessor", {}),
        ("EfficientNetImageProcessor", EFFICIENTNET_B2),
        ("EfficientNetImageProcessor", {"rescale_offset": True, "rescale_factor": 1 / 127.5, "include_top": False}),
        ("EfficientNetImageProcessor", {"size": 33, "do_normalize": False, "do_center_crop": True}),
    ],
)
def test_equal_to_the_processors_of_transformers(processor, settings):
    want = theirs(processor, settings, frames())
    got = images.prepare(frames(), settings, processor)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


def test_one_array_is_as_good_as_a_sequence():
    raw = np.stack(frames([(50, 60)] * 3))
    np.testing.assert_array_equal(images.prepare(raw, {}), images.prepare(list(raw), {}))


@pytest.mark.parametrize(
    ("name", "processor"),
    [
        ({"image_processor_type": "BitImageProcessor"}, "BitImageProcessor"),
        ({"image_processor_type": "CLIPImageProcessorFast"}, "CLIPImageProcessor"),
        ({"feature_extractor_type": "CLIPFeatureExtractor"}, "CLIPImageProcessor"),
        ({}, "ViTImageProcessor"),
    ],
)
def test_the_file_says_which_processor_fills_in_what_it_leaves_out(name, processor):
    raw = frames([(50, 60)])
    np.testing.assert_allclose(images.prepare(raw, name), theirs(processor, {}, raw), rtol=0, atol=1e-6)


def test_nothing_is_done_that_is_not_asked_for():
    raw = np.stack(frames([(5, 6)]))
    np.testing.assert_array_equal(images.prepare(raw, OFF), raw.astype(np.float32))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (np.zeros((2, 8, 9), np.uint8), r"an image \(8, 9\) uint8: expected RGB .*grey"),
        ([np.zeros((8, 9, 4), np.uint8)], r"an image \(8, 9, 4\) uint8: expected RGB .*fourth channel"),
        (np.zeros((1, 8, 9, 3), np.float32), r"an image \(8, 9, 3\) float32: expected RGB .*uint8"),
        (np.zeros((1, 0, 9, 3), np.uint8), r"an image \(0, 9, 3\)"),
        ([], "0 images"),
    ],
)
def test_other_pictures_are_refused(raw, message):
    with pytest.raises(AvjaxError, match=message):
        images.prepare(raw, {})


def test_pictures_that_remain_of_different_sizes_are_refused():
    with pytest.raises(AvjaxError, match=r"2 images.*\(5, 6, 3\), \(7, 8, 3\).* one size"):
        images.prepare(frames([(7, 8), (5, 6)]), OFF)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_processor_type": "SamImageProcessor"}, "'SamImageProcessor' is not known; known are ViTImage"),
        ({"do_pad": True}, "do_pad"),
        ({"size": {"shortest_edge": 4, "longest_edge": 9}}, "'longest_edge': 9.* expected height and width"),
        ({"size": {"longest_edge": 9}}, "'longest_edge': 9.* expected height and width"),
        ({"size": None, "image_std": None}, "of a ViTImageProcessor lacks size, image_std"),
        ({"do_center_crop": True}, "lacks crop_size"),
        ({"include_top": True, "do_normalize": False, "image_std": None}, "lacks image_std"),
    ],
)
def test_settings_that_are_not_computed_are_refused(settings, message):
    with pytest.raises(AvjaxError, match=message):
        images.prepare(frames([(7, 8)]), settings)
