"""MAG: its equations by plain loops, and what it does without company."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avjax.models.fusions import mag
from tests.models.fusions.made import dense, randomised

TEXT, AUDIO, VIDEO = (
    np.random.default_rng(i).normal(size=(2, 3, w)).astype(np.float32) for i, w in enumerate((4, 2, 5))
)


STEPS = {"audio": AUDIO, "video": VIDEO}
MASKS = {s: np.ones((2, 3), bool) for s in STEPS}


@pytest.mark.parametrize("shift", [0.1, 50.0])
def test_mag_shifts_each_token_by_a_bounded_step(shift):
    """Rahman et al. 2020, Eqs. 1–5; a large β leaves the whole shift."""
    block = mag.MagBlock(shift, 0.0)
    variables = randomised(block, TEXT, STEPS, MASKS)
    params = variables["params"]
    want = np.zeros(TEXT.shape)
    for b, t in np.ndindex(2, 3):
        z, moved = np.float64(TEXT[b, t]), np.zeros(4)
        for stream, x in STEPS.items():
            gate = np.maximum(dense(np.concatenate([x[b, t], z]), params[f"gate_{stream}"]), 0)
            moved += gate * dense(x[b, t], params[f"shift_{stream}"])
        z = z + min(shift * np.linalg.norm(z) / (np.linalg.norm(moved) + 1e-6), 1) * moved
        z = (z - z.mean()) / np.sqrt(z.var() + 1e-5)
        want[b, t] = z * params["norm"]["scale"] + params["norm"]["bias"]
    np.testing.assert_allclose(jax.jit(block.apply)(variables, TEXT, STEPS, MASKS), want, atol=1e-4)


def test_mag_leaves_text_alone_that_has_no_company():
    block = mag.MagBlock(1.0, 0.0)
    variables = randomised(block, TEXT, STEPS, MASKS)
    variables["params"]["norm"] = {"scale": jnp.ones(4), "bias": jnp.zeros(4)}
    nothing = {s: np.zeros((2, 3), bool) for s in STEPS}
    grad = jax.jit(jax.grad(lambda v, t: block.apply(v, t, STEPS, nothing)[0, 0, 0], (0, 1)))(variables, TEXT)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grad))
    got = jax.jit(block.apply)(variables, TEXT, STEPS, nothing)
    want = (TEXT - TEXT.mean(-1, keepdims=True)) / np.sqrt(TEXT.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(got, want, atol=1e-5)
