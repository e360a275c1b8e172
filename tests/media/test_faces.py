"""Faces: tracking on plain boxes, crops of plain images, the landmarker on real clips."""

import numpy as np
import pytest

from avjax.encoders import weights
from avjax.errors import AvjaxError
from avjax.media import faces as f
from avjax.media.video import Frames, read_frames


def box(x, y, side):
    return (x, y, x + side, y + side)


def boxes(*per_frame):
    return [np.array(frame, np.float32).reshape(-1, 4) for frame in per_frame]


def made(images, rows, blendshapes=None):
    """Faces with the given boxes; a row of None is a frame without a face."""
    present = np.array([row is not None for row in rows])
    return f.Faces(
        present=present,
        boxes=np.array([row or (0, 0, 0, 0) for row in rows], np.float32),
        blendshapes=np.zeros((len(images), 52), np.float32) if blendshapes is None else blendshapes,
        pose=np.zeros((len(images), 6), np.float32),
        several=0,
    )


def crops(frames, faces, **options):
    return f.crops(frames, faces.present, faces.boxes, **options)


def test_the_largest_face_comes_first():
    assert f.follow(boxes([box(0, 0, 10), box(50, 0, 30)])) == [1]


def test_the_followed_face_stays_although_another_grows_larger():
    left, right = box(0, 0, 20), box(50, 0, 10)
    assert f.follow(boxes([left, right], [box(50, 0, 40), box(2, 0, 20)], [box(4, 0, 20)])) == [0, 1, 0]


def test_the_best_overlap_wins():
    assert f.follow(boxes([box(0, 0, 20)], [box(12, 0, 20), box(3, 0, 20)])) == [0, 1]


def test_a_lost_face_gives_way_to_the_largest():
    assert f.follow(boxes([box(0, 0, 20)], [], [box(0, 0, 20), box(50, 0, 40)])) == [0, None, 1]
    assert f.follow(boxes([box(0, 0, 20)], [box(60, 0, 5), box(80, 0, 9)])) == [0, 1]


def test_crops_show_the_box_with_its_margin():
    image = np.zeros((100, 200, 3), np.uint8)
    image[40:60, 90:110] = 255
    frames = Frames(image[None], np.zeros(1))
    crop = crops(frames, made(image[None], [box(90, 40, 20)]), size=60, margin=0.25)[0]
    assert crop.shape == (60, 60, 3)
    assert crop[11:49, 11:49].min() == 255  # a 20-pixel face in a 30-pixel square
    assert crop[:9].max() == crop[:, 51:].max() == 0


def test_shrinking_averages():
    image = np.random.default_rng(0).integers(0, 256, (400, 400, 3), np.uint8)
    crop = crops(Frames(image[None], np.zeros(1)), made(image[None], [box(0, 0, 400)]), size=20, margin=0.0)[0]
    assert np.abs(crop.astype(float) - 127.5).max() < 25


def test_a_tall_box_is_not_stretched():
    image = np.zeros((100, 100, 3), np.uint8)
    image[30:70, 40:60] = 255
    crop = crops(Frames(image[None], np.zeros(1)), made(image[None], [(40, 30, 60, 70)]), size=40, margin=0.0)[0]
    lit = crop[..., 0] > 127
    assert lit.all(1).sum() == 0
    assert (lit.any(1).sum(), lit.any(0).sum()) == (40, 20)


def test_beyond_the_image_its_edge_is_repeated():
    image = np.full((50, 50, 3), 40, np.uint8)
    image[:, :5] = 200
    crop = crops(Frames(image[None], np.zeros(1)), made(image[None], [box(-20, 10, 30)]), size=30, margin=0.0)[0]
    assert np.all(crop[:, :25] == 200)
    assert np.all(crop[:, 25:] == 40)


def test_a_frame_without_a_face_is_zero():
    images = np.full((2, 40, 80, 3), 9, np.uint8)
    some = made(images, [box(10, 10, 20), None])
    shown, empty = crops(Frames(images, np.arange(2.0)), some, size=16)
    assert shown.min() == 9
    assert not empty.any()


def coloured():
    """Returns an image (40, 60) whose columns are numbered in red and whose rows in green."""
    y, x = np.mgrid[:40, :60].astype(np.uint8)
    return np.stack([x, y, np.full_like(x, 200)], -1)


def boxed(box, size=10, **options):
    frames = Frames(np.stack([coloured()] * 2), np.arange(2.0))
    out = f.boxed(frames, np.array([True, False]), np.array([box, box], np.float32), size, **options)
    assert (out.shape, out.dtype) == ((2, size, size, 3), np.uint8)
    assert not out[1].any(), "no face, nothing cut"
    return out[0]


def test_a_box_is_cut_out_as_it_is():
    np.testing.assert_array_equal(boxed((20, 10, 30, 20)), coloured()[10:20, 20:30])
    np.testing.assert_array_equal(boxed((19.6, 10.4, 30.4, 19.6)), coloured()[10:20, 20:30], "to the nearest pixel")
    tall = boxed((20, 0, 30, 40))
    assert (np.diff(tall[0, :, 0].astype(int)) == 1).all()
    assert tall[-1, 0, 1] >= 37, "stretched to a square"


def test_a_box_that_extends_beyond_the_image_is_clamped_to_it():
    np.testing.assert_array_equal(boxed((-10, -5, 10, 10)), boxed((0, 0, 10, 10)))
    np.testing.assert_array_equal(boxed((50, 30, 75, 99)), coloured()[30:, 50:])
    assert not boxed((-20, 0, -5, 10)).any(), "nothing is beside the image"


def test_a_box_that_is_not_clamped_counts_from_the_far_side():
    np.testing.assert_array_equal(boxed((50, 30, 75, 99), clamped=False), coloured()[30:, 50:])
    assert not boxed((-10, 0, 10, 10), clamped=False).any(), "from the 50th column to the 10th is nothing"
    assert not boxed((0, -5, 10, 10), clamped=False).any()
    np.testing.assert_array_equal(boxed((-20, 0, -10, 10), clamped=False), coloured()[:10, 40:50])


def units(values: dict[str, list[float]], steps: int) -> dict[str, np.ndarray]:
    """Action units of `steps` frames whose named blendshapes have the given values; all others are 0."""
    shapes = np.zeros((steps, 52), np.float32)
    for name, column in values.items():
        shapes[:, f.BLENDSHAPES.index(name)] = column
    out = f.action_units(shapes, np.ones(steps, bool))
    assert out.dtype == np.float32
    return dict(zip(f.AU_NAMES, out.T, strict=True))


def test_both_sides_are_averaged_onto_the_scale_of_five():
    au = units({"mouthSmileLeft": [0, 0, 0.8, 1], "mouthSmileRight": [0, 0, 0.4, 1]}, 4)
    np.testing.assert_allclose(au["AU12"], [0, 0, 3, 5], atol=1e-6)
    assert not au["AU1"].any()


def test_a_smile_held_throughout_stays():
    au = units({"mouthSmileLeft": [0.7] * 8, "mouthSmileRight": [0.7] * 8}, 8)
    np.testing.assert_allclose(au["AU12"], 5 * (0.7 - 0.1), atol=1e-6)


def test_a_small_resting_value_is_neutral():
    au = units({"mouthSmileLeft": [0.06] * 8, "mouthSmileRight": [0.06] * 8}, 8)
    np.testing.assert_allclose(au["AU12"], 0, atol=1e-6)


def test_brows_count_from_where_they_rest():
    au = units({"browInnerUp": [0.5] * 9 + [0.9]}, 10)
    np.testing.assert_allclose(au["AU1"], [0] * 9 + [2.0], atol=1e-6)


def test_frames_without_a_face_neither_show_nor_count():
    shapes = np.zeros((4, 52), np.float32)
    shapes[:, f.BLENDSHAPES.index("browInnerUp")] = [0.5, 0.5, 0.0, 0.0]
    au = f.action_units(shapes, np.array([True, True, False, False]))
    assert not au.any()  # the neutral is 0.5, not the zero of the empty frames
    assert not f.action_units(np.ones((3, 52), np.float32), np.zeros(3, bool)).any()


def test_every_unit_reads_real_blendshapes():
    assert len(f.BLENDSHAPES) == len(set(f.BLENDSHAPES)) == 52
    assert all(set(names) <= set(f.BLENDSHAPES) for names in f.AU_BLENDSHAPES.values())


def test_a_missing_model_is_a_clear_error(tmp_path):
    with pytest.raises(AvjaxError, match=r"nowhere.task: no such file"):
        f.FaceTracker(tmp_path / "nowhere.task")


@pytest.fixture(scope="module")
def tracker():
    with f.FaceTracker(weights.fetch("face_landmarker")) as tracker:
        yield tracker


def clip(java_sed, name, count=6):
    return read_frames(java_sed / "mp4" / f"{name}_01.mp4", count=count)


def equal(a: f.Faces, b: f.Faces) -> bool:
    return all(np.array_equal(getattr(a, k), getattr(b, k)) for k in ("present", "boxes", "blendshapes", "pose"))


@pytest.mark.weights
def test_a_real_face(tracker, java_sed):
    frames = clip(java_sed, "01-01-01")
    faces = tracker.track(frames)
    assert faces.present.all()
    assert faces.several == 0
    assert faces.blendshapes.shape == (6, 52)
    assert faces.blendshapes.max() <= 1
    assert np.abs(faces.pose[:, :3]).max() < 0.5  # she looks into the camera
    assert np.all(faces.pose[:, 5] < -1)  # and sits before it
    centres = (faces.boxes[:, :2] + faces.boxes[:, 2:]) / 2
    assert np.all(np.abs(centres - [180, 135]) < 60)
    assert crops(frames, faces).shape == (6, 224, 224, 3)


@pytest.mark.weights
def test_a_clip_never_influences_another(tracker, java_sed):
    first, second = clip(java_sed, "01-01-01"), clip(java_sed, "07-02-03")
    alone = tracker.track(second)
    tracker.track(first)
    assert equal(tracker.track(second), alone)
    with f.FaceTracker(weights.fetch("face_landmarker")) as fresh:
        assert equal(fresh.track(second), alone)


@pytest.mark.weights
def test_a_smile_is_seen(tracker, java_sed):
    happy, neutral = (tracker.track(clip(java_sed, name)) for name in ("02-01-03", "02-01-01"))
    smile = f.AU_NAMES.index("AU12")
    assert np.percentile(f.action_units(happy.blendshapes, happy.present)[:, smile], 90) > 2
    assert np.percentile(f.action_units(neutral.blendshapes, neutral.present)[:, smile], 90) < 1


@pytest.mark.weights
def test_frames_without_a_face_are_zero(tracker, java_sed):
    frames = clip(java_sed, "01-01-01")
    frames.images[2] = 0
    faces = tracker.track(frames)
    assert faces.present.tolist() == [True, True, False, True, True, True]
    for rows in (faces.boxes, faces.blendshapes, faces.pose):
        assert not rows[2].any()
    nothing = tracker.track(Frames(np.zeros((2, 64, 64, 3), np.uint8), np.arange(2.0)))
    assert not nothing.present.any()


@pytest.mark.weights
def test_of_two_faces_one_is_followed(tracker, java_sed):
    left, right = clip(java_sed, "01-01-01"), clip(java_sed, "06-01-01")
    both = Frames(np.concatenate([left.images, right.images], axis=2), left.times)
    faces = tracker.track(both)
    assert faces.several == 6
    sides = (faces.boxes[:, 0] + faces.boxes[:, 2]) / 2 > left.images.shape[2]
    assert len(set(sides.tolist())) == 1
