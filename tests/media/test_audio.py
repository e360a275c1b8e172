"""Audio is read at 16 kHz on the clip's clock, and its features describe the speaker, not the recording's edges."""

import av
import numpy as np
import pytest

from avjax.errors import UnusableMedia
from avjax.media import audio
from tests import clips

RATE = audio.SAMPLE_RATE


def sine(hertz: float, seconds: float, rate: int = RATE, level: float = 0.5) -> np.ndarray:
    return (level * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def voice(seconds: float, hertz: float = 150.0) -> np.ndarray:
    """A buzz with the falling harmonics of a voice."""
    return sum(sine(hertz * k, seconds, level=0.3 / k) for k in range(1, 20)).astype(np.float32)


def syllables(per_second: int, count: int, loud: int = 0, gain: float = 1.0) -> np.ndarray:
    """`count` bumps of a voice, the first `loud` of them louder by `gain`."""
    length = round(RATE / per_second)
    bump = np.maximum(np.sin(np.pi * np.arange(length) / length), 0.01)
    gains = np.where(np.arange(count) < loud, gain, 1.0)
    return voice(count * length / RATE) * np.concatenate([bump * g for g in gains]) * 0.3


def write(path, samples, rate, codec="pcm_s16le", format="s16", begin=0.0, with_video=False):  # noqa: PLR0913 - a file has as many properties
    """Writes (channels, n) samples in [-1, 1], which begin `begin` seconds after the video if there is one."""
    samples = np.atleast_2d(samples)
    scale, offset, dtype = {"s16": (32767, 0, np.int16), "u8": (127, 128, np.uint8), "fltp": (1, 0, np.float32)}[format]
    data = (samples * scale + offset).astype(dtype)
    layout = "mono" if len(samples) == 1 else "stereo"
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=10) if with_video else None
        stream = container.add_stream(codec, rate=rate, layout=layout)
        if video:
            video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
            for _ in range(20):
                container.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")))
            container.mux(video.encode())
        planar = data if format == "fltp" else np.ascontiguousarray(data.T.reshape(1, -1))
        frame = av.AudioFrame.from_ndarray(planar, format=format, layout=layout)
        frame.sample_rate, frame.pts = rate, round(begin * rate)
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def loudest_hertz(samples: np.ndarray) -> float:
    return float(np.abs(np.fft.rfft(samples)).argmax() * RATE / len(samples))


@pytest.mark.parametrize(
    ("name", "rate", "codec", "format", "channels"),
    [
        ("cd.wav", 44100, "pcm_s16le", "s16", 2),
        ("studio.wav", 48000, "pcm_s16le", "s16", 2),
        ("old.wav", 8000, "pcm_u8", "u8", 1),
        ("clip.mp4", 44100, "mp3", "fltp", 2),
        ("clip.mkv", 48000, "aac", "fltp", 1),
    ],
)
def test_any_audio_is_read_at_16_khz_mono(tmp_path, name, rate, codec, format, channels):
    tone = np.tile(sine(440, 2.0, rate), (channels, 1))
    samples = audio.read_audio(write(tmp_path / name, tone, rate, codec, format))
    assert samples.dtype == np.float32
    assert len(samples) / RATE == pytest.approx(2.0, abs=0.06)  # lossy codecs pad to whole frames
    assert loudest_hertz(samples) == pytest.approx(440, abs=1)
    assert np.sqrt(np.mean(samples[8000:24000] ** 2)) == pytest.approx(
        0.5 / np.sqrt(2), rel=0.06
    )  # lossy codecs lose some


def test_not_a_sample_is_lost_at_the_end(tmp_path):
    tone = np.zeros(48000, np.float32)
    tone[-4800:] = sine(440, 0.1, 48000)
    samples = audio.read_audio(write(tmp_path / "late.wav", tone, 48000))
    assert len(samples) == RATE
    assert np.abs(samples[-100:]).max() > 0.4


def test_stereo_is_mixed_down(tmp_path):
    tone = sine(300, 1.0)
    opposite = audio.read_audio(write(tmp_path / "opposite.wav", np.stack([tone, -tone]), RATE))
    assert np.abs(opposite).max() < 1e-3


def test_a_part(tmp_path):
    path = write(tmp_path / "two.wav", np.concatenate([sine(300, 5.0), sine(800, 5.0)]), RATE)
    part = audio.read_audio(path, start=4.0, end=6.0)
    full = audio.read_audio(path)
    np.testing.assert_allclose(part, full[4 * RATE : 6 * RATE], atol=1e-6)
    assert len(audio.read_audio(path, audio.Sampling(max_seconds=1.5))) == 1.5 * RATE
    assert len(audio.read_audio(path, audio.Sampling(max_seconds=3.0), start=9.5)) == 0.5 * RATE
    assert len(audio.read_audio(path, audio.Sampling(max_seconds=3.0), start=1.0, end=1.25)) == 0.25 * RATE


def test_another_rate(tmp_path):
    path = write(tmp_path / "two.wav", np.concatenate([sine(300, 2.0, 44100), sine(800, 2.0, 44100)]), 44100)
    full = audio.read_audio(path, audio.Sampling(22050))
    assert full.dtype == np.float32
    assert len(full) == pytest.approx(4 * 22050, abs=32)
    part = audio.read_audio(path, audio.Sampling(22050), start=1.5, end=3.0)
    assert len(part) == 1.5 * 22050
    np.testing.assert_allclose(part[2000:], full[33075 : 33075 + len(part)][2000:], atol=1e-3)
    tones = [np.abs(np.fft.rfft(half)).argmax() * 22050 / len(half) for half in (full[:44100], full[44100:])]
    np.testing.assert_allclose(tones, [300, 800], atol=1)
    assert len(audio.read_audio(path, audio.Sampling(8000, 1.0))) == 8000


def test_two_rates_are_of_one_pass_and_as_each_alone(tmp_path, monkeypatch):
    path = write(tmp_path / "noise.wav", np.random.default_rng(0).uniform(-0.5, 0.5, 4 * 44100), 44100)
    samplings = [audio.Sampling(max_seconds=1.0), audio.Sampling(22050)]
    alone = [audio.read_audio(path, sampling, start=0.5) for sampling in samplings]
    decoded = clips.count_decoding(monkeypatch)
    both = audio.read_audio_parts(path, samplings, start=0.5)
    assert decoded["audio passes"] == 1
    assert [len(samples) for samples in both] == [RATE, 3.5 * 22050]
    for one, other in zip(alone, both, strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(UnusableMedia, match="no audio can be decoded between 9 s and the end"):
        audio.read_audio(path, start=9.0)
    assert [len(samples) for samples in audio.read_audio_parts(path, samplings, start=9.0)] == [0, 0]


def test_audio_that_begins_late_stays_on_the_clock(tmp_path):
    path = write(tmp_path / "late.mkv", sine(440, 1.0), RATE, begin=0.7, with_video=True)
    samples = audio.read_audio(path)
    begin = np.flatnonzero(np.abs(samples) > 0.1)[0] / RATE
    assert begin == pytest.approx(0.7, abs=0.01)
    np.testing.assert_array_equal(audio.read_audio(path, start=0.5), samples[RATE // 2 :])


def test_overshoot_is_clipped(tmp_path):
    loud = write(tmp_path / "loud.mkv", np.sign(sine(200, 1.0)) * 1.5, RATE, "pcm_f32le", "fltp")
    samples = audio.read_audio(loud)
    assert np.abs(samples).max() == 1.0


def test_not_a_number_is_silence(tmp_path):
    tone = sine(200, 1.0)
    tone[100:200] = np.nan
    samples = audio.read_audio(write(tmp_path / "nan.mkv", tone, RATE, "pcm_f32le", "fltp"))
    assert np.all(np.isfinite(samples))


def test_damage_in_the_middle_costs_little(tmp_path):
    path = write(tmp_path / "damaged.mp3", sine(440, 4.0, 44100), 44100, "mp3", "fltp")
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 600] = np.random.default_rng(0).bytes(600)
    path.write_bytes(data)
    assert len(audio.read_audio(path)) / RATE > 3.5


def test_a_stream_that_changes_its_channels_is_read_on(tmp_path):
    parts = [write(tmp_path / f"{n}.mp3", np.tile(sine(440, 1.0, 44100), (n, 1)), 44100, "mp3", "fltp") for n in (1, 2)]
    path = tmp_path / "joined.mp3"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    samples = audio.read_audio(path)
    assert len(samples) / RATE == pytest.approx(2.0, abs=0.3)
    assert np.sqrt(np.mean(samples[-RATE // 2 : -RATE // 4] ** 2)) > 0.3


def test_no_audio_is_unusable(tmp_path):
    for name, content in {"empty.wav": b"", "noise.mp3": np.random.default_rng(0).bytes(5000)}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UnusableMedia):
            audio.read_audio(tmp_path / name)
    with pytest.raises(UnusableMedia, match="no audio can be decoded between 2 s and the end"):
        audio.read_audio(write(tmp_path / "short.wav", sine(100, 0.5), RATE), start=2.0)


def test_a_silent_film_has_no_audio(tmp_path):
    with av.open(str(tmp_path / "film.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode())
    with pytest.raises(UnusableMedia, match="no audio stream"):
        audio.read_audio(tmp_path / "film.mp4")


def test_levels_are_those_of_full_scale():
    analysis = audio.analyse(sine(1000, 1.0, level=1.0))
    assert analysis.energy_db[50] == pytest.approx(-3.01, abs=0.05)
    assert 10 * np.log10(np.sum(10 ** (analysis.mel_db[50] / 10))) == pytest.approx(-3.01, abs=0.1)


@pytest.mark.parametrize("hertz", [80.0, 150.0, 330.0])
def test_pitch(hertz):
    analysis = audio.analyse(voice(1.0, hertz))
    assert audio.prosody(analysis).f0_median_hz == pytest.approx(hertz, rel=0.012)  # a fifth of a semitone
    features = audio.acoustic(analysis)
    np.testing.assert_allclose(
        features.features[2:-2, audio.ACOUSTIC_NAMES.index("f0")], np.log2(hertz / 100), atol=0.02
    )


def test_a_step_that_is_half_voiced_keeps_its_pitch():
    silence = np.zeros(RATE // 2, np.float32)
    features = audio.acoustic(audio.analyse(np.concatenate([voice(0.55), silence, voice(0.55)])))
    assert features.features[5, audio.ACOUSTIC_NAMES.index("f0")] == pytest.approx(np.log2(1.5), abs=0.05)


def test_names_match_columns_and_scales():
    features = audio.acoustic(audio.analyse(syllables(4, 8)))
    assert features.features.shape == (20, len(audio.ACOUSTIC_NAMES)) == (20, 56)
    assert features.features.dtype == np.float32
    assert np.abs(features.features).max() < 10
    assert features.mask.all()


def test_lead_in_length_is_no_feature():
    speech = syllables(4, 8)
    silence = np.zeros(RATE // 2, np.float32)
    bare, framed = (audio.analyse(s) for s in (speech, np.concatenate([silence, speech, silence])))
    a, b = audio.acoustic(bare), audio.acoustic(framed)
    assert 8 <= (~b.mask).sum() <= 10  # ten steps of silence, less those that the first and last window reach into
    assert not b.features[~b.mask].any()
    np.testing.assert_allclose(a.features[1:19], b.features[6:24], atol=0.15)
    assert audio.prosody(framed).stress_db == pytest.approx(audio.prosody(bare).stress_db, abs=0.3)
    assert audio.prosody(framed).syllables_per_second == pytest.approx(
        audio.prosody(bare).syllables_per_second, rel=0.05
    )


def test_pauses_inside_stay():
    pause = np.zeros(RATE, np.float32)
    features = audio.acoustic(audio.analyse(np.concatenate([syllables(4, 4), pause, syllables(4, 4)])))
    assert features.mask.all()
    assert features.features[15, audio.ACOUSTIC_NAMES.index("energy")] == 0
    assert features.features[15, audio.ACOUSTIC_NAMES.index("f0")] == 0


@pytest.mark.parametrize("samples", [np.zeros(RATE), np.zeros(1), np.zeros(161), np.full(RATE, 2e-5)])
def test_silence_is_finite_and_masked(samples):
    analysis = audio.analyse(samples.astype(np.float32))
    features = audio.acoustic(analysis)
    assert not features.mask.any()
    assert not features.features.any()
    assert audio.prosody(analysis) == audio.Prosody(None, None, None)


def test_steps_per_second():
    analysis = audio.analyse(voice(1.234))
    assert len(audio.acoustic(analysis, 10).features) == 13
    fine = audio.acoustic(analysis, 50)
    assert len(fine.features) == 62
    with pytest.raises(ValueError, match="divide 100"):
        audio.acoustic(analysis, 30)


@pytest.mark.parametrize("rate", [3, 4, 6])
def test_speech_rate_counts_syllables(rate):
    analysis = audio.analyse(syllables(rate, 3 * rate))
    assert audio.prosody(analysis).syllables_per_second == pytest.approx(rate, rel=0.08)


def test_long_pauses_do_not_slow_speech():
    pause = np.zeros(RATE, np.float32)
    analysis = audio.analyse(np.concatenate([syllables(4, 8), pause, syllables(4, 8)]))
    assert audio.prosody(analysis).syllables_per_second == pytest.approx(4, rel=0.1)


def test_short_gaps_belong_to_speech():
    bump, gap = syllables(10, 1), np.zeros(round(0.15 * RATE), np.float32)
    analysis = audio.analyse(np.concatenate([np.concatenate([bump, gap])] * 12))
    assert audio.prosody(analysis).syllables_per_second == pytest.approx(4, rel=0.12)


def test_bursts_of_noise_are_no_syllables():
    bump = syllables(4, 8)
    noise = np.random.default_rng(0).normal(0, 0.5, len(bump)) * np.abs(bump)
    analysis = audio.analyse(np.concatenate([bump, noise]).astype(np.float32))
    assert audio.prosody(analysis).syllables_per_second == pytest.approx(2, rel=0.15)


def test_stress_is_what_the_loudest_quarter_adds():
    even, stressed = (audio.prosody(audio.analyse(syllables(4, 12, 3, gain))).stress_db for gain in (1.0, 2.0))
    assert 4.0 < stressed - even < 6.1  # 6 dB, less what the loud quarter adds to the median


def test_noise_has_no_pitch():
    noise = np.random.default_rng(0).normal(0, 0.1, RATE).astype(np.float32)
    analysis = audio.analyse(noise)
    assert (analysis.f0_hz > 0).mean() < 0.2
    assert audio.acoustic(analysis).mask.all()


def test_real_speech(java_sed):
    paths = sorted((java_sed / "mp4").glob("*.mp4"))[::12]
    results = {p.stem: audio.prosody(audio.analyse(audio.read_audio(p))) for p in paths}
    women = [r.f0_median_hz for name, r in results.items() if name[:2] in ("01", "02")]
    men = [r.f0_median_hz for name, r in results.items() if name[:2] in ("06", "07")]
    assert np.median(women) > np.median(men) * 1.3
    assert all(1.5 < r.syllables_per_second < 6 for r in results.values())
    assert all(0 < r.stress_db < 25 for r in results.values())


def test_surface_is_lead_in_and_loudness():
    rng = np.random.default_rng(0)
    noise, tone = rng.normal(0, 1e-4, 24000), 0.1 * np.sin(2 * np.pi * 200 * np.arange(24000) / 16000)
    lead_in, loudness = audio.surface(audio.analyse(np.where(np.arange(24000) < 8000, noise, tone).astype(np.float32)))
    assert lead_in == pytest.approx(0.5, abs=0.03)
    assert loudness == pytest.approx(10 * np.log10(2 / 3 * 0.1**2 / 2), abs=0.3)


def test_surface_of_digital_silence():
    assert audio.surface(audio.analyse(np.zeros(8000, np.float32))) == (0.5, audio.FLOOR_DB)
