"""Two steps of a system on meshes of eight CPU devices; a program, as a process sets its number of devices once."""

import dataclasses
import json
import sys

import jax
import numpy as np

from avjax import config as configs
from avjax import models
from avjax.datasets.base import Fold
from avjax.training import lanes as lane_plans
from avjax.training import loop, sharding, streamed_batches
from tests import prompted, synthetic

MESHES = {
    **{preset: {} for preset in ("single", "dp", "fsdp", "tp", "lanes")},
    # By sizes, which replace those of the preset.
    "lane × fsdp × tensor": {"lane": 2, "fsdp": 2, "tensor": 2},
    "data × tensor": {"data": 2, "tensor": 4},
    "data × fsdp": {"data": 4, "fsdp": 2},
}
# Configuration, and the changes that make it small.
SYSTEMS = {
    "etg_aver": ("configs/etg_folder.py", {"model__width": 16}),
    "etg_aver_remat": ("configs/etg_folder.py", {"model__width": 16, "train__remat": True}),
    "de_iii": (
        "configs/deiii_folder.py",
        {"model__settings__width": 16, "model__settings__heads": 8, "model__settings__output": 16}
        | {f"model__settings__depths__{stream}": 1 for stream in ("audio", "video", "flow")},
    ),
    # Without rotation: rotated frames are rounded to integers, so that a last bit may change a pixel by 1.
    "avt_ca": (
        "configs/avtca_folder.py",
        {"model__settings__width": 16, "model__settings__heads": 8, "train__augment__degrees": 0.0},
    ),
    "emoasst": ("configs/emoasst_folder.py", {f"model__settings__{k}": v for k, v in prompted.SMALL.items()}),
}


def features(system: str):
    """Makes features for a system."""
    made = prompted.make(clips=24) if system == "emoasst" else synthetic.make(clips=24)
    both = {name: dict(part) for name, part in (("arrays", made.arrays), ("masks", made.masks))}
    for part in both.values():
        part["flow"] = part["video"]
    if system == "avt_ca":  # reads raw frames
        shape = (*made.masks["video"].shape, 32, 32, 3)
        both["arrays"]["video"] = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    return dataclasses.replace(made, **both)


def trained(system: str, preset: str, sizes: dict) -> dict[str, object]:
    """Returns the losses of two steps by lane, the axes that shard parameters, and the devices."""
    file, small = SYSTEMS[system]
    chosen = {"train__seeds": tuple(range(1, 9)), "train__epochs": 1, "train__epochs_per_call": 1}
    chosen |= {
        "train__batch_size": 8,
        "mesh__preset": "auto" if sizes else preset,
        **{f"mesh__{k}": v for k, v in sizes.items()},
    }
    config = configs.settings(file, **small | chosen)
    made = features(system)
    ids = made.ids
    model = models.build(config.model, len(made.classes))
    fold = Fold("one", tuple(ids[:16]), tuple(ids[20:]), tuple(ids[16:20]))
    plan = lane_plans.plan(made, [fold], config.train.seeds, config.protocol, model.turns)
    placement = sharding.placement(config, len(plan.names))
    clips, lanes = streamed_batches.choose(made, config, model.constants, placement), placement.put_lanes(plan.lanes)
    trainer = loop.make(model, config, placement)
    state = trainer.init(lanes, clips)
    if placement.mesh:
        sharding.check(state, placement.of_state(state))
    state, sums = trainer.epochs(state, lanes, clips, np.int32(1))
    if placement.mesh:
        sharding.check(state, placement.of_state(state))
    losses = sum(np.asarray(v)[:, 0] for v in sums["train_terms"].values())  # (lanes, steps)
    specs = [leaf.sharding.spec for leaf in jax.tree.leaves((state.params, state.opt_state)) if placement.mesh]
    shared = {axis for spec in specs for axes in spec for axis in sharding._names(axes)}
    logits = jax.device_get(trainer.predict(state, lanes, clips))
    predictions = np.concatenate([v.ravel() for v in jax.tree.leaves(logits)])
    return {
        "losses": losses.tolist(),
        "predictions": predictions.tolist(),
        "shared": sorted(shared),
        "devices": placement.mesh.size if placement.mesh else 1,
    }


def main(system: str, presets: list[str]) -> None:
    """Prints a row of JSON for each preset."""
    jax.config.update("jax_disable_most_optimizations", True)
    assert jax.device_count() == 8
    for preset in presets:
        print(json.dumps({"system": system, "preset": preset} | trained(system, preset, MESHES[preset])), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
