"""Presets that see every frame and its optical flow, from clips to packed features; encoders are small and random."""

import csv
import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest

from avjax import config, train
from avjax.encoders import perceiver, weights
from avjax.features import encode, presets
from avjax.features import extract as extraction
from avjax.features import store as stores
from avjax.features.face_video import Raw
from avjax.features.spool import Spool
from avjax.inference import predict as prediction
from avjax.inference import run as runs
from avjax.inference import tables as prediction_tables
from avjax.media import flow
from avjax.utils.progress import Stopwatch
from tests.features.test_presets import data, extract, tiny  # noqa: F401

torch = pytest.importorskip("torch", reason="the encoders' files are made by PyTorch (extra parity)")
import transformers  # noqa: E402

STREAMS = ("video", "flow", "audio")


@pytest.fixture(scope="module")
def flowing(tiny, tmp_path_factory):  # noqa: F811
    """Presets of the small encoders: with DIS flow, and with that of a small Perceiver."""
    flow_encoder = tmp_path_factory.mktemp("flow") / "mover"
    config = transformers.PerceiverConfig(
        train_size=[24, 36],
        num_latents=4,
        d_latents=8,
        d_model=322,
        num_self_attends_per_block=1,
        num_self_attention_heads=2,
        num_cross_attention_heads=1,
    )
    torch.manual_seed(0)
    transformers.PerceiverForOpticalFlow(config).save_pretrained(flow_encoder)
    image = dataclasses.replace(tiny.image, every=1, side=48)
    base = dataclasses.replace(tiny, frames=0, image=image, face=False, max_seconds=1.2)
    return {
        "dis": dataclasses.replace(base, flow=presets.Flow("dis", image, side=48)),
        "moved": dataclasses.replace(base, flow=presets.Flow(str(flow_encoder), image, side=40, window=2, stride=2)),
        "grid": dataclasses.replace(base, image=None, face=True, speech=None, flow=presets.Flow("dis", None, side=48)),
    }


@pytest.fixture(autouse=True)
def registered(flowing, monkeypatch):
    for name, preset in flowing.items():
        monkeypatch.setitem(presets.PRESETS, name, preset)


@pytest.fixture(scope="module")
def packed(data, flowing, tmp_path_factory):  # noqa: F811
    """A function that gives the store and the examples of a preset, extracted once."""
    out = tmp_path_factory.mktemp("store")

    @functools.cache
    def made(name):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(presets.PRESETS, name, flowing[name])
            return out, extract(data, out, name)

    return made


EITHER = pytest.mark.parametrize("name", ["dis", "moved"])


@pytest.mark.thorough
@EITHER
def test_every_frame_has_a_step_of_video_and_flow(packed, name):
    out, made = packed(name)
    assert len(made) == 7
    assert not (out / "scratch").exists()
    for clip in made.values():
        assert clip["flow"].shape == clip["video"].shape == (len(clip["times"]), 12)
        assert clip["flow"].dtype == np.float16
        np.testing.assert_array_equal(clip["flow_mask"], clip["video_mask"])
        assert not clip["flow"][~clip["flow_mask"]].any()
    assert len(made["voice"]["flow"]) == 0
    seen = [c for i, c in made.items() if "/" in i]
    assert all(c["flow_mask"].all() and len(c["flow"]) > 10 for c in seen)
    moves = [np.abs(np.diff(c["flow"].astype(np.float32), axis=0)).max(1) > 0 for c in seen]
    stride = {"dis": 1, "moved": 2}[name]
    for changes in moves:
        assert not changes[[i for i in range(len(changes)) if (i + 1) % stride]].any(), "held until the next"
        assert changes.mean() > 0.8 / stride


@pytest.mark.thorough
def test_the_store_loads_flow(packed):
    out, made = packed("dis")
    full = stores.load(out, "dis")
    assert full.arrays["flow"].shape[0] == 7
    row = full.ids.index(next(i for i in full.ids if "/" in i))
    steps = made[full.ids[row]]["flow"]
    np.testing.assert_array_equal(full.arrays["flow"][row, : len(steps)], steps)
    assert full.masks["flow"][row].sum() == len(steps)
    assert not full.random


@pytest.mark.thorough
@EITHER
def test_neither_blocks_nor_neighbours_nor_the_device_change_a_clips_features(
    packed,
    data,  # noqa: F811
    name,
    tmp_path,
    monkeypatch,
):
    _, made = packed(name)
    monkeypatch.setattr(encode, "BLOCK", 7)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr("avjax.encoders.loading.default_dtype", lambda: "float32")
    with (data / "labels.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    (tmp_path / "alone").mkdir()
    for row in rows:
        (tmp_path / "alone" / row[0]).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "alone" / row[0]).hardlink_to(data / row[0])
    chosen = [rows[1], rows[4]]
    with (tmp_path / "alone" / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *chosen])
    alone = extract(tmp_path / "alone", tmp_path / "F", name)
    assert len(alone) == 2
    for clip_id, clip in alone.items():
        for stream in STREAMS:
            size = max(1e-3, float(np.abs(made[clip_id][stream]).max(initial=0)))
            np.testing.assert_allclose(clip[stream], made[clip_id][stream], atol=2e-3 * size)


@pytest.mark.budget(9)
def test_a_grid_of_flow_stands_beside_the_measurements_of_every_frame(packed):
    out, made = packed("grid")
    assert len(made) == 7
    assert not (out / "scratch").exists()
    for clip in made.values():
        assert clip["flow"].shape == (len(clip["times"]), 147)
        assert clip["flow"].dtype == np.float16
        np.testing.assert_array_equal(clip["flow_mask"], clip["video_mask"])
        assert len(clip["video"]) == len(clip["flow"])
        assert not clip["flow"][~clip["flow_mask"]].any()
        assert np.abs(clip["flow"]).max(initial=0) <= 1
    assert len(made["voice"]["flow"]) == 0
    assert not made["faceless"]["flow_mask"].any()
    for clip in (c for i, c in made.items() if "/" in i):
        assert not clip["flow"][0].any(), "no motion before the first"
        assert clip["flow"][1:].any(1).mean() > 0.8
    records = [r for r in map(_read, (out / "provenance").iterdir()) if r["feature"] == "flow"]
    assert {"face_landmarker"} in [r["weights"].keys() for r in records], "no encoder"


@pytest.mark.thorough
def test_a_grid_of_flow_is_the_same_when_it_is_taken_up_again(packed, data, tmp_path):  # noqa: F811
    full, made = packed("grid")
    out = tmp_path / "F"
    shutil.copytree(full / "staged", out / "staged")
    shutil.copytree(full / "provenance", out / "provenance")
    grids = [p for p in out.glob("staged/*/flow-*") if np.load(p)["steps"].shape[1] == 147]
    assert len(grids) == 7
    for path in grids[::2]:
        path.unlink()
    again = extract(data, out, "grid")
    assert all(path.exists() for path in grids)
    for clip_id, clip in made.items():
        np.testing.assert_array_equal(again[clip_id]["flow"], clip["flow"])


def test_a_staged_grid_is_of_the_full_clip_whatever_its_blocks(tmp_path, flowing, monkeypatch):
    rng = np.random.default_rng(0)
    flows = (
        rng.normal(size=(10, 48, 48, 2)).astype(np.float16) * np.arange(1, 11, dtype=np.float16)[:, None, None, None]
    )
    store, settings, present = stores.Store(tmp_path), flowing["grid"], np.ones(11, bool)
    context = encode.Context(settings, store, Stopwatch(), encode.Loader(random=True))
    stage = encode.FlowGrid(context, face_landmarker="abc")

    def staged(name, flows, present=present):
        spool = None
        if flows is not None:
            spool = Spool.create(tmp_path / "room", flows.shape[1:], "float16")
            spool.add(flows)
        stage.add(encode.Unencoded(name, stage.key, Raw(flows=spool), present))
        assert not spool or not spool.path.exists()
        return store.get(name, "flow", stage.key)["steps"]

    made = staged("a", flows)
    monkeypatch.setattr(encode, "BLOCK", 3)
    np.testing.assert_array_equal(staged("b", flows), made)
    assert made.shape == (11, 147)
    assert not made[0].any()
    np.testing.assert_allclose(made[1:], flow.grid(flows, flow.spread([flows])), atol=1e-3)
    np.testing.assert_array_equal(staged("c", None, np.zeros(2, bool)), np.zeros((2, 147)))


@pytest.mark.thorough
def test_the_flow_encoder_computes_the_flow_of_the_pairs(data, tmp_path, monkeypatch):  # noqa: F811
    asked = []

    def moved(flow_encoder, first, second, *, batch):
        assert batch == 1, "on a CPU"
        asked.append((flow_encoder.provenance["source"], first.shape, second.shape))
        return np.full((*first.shape[:3], 2), np.float32(len(asked)))

    monkeypatch.setattr(perceiver, "optical_flow", moved)
    made = extract(data, tmp_path / "F", "moved")
    assert {source for source, _, _ in asked} == {"mover"}
    assert all(first == second and first[1:] == (40, 40, 3) for _, first, second in asked)
    seen = [c for i, c in made.items() if "/" in i]
    assert sum(n for _, (n, *_), _ in asked) == sum(len(flow.ends(c["flow_mask"], 2, 2)) for c in seen)
    record = next(r for r in map(_read, (tmp_path / "F" / "provenance").iterdir()) if r["feature"] == "flow")
    assert record["weights"]["flow_source"] == "mover"
    assert record["weights"]["flow_model_type"] == "perceiver"


def _read(path):
    return json.loads(path.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["emoasst", "deiii_dis"])
def test_random_weights_of_the_true_size_run_end_to_end_and_mark_every_result(name, data, tmp_path, monkeypatch):  # noqa: F811
    from rich.console import Console

    fetch = weights.fetch
    monkeypatch.setattr(
        weights,
        "fetch",
        lambda what, *_: fetch(what) if what == "face_landmarker" else pytest.fail(f"{what} was fetched"),
    )
    out, workdir = tmp_path / "F", tmp_path / "W"
    options = extraction.Options(processes=2)
    extraction.extract("folder", name, root=str(data), out=str(out), random=True, options=options)
    assert stores.load(out, name).random
    encoded = [
        r for r in map(_read, (out / "provenance").iterdir()) if r["feature"] in ("image", "flow", "speech", "text")
    ]
    assert len(encoded) == (3 if name == "emoasst" else 4)
    assert {r["weights"]["sha256"] for r in encoded} == {"random, seed 0"}
    settings = config.settings(
        "configs/etg_folder.py",
        data__features=str(out),
        preset=name,
        protocol__fold_count=2,
        model__width=16,
        train__epochs=1,
        train__epochs_per_call=1,
        train__seeds=(1,),
    )
    train.train(settings, workdir)
    assert _read(workdir / "metrics.json")["protocol"].startswith("RANDOM WEIGHTS")
    assert "RANDOM WEIGHTS" in (workdir / "report.html").read_text()
    run = runs.read_run(workdir)
    clip = prediction.find_clips([str(data / "faceless.mp4")])
    (row,), rejected = prediction.predict(run, clip, Console(quiet=True))
    assert not rejected
    assert "RANDOM WEIGHTS" in prediction_tables.as_json(run, [row], [])
    want = prediction.probabilities(run, stores.load(out, name))[stores.load(out, name).ids.index("faceless")]
    np.testing.assert_allclose(list(row.scores.values()), want, atol=1e-5)
