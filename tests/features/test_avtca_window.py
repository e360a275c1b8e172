"""Face crops and MFCCs of one span: which frames, which samples, and what is real. The crops show their number."""

import dataclasses
from fractions import Fraction

import av
import numpy as np
import pytest

from avjax.datasets.base import Clip
from avjax.features import avtca_window, presets, provenance
from avjax.features import clip as clip_features
from avjax.features.presets import Window
from avjax.media import faces
from avjax.utils.progress import Stopwatch
from tests import clips
from tests.features.test_clip import NoFace
from tests.media.test_audio import write as write_audio
from tests.media.test_video import write

librosa = pytest.importorskip("librosa", reason="needs avjax[media]")
FRAMES = [3, 10, 17, 24, 31, 39, 46, 53, 60, 67, 75, 82, 89, 96, 103]
RATE = 22050
WINDOW = Window(side=128)
RELEASED = dataclasses.replace(WINDOW, released=True)
WHOLE = (0, 0, 128, 64)


class Boxes:
    """A tracker that finds the given boxes; of None there is no face. The last one is that of all further frames."""

    def __init__(self, *boxes):
        self._boxes = boxes

    def track(self, frames, before=None):
        out = faces._empty(len(frames.times), several=0)
        for t in range(len(out.present)):
            box = self._boxes[min(t, len(self._boxes) - 1)]
            out.present[t], out.boxes[t] = box is not None, box or 0
        return out


def measure(path, window=WINDOW, tracker=None, staged=None, **columns):
    """Measures the window of a clip, with the outer silence of its audio masked."""
    settings = presets.Preset(frames=2, window=window)
    clip = Clip("c", path, "sad", **columns)
    instruments = clip_features.Instruments(settings, tracker or Boxes(WHOLE), Stopwatch(), path.parent / "room")
    return clip_features.measure(clip, instruments, staged)[0]


def numbers(crops):
    """Returns the numbers that are shown in crops of full frames."""
    lower = crops[:, 100, 8::16, 0] > 127
    return (lower @ (1 << np.arange(8))).tolist()


def noise(seconds):
    return np.random.default_rng(0).uniform(-0.5, 0.5, round(seconds * RATE)).astype(np.float32)


def mfcc(samples):
    padded = np.pad(samples, (0, round(3.6 * RATE) - len(samples)))
    return librosa.feature.mfcc(y=padded, sr=RATE, n_mfcc=10).T


def beside(path, samples):
    """Writes an audio file for the film at `path`."""
    return write_audio(path.with_suffix(".wav"), samples, RATE)


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """Six seconds of 30 frames each, with seven seconds of audio in a file of its own."""
    path = write(tmp_path_factory.mktemp("film") / "film.mp4", 180, rate=30)
    beside(path, noise(7))
    return path


def audio_of(film):
    return film.with_suffix(".wav")


def frame_times(seconds, window=WINDOW):
    return avtca_window.frame_times(window, seconds)


@pytest.mark.parametrize("rate", [30, 29.97])
def test_moments_are_in_the_middle_of_the_frames_of_avt_ca(rate):
    assert np.floor(frame_times(3.6) * rate + 1e-9).astype(int).tolist() == FRAMES


def test_moments_are_in_the_middle_of_longer_clips_and_at_the_beginning_of_shorter_ones():
    full = frame_times(3.6)
    np.testing.assert_allclose(frame_times(10.0), full + 3.2)
    np.testing.assert_array_equal(frame_times(1.0), full)
    np.testing.assert_array_equal(frame_times(10.0, RELEASED), full)
    few = Window(seconds=1.0, rate=10, count=5)
    np.testing.assert_allclose(frame_times(1.0, few), [0.15, 0.35, 0.55, 0.75, 0.95])


def test_video_and_audio_are_cut_at_the_same_time(film):
    made = measure(film, audio=audio_of(film))["window"]
    assert (made["images"].shape, made["images"].dtype) == ((15, 128, 128, 3), np.uint8)
    assert numbers(made["images"]) == [36 + n for n in FRAMES], "from 1.2 s of six"
    assert made["images_mask"].all()
    assert (made["mfcc"].shape, made["mfcc"].dtype) == ((156, 10), np.float32)
    first = round(1.2 * RATE)
    np.testing.assert_allclose(made["mfcc"], mfcc(noise(7)[first : first + 79380]), atol=0.05)
    assert made["mfcc_mask"].all()


def test_video_of_2997_frames_gives_the_same_numbers(tmp_path):
    path = write(tmp_path / "film.mp4", 108, rate=Fraction(30000, 1001))
    made = measure(path)["window"]
    assert numbers(made["images"]) == FRAMES


def test_beyond_the_end_of_a_short_clip_all_is_masked(tmp_path):
    path = write(tmp_path / "film.mp4", 60, rate=30)
    made = measure(path, audio=beside(path, noise(2)))["window"]
    assert made["images_mask"].tolist() == 8 * [True] + 7 * [False]
    assert numbers(made["images"][:8]) == FRAMES[:8]
    assert not made["images"][8:].any()
    assert made["mfcc_mask"].sum() == pytest.approx(156 * 2 / 3.6, abs=1)
    assert (np.diff(made["mfcc_mask"].astype(int)) <= 0).all()
    np.testing.assert_allclose(made["mfcc"], mfcc(noise(2)), atol=0.05)


def test_a_part_of_a_file_is_a_clip(film):
    made = measure(film, audio=audio_of(film), start=1.0, end=3.0)["window"]
    assert numbers(made["images"][:8]) == [30 + n for n in FRAMES[:8]]
    assert made["images_mask"].sum() == 8
    np.testing.assert_allclose(made["mfcc"], mfcc(noise(7)[RATE : 3 * RATE]), atol=0.05)


def test_digital_silence_is_masked(film):
    samples = noise(6)
    samples[: 2 * RATE] = samples[4 * RATE :] = 0
    made = measure(film, audio=beside(film.with_name("silent.mp4"), samples))["window"]
    times = 1.2 + np.arange(156) * 3.6 / 156
    sure = np.minimum(np.abs(times - 2), np.abs(times - 4)) > 0.05
    np.testing.assert_array_equal(made["mfcc_mask"][sure], ((times > 2) & (times < 4))[sure])
    made = measure(film, audio=beside(film.with_name("still.mp4"), 0 * samples))["window"]
    assert not made["mfcc_mask"].any()


def test_audio_in_the_middle_of_a_long_clip_counts_although_the_measurements_end_before(tmp_path):
    settings = presets.Preset(max_seconds=1.0, window=Window(seconds=1.0, side=8))
    clip = Clip("c", clips.write_wav(tmp_path / "a.wav", seconds=4), "sad")
    made, _ = clip_features.measure(clip, clip_features.Instruments(settings, NoFace(), Stopwatch(), tmp_path))
    assert made["audio"]["seconds"] == 1
    assert made["window"]["mfcc_mask"].all()


def test_without_video_the_audio_has_its_own_middle(tmp_path):
    path = write_audio(tmp_path / "a.wav", noise(6), RATE)
    made = measure(path)["window"]
    assert not made["images_mask"].any()
    assert made["images"].shape == (15, 128, 128, 3)
    np.testing.assert_allclose(made["mfcc"], mfcc(noise(6)[26460 : 26460 + 79380]), atol=0.05)
    assert made["mfcc_mask"].all()


@pytest.mark.parametrize("window", [WINDOW, RELEASED], ids=["corrected", "released"])
def test_what_is_missing_is_masked_and_finite(film, tmp_path, window):
    mute = measure(film, window)["window"]
    assert mute["images_mask"].all()
    assert not mute["mfcc_mask"].any()
    assert mute["mfcc"].shape == (156, 10)
    assert np.isfinite(mute["mfcc"]).all()
    assert not measure(film, window, NoFace())["window"]["images_mask"].any()
    blind = measure(write_audio(tmp_path / "a.wav", noise(1), RATE), window)["window"]
    assert not blind["images_mask"].any()


def test_a_frame_without_a_face_is_masked(film):
    made = measure(film, tracker=Boxes(WHOLE, None, WHOLE))["window"]
    assert made["images_mask"].tolist() == [True, False, *[True] * 13]
    assert not made["images"][1].any()


def test_a_box_beyond_the_image_is_clamped(film):
    made = measure(film, tracker=Boxes((-50, -9, 128, 64)))["window"]
    assert numbers(made["images"]) == [36 + n for n in FRAMES]


def test_released_crops_are_of_the_beginning_and_audio_of_its_own_middle(film):
    made = measure(film, RELEASED, audio=audio_of(film))["window"]
    assert numbers(made["images"]) == FRAMES
    first = round(1.7 * RATE)
    np.testing.assert_allclose(made["mfcc"], mfcc(noise(7)[first : first + 79380]), atol=0.05)


def test_released_zeros_beyond_the_end_count_as_real(tmp_path):
    path = write(tmp_path / "film.mp4", 60, rate=30)
    made = measure(path, RELEASED, audio=beside(path, noise(2)))["window"]
    assert numbers(made["images"][:8]) == FRAMES[:8]
    assert not made["images"][8:].any()
    assert made["images_mask"].all()
    assert made["mfcc_mask"].all()


def test_released_boxes_are_not_clamped_and_the_last_one_stays(film):
    boxes = (None, (-10, 0, 100, 64), WHOLE, None, None, (0, -5, 128, 50), None, WHOLE)
    made = measure(film, RELEASED, Boxes(*boxes))["window"]
    lit = made["images"].any((1, 2, 3))
    assert lit.tolist() == [False, False, True, True, True, False, False, *[True] * 8]
    assert numbers(made["images"])[3] == FRAMES[3], "the position is the old one, the image is new"
    assert made["images_mask"].all()


def red(path):
    """Writes four seconds of plain red."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for _ in range(40):
            image = np.zeros((64, 64, 3), np.uint8) + np.array((255, 0, 0), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_channels_are_red_green_blue_and_the_other_way_round_as_released(tmp_path):
    path, tracker = red(tmp_path / "red.mp4"), Boxes((0, 0, 64, 64))
    for window, channel in ((WINDOW, 0), (RELEASED, 2)):
        means = measure(path, window, tracker)["window"]["images"].mean((0, 1, 2))
        assert means[channel] > 200
        assert np.delete(means, channel).max() < 50


def test_streams_are_the_crops_and_the_mfcc(film):
    made = measure(film, tracker=Boxes(WHOLE, None, WHOLE), audio=audio_of(film))
    text = {s: np.zeros((1, 4), np.float16) for s in clip_features.TEXTS}
    settings = presets.Preset(frames=2, window=WINDOW)
    packed = clip_features.example(Clip("c", film, "sad"), settings, made | {"text": text}, dict.fromkeys(text, ""))
    assert packed["video"] is made["window"]["images"]
    assert packed["audio"] is made["window"]["mfcc"]
    assert packed["video_mask"].sum() == 14
    assert packed["audio_mask"].all()
    assert packed["duration"] == pytest.approx(7, abs=0.01)


def test_every_setting_changes_the_provenance():
    changes = {"seconds": 2.0, "rate": 25, "count": 7, "side": 9, "sample_rate": 16000, "mfccs": 13, "released": True}
    assert changes.keys() == {f.name for f in dataclasses.fields(Window)}
    made = [
        str(provenance.described("window", presets.Preset(window=dataclasses.replace(Window(), **{name: value}))))
        for name, value in [*changes.items(), ("side", 224)]
    ]
    assert len(set(made)) == len(made)
