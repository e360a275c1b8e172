"""Frames are those requested, whatever the container states. Each frame shows its own number."""

from contextlib import suppress
from fractions import Fraction

import av
import numpy as np
import pytest

from avjax.errors import UnusableMedia
from avjax.media import video
from tests import clips

BITS = 8
CELL = 16  # pixels; large enough for the code to survive compression


def numbered(number: int, height: int = 64) -> np.ndarray:
    """Returns an image with the bits of `number` as columns; its upper half is inverted to tell up from down."""
    bits = (number >> np.arange(BITS)) & 1
    lower = np.repeat(bits, CELL) * 255
    halves = np.stack([255 - lower] * (height // 2) + [lower] * (height - height // 2))
    return np.repeat(halves[..., None], 3, axis=2).astype(np.uint8)


def numbers(frames: video.Frames) -> list[int]:
    """Reads the frame numbers back, and checks that each frame is upright."""
    cells = frames.images[..., 0].reshape(len(frames.images), -1, BITS, CELL).mean(3) > 127
    upper, lower = cells[:, 8], cells[:, -8]
    np.testing.assert_array_equal(upper, ~lower)
    return (lower @ (1 << np.arange(BITS))).tolist()


def write(  # noqa: PLR0913 - a file has as many properties
    path, total=30, *, rate=25, pts=None, rotation=0, codec="libx264", turns=0, height=64, title=None, **options
):
    """Writes `total` numbered frames; `pts` in milliseconds makes the frame rate variable."""
    with av.open(str(path), "w", **options) as container:
        container.metadata.update({"title": title} if title else {})
        stream = container.add_stream(codec, rate=rate)
        first = np.rot90(numbered(0, height), turns)
        stream.height, stream.width, stream.pix_fmt = *first.shape[:2], "yuv420p"
        time_base = stream.codec_context.time_base = Fraction(1, 1000 if pts is not None else rate)
        if rotation:
            stream.set_display_rotation(rotation)
        for i in range(total):
            frame = av.VideoFrame.from_ndarray(
                np.ascontiguousarray(np.rot90(numbered(i, height), turns)), format="rgb24"
            )
            frame.time_base = time_base
            frame.pts = i if pts is None else pts[i]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def shown(path, asked):
    """The frames shown at the times `asked`, ascending."""
    for blocks in video.passes(path, {"": lambda times, over: video.shown_at(times, asked)}):
        parts = [frames for _, frames in blocks]
    return video.joined(parts)


@pytest.fixture
def clip(tmp_path):
    return write(tmp_path / "clip.mp4")


def test_count_takes_the_centres_of_equal_spans(clip):
    frames = video.read_frames(clip, count=5)
    assert numbers(frames) == [3, 9, 15, 21, 27]
    np.testing.assert_allclose(frames.times, np.array([3, 9, 15, 21, 27]) / 25)
    assert frames.images.shape == (5, 64, 128, 3)
    assert frames.images.dtype == np.uint8


def test_a_short_clip_gives_each_frame_once(tmp_path):
    short = write(tmp_path / "short.mp4", 3)
    assert numbers(video.read_frames(short, count=8)) == [0, 1, 2]


def test_one_frame(tmp_path):
    path = write(tmp_path / "one.mp4", 1)
    assert numbers(video.read_frames(path, count=4)) == [0]


def test_indices_in_any_order_with_repeats(clip):
    assert numbers(video.read_frames(clip, indices=[29, 3, 3, 0])) == [29, 3, 3, 0]


def test_an_index_past_the_end_is_an_error_that_counts_the_frames(clip):
    with pytest.raises(UnusableMedia, match="frames 0 to 29"):
        video.read_frames(clip, indices=[3, 30])


def test_variable_frame_rate_goes_by_timestamps(tmp_path):
    # Ten frames within the first 100 ms, then one each half second.
    pts = [*range(0, 100, 10), 500, 1000, 1500, 2000]
    path = write(tmp_path / "vfr.mkv", len(pts), pts=pts)
    np.testing.assert_allclose(video.read_frames(path, count=99).times, np.array(pts) / 1000)
    assert numbers(shown(path, np.arange(9) / 4)) == [0, 9, 10, 10, 11, 11, 12, 12, 13]


def test_rounded_timestamps_do_not_delay_a_frame(tmp_path):
    path = write(tmp_path / "rounded.mkv", 30, rate=30, pts=np.round(np.arange(30) * 1000 / 30).astype(int).tolist())
    assert numbers(shown(path, np.arange(30) / 30)) == list(range(30))


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_rotated_clips_come_upright(tmp_path, rotation):
    # The camera was held turned: what is stored is turned back by the display matrix.
    path = write(tmp_path / "phone.mp4", 6, rotation=rotation, turns=-rotation // 90)
    assert numbers(video.read_frames(path, count=3)) == [1, 3, 5]


def test_a_part_is_counted_by_itself(clip):
    frames = video.read_frames(clip, indices=[0, 1], start=0.4, end=0.8)
    assert numbers(frames) == [10, 11]
    assert numbers(video.read_frames(clip, count=99, start=0.4, end=0.8)) == list(range(10, 20))


def test_frames_shown_at_chosen_times(clip):
    asked = np.array([0.0, 0.419, 0.42, 0.99, 1.19])
    frames = shown(clip, asked)
    assert numbers(frames) == [0, 10, 10, 24, 29]
    np.testing.assert_allclose(frames.times, np.array([0, 10, 10, 24, 29]) / 25)


@pytest.mark.parametrize(("part", "over"), [({}, 1.2), ({"start": 0.4, "end": 0.8}, 0.8), ({"end": 5.0}, 1.2)])
def test_a_choice_learns_when_the_last_frame_is_over(clip, part, over):
    lasted = []

    def choice(times, over):
        lasted.append((len(times), over))
        return np.zeros(1, int)

    for blocks in video.passes(clip, {"first": choice}, **part):
        assert [name for name, _ in blocks] == ["first"]
    assert lasted == [(10 if "start" in part else 30, pytest.approx(over))]


def test_choices_share_a_pass(clip, monkeypatch):
    decoded = clips.count_decoding(monkeypatch)
    choices = {"all": video.every_frame, "few": video.spread(3), "none": lambda times, over: np.zeros(0, int)}
    for blocks in video.passes(clip, choices):
        blocks_read = [(name, numbers(frames)) for name, frames in blocks]
    assert blocks_read == [("all", [*range(16)]), ("all", [*range(16, 30)]), ("few", [5, 15, 25])]
    assert decoded == {"video": 30, "video passes": 1}


def test_if_packets_are_incomplete_a_second_pass_corrects_the_first(clip, monkeypatch):
    # Of every fifth packet no frame comes.
    frames = video._frames
    monkeypatch.setattr(video, "_frames", lambda *of: (f for i, f in enumerate(frames(*of)) if i % 5))
    choice = {"last": lambda times, over: np.array([len(times) - 1])}
    passes = [[numbers(frames) for _, frames in blocks] for blocks in video.passes(clip, choice)]
    assert passes == [[], [[29]]]
    assert numbers(video.read_frames(clip, count=3)) == [6, 16, 26]


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "ts"])
def test_a_late_part_is_sought_exactly(tmp_path, suffix):
    path = write(tmp_path / f"long.{suffix}", 200)
    frames = video.read_frames(path, indices=[0, 1, 2], start=6.0, end=7.0)
    begin = numbers(frames)[0]
    assert numbers(video.read_frames(path, count=99, start=6.0, end=7.0)) == list(range(begin, begin + 25))
    assert numbers(frames) == [begin, begin + 1, begin + 2]
    assert frames.times[0] == pytest.approx(6.0, abs=0.041)
    full = video.read_frames(path, count=999)
    assert numbers(full) == list(range(200))
    np.testing.assert_array_equal(full.images[begin], frames.images[0])


def test_jumbled_timestamps_do_not_end_a_part_early(tmp_path):
    path = write(tmp_path / "jumbled.avi", 60)  # AVI keeps no timestamps of frames that are shown later than decoded
    full = video.read_frames(path, count=99)
    for end in full.times[20:40]:
        part = video.read_frames(path, count=99, end=end)
        assert numbers(part) == list(range(np.searchsorted(full.times, end)))


def test_a_part_without_frames_is_unusable(clip):
    with pytest.raises(UnusableMedia, match=r"not one frame can be decoded between 5 s and 6 s"):
        video.read_frames(clip, count=1, start=5, end=6)


def test_a_lying_header_does_not_matter(tmp_path):
    path = tmp_path / "lie.avi"
    write(path, 30, codec="mpeg4")
    data = bytearray(path.read_bytes())
    for box, offset in ((b"avih", 24), (b"strh", 40)):  # total frames and stream length
        at = data.index(box) + offset
        data[at : at + 4] = (7777).to_bytes(4, "little")
    path.write_bytes(data)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 7777
    assert numbers(video.read_frames(path, count=999)) == list(range(30))


def test_a_stream_without_header_or_timestamps(tmp_path):
    path = write(tmp_path / "bare.h264", 30)
    frames = video.read_frames(path, indices=[0, 29])
    assert numbers(frames) == [0, 29]
    assert frames.times[1] > frames.times[0]


def test_a_truncated_file_gives_its_beginning(tmp_path):
    path = write(tmp_path / "cut.mkv", 100, options={"cluster_time_limit": "100"})
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    got = numbers(video.read_frames(path, count=999))
    assert got[:20] == list(range(20))
    assert len(set(got)) == len(got) < 90


def test_a_container_that_breaks_off_gives_what_came_before(tmp_path):
    path = write(tmp_path / "front.mp4", 100, options={"movflags": "faststart"})
    data = path.read_bytes()
    path.write_bytes(data[: (data.index(b"mdat") + len(data)) // 2])
    got = numbers(video.read_frames(path, count=999))
    assert got[:20] == list(range(20))
    assert len(set(got)) == len(got) < 99


class Faulty:
    """A container whose packets break off with an error after the first twenty."""

    def __init__(self, container, error):
        self.start_time, self._packets, self._error = container.start_time, container.demux(video=0), error

    def demux(self, stream):
        for i, packet in enumerate(self._packets):
            yield packet
            if i == 19 and self._error:
                error, self._error = self._error, None
                raise error


@pytest.mark.parametrize(("error", "frames"), [(av.error.InvalidDataError(1, "bad"), 20), (IndexError(), 30)])
def test_an_error_between_packets(clip, error, frames):
    with av.open(str(clip)) as container:
        assert len(list(video.decoded(Faulty(container, error), container.streams.video[0]))) == frames


def test_video_of_an_unknown_codec_is_no_video(tmp_path):
    path = write(tmp_path / "unknown.mkv", 5)
    path.write_bytes(path.read_bytes().replace(b"V_MPEG4/ISO/AVC", b"V_MPEG4/ISO/XYZ"))
    with pytest.raises(UnusableMedia, match="no video stream"):
        video.read_frames(path, count=1)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "ts"])
def test_damage_ends_in_frames_or_unusable_media(tmp_path, suffix):
    rng = np.random.default_rng(1)
    path = write(tmp_path / f"victim.{suffix}", 40)
    full = np.frombuffer(path.read_bytes(), np.uint8)
    for flips in [1, 10, 100] * 3:
        data = full.copy()
        data[rng.integers(len(data), size=flips)] = rng.integers(256, size=flips)
        path.write_bytes(data[: rng.integers(len(data))].tobytes())
        with suppress(UnusableMedia):
            assert 1 <= len(video.read_frames(path, count=4).times) <= 4


def test_a_size_that_changes_midway_keeps_the_first(tmp_path):
    parts = [write(tmp_path / f"{height}.h264", 10, height=height).read_bytes() for height in (64, 128)]
    path = tmp_path / "joined.h264"
    path.write_bytes(b"".join(parts))
    frames = video.read_frames(path, count=99)
    assert frames.images.shape == (20, 64, 128, 3)
    assert numbers(frames) == [*range(10), *range(10)]


def test_cover_art_is_no_video(tmp_path):
    path = tmp_path / "song.mp3"
    with av.open(str(path), "w") as container:
        audio = container.add_stream("mp3", rate=44100, layout="mono")
        cover = container.add_stream("mjpeg")
        cover.width, cover.height, cover.pix_fmt = 64, 64, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        image = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
        container.mux(cover.encode(image.reformat(format="yuvj420p")))
        container.mux(cover.encode())
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(audio.encode(frame))
        container.mux(audio.encode())
    with pytest.raises(UnusableMedia, match="no video stream"):
        video.read_frames(path, count=1)


def test_metadata_in_another_encoding_is_no_obstacle(tmp_path):
    path = write(tmp_path / "titled.mkv", 3, title="Maedchen")
    path.write_bytes(path.read_bytes().replace(b"Maedchen", b"M\xe4dchen\xff"))
    assert numbers(video.read_frames(path, count=3)) == [0, 1, 2]


def test_flipped_bytes_cost_some_frames_only(tmp_path):
    path = write(tmp_path / "flipped.mp4", 100)
    data = bytearray(path.read_bytes())
    middle = data.index(b"mdat") + 4 + (data.index(b"moov") - data.index(b"mdat")) // 2
    data[middle : middle + 200] = bytes(200)
    path.write_bytes(data)
    first = video.read_frames(path, count=999)
    assert 50 < len(first.times) <= 100
    again = video.read_frames(path, count=999)
    np.testing.assert_array_equal(first.images, again.images)


def test_what_is_no_video_is_unusable(tmp_path):
    files = {"empty.mp4": b"", "noise.mp4": np.random.default_rng(0).bytes(20_000), "text.mp4": b"not a film\n" * 99}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    reasons = {"empty.mp4": "an empty file", "missing.mp4": "no such file", ".": "a folder, not a file"}
    for name in (*files, *reasons):
        with pytest.raises(UnusableMedia, match=f"^{reasons.get(name, 'not a media file, or one that is damaged')}"):
            video.read_frames(tmp_path / name, count=1)


def test_audio_alone_has_no_video(tmp_path):
    path = tmp_path / "voice.wav"
    write_silence(path)
    with pytest.raises(UnusableMedia, match="no video stream"):
        video.read_frames(path, count=1)


def write_silence(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_too_many_pixels_is_an_error(clip, monkeypatch):
    monkeypatch.setattr(video, "MAX_PIXELS", 8000)
    with pytest.raises(UnusableMedia, match="128x64 pixels; at most 8000 are read"):
        video.read_frames(clip, count=1)


def test_a_wrong_choice_is_refused(clip):
    with pytest.raises(ValueError, match=r"at least 1"):
        video.read_frames(clip, count=0)
    with pytest.raises(UnusableMedia, match=r"frames \[\] were asked for"):
        video.read_frames(clip)


def test_real_clips(java_sed):
    for path in sorted((java_sed / "mp4").glob("*.mp4"))[::16]:
        frames = video.read_frames(path, count=16)
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert frames.images.shape == (16, stream.height, stream.width, 3)
            assert frames.times[-1] < container.duration / 1e6 + 0.5
        assert np.all(np.diff(frames.times) > 0)


def test_nothing_is_printed(tmp_path, clip, capfd):
    data = bytearray(clip.read_bytes())
    data[len(data) // 3 : len(data) // 3 + 100] = bytes(100)
    clip.write_bytes(data)
    video.read_frames(clip, count=2)
    assert capfd.readouterr() == ("", "")
