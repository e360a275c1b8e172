"""Reports: tables that compare only what is comparable, plots, and a self-contained page."""

import copy
import json
import re

import numpy as np
import pytest

from avjax.errors import AvjaxError
from avjax.evaluation.report import page, tables
from avjax.evaluation.significance import Evidence
from tests.reported import fold, lines_with, run, shown, summary, values_run


def test_run_table_shows_every_lane_and_the_scores_without_a_model():
    text = shown(tables.run_table(run(), "my run"))
    assert "my run" in text
    assert len(lines_with(text, "│ 1 ")) == 2
    assert lines_with(text, "│ 1 ", "69.0", "60.0")
    assert lines_with(text, "mean ± std", "70.0 ± 8.2", "60.0 ± 8.2")
    assert lines_with(text, "pooled", "72.5", "71.7")
    assert lines_with(text, "chance", "33.3")
    assert lines_with(text, "majority class", "50.0", "33.3")
    assert "demo · leave one speaker out" in text
    assert "40 clips used, 2 quarantined; audio masked in 1, video masked in 3." in text
    assert "No speaker is in both training and test." in text


def test_reference_table_pairs_the_references_with_the_run():
    text = shown(tables.reference_table(run(wars=(0.7, 0.8), seeds=(0, 1))))
    (row,) = lines_with(text, "audio+video")
    assert "70.0 ± 5.0" in row  # WAR .65 and .75
    assert "+5.0" in row
    assert "uninformative" in text


def test_one_lane_has_no_spread():
    text = shown(tables.run_table(run(wars=(0.7,), seeds=(0,)), "one"))
    assert "±" not in text
    assert lines_with(text, "single run", "70.0", "60.0")


@pytest.mark.parametrize(
    ("overlaps", "warning"),
    [((0, 2, 1), "NOT speaker-independent: up to 2 speakers"), ((None, None, None), "Speakers are unknown")],
)
def test_shared_or_unknown_speakers_are_said_aloud(overlaps, warning, tmp_path):
    folds = [fold(str(i), 0, 0.5, 0.5, speaker_overlap=overlap) for i, overlap in enumerate(overlaps, 1)]
    metrics = run() | summary(folds)
    assert warning in shown(tables.run_table(metrics, "r"))
    assert f'<p class="warning">{warning}' in rendered(tmp_path, metrics)


def test_a_class_that_never_occurs_does_not_count_for_the_majority_uar():
    metrics = run(confusion=[[6, 2, 2], [0, 0, 0], [0, 5, 15]])
    assert tables.summary_rows(metrics)[-1] == ("majority class", "66.7", "50.0")


def test_compare_pairs_folds_after_averaging_seeds():
    base, better = run(), run(wars=(0.75, 0.79, 0.60))
    for text in (
        shown(tables.compare_table([("a", base), ("b", better)])),
        tables.compare_markdown([("a", base), ("b", better)]),
    ):
        assert text.count("leave one speaker out") == 1
        assert lines_with(text, "a", "70.0 ± 8.2", "60.0 ± 8.2", "–")
        assert lines_with(text, "b", "71.3", "+1.3", "+5.0 −1.0 +0.0")
        assert "With 3 folds, an interval of the difference is uninformative" in text
        assert tables._MARK not in text


def test_seeds_together_have_a_column_where_there_are_several():
    one = run(seeds=(0,))
    assert tables.TOGETHER not in tables.compare_markdown([("one", one), ("again", one)])
    three = run(together={"folds": one["folds"], "mean": {"war": 0.77}, "std": {"war": 0.01}})
    shown = tables.compare_markdown([("one", one), ("three", three)])
    assert [line.split(" | ")[-1] for line in shown.splitlines() if line.startswith("| ")][2:] == [
        "– |",
        "77.0 ± 1.0 |",
    ]
    assert tables.TOGETHER_NOTE.format("WAR") in shown


def test_seeds_need_not_be_the_same():
    differences = tables.fold_differences(run(seeds=(0, 1, 2))["folds"], run(seeds=(5,))["folds"])
    assert list(differences) == ["1", "2", "3"]
    np.testing.assert_allclose(list(differences.values()), 0, atol=1e-9)


def test_interval_from_six_folds_on():
    """t(.975, 5) = 2.5706; differences 1..6 have mean 3.5 and standard deviation 1.8708."""
    assert tables.difference([1, 2, 3, 4, 5]) == "+3.0"
    assert tables.difference([1, 2, 3, 4, 5, 6]) == "+3.5 [+1.5, +5.5]"
    wars = (0.5,) * 6
    text = tables.compare_markdown([("a", run(wars)), ("b", run(wars, gain=0.1))])
    assert "95 % interval over 6 folds" in text
    assert "uninformative" not in text


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (run(protocol="random"), "protocol random, not leave one speaker out"),
        (run(protocol="leave one speaker out; aided"), "protocol with aided."),
        (run(dataset="DFEW"), "data set DFEW, not demo"),
        (run(classes=["a", "b", "c"]), "different classes"),
        (run(wars=(0.7, 0.8)), "folds 1, 2, not 1, 2, 3"),
        (run() | summary([fold(str(i), 0, 0.9, 0.9, n_test=9) for i in (1, 2, 3)]), "27 test clips, not 24"),
    ],
)
def test_what_cannot_be_compared_is_marked_and_gets_no_difference(other, reason):
    text = tables.compare_markdown([("first", run()), ("stranger", other), ("friend", run(gain=0.1))])
    assert f"- † stranger cannot be compared with first: {reason}" in text
    (row,) = lines_with(text, "| stranger † |")
    assert row.endswith("| – | – |")
    assert lines_with(text, "| friend |", "+10.0")


def test_what_was_tested_under_another_protocol_keeps_its_difference():
    evidence = {"first": Evidence((0.6, 0.8)), "aided": Evidence((0.7, 0.9), (0.1, 0.05, 0.15), 0.01)}
    first, aided = run(protocol="leave one out; plain; last epoch"), run(protocol="leave one out; last epoch", gain=0.1)
    text = tables.compare_markdown([("first", first), ("aided", aided)], evidence)
    assert "- † aided has another protocol than first: protocol without plain." in text
    assert lines_with(text, "| aided † |", "70.0–90.0 | +10.0 \\[+5.0, +15.0] | 0.010")


def test_which_head_answers_is_no_other_protocol():
    chosen = run() | {"protocol": f"{run()['protocol']}; head: best validation UAR"}
    assert tables._MARK not in shown(tables.compare_table([("one", run()), ("two", chosen)]))


def test_names_are_shown_not_obeyed():
    odd = "a|b[bold]*c*"
    assert odd in shown(tables.compare_table([(odd, run())]))
    assert odd in shown(tables.run_table(run(), odd))
    (row,) = lines_with(tables.compare_markdown([(odd, run())]), "bold")
    assert row.startswith(r"| a\|b\[bold]\*c\* |")


def test_markdown_is_a_table():
    lines = tables.compare_markdown([("a", run()), ("b", run())]).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 4
    assert {line.count("|") for line in rows} == {len(tables.compare_columns(run())) + 1}


def test_nothing_to_compare():
    with pytest.raises(AvjaxError, match="at least one"):
        tables.compare_table([])


def test_points_have_a_sign_and_no_negative_zero():
    assert [tables.points(x) for x in (1.25, -0.04, 0.0, -3.0)] == ["+1.2", "+0.0", "+0.0", "−3.0"]


def test_runs_of_values_show_their_scores_and_the_chosen_heads():
    metrics = values_run()
    assert tables.run_columns(metrics) == ("fold", "seed", "train", "val", "test", "epoch", "CCC", "Pearson")
    text = shown(tables.run_table(metrics, "values"))
    assert lines_with(text, "│ 1 ", "7 (video)", "60.0", "70.0")
    assert lines_with(text, "│ 2 ", "7 (fusion)", "70.0", "80.0")
    assert lines_with(text, "mean ± std", "65.0 ± 5.0", "75.0 ± 5.0")
    assert lines_with(text, "pooled", "66.0", "77.0")
    assert "majority" not in text
    assert "chance" not in text
    assert tables.run_rows(run())[0][5] == "7", "without a choice there is no head to name"


@pytest.mark.parametrize(
    ("task", "columns", "first"),
    [
        ("regression", ("pooled", "CCC", "Pearson", "RMSE"), ("valence", "0.661", "0.772", "0.253")),
        ("multilabel", ("pooled", "weighted accuracy", "F1"), ("valence", "0.661", "0.772")),
    ],
)
def test_each_value_has_a_row(task, columns, first):
    metrics = values_run(task)
    assert tables.value_columns(metrics) == columns
    assert tables.value_rows(metrics)[0] == first
    text = shown(tables.value_table(metrics))
    assert lines_with(text, *first)
    assert "All folds and seeds pooled." in text
    assert tables.value_rows(run()) == []


def test_values_are_compared_by_ccc_and_with_ridge_regression():
    first, other = values_run(), values_run(gain=0.05)
    text = tables.compare_markdown([("a", first), ("b", other), ("c", run())])
    assert lines_with(text, "| run | CCC | Pearson | CCC − first | per fold |")
    assert lines_with(text, "| b | 70.0 ± 5.0 | 80.0 ± 5.0 | +5.0 | +5.0 +5.0 |")
    assert lines_with(text, "| c † | – | – | – | – |")
    assert "c cannot be compared with a: " in text
    assert "task single, not regression" in text
    assert "- CCC and Pearson: mean ± standard deviation" in text
    reference = shown(tables.reference_table(first))
    assert "ridge regression" in reference
    assert lines_with(reference, "audio", "40.0 ± 0.0", "45.0 ± 0.0", "+25.0")
    assert tables.reference_columns(values_run("multilabel"))[0].startswith("logistic regression")


def workdir(root, metrics: dict):
    (root / "metrics.json").write_text(json.dumps(metrics))
    (root / "config.json").write_text(
        json.dumps({"model": {"name": "etg_aver", "width": 768}, "seeds": [0, 1], "x": {}})
    )
    (root / "environment.json").write_text(json.dumps({"jax": "0.10.2"}))
    (root / "confusion.png").write_bytes(b"\x89PNG confusion")
    (root / "curves.png").write_bytes(b"\x89PNG curves")
    return root


def rendered(root, metrics: dict, **options) -> str:
    return page.write_report(workdir(root, metrics), **options).read_text()


def test_page_tells_the_whole_run(tmp_path):
    text = rendered(tmp_path, run())
    for words in ("leave one speaker out", "40 clips used", "70.0", "± 8.2", "No speaker is in both", "fusion"):
        assert words in text
    assert re.search(r"audio\+video</th><td>65\.0 ± 8\.2</td><td>60\.0 ± 8\.2</td><td>\+5\.0<", text)
    assert re.search(r"model\.width</th><td>768<", text)
    assert re.search(r"seeds</th><td>\[0, 1\]<", text)
    assert re.search(r"jax</th><td>0\.10\.2<", text)
    assert "uninformative" in text
    assert 'class="warning"' not in text


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("regression", ["<dt>CCC, %</dt>", "ridge regression on pooled features", "CCC and Pearson correlation × 100"]),
        (
            "multilabel",
            ["<dt>weighted accuracy, %</dt>", "logistic regression on pooled", "Scores are averaged over the labels."],
        ),
    ],
)
def test_page_of_another_task_shows_its_predictions_and_each_value(tmp_path, task, expected):
    metrics = values_run(task)
    workdir(tmp_path, metrics)
    (tmp_path / page.PREDICTIONS[task]).write_bytes(b"\x89PNG predictions")
    text = page.write_report(tmp_path).read_text()
    for words in (*expected, "valence, arousal", "7 (video)", "<h2>Predictions</h2>", "0.661", "0.772"):
        assert words in text
    assert "data:image/png;base64,iVBORyBwcm" in text  # "\x89PNG pr"
    assert "majority" not in text
    assert "Attention" not in text
    (tmp_path / "attention.png").write_bytes(b"\x89PNG maps")
    assert "<h2>Attention between the modalities</h2>" in page.write_report(tmp_path).read_text()
    (tmp_path / page.PREDICTIONS[task]).unlink()
    with pytest.raises(AvjaxError, match=f"no {page.PREDICTIONS[task]}"):
        page.write_report(tmp_path)


def test_page_stands_alone(tmp_path):
    text = rendered(tmp_path, run())
    assert text.count("data:image/png;base64,iVBORyBjb") == 1  # "\x89PNG co" and
    assert text.count("data:image/png;base64,iVBORyBjd") == 1  # "\x89PNG cu"
    assert not re.search(r"https?://|<script|<link|@import", text)
    assert re.findall(r'src="(?!data:)', text) == []


def test_page_escapes_what_media_and_files_say(tmp_path):
    evil = "<script>alert('x')</script>"
    example = {"clip_id": evil, "label": evil, "predicted": "joy", "sentence": evil}
    text = rendered(tmp_path, run(dataset=evil, heads={evil: {"war": 0.5, "uar": 0.5, "f1": 0.5}}), sentences=[example])
    assert "<script" not in text
    assert text.count("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;") >= 5


def test_a_dozen_sentences_at_most_and_mistakes_stand_out(tmp_path):
    examples = [
        {"clip_id": f"c{i:02d}", "label": "joy", "predicted": "joy" if i else "anger", "sentence": f"Words {i}."}
        for i in range(14)
    ]
    text = rendered(tmp_path, run(), sentences=examples)
    assert "c11" in text
    assert "c12" not in text
    assert "Sentences, the first 12" in text
    assert text.count('class="wrong"') == 1
    assert "<h2>Sentences</h2>" in rendered(tmp_path, run(), sentences=examples[:2])
    assert "<h2>Sentences" not in rendered(tmp_path, run())


def test_page_without_references(tmp_path):
    text = rendered(tmp_path, run(reference={}))
    assert "logistic regression" not in text
    assert "uninformative" not in text


def test_page_repeats_to_the_byte_and_does_not_touch_its_sources(tmp_path):
    metrics = run()
    before = copy.deepcopy(metrics)
    assert rendered(tmp_path, metrics) == rendered(tmp_path, metrics)
    assert json.loads((tmp_path / "metrics.json").read_text()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*page._FILES, "confusion.png", "report.html"])


def test_page_needs_a_finished_run(tmp_path):
    workdir(tmp_path, run())
    (tmp_path / "curves.png").unlink()
    with pytest.raises(AvjaxError, match=r"no curves\.png"):
        page.write_report(tmp_path)
    workdir(tmp_path, run())
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(AvjaxError, match=r"config\.json: cannot be read as JSON"):
        page.write_report(tmp_path)
