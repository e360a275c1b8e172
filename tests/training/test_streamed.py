"""Streamed clips: the same batches and parameters as resident ones, read anew from disk, cut and gone on anywhere."""

import dataclasses
import json
import re
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avjax import config, models
from avjax.errors import AvjaxError
from avjax.features import store
from avjax.features.packed import Packed
from avjax.training import batches, history, loop, streamed_batches, streamed_loop
from avjax.training import lanes as lane_plans
from tests import synthetic
from tests.training.test_loop import FOLDS, SMALL, TALK, settings, with_dialogues

FEATURES = synthetic.make(signal=0.5)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("store")
    synthetic.write_store(root, FEATURES)
    return root


def chosen(mode: str = "streamed", **more):
    return settings(data__mode=mode, train__epochs=2, train__epochs_per_call=1, train__save_steps=1, **more)


class Run:
    """A protocol trained epoch by epoch, from memory or from disk."""

    def __init__(self, features=FEATURES, made=None, workdir=None, model=SMALL, folds=FOLDS, say=lambda line: None):
        self.config = made or chosen()
        self.plan = lane_plans.plan(features, folds, (1, 2), self.config.protocol, model.turns)
        self.data, self.model = streamed_batches.choose(features, self.config), model
        streamed = isinstance(self.data, streamed_batches.Streamed)
        if streamed:
            self.trainer = streamed_loop.make(model, self.config, workdir, say=say)
        else:
            self.trainer = loop.make(model, self.config)
        self.state = self.trainer.init(self.plan.lanes, self.data)
        self.rows = []

    def train(self, first: int = 1, last: int = 2) -> "Run":
        for epoch in range(first, last + 1):
            self.state, sums = self.trainer.epochs(self.state, self.plan.lanes, self.data, jnp.int32(epoch))
            self.rows += history.epoch_rows(sums, self.plan.names, epoch, self.model)
        return self

    def predictions(self) -> dict[str, np.ndarray]:
        return jax.device_get(self.trainer.predict(self.state, self.plan.lanes, self.data))


def near(a, b) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), a, b)


def equal(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def full() -> Run:
    return Run().train()


@pytest.mark.budget(10)
def test_streamed_and_resident_training_give_equal_parameters(full):
    resident = Run(made=chosen("resident")).train()
    assert isinstance(resident.data, batches.Resident)
    near(full.state.stats, resident.state.stats)
    near(full.state.params, resident.state.params)
    near(full.state.best, resident.state.best)
    equal(full.state.best_epoch, resident.state.best_epoch)
    near(full.predictions(), resident.predictions())
    for ours, theirs in zip(full.rows, resident.rows, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


@pytest.mark.thorough
def test_conversations_stream_too():
    features = with_dialogues(lambda i: f"dialogue {i // 4}")
    runs = [Run(features, chosen(mode), model=TALK).train(last=1) for mode in ("streamed", "resident")]
    near(*(run.state.params for run in runs))
    near(*(run.predictions() for run in runs))


def test_from_disk_is_as_from_memory(root, full):
    features = store.load(root, "lite", on_disk=True)
    assert not features.arrays
    again = Run(dataclasses.replace(features, clips=FEATURES.clips)).train()
    equal(again.state.params, full.state.params)
    equal(again.predictions(), full.predictions())


def test_packed_clips_are_those_of_the_whole_set(root):
    packed = Packed(root, "synthetic", "lite", FEATURES.clips, "audio")
    loaded = store.load(root, "lite")
    together = batches.streams_of(loaded, "audio")
    assert len(packed) == len(FEATURES.ids)
    for i in (0, 3, 5, 47):
        clip = packed[i]
        assert clip.keys() == together.keys()
        for key, array in clip.items():
            np.testing.assert_array_equal(array, together[key][i], err_msg=key)
    with pytest.raises(AvjaxError, match=r"model\.text_source is 'smell'; the feature store has "):
        Packed(root, "synthetic", "lite", FEATURES.clips, "smell")


def test_what_is_in_memory_stands_beside_the_clips_on_disk(root):
    rng = np.random.default_rng(0)
    held = {name: rng.normal(size=(48, n, 5)).astype(np.float32) for name, n in (("prompts", 6), ("text_constant", 1))}
    masks = {name: np.ones(array.shape[:2], bool) for name, array in held.items()}
    left, loaded = (store.load(root, "lite", on_disk=on_disk) for on_disk in (True, False))
    left, loaded = (dataclasses.replace(f, arrays=f.arrays | held, masks=f.masks | masks) for f in (left, loaded))
    for source, texts in (("constant", held["text_constant"]), ("audio", loaded.arrays["text_audio"])):
        disk, memory = (streamed_batches.choose(f, chosen(model__text_source=source)) for f in (left, loaded))
        index = np.array([[3, 0], [47, 3]])
        equal(disk.rows(index), memory.rows(index))
        np.testing.assert_array_equal(disk.rows(index)["prompts"], held["prompts"][index])
        np.testing.assert_array_equal(disk.rows(index)["text"], texts[index])
        assert len(disk.clips) == 48


class Killed(Exception):
    pass


@pytest.mark.budget(8)
@pytest.mark.parametrize("steps", [3, *(pytest.param(n, marks=pytest.mark.thorough) for n in (1, 5))])
def test_cut_within_an_epoch_it_goes_on_bit_for_bit(tmp_path, full, steps):
    """Killed after so many steps; what it had written then is all that the next run knows."""
    lines = []

    def die(line: str) -> None:
        lines.append(line)
        if len(lines) == steps:
            raise Killed

    with pytest.raises(Killed):
        Run(workdir=tmp_path, say=die).train()
    count = int(re.search(r"step (\d+) of (\d+)", lines[-1])[2])
    epoch = 1 + (steps - 1) // count
    resumed = Run(workdir=tmp_path, say=lines.append)
    if epoch > 1:
        resumed.state = Run().train(last=epoch - 1).state  # as the checkpoint of the whole epoch has it
    del lines[:]
    resumed.train(first=epoch)
    assert len(lines) == 2 * count - steps, "steps made before are not made again"
    equal(resumed.state.params, full.state.params)
    equal(resumed.predictions(), full.predictions())
    per_epoch = len(full.plan.names)
    assert resumed.rows == full.rows[(epoch - 1) * per_epoch :]


@pytest.mark.thorough
def test_a_checkpoint_of_another_epoch_is_not_taken(tmp_path):
    Run(workdir=tmp_path).train(last=1)
    lines = []
    later = Run(workdir=tmp_path, say=lines.append)
    later.train(first=2)
    assert lines[0].startswith("epoch 2/2, step 1 of")


def test_size_decides_and_can_be_overruled(monkeypatch, root):
    assert isinstance(streamed_batches.choose(FEATURES, chosen("auto")), batches.Resident)
    monkeypatch.setattr(streamed_batches, "room", lambda: 1000)
    assert isinstance(streamed_batches.choose(FEATURES, chosen("auto")), streamed_batches.Streamed)
    assert isinstance(streamed_batches.choose(FEATURES, chosen("resident")), batches.Resident)
    assert streamed_batches.too_large(root, "synthetic", "lite", "auto")
    assert not streamed_batches.too_large(root, "synthetic", "lite", "resident")
    monkeypatch.setattr(streamed_batches, "room", lambda: 1e9)
    assert not streamed_batches.too_large(root, "synthetic", "lite", "auto")
    with pytest.raises(AvjaxError, match=r"data\.mode is 'cloud'; choose one of auto, resident, streamed"):
        streamed_batches.choose(FEATURES, chosen("cloud"))


def test_features_that_a_model_cannot_read_are_named():
    data = streamed_batches.choose(FEATURES, chosen()).resident(np.arange(1))
    flow = dataclasses.replace(SMALL, streams=("audio", "flow"))
    with pytest.raises(
        AvjaxError, match=r"model\.streams has flow; the features of preset 'lite' have audio, text, video"
    ):
        loop.check_streams(flow, data, "lite")
    seeing = dataclasses.replace(SMALL, streams=("audio", "video"), frame_stream="video")
    with pytest.raises(
        AvjaxError, match="the model reads raw frames as video, the features of preset 'lite' are feature"
    ):
        loop.check_streams(seeing, data, "lite")
    loop.check_streams(SMALL, data, "lite")


def test_there_is_room_on_this_machine():
    assert streamed_batches.room() > 1e8


def test_batches_come_in_order_from_any_step():
    data = streamed_batches.choose(FEATURES, chosen())
    index = np.arange(24).reshape(6, 4)
    every = [(i.tolist(), rows["audio"].sum()) for i, rows in streamed_batches.batches(data, index)]
    assert [i for i, _ in every] == index.tolist()
    rest = [(i.tolist(), rows["audio"].sum()) for i, rows in streamed_batches.batches(data, index, 4)]
    assert rest == every[4:]
    assert list(streamed_batches.batches(data, index, 6)) == []


@pytest.mark.slow
def test_killed_within_an_epoch_a_command_ends_as_if_undisturbed(root, tmp_path):
    def command(name: str) -> list[str]:
        keys = {"data.features": root, "data.mode": "streamed", "train.save_steps": 2, "train.epochs": 3}
        keys |= {"train.batch_size": 8, "train.seeds": "(1,)", "model.width": 16}
        flags = [f"--config.{key}={value}" for key, value in keys.items()]
        start = [sys.executable, "-m", "avjax.train", "--config", "configs/etg_folder.py"]
        return [*start, *flags, "--workdir", str(tmp_path / name)]

    subprocess.run(command("whole"), check=True, capture_output=True)
    for at in ("epoch 1/3, step 2", "epoch 2/3, step 2"):
        process = subprocess.Popen(command("cut"), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for line in process.stdout:
            if line.startswith(at):
                process.send_signal(signal.SIGKILL)
                break
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    subprocess.run(command("cut"), check=True, capture_output=True)
    for file in ("metrics.json", "predictions.npz", "metrics.jsonl"):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
    assert not (tmp_path / "cut" / streamed_loop.FOLDER).exists()
    assert json.loads((tmp_path / "whole/metrics.json").read_text())["task"] == "single"


def frame_run(features, mode: str, **augment: float) -> Run:
    """AVT-CA on raw frames, after an epoch."""
    changes = {f"train__augment__{key}": value for key, value in augment.items()} | {"model__settings__width": 16}
    changes |= {"data__mode": mode, "train__epochs": 1, "train__batch_size": 8}
    made = config.settings("configs/avtca_folder.py", **changes)
    model = models.build(made.model, 3)
    assert model.frame_stream == "video"
    return Run(features, made, model=model).train(last=1)


@pytest.mark.slow
def test_raw_pictures_stream_with_the_same_augmentation():
    frames = np.random.default_rng(0).integers(0, 256, (48, 3, 8, 8, 3)).astype(np.uint8)
    arrays = {"video": frames, "audio": FEATURES.arrays["audio"]}
    masks = {"video": np.ones((48, 3), bool), "audio": FEATURES.masks["audio"]}
    features = dataclasses.replace(FEATURES, arrays=arrays, masks=masks)
    streamed, resident = (frame_run(features, mode) for mode in ("streamed", "resident"))
    assert streamed.data.rows(np.arange(2))["video"].dtype == np.uint8
    near(streamed.state.params, resident.state.params)
    still = frame_run(features, "resident", degrees=0.0, flip=0.0)
    apart = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), resident.state.params, still.state.params)
    assert max(jax.tree.leaves(apart)) > 1e-4, "frames are rotated and mirrored"
