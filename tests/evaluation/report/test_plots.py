"""Plots of a run: what they show, that it can be read, and that they repeat to the byte."""

import numpy as np
import pytest

from avjax.errors import AvjaxError
from avjax.evaluation.report import page, plots
from tests.reported import CLASSES, CONFUSION, run, values_run

HISTORY = [{"epoch": e, "train_loss": 2 / e, "val_loss": 2.2 / e, "val_uar": 0.3 + 0.02 * e} for e in range(1, 6)]


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, for a look at what they show."""
    kept = []
    save = plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: (kept.append(figure), save(figure, path)))
    return kept


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_confusion_figure_shows_shares_counts_scores_and_protocol(tmp_path, figures):
    plots.confusion_figure(CONFUSION, CLASSES, "My run", tmp_path / "c.png", note="leave one speaker out")
    (axes,) = figures[0].axes
    shown = texts(axes)
    assert {"60", "80", "75", "6", "8", "15"} <= set(shown)  # row percentages and counts of the diagonal
    assert len(shown) == 2 * 8 + 1  # eight cells hold clips; an empty one holds no text
    assert axes.get_title() == "My run"
    assert "WAR 72.5 %   ·   UAR 71.7 %" in shown
    assert figures[0].get_supxlabel() == "leave one speaker out"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["anger (10)", "joy (10)", "neutral (20)"]
    assert [label.get_text() for label in axes.get_xticklabels()] == CLASSES


def test_a_class_without_clips_is_an_empty_row(tmp_path, figures):
    plots.confusion_figure([[3, 1], [0, 0]], ["a", "b"], "t", tmp_path / "c.png")
    assert set(texts(figures[0].axes[0])[:-1]) >= {"75", "25", "3", "1"}
    assert "b (0)" in [label.get_text() for label in figures[0].axes[0].get_yticklabels()]


def test_labels_can_be_read_on_every_colour():
    import matplotlib

    for colour in matplotlib.colormaps[plots._COLOURS](np.linspace(0, 1, 101)):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
        background = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        ink = {"white": 1.0, "black": 0.0}[plots._ink(colour)]
        light, dark = max(ink, background), min(ink, background)
        assert (light + 0.05) / (dark + 0.05) >= 4.5  # WCAG 2, level AA


def test_curves_show_what_was_measured(tmp_path, figures):
    plots.curves_figure(HISTORY, tmp_path / "v.png")
    plots.curves_figure(
        [{"epoch": row["epoch"], "train_loss": row["train_loss"]} for row in HISTORY], tmp_path / "t.png"
    )
    plots.curves_figure([row | {"val_loss": None, "val_uar": None} for row in HISTORY], tmp_path / "n.png")
    both, *train_only = figures
    loss, uar = both.axes
    assert [line.get_label() for line in loss.lines] == ["training", "validation"]
    np.testing.assert_allclose(uar.lines[0].get_ydata(), [32, 34, 36, 38, 40])
    for figure in train_only:
        (axes,) = figure.axes
        assert [line.get_label() for line in axes.lines] == ["training"]


def test_a_single_epoch_is_visible(tmp_path, figures):
    plots.curves_figure(HISTORY[:1], tmp_path / "v.png")
    assert figures[0].axes[0].lines[0].get_marker() == "o"


def test_pictures_repeat_to_the_byte(tmp_path):
    for name in ("a", "b"):
        plots.confusion_figure(CONFUSION, CLASSES, "t", tmp_path / f"{name}.png")
        plots.curves_figure(HISTORY, tmp_path / f"{name}2.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a2.png").read_bytes() == (tmp_path / "b2.png").read_bytes()
    assert b"tEXt" not in (tmp_path / "a.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


TRUTH = np.random.default_rng(0).random((20, 2)).astype(np.float32)
GUESS = TRUTH + np.array([[0.1, -0.2]], np.float32)


def test_scatter_shows_each_value_with_its_ccc(tmp_path, figures):
    plots.scatter_figure(TRUTH, GUESS, ["valence", "arousal"], "My run", tmp_path / "s.png", note="how")
    valence, arousal = figures[0].axes
    x, y = TRUTH[:, 0].astype(float), GUESS[:, 0].astype(float)
    ccc = 2 * np.cov(x, y, bias=True)[0, 1] / (x.var() + y.var() + (x.mean() - y.mean()) ** 2)
    assert valence.get_title() == f"valence: CCC {100 * ccc:.1f}"
    assert arousal.get_title().startswith("arousal: CCC ")
    np.testing.assert_allclose(arousal.collections[0].get_offsets(), np.stack([TRUTH[:, 1], GUESS[:, 1]], -1))
    np.testing.assert_array_equal(*valence.lines[0].get_data())  # the diagonal
    assert figures[0].get_suptitle() == "My run"
    assert figures[0].get_supxlabel() == "how"


def test_labels_figure_shows_what_was_found_of_yes_and_of_no(tmp_path, figures):
    counts = np.array([[[6.0, 2.0], [1.0, 3.0]], [[12.0, 0.0], [0.0, 0.0]]])  # nobody has the second
    plots.labels_figure(counts, ["happy", "sad"], "t", tmp_path / "l.png")
    (axes,) = figures[0].axes
    yes, no = ([bar.get_width() for bar in bars] for bars in axes.containers)
    np.testing.assert_allclose(yes, [75, 0])
    np.testing.assert_allclose(no, [75, 100])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["happy (4)", "sad (0)"]


def test_attention_is_drawn_clip_by_clip_and_a_missing_stream_is_empty(tmp_path, figures):
    weights = np.random.default_rng(0).random((3, 5))
    clips = [{"name": "a (joy)", "video": weights, "audio": weights.T}]
    clips += [{"name": "b (anger)", "video": weights[:, :0], "audio": weights.T[:0]}]
    streams = [("video", "video", "audio"), ("audio", "audio", "video")]
    plots.attention_figure(clips, streams, "t", tmp_path / "a.png", note="how")
    first, second, *empty = figures[0].axes
    np.testing.assert_array_equal(first.images[0].get_array(), weights.T)  # who asks runs to the right
    np.testing.assert_array_equal(second.images[0].get_array(), weights)
    assert (first.get_xlabel(), first.get_ylabel()) == ("video step (query)", "audio step (key)")
    assert [len(axes.images) for axes in empty] == [0, 0]
    assert [axes.get_title() for axes in figures[0].axes] == ["a (joy)", "a (joy)", "b (anger)", "b (anger)"]
    assert figures[0].get_supxlabel().startswith("how. ")


def test_pictures_of_other_tasks_repeat_to_the_byte(tmp_path):
    maps = [{"name": "a", "video": TRUTH}]
    for name in ("a", "b"):
        plots.scatter_figure(TRUTH, GUESS, ["v", "a"], "t", tmp_path / f"{name}1.png")
        plots.labels_figure(np.ones((2, 2, 2)), ["x", "y"], "t", tmp_path / f"{name}2.png")
        plots.attention_figure(maps, [("video", "video", "audio")], "t", tmp_path / f"{name}3.png")
    for number in (1, 2, 3):
        assert (tmp_path / f"a{number}.png").read_bytes() == (tmp_path / f"b{number}.png").read_bytes()
        assert (tmp_path / f"a{number}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("task", list(page.PREDICTIONS))
def test_each_task_has_its_picture_of_answers(tmp_path, task):
    labels = {"regression": TRUTH, "multilabel": TRUTH > 0.5}
    metrics = values_run(task) if task in labels else run(classes=["a", "b"])
    metrics, label = metrics | {"confusion": [[5, 5], [5, 5]]}, labels.get(task, np.array([0, 1] * 10))
    plots.predictions_figure(metrics, {"label": label, "logits_fusion": GUESS}, "t", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [page.PREDICTIONS[task]]


def test_curves_show_the_score_that_validation_picks_by(tmp_path, figures):
    history = [{"epoch": e, "train_loss": 1 / e, "val_loss": 1 / e, "val_ccc": 0.1 * e} for e in (1, 2)]
    plots.curves_figure(history, tmp_path / "c.png")
    _, ccc = figures[0].axes
    assert ccc.get_title("left") == "validation CCC, %"
    np.testing.assert_allclose(ccc.lines[0].get_ydata(), [10, 20])


def test_bad_pictures_are_refused(tmp_path):
    with pytest.raises(AvjaxError, match=r"shape \(3, 3\) for 2 classes"):
        plots.confusion_figure(CONFUSION, ["a", "b"], "t", tmp_path / "c.png")
    with pytest.raises(AvjaxError, match="finite counts"):
        plots.confusion_figure([[1, float("nan")], [0, 1]], ["a", "b"], "t", tmp_path / "c.png")
    with pytest.raises(AvjaxError, match="no epochs"):
        plots.curves_figure([], tmp_path / "c.png")
