"""The baselines' PyTorch versions make the same step as ours, and a differing one is rejected."""

import dataclasses

import numpy as np
import pytest

from avjax.errors import AvjaxError
from benchmarks import step as benchmark
from benchmarks.torch import baselines as torch_baselines
from benchmarks.torch import towers as torch_towers
from benchmarks.torch.layers import named
from benchmarks.torch.restated import sum_of_heads
from tests.benched import needs_torch

WIDTHS = {"text": 4, "audio": 3, "video": 5}
SMALL = {
    "concat": {"width": 6, "hidden": 5},
    "additive": {"width": 6, "hidden": 5},
    "weighted_sum": {"width": 6, "hidden": 5},
    "amh": {"widths": WIDTHS, "hops": 4},
    "bc_lstm": {"hidden": 4, "width": 5},
    "mag": {"shift": 0.5},
    "misa": {"width": 6, "heads": 2, "inner": 7, "recurrent": 4},
    "mfm": {"latents": WIDTHS | {"label": 6}, "factors": WIDTHS | {"label": 6}, "widths": WIDTHS, "memory": 7}
    | {"hidden": 8, "segment_count": 6},
    "mmtm": {"width": 8, "heads": 2, "layers": 2},
    "msaf": {"width": 8, "heads": 2, "layers": 2, "block": 4},
    "m2fnet": {"width": 8, "heads": 2, "layers": 1, "fusion_layers": 2},
    "tmep": {"width": 8, "heads": 2, "layers": 1, "joint_layers": 2},
    "cfn_sr": {"width": 8, "heads": 2, "layers": 2, "blocks": 2, "kernel": 3},
    "vavl": {"bottleneck": 5, "width": 8, "heads": 2, "kernel": 5, "depth": 1, "shared_depth": 1},
}
# One of clips and one of conversations; the others are thorough.
QUICK = ("concat", "bc_lstm")
# Models whose loss has terms besides those of the heads.
MORE_TERMS = ("m2fnet", "misa", "mfm", "vavl")
RESTATED = torch_baselines.RESTATED | torch_towers.RESTATED


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Makes models small and streams short and of different lengths; several clips share a class."""
    for name, settings in SMALL.items():
        monkeypatch.setitem(benchmark.SIZES, name, (benchmark.Size("small", settings),))
    monkeypatch.setattr(benchmark, "SHAPES", {"text": (5, 9), "audio": (12, 7), "video": (7, 6)})
    monkeypatch.setattr(benchmark, "BATCH", 12)
    monkeypatch.setattr(benchmark, "TURNS", 3)


def ways(name: str) -> list[str]:
    """Returns the names of the ways whose first two steps are the same."""
    return [way.name for way in benchmark.make_ways(benchmark.make_case(name, *benchmark.sizes(name)))]


def test_what_is_restated_is_measured():
    assert set(RESTATED) == set(SMALL) <= set(benchmark.MODELS)
    assert {name: benchmark.RESTATED[name] for name in RESTATED} == RESTATED


@needs_torch
@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.thorough) for n in SMALL])
def test_both_sides_make_the_same_step(name):
    assert ways(name) == ["avjax", "pytorch"]


@pytest.mark.thorough
@needs_torch
@pytest.mark.parametrize("name", MORE_TERMS)
def test_a_loss_without_its_further_terms_is_refused(name, monkeypatch):
    monkeypatch.setitem(benchmark.RESTATED, name, dataclasses.replace(RESTATED[name], loss=sum_of_heads))
    with pytest.raises(AvjaxError, match=f"{name}: pytorch: what an update changes in the logits"):
        ways(name)


# ---- Names --------------------------------------------------------------------------------------------------------


def test_query_key_and_value_stand_in_one_matrix():
    rng = np.random.default_rng(0)
    split = {name: {"kernel": rng.normal(size=(4, 2, 3)), "bias": rng.normal(size=(2, 3))} for name in "qkv"}
    parts = dict(zip(("query", "key", "value"), split.values(), strict=True))
    state = named({"block": {"attention": parts | {"out": {"kernel": rng.normal(size=(2, 3, 4))}}}})
    assert set(state) == {f"block.attention.{name}" for name in ("in_proj_weight", "in_proj_bias", "out.weight")}
    x = rng.normal(size=4)
    want = [np.tensordot(x, part["kernel"], 1).ravel() + part["bias"].ravel() for part in parts.values()]
    got = state["block.attention.in_proj_weight"] @ x + state["block.attention.in_proj_bias"]
    np.testing.assert_allclose(got, np.concatenate(want))


def test_a_recurrence_has_the_tensors_of_pytorch():
    rng = np.random.default_rng(0)
    given = {"kernel": rng.normal(size=(5, 4, 3)), "bias": rng.normal(size=(4, 3))}
    kernel = rng.normal(size=(3, 12))
    state = named({"text": {"input": given, "kernel": kernel}})
    assert {name: x.shape for name, x in state.items()} == {
        "text.weight_ih": (12, 5),
        "text.weight_hh": (12, 3),
        "text.bias_ih": (12,),
        "text.bias_hh": (12,),
    }
    np.testing.assert_array_equal(state["text.weight_hh"], kernel.T)
    np.testing.assert_array_equal(state["text.weight_ih"][4], given["kernel"][:, 1, 1])
    assert not state["text.bias_hh"].any()
