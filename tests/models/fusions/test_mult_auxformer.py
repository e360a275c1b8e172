"""MulT and AuxFormer: the released way with padding, the losses, and gradients against PyTorch."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avjax.models.base import Output
from avjax.models.fusions import auxformer, mult
from tests.references import agreement

SMALL = {"width": 8, "heads": 2, "layers": 1}
WIDTHS = {"text": 5, "audio": 6, "video": 8}


def batch(real: int, padded: int = 0) -> dict[str, np.ndarray]:
    """Two clips of `real` steps in every stream, then padding."""
    out = {}
    for i, (stream, width) in enumerate(WIDTHS.items()):
        x = np.random.default_rng(i).normal(size=(2, real, width)).astype(np.float32)
        out[stream] = np.pad(x, ((0, 0), (0, padded), (0, 0)))
        out[f"{stream}_mask"] = np.pad(np.ones((2, real), bool), ((0, 0), (0, padded)))
    return out


MODULES = {
    "mult": mult.MulT(3, streams=("text", "audio"), **SMALL),
    "auxformer": auxformer.AuxFormer(3, hidden=(6, 4), repeats=1, **SMALL),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_only_the_released_form_answers_otherwise_on_padding(name):
    true, released = MODULES[name], MODULES[name].clone(as_released=True)
    shapes = jax.eval_shape(true.init, jax.random.key(0), batch(4))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda v: np.float32(rng.normal(size=v.shape)), shapes)
    predict = lambda module, padding: jax.jit(module.apply)(variables, batch(4, padding)).logits["fusion"]  # noqa: E731
    want = predict(released, 0)
    np.testing.assert_allclose(predict(true, 3), want, atol=1e-4 * np.std(want))
    assert np.abs(predict(released, 3) - want).max() > 0.01 * np.std(want)


def test_auxformer_weighs_three_heads_alike_and_skips_what_is_missing():
    logits = {h: jnp.float32([[1, 0, 0], [0, i, 0]]) for i, h in enumerate(("fusion", "audio", "video"))}
    one = {"audio_mask": jnp.ones((2, 3), bool), "video_mask": jnp.eye(2, 3, dtype=bool)}
    one |= {"label": jnp.array([0, 1]), "weight": jnp.ones(2)}
    one["audio_mask"] = one["audio_mask"].at[0].set(False)
    terms = auxformer.auxformer_loss(Output(logits, {}, {}), one, "single")
    sure = math.log(math.e + 2) - 1
    np.testing.assert_allclose(terms["fusion"], [sure / 3, math.log(3) / 3], atol=1e-6)
    np.testing.assert_allclose(terms["audio"], [0, sure / 3], atol=1e-6)
    np.testing.assert_allclose(terms["video"], [sure / 3, (math.log(math.e**2 + 2) - 2) / 3], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mult", "auxformer"])
def test_gradients_are_those_of_the_released_system(name):
    agreement.assert_gradients(name)
