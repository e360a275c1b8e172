"""The benchmark of the start-up: the first step's time, its division into parts, and the start of a small run."""

import importlib

import pytest

from avjax.errors import AvjaxError
from avjax.features import extract as extraction
from benchmarks import record, startup
from tests import tiny_run
from tests.benched import committed

COMPILE, LOWER, TRACE = (startup.PARTS[part][0] for part in ("compiling", "lowering", "tracing"))


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([], {"other": 10}),
        ([("imports", 13.0, 2.0), ("imports", 16.0, 1.0)], {"imports": 3, "other": 7}),
        ([(TRACE, 15.0, 4.0), (TRACE, 14.0, 2.0)], {"tracing": 4, "other": 6}),  # one within the other
        ([("imports", 13.0, 2.0), (TRACE, 15.0, 4.0)], {"imports": 2, "tracing": 2, "other": 6}),
        ([(COMPILE, 12.0, 1.0), (LOWER, 14.0, 4.0)], {"compiling": 1, "lowering": 3, "other": 6}),
        ([("features", 14.0, 4.0), ("imports", 13.0, 3.0)], {"imports": 3, "features": 1, "other": 6}),
        ([("imports", 11.0, 5.0), (COMPILE, 25.0, 7.0)], {"imports": 1, "compiling": 2, "other": 7}),  # cut off
        ([("imports", 9.0, 1.0), (COMPILE, 25.0, 1.0), ("more", 15.0, 5.0)], {"other": 10}),  # before, after, unknown
    ],
)
def test_split_divides_all_of_the_time_once(events, expected):
    spent = startup.split(events, 10.0, 20.0)
    assert list(spent) == [*startup.PARTS, "other"]
    assert {part: seconds for part, seconds in spent.items() if seconds} == pytest.approx(expected)


def test_events_are_those_of_jax():
    import jax

    heard = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, seconds, **_: heard.append(name))
    try:
        jax.jit(lambda x: x + 1.5)(1.0)
    finally:
        jax.monitoring.clear_event_listeners()
    assert {COMPILE, LOWER, TRACE} <= set(heard)


def test_imports_are_noted_once(tmp_path, monkeypatch):
    (tmp_path / "outer_slow.py").write_text("import time, inner_slow\ntime.sleep(0.02)\n")
    (tmp_path / "inner_slow.py").write_text("import time\ntime.sleep(0.02)\n")
    monkeypatch.syspath_prepend(tmp_path)
    noted = []
    load = startup.timed(importlib.import_module, lambda what, seconds: noted.append((what, seconds)))
    nested = startup.timed(lambda name: load(name), lambda *_: None)
    nested("outer_slow")
    load("outer_slow")  # imported already
    ((what, seconds),) = noted
    assert what == "imports"
    assert 0.04 < seconds < 5


def test_a_training_that_ends_early_is_an_error(tmp_path):
    with pytest.raises(AvjaxError, match=r"ended before its second line about epochs: error: nowhere\.py: no such"):
        startup.start(["--config=nowhere.py"], tmp_path / "run", tmp_path / "cache")


@pytest.mark.thorough
def test_rows(tmp_path, monkeypatch):
    tiny_run._write_data(tmp_path / "R")
    store = extraction.extract("folder", "lite", root=str(tmp_path / "R"), out=str(tmp_path / "F"), random=True)
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")  # faster; figures are not checked
    flags = [
        "--config=configs/etg_folder.py:audio_only",
        f"--config.data.features={store}",
        "--config.protocol.fold_count=2",
    ]
    flags += ["--config.model.width=16", "--config.train.epochs=20", "--config.train.epochs_per_call=2"]
    messages = []
    rows = {row["what"]: row for row in startup.measure(flags, 1, messages.append)}
    assert list(rows) == [startup.EMPTY, startup.FILLED]
    assert len(messages) == 2
    for row in rows.values():
        low, median, high = (row[f"first_step_seconds_{k}"] for k in ("min", "median", "max"))
        assert 0 < low == median == high <= row["first_epochs_seconds"]
        parts = [row[f"{part}_seconds"] for part in (*startup.PARTS, "other")]
        assert sum(parts) == pytest.approx(median)
        assert min(parts[:-1]) > 0
    assert rows[startup.FILLED]["compiling_seconds"] < rows[startup.EMPTY]["compiling_seconds"]


def test_committed_results_can_be_added_to():
    committed_rows = committed("startup", startup.KEY)
    start = startup.Start(1.0, 2.0, dict.fromkeys((*startup.PARTS, "other"), 0.1))
    row = startup.row("c", startup.EMPTY, [start])
    assert list(committed_rows[0]) == ["benchmark", *row, *record.circumstances()]
