"""The benchmark of flow: its figures are consistent, and rows can be added to its committed CSV."""

import dataclasses

import numpy as np
import pytest

from avjax.features import presets
from benchmarks import flow as benchmark
from benchmarks import record
from tests.benched import committed


@pytest.fixture
def small(monkeypatch):
    """Makes faces small, and a Perceiver whose flow is zero."""
    for name in benchmark.SOURCES.values():
        preset = presets.PRESETS[name]
        changed = dataclasses.replace(preset, flow=dataclasses.replace(preset.flow, side=48))
        monkeypatch.setitem(presets.PRESETS, name, changed)
    real = benchmark.load
    monkeypatch.setattr(benchmark, "load", lambda name, **more: name if "flow" in name else real(name, **more))
    monkeypatch.setattr(benchmark.perceiver, "optical_flow", lambda _, a, b: np.zeros((*a.shape[:3], 2), np.float32))


@pytest.mark.thorough
def test_rows(small):
    for name in benchmark.SOURCES:
        messages = []
        row = benchmark.measure(name, 2, messages.append)
        assert (row["source"], row["side"], row["repeats"]) == (name, 48, 2)
        assert len(messages) == 6
        total = 0
        for step in ("flow", "drawing", "seeing"):
            low, median, high = (row[f"{step}_seconds_{k}"] for k in ("min", "median", "max"))
            assert 0 < low <= median <= high
            assert row[f"{step}_per_second"] == pytest.approx(row["pairs"] / median)
            total += median
        assert row["pairs_per_second"] == pytest.approx(row["pairs"] / total)


def test_made_up_faces_move():
    first, second = benchmark.faces(2, 64)
    made = benchmark.flow.dis(first, second)
    assert np.median(made[..., 0]) == pytest.approx(2, abs=0.2)


@pytest.mark.thorough
def test_committed_results_can_be_added_to(small):
    rows = committed("flow", benchmark.KEY)
    assert {row["source"] for row in rows} == set(benchmark.SOURCES)
    assert list(rows[0]) == ["benchmark", *benchmark.measure("dis", 1, print), *record.circumstances()]
