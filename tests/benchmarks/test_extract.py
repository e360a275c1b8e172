"""The benchmark of extraction: its figures are those of the extraction, and rows can be added to its CSV."""

import pytest

from avjax.features import presets
from benchmarks import extract, record
from tests import tiny_run
from tests.benched import committed


def test_encoders_are_one_stage_whatever_their_names():
    spent = {"decoding": 1.0, "faces": 2.0, "minilm": 3.0, "vit_s14": 4.0, "packing": 5.0}
    expected = dict.fromkeys((f"{stage}_seconds" for stage in extract.STAGES), "")
    expected |= {"decoding_seconds": 1, "faces_seconds": 2, "encoders_seconds": 7, "packing_seconds": 5}
    assert extract.by_stage(spent) == expected


def made(monkeypatch, *seconds: float) -> dict:
    """Returns the row of extractions that take the given seconds."""
    left = list(seconds)

    def timings(*_):
        now = left.pop(0)
        return {"clips": 40, "seconds_of_sound": 80.0, "seconds": now, "spent": {"faces": now / 2}}

    monkeypatch.setattr(extract, "_timings", timings)
    return extract.measure("folder", "R", "lite", True, len(seconds), print)


def test_figures_are_those_of_the_median_run(monkeypatch):
    row = made(monkeypatch, 30.0, 10.0, 20.0)
    assert [row[f"seconds_{k}"] for k in ("min", "median", "max")] == [10, 20, 30]
    assert (row["clips_per_second"], row["times_real_time"], row["faces_seconds"]) == (2, 4, 10)
    assert (row["weights"], row["repeats"], row["workers"]) == ("random", 3, record.cores())


@pytest.mark.thorough
def test_rows(tmp_path):
    tiny_run._write_data(tmp_path / "R")
    messages = []
    row = extract.measure("folder", str(tmp_path / "R"), "lite", True, 1, messages.append)
    assert (row["clips"], row["preset"], row["dataset"]) == (9, "lite", "folder")
    assert row["clips_per_second"] == pytest.approx(9 / row["seconds_median"])
    assert len(messages) == 1
    assert all(row[f"{stage}_seconds"] > 0 for stage in extract.STAGES if stage != "flow")


@pytest.mark.thorough
def test_every_stage_is_known(tmp_path):
    """The time of an extraction is attributed to the stages or to the encoders of its preset."""
    tiny_run._write_data(tmp_path / "R")
    spent = extract._timings("folder", str(tmp_path / "R"), "deiii_lite", True, 1)["spent"]
    encoders = {presets.PRESETS["deiii_lite"].text.source}
    assert spent.keys() - encoders <= set(extract.STAGES)
    assert spent["flow"] > 0


def test_committed_results_can_be_added_to(monkeypatch):
    rows = committed("extract", extract.KEY)
    row = made(monkeypatch, 1.0)
    assert list(rows[0]) == ["benchmark", *row, *record.circumstances()]
