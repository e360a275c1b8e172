"""The benchmark of steps makes the same step on both sides, rejects others, and computes its figures correctly."""

import csv
import dataclasses

import jax
import numpy as np
import pytest

from avjax.errors import AvjaxError
from benchmarks import record
from benchmarks import step as benchmark
from benchmarks.torch import fusions as torch_fusions
from benchmarks.torch import sequences as torch_sequences
from benchmarks.torch import systems as torch_systems
from benchmarks.ways import chosen
from tests.benched import assert_one_line, bench, committed, needs_torch

SMALL = {
    "etg_aver": {"width": 8, "segment_count": 3},
    "emoasst": {"width": 8, "heads": 2, "inner": 12},
    "de_iii": {
        "width": 8,
        **{"heads": 2, "depths": {"audio": 1, "video": 1, "flow": 1}, "kernel": 3, "output": 6, "hidden": 5},
    },
    "avt_ca": {"width": 8, "heads": 2},
    "lmf": {"widths": {"text": 4, "audio": 3, "video": 5}, "text_width": 6, "rank": 2},
    "tfn": {"widths": {"text": 4, "audio": 3, "video": 5}, "text_width": 6, "hidden": 7},
    "mfn": {
        "widths": {"text": 4, "audio": 3, "video": 5},
        **{"memory": 6, "attention": 7, "proposal": 8, "retain": 9, "update": 10, "output": 11},
    },
    "mult": {"width": 6, "heads": 2, "layers": 2},
    "auxformer": {"heads": 5, "layers": 2, "hidden": (6, 7)},
    "uavm": {"width": 8, "heads": 2, "depth": 2, "shared_depth": 1},
    "mmer_ia": {"heads": 2},
    "mmer_it": {"heads": 2},
    "mmer_lt": {"heads": 2},
    "avtca_released": {"heads": 4},
    "three_branch": {"width": 8, "heads": 2, "layers": 2},
    "mma_dfer": {"width": 8, "heads": 2, "inner": 12, "layers": 2, "bottleneck": 4},
    "c3d_lstm": {"widths": (4, 5), "hidden": 6},
    "ladder": {"widths": (8, 6)},
    "bc_lstm": {"hidden": 4, "width": 5},
    "concat": {"width": 6, "hidden": 5},
}
# One of each file in benchmarks/torch; the others are thorough. `test_row` has lmf.
QUICK = ("etg_aver", "c3d_lstm")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Makes models and batches small and timings short."""
    for name, settings in SMALL.items():
        more = {"classes": (benchmark.CLASSES, benchmark.SHAPES["text"][1])} if name == "emoasst" else {}
        monkeypatch.setitem(benchmark.SIZES, name, (benchmark.Size("small", settings, more=more),))
    monkeypatch.setattr(benchmark, "BATCH", 4)
    monkeypatch.setattr(benchmark, "TURNS", 2)
    monkeypatch.setattr(benchmark.encoders, "_LEAST_SECONDS", 0.01)


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch, programs):
    """Compiles one step for all cases of the same module."""
    right = benchmark.our_program

    def our_program(case):
        program, state, given = right(case)
        return programs.setdefault(f"{case.name} {case.model.module}", program), state, given

    monkeypatch.setattr(benchmark, "our_program", our_program)


@pytest.fixture(scope="module")
def programs():
    """Holds the compiled steps."""
    return {}


def measured(name: str, repeats: int = 2) -> tuple[dict, list[str]]:
    """Returns the row and the messages."""
    messages: list[str] = []
    (row,) = benchmark.measure(name, repeats, messages.append)
    return row, messages


def case_of(name: str) -> benchmark.Case:
    """Builds a case of the model's only size."""
    return benchmark.make_case(name, *benchmark.sizes(name))


# ---- Rows ---------------------------------------------------------------------------------------------------------


@pytest.mark.budget(8)
@needs_torch
def test_row():
    row, messages = measured("lmf")
    assert (row["model"], row["size"], row["batch"], row["repeats"]) == ("lmf", "small", 4, 2)
    assert row["streams"] == "text 20x300 audio 50x74 video 50x35"
    lstm, text = 4 * 4 * (300 + 4 + 1), 6 * (4 + 1)
    dense = 3 * (74 + 1) + 2 * 3 * (3 + 1) + 5 * (35 + 1) + 2 * 5 * (5 + 1)
    factors = 2 * 7 * (1 + 6 + 1 + 3 + 1 + 5) + 2 + 7
    assert row["parameters"] == lstm + text + dense + factors
    assert messages[:2] == ["lmf (small): compiling", "lmf (small): avjax, pytorch compute the same"]
    assert [line.split(": ")[1].split()[0] for line in messages[2:]] == 2 * ["avjax", "pytorch"]
    for way in ("avjax", "pytorch"):
        low, median, high = (row[f"{way}_seconds_{k}"] for k in ("min", "median", "max"))
        assert 0 < low <= median <= high
        assert row[f"{way}_per_second"] == pytest.approx(4 / median)
    assert row["speed_up_over_pytorch"] == row["pytorch_seconds_median"] / row["avjax_seconds_median"]
    assert row["avjax_compile_seconds"] > 0
    assert row["pytorch_compile_seconds"] == ""
    assert set(benchmark.TABLE) <= set(row)


def test_a_conversation_is_as_many_clips():
    case = case_of("bc_lstm")
    assert case.batch["text"].shape == (2, 2, 20, 300)
    assert case.batch["text_mask"].shape == (2, 2, 20)
    assert case.batch["label"].shape == case.batch["turn_mask"].shape == case.batch["weight"].shape == (2, 2)


def test_a_model_without_pytorch_version_is_measured_alone(monkeypatch):
    monkeypatch.delitem(benchmark.RESTATED, "concat")
    row, messages = measured("concat", 1)
    assert row["avjax_seconds_median"] > 0
    assert {v for k, v in row.items() if k.startswith(("pytorch", "compiled", "speed_up"))} == {""}
    assert "compute the same" not in " ".join(messages)


def test_without_pytorch_nothing_is_compared(no_torch):
    case = case_of("lmf")
    assert case.restated is None
    assert benchmark.torch_ways(case) == []


def test_every_size_has_a_row(monkeypatch):
    two = benchmark.Size("one", SMALL["concat"]), benchmark.Size("two", {"width": 5, "hidden": 5}, {"video": (9, 3)})
    monkeypatch.setitem(benchmark.SIZES, "concat", two)
    monkeypatch.delitem(benchmark.RESTATED, "concat")
    rows = benchmark.measure("concat", 1, lambda line: None)
    assert [(row["size"], row["streams"]) for row in rows] == [
        ("one", "text 20x300 audio 50x74 video 50x35"),
        ("two", "text 20x300 audio 50x74 video 9x3"),
    ]
    assert rows[0]["parameters"] != rows[1]["parameters"]


def test_unknown_names_are_reported():
    assert chosen("--models", ["mult", "lmf"], benchmark.MODELS) == ["mult", "lmf"]
    with pytest.raises(AvjaxError, match=r"--models: alloy is not among emoasst, etg_aver, .*, lmf, tfn"):
        chosen("--models", ["alloy"], benchmark.MODELS)


# ---- The same on both sides ---------------------------------------------------------------------------------------


def test_what_is_restated_is_a_model_and_restated_once():
    files = [set(file.RESTATED) for file in (torch_fusions, torch_sequences, torch_systems)]
    assert sum(len(names) for names in files) == len(set.union(*files))
    assert set.union(*files) == set(SMALL) - {"bc_lstm", "concat"}
    assert set.union(*files) <= set(benchmark.RESTATED) <= set(benchmark.MODELS)


@needs_torch
@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.thorough)
        for name in SMALL
        if name not in ("bc_lstm", "concat")
    ],
)
def test_both_sides_make_the_same_step(name):
    assert [way.name for way in benchmark.make_ways(case_of(name))] == ["avjax", "pytorch"]


@pytest.mark.thorough
@needs_torch
def test_both_read_the_first_token_where_it_is_the_summary(monkeypatch):
    settings = SMALL["etg_aver"] | {"summary": "first"}
    monkeypatch.setitem(benchmark.SIZES, "etg_aver", (benchmark.Size("small", settings),))
    assert len(benchmark.make_ways(case_of("etg_aver"))) == 2


@needs_torch
def test_another_loss_is_refused(monkeypatch):
    restated = benchmark.RESTATED["lmf"]
    other = lambda outputs, inputs: -restated.loss(outputs, inputs)  # noqa: E731
    monkeypatch.setitem(benchmark.RESTATED, "lmf", dataclasses.replace(restated, loss=other))
    with pytest.raises(AvjaxError, match=r"lmf: pytorch: what an update changes in the logits of 'fusion' differ"):
        measured("lmf")


@needs_torch
def test_a_system_of_other_weights_is_refused(monkeypatch):
    restated = benchmark.RESTATED["lmf"]
    other = lambda params: restated.state(params) | {"fusion_bias": params["bias"][None] + 0.1}  # noqa: E731
    monkeypatch.setitem(benchmark.RESTATED, "lmf", dataclasses.replace(restated, state=other))
    with pytest.raises(AvjaxError, match=r"lmf: pytorch: the logits of 'fusion' differ from avjax's by .* cannot be"):
        measured("lmf")


def test_other_logits_and_other_updates_are_refused():
    rng = np.random.default_rng(0)
    first, change = rng.normal(size=(2, 4, 7))
    ours = [{"fusion": first, "audio": first}, {"fusion": first + change, "audio": first}]
    benchmark.check_agreement("x", ours, [{"fusion": first}, {"fusion": first + change}])
    for theirs, what in (
        ([first + 0.01, first + change], "x: the logits of 'fusion' differ"),
        ([first, first], "x: what an update changes in the logits of 'fusion' differ"),
        ([first, first - change], "x: what an update changes"),
        ([first * np.nan, first], "differ from avjax's by nan"),
    ):
        with (
            np.errstate(divide="ignore", invalid="ignore"),
            pytest.raises(AvjaxError, match=what),
        ):
            benchmark.check_agreement("x", ours, [{"fusion": x} for x in theirs])


def test_no_weight_can_be_mistaken_for_another():
    shapes = {"norm": {"scale": jax.ShapeDtypeStruct((9,), "float32"), "bias": jax.ShapeDtypeStruct((9,), "float32")}}
    norm = benchmark.random_variables(shapes)["norm"]
    assert len({*norm["scale"].tolist(), *norm["bias"].tolist()}) == 18
    assert norm["scale"].mean() == pytest.approx(1, abs=0.2)
    assert norm["bias"].mean() == pytest.approx(0, abs=0.2)


# ---- The command and its record -----------------------------------------------------------------------------------


@pytest.mark.thorough
@needs_torch
def test_a_model_is_measured_and_recorded(tmp_path):
    out = tmp_path / "step.csv"
    done = bench("step", "--models=lmf", "--repeats=1", f"--out={out}")
    assert done.returncode == 0, done.stderr
    with out.open() as file:
        (row,) = csv.DictReader(file)
    assert (row["benchmark"], row["model"], row["size"], row["batch"]) == ("step", "lmf", "default", "32")
    assert row["jax"] == jax.__version__
    assert float(row["speed_up_over_pytorch"]) > 0
    assert "compiled s" not in done.stdout, "nothing was compiled by PyTorch; the table has no column for it"


def test_a_mistake_is_one_line():
    assert_one_line(bench("step", "--models=alloy"), "alloy is not among ")


def test_committed_results_can_be_added_to(monkeypatch):
    rows = committed("step", benchmark.KEY)
    assert {row["model"] for row in rows} == set(benchmark.MODELS)
    monkeypatch.delitem(benchmark.RESTATED, "concat")
    row, _ = measured("concat", 1)
    assert list(rows[0]) == ["benchmark", *row, *record.circumstances()]
