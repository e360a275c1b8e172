"""What of pretrained weights is trained: chosen by paths, changed by factors of low rank, and put together again."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from avjax.errors import AvjaxError
from avjax.models import lora
from avjax.models.lora import Tuning
from avjax.settings import LoraSettings

# Query with 4 inputs and 2 heads of 3, out the other way round, of unequal sides so that none passes for the other.
SHAPES = {
    "words/embedding": (7, 4),
    "block_0/attention/query/kernel": (5, 2, 3),
    "block_0/attention/query/bias": (2, 3),
    "block_0/attention/out/kernel": (2, 3, 5),
    "block_0/up/kernel": (5, 8),
    "block_1/attention/query/kernel": (5, 2, 3),
    "conv_0/kernel": (3, 4, 5),
}


def params(seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    tree: dict = {}
    for path, shape in SHAPES.items():
        *parents, leaf = path.split("/")
        at = tree
        for name in parents:
            at = at.setdefault(name, {})
        at[leaf] = rng.normal(size=shape).astype(np.float32)
    return tree


def flat(tree) -> dict:
    return flatten_dict(tree, sep="/")


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (Tuning(), list(SHAPES)),
        (Tuning(frozen=("",)), []),
        (Tuning(frozen=("^text/words/", "/bias$", "block_1")), [*SHAPES][1:2] + [*SHAPES][3:5] + [*SHAPES][6:]),
        (Tuning(frozen=("^audio/",)), list(SHAPES)),
        (Tuning(lora=LoraSettings()), [p for p in SHAPES if "attention" in p and p.endswith("kernel")]),
        (Tuning(frozen=("block_0/",), lora=LoraSettings()), ["block_1/attention/query/kernel"]),
        (Tuning(lora=LoraSettings(targets=("^text/.*/up/kernel$",))), ["block_0/up/kernel"]),
    ],
)
def test_leaves_are_chosen_by_their_paths(how, expected):
    assert how.chosen("text", list(SHAPES)) == expected


def test_trained_leaves_begin_as_pretrained_and_take_their_places():
    how, pretrained = Tuning(frozen=("/bias$", "conv")), params()
    trained = lora.init_params(jax.random.key(0), how, "text", pretrained)
    assert flat(trained).keys() == {p for p in SHAPES if "bias" not in p and "conv" not in p}
    jax.tree.map(np.testing.assert_array_equal, lora.merged(how, pretrained, trained), pretrained)
    moved = jax.tree.map(lambda leaf: leaf + 1, trained)
    for path, leaf in flat(lora.merged(how, pretrained, moved)).items():
        np.testing.assert_array_equal(leaf, flat(pretrained)[path] + (path in flat(trained)), path)


def test_lora_changes_nothing_at_first_and_then_adds_the_product_of_its_factors():
    how, pretrained = Tuning(lora=LoraSettings(rank=2, alpha=6.0, targets=("kernel$",))), params()
    trained = lora.init_params(jax.random.key(3), how, "text", pretrained)
    jax.tree.map(np.testing.assert_array_equal, lora.merged(how, pretrained, trained), pretrained)
    rng = np.random.default_rng(1)
    moved = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), trained)
    ours, before, factors = flat(lora.merged(how, pretrained, moved)), flat(pretrained), flat(moved)
    sides = {"query/kernel": (5, 6), "out/kernel": (6, 5), "up/kernel": (5, 8), "conv_0/kernel": (12, 5)}
    for path, leaf in ours.items():
        change = np.zeros(leaf.size)
        if path.endswith("kernel"):
            down, up = (np.float64(factors[f"{path}/{side}"]) for side in ("down", "up"))
            assert (len(down), up.shape[1]) == next(v for k, v in sides.items() if path.endswith(k))
            change = np.array([6.0 / 2 * sum(a * b for a, b in zip(row, column, strict=True))
                               for row in down for column in up.T])  # fmt: skip
        np.testing.assert_allclose(leaf.reshape(-1), before[path].reshape(-1) + change, atol=1e-5, err_msg=path)


def test_factors_differ_between_kernels_and_are_of_the_size_of_a_projection():
    wide = {"attention": {"query": {"kernel": np.zeros((400, 4, 100))}, "key": {"kernel": np.zeros((400, 4, 100))}}}
    how = Tuning(lora=LoraSettings(rank=50, targets=("kernel$",)))
    trained = flat(lora.init_params(jax.random.key(0), how, "text", wide))
    query, key = (np.asarray(trained[f"attention/{name}/kernel/down"]) for name in ("query", "key"))
    assert query.std() == pytest.approx(400**-0.5, rel=0.02)
    assert abs(np.corrcoef(query.reshape(-1), key.reshape(-1))[0, 1]) < 0.03
    assert not trained["attention/query/kernel/up"].any()


def test_what_is_no_kernel_has_no_factors():
    how = Tuning(lora=LoraSettings(targets=("conv_0|norm",)))
    with pytest.raises(AvjaxError, match=r"targets names text/norm/scale of shape \(5,\), which is not a kernel"):
        lora.init_params(jax.random.key(0), how, "text", {"norm": {"scale": np.ones(5)}})


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (Tuning(frozen=("^video/", "^flow/")), r"frozen: '\^flow/' is found in no path .* look like video/words"),
        (Tuning(lora=LoraSettings(targets=("querry",))), r"lora\.targets: 'querry' is found in no path"),
    ],
)
def test_a_pattern_that_finds_nothing_is_a_mistake(how, message):
    with pytest.raises(AvjaxError, match=message):
        how.check({"video": params(), "text": params()})
    Tuning(("^video/", "block_1"), LoraSettings()).check({"video": params(), "text": params()})
