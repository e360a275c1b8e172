"""MFN: the common clock, released handling of padding, outputs and gradients against PyTorch."""

import jax
import numpy as np
import pytest

from avjax.errors import AvjaxError
from avjax.models.fusions.mfn import Mfn
from tests.references import agreement

SMALL = {
    "widths": {"text": 4, "audio": 3, "video": 5},
    "memory": 6,
    "attention": 4,
    "proposal": 4,
    "retain": 4,
    "update": 4,
    "output": 4,
}


def batch(**lengths: int) -> dict[str, np.ndarray]:
    out = {}
    for i, (stream, n) in enumerate(lengths.items()):
        out[stream] = np.random.default_rng(i).normal(size=(2, n, 4 + i)).astype(np.float32)
        out[f"{stream}_mask"] = np.ones((2, n), bool)
    return out


def weights(module: Mfn, one: dict[str, np.ndarray]):
    """Random params, biases too."""
    rng = np.random.default_rng(9)
    shapes = jax.eval_shape(module.init, jax.random.key(0), one)
    return jax.tree.map(lambda v: np.float32(rng.normal(size=v.shape)), shapes)


@pytest.mark.slow
def test_a_clock_of_as_many_spans_changes_nothing():
    one = batch(text=5, audio=5, video=5)
    clocked, released = Mfn(3, segment_count=5, **SMALL), Mfn(3, as_released=True, **SMALL)
    variables = weights(clocked, one)
    want = jax.jit(released.apply)(variables, one)
    np.testing.assert_allclose(
        jax.jit(clocked.apply)(variables, one).logits["fusion"], want.logits["fusion"], atol=1e-6
    )
    fewer = jax.jit(clocked.clone(segment_count=2).apply)(variables, one)
    assert np.abs(fewer.logits["fusion"] - want.logits["fusion"]).max() > 1e-4


def test_the_released_form_goes_on_through_padding():
    module = Mfn(3, as_released=True, **SMALL)
    one = batch(text=5, audio=5, video=5)
    longer = {k: np.pad(v, ((0, 0), (0, 2)) + ((0, 0),) * (v.ndim - 2)) for k, v in one.items()}
    variables = weights(module, one)
    before, after = (jax.jit(module.apply)(variables, b).features["states"] for b in (one, longer))
    assert np.abs(before - after).max() > 1e-3


def test_memory_is_kept_where_no_stream_is_real():
    """A clip with a span in the middle in which every stream is masked is the clip without that span."""
    module = Mfn(3, segment_count=5, **SMALL)
    one = batch(text=5, audio=5, video=5)
    variables = weights(module, one)
    short = {k: np.delete(v, 2, 1) for k, v in one.items()}
    gap = {k: v.copy() for k, v in one.items()}
    for stream in ("text", "audio", "video"):
        gap[f"{stream}_mask"][:, 2] = False
    got = jax.jit(module.apply)(variables, gap).features["states"]
    want = jax.jit(module.clone(segment_count=4).apply)(variables, short).features["states"]
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_streams_off_the_clock_are_named():
    with pytest.raises(AvjaxError, match="needs equal numbers"):
        Mfn(3, as_released=True, **SMALL).init(jax.random.key(0), batch(text=5, audio=4, video=5))


def test_answers_and_gradients_are_those_of_the_released_system():
    agreement.assert_answers("mfn")
    agreement.assert_gradients("mfn")
