"""Tests specific to the flow network; parity with the original is in test_parity.py."""

import functools
import random
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avjax import encoders
from avjax.encoders import perceiver
from avjax.encoders.perceiver import PerceiverConfig, optical_flow
from avjax.errors import AvjaxError
from tests.originals import stirred
from tests.originals.perceiver import KINDS, true_size

HUB = {
    "model_type": "perceiver",
    "train_size": [9, 10],
    "num_latents": 5,
    "d_latents": 12,
    "num_self_attends_per_block": 1,
    "num_self_attention_heads": 3,
    "num_cross_attention_heads": 2,
}
TILES = HUB | {"train_size": [24, 30]}  # wide enough to overlap


def torch_and_transformers():
    pytest.importorskip("torch", reason="the reference is in PyTorch (extra parity)")
    import transformers

    return transformers


def random_params(module, seed=0):
    """Large enough for scores that are far apart."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: rng.normal(0.1, 0.2, leaf.shape).astype(np.float32), perceiver.shapes(module.config)
    )


def made(hub=HUB, dtype=jnp.float32):
    """A network with random params, as a function of pairs and mask."""
    module = perceiver.build(hub, dtype, None)
    return jax.jit(functools.partial(module.apply, {"params": random_params(module)}))


@functools.cache
def small():
    """The network of HUB, compiled once."""
    return made()


def pairs_of(count, size=(9, 10)):
    return np.random.default_rng(1).uniform(-1, 1, (count, 2, *size, 3)).astype(np.float32)


def frames_of(count, size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *size, 3), np.uint8)


# The network


@pytest.mark.parametrize(
    ("height", "portions"), [(12, {70: 4, 1: 12}), pytest.param(7, {70: 7}, marks=pytest.mark.thorough)]
)
def test_going_over_the_pixels_in_portions_changes_nothing(monkeypatch, height, portions):
    hub = HUB | {"train_size": [height, 10]}
    pairs, mask = pairs_of(2, (height, 10)), np.ones(2, bool)
    full, _ = made(hub)(pairs, mask)
    for pixels, count in portions.items():
        monkeypatch.setattr(perceiver, "_PIXELS", pixels)
        assert len(perceiver.Pixels.of(jnp.zeros((2, height, 10, 64))).portions[0]) == count
        parts, _ = made(hub)(pairs, mask)
        # The flow of a network drawn at random is about 34: it has few digits below its deviation.
        np.testing.assert_allclose(parts, full, rtol=1e-6, atol=1e-5 * full.std())


def test_in_portions_it_equals_the_original(monkeypatch):
    torch_and_transformers()
    monkeypatch.setattr(perceiver, "_PIXELS", 1)
    config = KINDS["perceiver"].draw(random.Random(3))
    model = stirred(KINDS["perceiver"].build(config), 3)
    module = perceiver.build(config.to_dict(), jnp.float32, None)
    params = perceiver.convert({n: t.numpy() for n, t in model.state_dict().items()}, module.config)
    pairs, mask = pairs_of(2, config.train_size), np.ones(2, bool)
    want, _ = KINDS["perceiver"].reference(model, pairs, mask)
    got, _ = jax.jit(module.apply)({"params": params}, pairs, mask)
    assert np.abs(got - want).max() <= 1e-4 * want.std()


def test_pairs_under_the_mask_leave_no_trace():
    run, pairs = small(), pairs_of(3)
    want, _ = run(pairs, np.ones(3, bool))
    bad = np.concatenate([pairs[:1], np.full_like(pairs[1:], np.nan)])
    flow, mask = run(bad, np.array([True, False, False]))
    np.testing.assert_allclose(flow[0], want[0], atol=1e-5 * want.std())
    np.testing.assert_array_equal(mask, np.repeat([[True], [False], [False]], 90, 1))
    assert np.isfinite(flow).all()
    assert np.isfinite(run(bad, np.zeros(3, bool))[0]).all()


def test_bfloat16_moves_end_points_by_few_percent():
    pairs, mask = pairs_of(3), np.ones(3, bool)
    want, _ = small()(pairs, mask)
    half, _ = made(dtype=jnp.bfloat16)(pairs, mask)
    error = np.linalg.norm(half - want, axis=-1).mean() / np.linalg.norm(want, axis=-1).mean()
    assert 0 < error < 0.05
    assert half.dtype == want.dtype == jnp.float32


def test_pairs_of_another_size_are_refused():
    with pytest.raises(AvjaxError, match=r"pairs \(1, 2, 9, 11, 3\): expected \(batch, 2, 9, 10, 3\)"):
        small()(pairs_of(1, (9, 11)), np.ones(1, bool))


# Checkpoints and configurations


@pytest.fixture
def checkpoint():
    """The configuration and the tensors of a small original."""
    transformers = torch_and_transformers()
    model = transformers.PerceiverForOpticalFlow(transformers.PerceiverConfig(**HUB))
    return PerceiverConfig.from_hub(HUB), {n: t.numpy() for n, t in model.state_dict().items()}


def test_the_prefix_of_a_checkpoint_does_not_matter(checkpoint):
    config, tensors = checkpoint
    bare = {n.removeprefix("perceiver."): t for n, t in tensors.items()}
    assert bare.keys().isdisjoint(tensors)
    assert jax.tree.all(
        jax.tree.map(np.array_equal, perceiver.convert(bare, config), perceiver.convert(tensors, config))
    )


def test_tensors_that_do_not_fit_are_named(checkpoint):
    config, tensors = checkpoint
    gone = "perceiver.encoder.self_attends.0.attention.output.dense.bias"
    rest = {n: t for n, t in tensors.items() if n != gone} | {"other": np.ones(3)}
    with pytest.raises(AvjaxError, match=rf"missing: {re.escape(gone[10:])}; left over: other$"):
        perceiver.convert(rest, config)
    with pytest.raises(AvjaxError, match=r"embeddings\.latents: shape \(4, 12\) does not fit"):
        perceiver.convert(tensors | {"perceiver.embeddings.latents": np.ones((4, 12))}, config)


def test_what_files_leave_out_is_the_originals_default():
    original = torch_and_transformers().PerceiverConfig
    hub = {k: v for k, v in HUB.items() if k != "train_size"}
    assert PerceiverConfig.from_hub(hub) == PerceiverConfig.from_hub(original(**hub).to_dict())
    assert PerceiverConfig.from_hub(hub).steps(0) == 182_528


@pytest.mark.parametrize(
    ("hub", "message"),
    [
        ({k: v for k, v in HUB.items() if k != "d_latents"}, "of a perceiver lacks d_latents"),
        (HUB | {"hidden_act": "mish"}, "'mish' is not known"),
        (HUB | {"architectures": ["PerceiverForMaskedLM"]}, "PerceiverForMaskedLM.*that for optical flow"),
        (HUB | {"qk_channels": 12}, "qk_channels and v_channels .* expected null"),
        (HUB | {"v_channels": 12}, "qk_channels and v_channels .* expected null"),
        (HUB | {"cross_attention_shape_for_attention": "v"}, "is 'v' in config.json, expected kv or q"),
        (HUB | {"num_self_attention_heads": 5}, "5 heads, and 2 to the pixels, .* widths 12 of the latents"),
        (HUB | {"num_cross_attention_heads": 5}, "3 heads, and 5 to the pixels"),
        (HUB | {"num_cross_attention_heads": 3}, "322 of the pixels"),
    ],
)
def test_configs_that_are_not_computed_are_refused(hub, message):
    with pytest.raises(AvjaxError, match=message):
        perceiver.build(hub, jnp.float32, None)


def test_layers_are_refused():
    with pytest.raises(AvjaxError, match="layer is 0, but a perceiver gives the flow alone"):
        perceiver.build(HUB, jnp.float32, 0)


# Pairs of the trained size


def test_prepare_brings_pictures_to_minus_one_to_one():
    raw = np.arange(256, dtype=np.uint8).reshape(-1, 1, 1, 1, 1).repeat(2, 1).repeat(3, 4)
    pairs, mask = perceiver.prepare(raw, {"do_resize": True, "size": 224})
    np.testing.assert_array_equal(pairs, (raw / 255.0 * 2 - 1).astype(np.float32))  # DeepMind's notebook
    assert (pairs.dtype, pairs.shape, mask.tolist()) == (np.float32, raw.shape, [True] * 256)


@pytest.mark.parametrize("raw", [np.zeros((1, 2, 4, 4, 3)), np.zeros((2, 4, 4, 3), np.uint8), frames_of(1, (3, 4, 4))])
def test_prepare_refuses_what_is_no_pair(raw):
    with pytest.raises(AvjaxError, match=r"pairs \(.*expected RGB images \(pairs, 2, height, width, 3\) uint8"):
        perceiver.prepare(raw, {})


# Frames of any size


class Fake:
    """Stands in for an encoder: returns the red channel of the first frame as x and of the second as y."""

    config = PerceiverConfig.from_hub(TILES)

    def __init__(self):
        self.calls = []

    def __call__(self, pairs, mask):
        self.calls.append(pairs)
        return np.moveaxis(pairs[..., 0], 1, -1).reshape(len(pairs), -1, 2), mask[:, None]


@pytest.mark.parametrize("size", [(24, 30), (1, 1), (7, 90), (60, 11), (25, 31), (24, 61), (53, 40)])
def test_every_pixel_gets_its_own_flow_in_pixels(size):
    first, second = frames_of(2, size, 1), frames_of(2, size, 2)
    flow = optical_flow(Fake(), first, second)
    want = 20 * (np.stack([first[..., 0], second[..., 0]], -1) / 127.5 - 1)
    np.testing.assert_allclose(flow, want, atol=1e-4)
    assert flow.dtype == np.float32


def test_small_frames_are_filled_up_with_their_edge():
    fake, frame = Fake(), frames_of(1, (10, 12))
    optical_flow(fake, frame, frame)
    (pairs,) = fake.calls
    want = np.pad(frame, [(0, 0), (0, 14), (0, 18), (0, 0)], mode="edge")
    np.testing.assert_array_equal(pairs[0, 0], perceiver.prepare(np.stack([want, want], 1), {})[0][0, 0])


def test_neighbours_fade_into_each_other():
    class Counting(Fake):
        def __call__(self, pairs, mask):
            self.calls.append(pairs)
            return np.full((1, 24 * 30, 2), len(self.calls) - 1, np.float32), mask[:, None]

    frame = frames_of(1, (24, 38))
    row = optical_flow(Counting(), frame, frame)[0, 12, :, 0] / 20
    assert not row[:8].any()
    np.testing.assert_allclose(row[30:], 1)
    assert (np.diff(row[8:30]) >= 0).all()
    assert 0 < row[8] < 0.2 < 0.8 < row[29] < 1
    np.testing.assert_allclose(row, 1 - row[::-1], atol=1e-6)


@pytest.mark.parametrize("tile", [21, 24, 368])
def test_tiles_cover_a_frame_and_share_what_they_must(tile):
    for size in range(1, 5 * tile, 1 + tile // 24):
        starts = perceiver._starts(size, tile)
        assert starts[0] == 0
        assert starts[-1] == max(0, size - tile)
        steps = np.diff(starts)
        assert not steps.size or (steps.max() <= tile - 20 and np.ptp(steps) <= 1)


@pytest.mark.parametrize(("batch", "sizes"), [(1, [1] * 6), (4, [4, 2]), (100, [6])])
def test_tiles_of_all_pairs_go_through_in_batches(batch, sizes):
    first, second = frames_of(3, (24, 40), 1), frames_of(3, (24, 40), 2)
    fake = Fake()
    flow = optical_flow(fake, first, second, batch=batch)
    assert [len(pairs) for pairs in fake.calls] == sizes
    np.testing.assert_array_equal(flow, optical_flow(Fake(), first, second))
    assert optical_flow(fake, first[:0], second[:0]).shape == (0, 24, 40, 2)


def test_the_flow_of_a_pair_does_not_depend_on_the_others():
    module = perceiver.build(TILES, jnp.float32, None)
    enc = encoders.Encoder(perceiver, module, random_params(module), {})
    first, second = frames_of(3, (26, 40), 1), frames_of(3, (26, 40), 2)
    together = optical_flow(enc, first, second, batch=4)
    assert together[1].std() > 0
    alone = optical_flow(enc, first[1:2], second[1:2])
    np.testing.assert_allclose(together[1], alone[0], atol=1e-5 * together.std())


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (frames_of(2, (4, 5)), frames_of(1, (4, 5))),
        (frames_of(2, (4, 5)), frames_of(2, (5, 4))),
        (frames_of(1, (4, 5)).astype(np.float32), frames_of(1, (4, 5))),
        (frames_of(1, (4, 5)), frames_of(1, (4, 5)).astype(np.float32)),
        (frames_of(1, (4, 5))[0], frames_of(1, (4, 5))[0]),
        (frames_of(1, (0, 5)), frames_of(1, (0, 5))),
    ],
)
def test_frames_of_another_kind_are_refused(first, second):
    with pytest.raises(AvjaxError, match=r"frames \(.*expected the same number of RGB frames"):
        optical_flow(Fake(), first, second)


def test_tiles_too_small_to_overlap_are_refused():
    fake = Fake()
    fake.config = PerceiverConfig.from_hub(HUB)
    assert optical_flow(fake, frames_of(1, (9, 8)), frames_of(1, (9, 8))).shape == (1, 9, 8, 2)
    with pytest.raises(AvjaxError, match="11 pixels along a side, but tiles of 10 cannot overlap by 20"):
        optical_flow(fake, frames_of(1, (9, 11)), frames_of(1, (9, 11)))


# The true size


@pytest.mark.slow
def test_frames_of_a_real_clip_at_true_size_within_memory(java_sed):
    pytest.importorskip("av", reason="frames of real clips (extra media)")
    from avjax.media.video import read_frames

    clip = min(java_sed.rglob("*.mp4"))
    images = read_frames(clip, indices=[0, 1]).images
    module = perceiver.build(true_size().to_dict(), jnp.float32, None)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.normal(0, 0.02, leaf.shape).astype(np.float32), perceiver.shapes(module.config)
    )
    enc = encoders.Encoder(perceiver, module, params, {})
    flow = optical_flow(enc, images[:1], images[1:])
    assert flow.shape == (1, *images.shape[1:3], 2)
    assert np.isfinite(flow).all()
    assert flow.std() > 0
    pair = jax.ShapeDtypeStruct((1, 2, 368, 496, 3), jnp.float32), jax.ShapeDtypeStruct((1,), bool)
    compiled = jax.jit(lambda p, *pair: module.apply({"params": p}, *pair)).lower(params, *pair).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 400e6
