"""A run on a mesh is the run on one device: every preset and system, the places of arrays, the sizes of meshes."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from avjax import config as configs
from avjax import models
from avjax.errors import AvjaxError
from avjax.settings import MeshSettings
from avjax.training import batches, dry_run, sharding
from avjax.training import lanes as lane_plans
from tests import meshes

# The axes that share out parameters and the optimizer's state.
SHARED = {
    "single": [],
    "dp": [],
    "fsdp": ["fsdp"],
    "tp": ["tensor"],
    "lanes": ["lane"],
    "lane × fsdp × tensor": ["fsdp", "lane", "tensor"],
    "data × tensor": ["tensor"],
    "data × fsdp": ["fsdp"],
}
DEVICES = {"single": 1}
MARKS = {"etg_aver": [pytest.mark.thorough, pytest.mark.budget(150)]}
# Of the answers' spread, behind two updates: Adam's first ones are as large where a gradient is rounding alone.
CLOSE = {"avt_ca": 1e-2}


def trained(system: str, presets: Iterable[str]) -> dict[str, dict]:
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-m", "tests.meshes", system, *presets]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {row["preset"]: row for row in map(json.loads, done.stdout.splitlines())}


@pytest.mark.budget(35)
def test_lanes_and_parameters_shared_out_make_the_same_two_steps():
    check_steps("etg_aver", ["single", "lane × fsdp × tensor"])


@pytest.mark.parametrize("system", [pytest.param(s, marks=MARKS.get(s, pytest.mark.slow)) for s in meshes.SYSTEMS])
def test_every_mesh_makes_the_same_two_steps(system):
    check_steps(system, meshes.MESHES)


def check_steps(system: str, presets: Iterable[str]) -> None:
    found = trained(system, presets)
    assert [*found] == [*presets]
    alone = found["single"]
    assert np.shape(alone["losses"]) == (8, 2)
    for preset, row in found.items():
        assert row["devices"] == DEVICES.get(preset, 8)
        assert row["shared"] == SHARED[preset]
        np.testing.assert_allclose(row["losses"], alone["losses"], rtol=1e-4)
        spread = np.std(alone["predictions"])
        np.testing.assert_allclose(row["predictions"], alone["predictions"], atol=CLOSE.get(system, 1e-3) * spread)


@pytest.mark.parametrize(
    ("preset", "given", "devices", "processes", "lanes", "batch", "expected"),
    [
        ("auto", {}, 1, 1, 5, 8, {}),
        ("auto", {}, 8, 1, 15, 8, {"lane": 5}),  # three devices stand by
        ("auto", {}, 8, 1, 16, 8, {"lane": 8}),
        ("auto", {}, 8, 1, 1, 12, {"data": 6}),
        ("auto", {}, 8, 2, 1, 16, {"data": 8}),
        ("lanes", {}, 8, 2, 12, 8, {"lane": 4, "data": 2}),  # no process without work
        ("single", {}, 8, 1, 5, 8, {}),
        ("dp", {}, 8, 1, 5, 8, {"data": 8}),
        ("fsdp", {}, 4, 1, 5, 8, {"fsdp": 4}),
        ("tp", {}, 4, 1, 5, 3, {"tensor": 4}),
        ("auto", {"lane": 5}, 8, 1, 5, 8, {"lane": 5}),
        ("dp", {"data": 2, "tensor": 4}, 8, 1, 5, 8, {"data": 2, "tensor": 4}),
    ],
)
def test_sizes_of_meshes(preset, given, devices, processes, lanes, batch, expected):  # noqa: PLR0913 - a row of the table
    sizes = sharding.mesh_sizes(MeshSettings(preset=preset, **given), devices, processes, lanes, batch)
    assert sizes == dict.fromkeys(sharding.AXES, 1) | expected
    assert tuple(sizes) == sharding.AXES


@pytest.mark.parametrize(
    ("preset", "given", "devices", "processes", "says"),
    [
        ("ddp", {}, 8, 1, "mesh.preset is 'ddp'; choose one of auto, single, dp"),
        ("dp", {"data": 16}, 8, 1, "data 16 takes 16 devices, and at most 8 are to be used"),
        ("single", {}, 8, 2, "one device takes 1 devices, and all 8 are to be used"),
        ("auto", {"lane": 4}, 8, 1, "splits lanes, 5, over 4 devices; these must divide it"),
        (
            "auto",
            {"data": 2, "fsdp": 2, "tensor": 2},
            8,
            1,
            "XLA's partitioner errs where all of data, fsdp and tensor",
        ),
        ("dp", {}, 5, 1, "splits train.batch_size, 8, over 5 devices"),
    ],
)
def test_meshes_that_do_not_fit(preset, given, devices, processes, says):
    with pytest.raises(AvjaxError, match=says):
        sharding.mesh_sizes(MeshSettings(preset=preset, **given), devices, processes, 5, 8)


@pytest.mark.parametrize(
    ("family", "path", "axes", "spec"),
    [
        ("etg_aver", "/params/fuse/query/kernel", 2, P("fsdp", "tensor")),
        ("etg_aver", "/params/head_text/kernel", 2, P("fsdp", None)),
        ("etg_aver", "/opt_state/1/mu/fuse/query/kernel", 2, P("fsdp", "tensor")),  # as the parameter that it is of
        ("etg_aver", "/stats/video/0", 2, P()),
        ("de_iii", "/params/audio_block_0/attention/query/kernel", 3, P("fsdp", "tensor", None)),
        ("de_iii", "/params/audio_block_0/attention/out/kernel", 3, P("tensor", None, "fsdp")),
        ("de_iii", "/params/audio_block_0/convolution/depthwise/kernel", 3, P(None, None, "fsdp")),
        ("avt_ca", "/params/video/stem/kernel", 4, P(None, None, "fsdp", "tensor")),
        ("emoasst", "/params/video/layer_0/up/bias", 1, P("tensor")),
        ("fusions", "/params/norm/scale", 1, P()),
    ],
)
def test_rules(family, path, axes, spec):
    assert sharding.spec_of(sharding.RULES[family], path, axes) == spec


def test_an_array_in_another_place_is_named():
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    mesh = jax.make_mesh((1,), ("lane",), axis_types=(jax.sharding.AxisType.Auto,))
    tree = {"a": {"kernel": jax.device_put(np.ones(4, np.float32), here)}}
    sharding.check(tree, {"a": {"kernel": here}})
    asked = jax.sharding.NamedSharding(mesh, P("lane"), memory_kind="unpinned_host")
    with pytest.raises(AvjaxError, match=r"/a/kernel .* is placed by .* as asked"):
        sharding.check(tree, {"a": {"kernel": asked}})


def test_a_dry_run_tells_parameters_memory_and_work(capsys):
    from rich.console import Console

    config = configs.settings("configs/etg_folder.py", model__width=16, train__batch_size=8)
    made = meshes.features("etg_aver")
    model = models.build(config.model, 3)
    fold = meshes.Fold("one", tuple(made.ids[:16]), tuple(made.ids[16:]), ())
    plan = lane_plans.plan(made, [fold], (1, 2), config.protocol)
    data = batches.resident(made, "both", "train")
    figures = dry_run.show(model, config, sharding.ALONE, plan, data, Console(width=200))
    told = capsys.readouterr().out
    assert "fuse/query/kernel" in told
    assert "(2, 16, 16)" in told
    assert f"Total: {2 * figures['parameters']:,}" in told
    assert "nothing was trained" in told
    assert figures["lanes"] == 2
    assert f"2 lanes of {figures['parameters']:,} parameters" in told
    # Four arrays of each parameter: it, the best so far, and Adam's two moments.
    assert figures["state_bytes"] > 4 * 4 * 2 * figures["parameters"]
    # A matrix of 16 × 16 meets each clip at least three times: forward, and twice backward.
    assert figures["flops"] > 2 * 8 * 3 * 2 * 16 * 16
    assert figures["temporary_bytes"] > 0
