"""LMF and TFN: their products by the definition, missing streams, the released way with padding, against PyTorch."""

import itertools

import jax
import numpy as np
import pytest

from avjax.models.fusions.lmf import Lmf
from avjax.models.fusions.tfn import Tfn
from tests.references import agreement

MODULES = {
    "lmf": Lmf(3, widths={"text": 4, "audio": 3, "video": 2}, text_width=2, rank=2),
    "tfn": Tfn(3, widths={"audio": 3, "video": 2, "text": 4}, text_width=2, hidden=4),
}


def batch(padded: int = 0, missing: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    out = {}
    for i, stream in enumerate(("text", "audio", "video")):
        x = np.random.default_rng(i).normal(size=(2, 4, 4 + i)).astype(np.float32)
        out[stream] = np.pad(x, ((0, 0), (0, padded), (0, 0)))
        out[f"{stream}_mask"] = np.pad(np.full((2, 4), stream not in missing), ((0, 0), (0, padded)))
    return out


def started(name: str):
    """A module, random variables and its jitted call."""
    module, rng = MODULES[name], np.random.default_rng(9)
    shapes = jax.eval_shape(module.init, jax.random.key(0), batch())
    return module, jax.tree.map(lambda v: np.float32(rng.normal(size=v.shape)), shapes), jax.jit(module.apply)


def test_low_rank_is_the_tensor_that_the_factors_make():
    """Liu et al. 2018, Eqs. 2 and 5: W · (z_t ⊗ z_a ⊗ z_v) with W = Σ_r w_r · f_t,r ⊗ f_a,r ⊗ f_v,r."""
    module, variables, apply = started("lmf")
    output, params = apply(variables, batch()), jax.tree.map(np.float64, variables["params"])
    z = [np.concatenate([np.ones((2, 1)), output.features[s]], 1) for s in module.streams]
    f = [params[f"factor_{s}"] for s in module.streams]
    want = np.zeros((2, 3))
    for r in range(2):
        for i, j, k in itertools.product(*(range(v.shape[1]) for v in z)):
            weight = params["weights"][0, r] * f[0][r, i] * f[1][r, j] * f[2][r, k]
            want += (z[0][:, i] * z[1][:, j] * z[2][:, k])[:, None] * weight
    np.testing.assert_allclose(output.logits["fusion"], want + params["bias"], atol=1e-5)


def test_the_product_holds_every_stream_alone_and_every_combination():
    module, variables, apply = started("tfn")
    features = apply(variables, batch()).features
    product = np.asarray(features["product"]).reshape(2, *(1 + features[s].shape[1] for s in module.streams))
    audio, video, text = (features[s] for s in module.streams)
    np.testing.assert_allclose(product[:, 0, 0, 0], 1)
    np.testing.assert_allclose(product[:, 1:, 0, 0], audio, atol=1e-6)
    np.testing.assert_allclose(product[:, 0, 0, 1:], text, atol=1e-6)
    np.testing.assert_allclose(product[:, 0, 2, 1], video[:, 1] * text[:, 0], atol=1e-6)
    np.testing.assert_allclose(product[:, 1, 2, 1], audio[:, 0] * video[:, 1] * text[:, 0], atol=1e-6)


@pytest.mark.parametrize("name", MODULES)
def test_a_missing_stream_is_a_zero_vector(name):
    _, variables, apply = started(name)
    gone = apply(variables, batch(missing=("text", "audio"))).features
    assert not gone["text"].any()
    assert not gone["audio"].any()
    np.testing.assert_allclose(gone["video"], apply(variables, batch()).features["video"], atol=1e-6)


@pytest.mark.parametrize("name", MODULES)
def test_only_the_released_form_answers_otherwise_on_padding(name):
    module, variables, apply = started(name)
    want = apply(variables, batch()).logits["fusion"]
    released = jax.jit(module.clone(as_released=True).apply)
    np.testing.assert_allclose(released(variables, batch()).logits["fusion"], want, atol=1e-6)
    np.testing.assert_allclose(apply(variables, batch(3)).logits["fusion"], want, atol=1e-6)
    assert np.abs(released(variables, batch(3)).logits["fusion"] - want).max() > 1e-4


@pytest.mark.parametrize("name", MODULES)
def test_answers_are_those_of_the_released_system(name):
    agreement.assert_answers(name)
