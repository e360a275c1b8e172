"""The benchmark of lanes: PyTorch's model and training are ours, single runs are lanes; and the CSV."""

import csv
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avjax import config, models
from avjax.datasets.base import Fold
from avjax.errors import AvjaxError
from avjax.training import batches, history, loop
from avjax.training import lanes as lane_plans
from benchmarks import lanes, record
from tests import synthetic
from tests.benched import assert_one_line, bench, committed, needs_torch

FEATURES = synthetic.make(clips=40, signal=0.3, seed=5)  # clip 3 lacks audio, clip 5 lacks a face
IDS = FEATURES.ids
FOLD = Fold("one", tuple(IDS[:24]), tuple(IDS[30:]), tuple(IDS[24:30]))


def settings(**more):
    """Returns settings with one batch per epoch, so that the order of the clips does not matter."""
    chosen = {"model__width": 16, "train__batch_size": 24, "train__epochs": 8, "train__epochs_per_call": 8}
    chosen |= {"train__patience": 0, "train__learning_rate": 0.01, "train__warmup": 0.2, "train__weight_decay": 0.1}
    return config.settings("configs/etg_mafw.py", **(chosen | more))


@functools.cache
def trained():
    """Trains a lane: returns plan, data, model, first state, last state, sums, test logits."""
    chosen = settings()
    plan = lane_plans.plan(FEATURES, [FOLD], (1,), chosen.protocol)
    data = batches.resident(FEATURES, "both", "train")
    model = models.build(chosen.model, 3)
    trainer = loop.make(model, chosen)
    first = jax.device_get(trainer.init(plan.lanes, data))
    last, sums = trainer.epochs(jax.device_put(first), plan.lanes, data, jnp.int32(1))
    return plan, data, model, first, last, sums, np.asarray(trainer.predict(last, plan.lanes, data)["fusion"])


def lane(tree):
    """Returns the first lane."""
    return jax.tree.map(lambda v: v[0], tree)


def in_torch(params):
    """Builds the PyTorch side with our parameters: module, model, streams, run."""
    from benchmarks.torch import etg_aver as torch_etg

    plan, data, *_ = trained()
    streams, (run,) = torch_etg.streams(data, "cpu"), torch_etg.runs(plan, "cpu")
    model = torch_etg.new_model(streams, 3, run.seed, settings().model)
    model.load_state_dict(torch_etg.from_flax(params))
    return torch_etg, model, streams, run


def close(ours, others, share: float = 1e-4) -> None:
    """Asserts that values are equal to within `share` of the standard deviation."""
    np.testing.assert_allclose(
        np.asarray(ours), np.asarray(others), rtol=0, atol=share * float(np.asarray(others).std())
    )


# ---- PyTorch ------------------------------------------------------------------------------------------------------


@pytest.mark.thorough
@needs_torch
def test_the_models_have_the_same_parameters():
    params = lane(trained()[3].params)
    _, model, *_ = in_torch(params)  # loading names every missing, additional or misshapen parameter
    assert sum(p.numel() for p in model.parameters()) == sum(v.size for v in jax.tree.leaves(params))


@pytest.mark.thorough
@needs_torch
def test_logits_loss_and_gradient_are_the_same():
    import torch

    plan, data, model, first, *_ = trained()
    torch_etg, theirs, streams, run = in_torch(lane(first.params))
    batch = batches.gather(data, lane(first.stats), plan.lanes.train[0], plan.lanes.train_weight[0])
    assert not batch["audio_mask"].any(-1).all()
    assert not batch["video_mask"].any(-1).all()

    def mean_loss(params):
        output = model.module.apply({"params": params}, batch, train=True)
        return jnp.mean(sum(model.loss(output, batch, plan.lanes.prior[0]).values())), output.logits

    (value, logits), grads = jax.jit(jax.value_and_grad(mean_loss, has_aux=True))(lane(first.params))
    batch_in_torch = torch_etg.take(torch_etg.standardised(streams, run.train), run.train)
    outputs = theirs(batch_in_torch)
    loss = torch_etg.loss(outputs, batch_in_torch, torch_etg.head_weights(settings().model)).mean()
    loss.backward()
    for head in logits:
        close(outputs[head].detach(), logits[head])
    assert loss.item() == pytest.approx(float(value), abs=1e-5)
    expected = torch_etg.from_flax(grads)
    everything = float(torch.cat([g.ravel() for g in expected.values()]).std())
    for name, parameter in theirs.named_parameters():
        np.testing.assert_allclose(parameter.grad, expected[name], rtol=0, atol=1e-4 * everything, err_msg=name)


@needs_torch
def test_what_lies_under_a_mask_is_not_read():
    torch_etg, model, streams, run = in_torch(lane(trained()[3].params))
    longer = dict(streams)
    for s in torch_etg.STREAMS:
        longer[s] = torch_etg.F.pad(streams[s], (0, 0, 0, 3))
        longer[f"{s}_mask"] = torch_etg.F.pad(streams[f"{s}_mask"], (0, 3))
        longer[s][~longer[f"{s}_mask"]] = 7.5
    for head, logits in torch_etg.predict(model, streams, run.test).items():
        close(torch_etg.predict(model, longer, run.test)[head], logits)


@needs_torch
def test_training_is_the_same():
    """Equal parameters, optimizer, schedule, clipping, decay and selection give equal epochs and predictions."""
    plan, _, _, first, last, sums, logits = trained()
    torch_etg, model, streams, run = in_torch(lane(first.params))
    ended = torch_etg.fit(model, streams, run, settings())
    rows = history.epoch_rows(sums, plan.names, 1, models.build(settings().model, 3))
    for name in ("train_loss", "val_loss", "val_uar"):
        np.testing.assert_allclose([r[name] for r in ended.rows], [r[name] for r in rows], atol=1e-4, err_msg=name)
    assert ended.steps == int(last.step[0]) == 8
    close(ended.logits, logits[0], 1e-3)
    assert 1 < int(last.best_epoch[0]) < 8, "a run whose last epoch is the best does not test the selection"


@needs_torch
def test_batches_cover_every_training_clip_once_an_epoch():
    torch_etg, model, streams, run = in_torch(lane(trained()[3].params))
    ended = torch_etg.fit(model, streams, run, settings(train__batch_size=10, train__epochs=2))
    assert ended.steps == 2 * 3  # 24 clips: 10, 10, 4
    assert [r["epoch"] for r in ended.rows] == [1, 2]


# ---- The measurement ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> tuple[list[dict[str, str]], list[str]]:
    """Runs one short command; returns its rows and its lines."""
    out = tmp_path_factory.mktemp("bench") / "new" / "lanes.csv"
    done = bench("lanes", "--widths=8", "--clips=60", "--epochs=1", "--batch=8", "--repeats=2", f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert f"written to {out}" in done.stdout
    with out.open() as file:
        return list(csv.DictReader(file)), done.stdout.splitlines()


@pytest.mark.slow
def test_rows(measured):
    by_name = {row["what"]: row for row in measured[0]}
    assert list(by_name) == ["lanes", "one after another", "pytorch"]
    for row in by_name.values():
        assert [row[k] for k in ("lanes", "epochs", "clips", "width", "repeats")] == ["25", "1", "60", "8", "2"]
        assert row["steps"] == str(25 * 6)  # 42 training clips in batches of 8
        assert row["jax"] == jax.__version__
        rate = float(row["gflop_per_update"]) * int(row["steps"]) / float(row["seconds_median"])
        assert float(row["gflops"]) == pytest.approx(rate, rel=1e-2)
        assert float(row["matrix_product_gflops"]) > 1
    lanes_row, alone = by_name["lanes"], by_name["one after another"]
    times = [float(lanes_row[f"seconds_{k}"]) for k in ("min", "median", "max")]
    assert 0 < times[0] <= times[1] <= times[2]
    assert float(lanes_row["compile_seconds"]) > 0.1
    assert float(alone["speed_up_over_one_after_another"]) == 1
    ratio = float(alone["seconds_median"]) / times[1]
    assert float(lanes_row["speed_up_over_one_after_another"]) == pytest.approx(ratio, rel=1e-2)


@pytest.mark.slow
def test_the_ways_are_timed_in_turn(measured):
    timed = [line.split(": ")[1].rsplit(" ", 2)[0] for line in measured[1] if "repeat" in line]
    assert timed == 2 * [row["what"] for row in measured[0] if row["seconds_min"]]


def test_without_pytorch_its_row_is_empty(no_torch):
    assert lanes.no_pytorch() == "not installed"
    ways = [lanes.Way("lanes", None, 1.0), lanes.Way("one after another", None, 2.0)]
    *measured, empty = lanes.timing_rows(ways, {"lanes": [1.0, 3.0, 2.0], "one after another": [8.0, 9.0, 7.0]})
    assert measured[0]["speed_up_over_one_after_another"] == 4
    assert [measured[0][f"seconds_{k}"] for k in ("min", "median", "max")] == [1, 2, 3]
    assert {row["speed_up_over_pytorch"] for row in measured} == {""}
    assert empty["what"] == "pytorch"
    assert set(empty.values()) == {"pytorch", ""}


def test_ways_that_do_not_agree_are_not_timed():
    state = trained()[4]
    logits = np.random.default_rng(0).normal(size=(1, 4, 3))
    ended = lanes.Ended(state, logits)
    lanes.check_agreement([ended], [ended])
    with pytest.raises(AvjaxError, match=r"lanes and single runs: predictions differ by .*; they do not compute"):
        lanes.check_agreement([ended], [lanes.Ended(state, logits + 0.01)])
    moved = state.replace(params=jax.tree.map(lambda v: v * 1.01, state.params))
    with pytest.raises(AvjaxError, match=r"single runs: parameters differ by 1\.0e-02"):
        lanes.check_agreement([ended], [lanes.Ended(moved, logits)])
    with pytest.raises(AvjaxError, match="predictions differ by nan"):
        lanes.check_agreement([ended], [lanes.Ended(state, logits * np.nan)])
    with pytest.raises(AvjaxError, match=r"lanes made \[8\] updates, single runs \[9\]"):
        lanes.check_agreement([ended], [lanes.Ended(state.replace(step=state.step + 1), logits)])


# ---- The record ---------------------------------------------------------------------------------------------------


def test_a_row_of_the_same_key_is_replaced_and_others_stay(tmp_path):
    path = tmp_path / "new" / "x.csv"
    row = {"what": "lanes", "machine": "A", "seconds": 1.23456, "torch": ""}
    record.merge(path, [row, row | {"what": "pytorch"}], ("what", "machine"))
    record.merge(path, [row | {"machine": "B"}], ("what", "machine"))
    record.merge(path, [row | {"seconds": 2}], ("what", "machine"))
    with path.open() as file:
        rows = [(r["what"], r["machine"], r["seconds"]) for r in csv.DictReader(file)]
    assert rows == [("pytorch", "A", "1.235"), ("lanes", "B", "1.235"), ("lanes", "A", "2")]


def test_a_file_of_other_columns_is_left_alone(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(AvjaxError, match=r"has the columns a, b; expected what, seconds; choose another --out"):
        record.merge(path, [{"what": "lanes", "seconds": 1.0}], ("what",))
    assert path.read_text() == "a,b\n1,2\n"


def test_circumstances_are_complete():
    circumstances = record.circumstances()
    assert all(str(value) for value in circumstances.values())
    assert circumstances["jax"] == jax.__version__
    assert record.cores() == circumstances["cores"] > 0


def test_committed_results_can_be_added_to():
    rows = committed("lanes", lanes.KEY)
    assert len(rows) >= 3
    assert list(record.circumstances()) == list(rows[0])[-len(record.circumstances()) :]
    assert {row["what"] for row in rows} == {"lanes", "one after another", "pytorch"}


# ---- The command --------------------------------------------------------------------------------------------------


def test_help_states_what_is_measured():
    done = bench("--help")
    assert done.returncode == 0
    assert "one after another" in done.stdout
    assert "--widths" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to do; expected a benchmark: lanes"),
        (["speed"], "got 'speed'; expected one benchmark of lanes"),
        (["lanes", "128"], "got 'lanes 128'; expected one benchmark of lanes"),
        (["lanes", "--widths=12,x"], "--widths=12,x; expected whole numbers above 0"),
        (["lanes", "--epochs=0"], "epochs"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    assert_one_line(bench(*arguments), message)
