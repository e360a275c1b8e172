"""Draws docs/front_page.png: the report of a finished run beside its prediction for one clip.

python docs/make_front_page.py runs/etg_mafw-demo CLIP.mp4
"""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import av
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

SHOWN = 6  # classes of the prediction
BASELINES = ("length, lead-in, loudness", "audio", "video", "audio+video")
DARK, GREY, RUN = "#1a1a2e", "#6b7280", "#3b0f70"


def main(workdir: Path, clip: Path) -> None:
    metrics = json.loads((workdir / "metrics.json").read_text())
    command = [sys.executable, "-m", "avjax.predict", "--json", "--workdir", str(workdir), str(clip)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    prediction = json.loads(printed)["clips"][0]

    plt.rcParams |= {"font.size": 12, "text.color": DARK}
    figure = plt.figure(figsize=(16, 7.6), dpi=100, facecolor="white")
    figure.text(0.03, 0.945, "report.html", size=17, weight="bold")
    figure.text(0.03, 0.905, metrics["dataset"], size=12, color=GREY)
    figure.text(0.67, 0.945, "avjax.predict", size=17, weight="bold")
    figure.text(0.67, 0.905, "one clip of the demo corpus, also used in training", size=12, color=GREY)

    scores(figure.add_axes((0.03, 0.33, 0.24, 0.5)), metrics)
    figure.text(0.03, 0.05, _wrapped(f"{metrics['dataset']}. {metrics['protocol']}", 48), size=10, color=GREY)
    confusion(figure.add_axes((0.365, 0.19, 0.26, 0.65)), metrics)
    figure.add_artist(plt.Line2D((0.65, 0.65), (0.04, 0.96), color="#d1d5db", linewidth=1))

    image = figure.add_axes((0.67, 0.5, 0.19, 0.36))
    image.imshow(middle_frame(clip))
    image.set_axis_off()
    image.set_anchor("W")
    figure.text(0.85, 0.84, _wrapped(f"“{prediction['sentence']}”", 25), size=11, va="top", linespacing=1.4)
    probabilities(figure.add_axes((0.765, 0.07, 0.2, 0.36)), prediction)
    figure.savefig(Path(__file__).with_name("front_page.png"), metadata={"Software": None})


def scores(axes: plt.Axes, metrics: dict) -> None:
    """Draws WAR of the run and of the logistic regressions beside it, as means with standard deviations."""
    rows = [("this run", metrics["mean"]["war"], metrics["std"]["war"], RUN)]
    for name in BASELINES:
        reference = metrics["reference"][name]
        rows.append((f"baseline: {name}", reference["mean"]["war"], reference["std"]["war"], "#c4b5d4"))
    for y, (name, mean, spread, colour) in enumerate(rows):
        axes.barh(y, 100 * mean, 0.42, xerr=100 * spread, color=colour, ecolor=GREY)
        axes.text(0, y - 0.32, f"{name}  {100 * mean:.1f} ± {100 * spread:.1f}", size=11, va="bottom")
    axes.axvline(100 / len(metrics["classes"]), color=GREY, linestyle=":", linewidth=1)
    axes.set(xlim=(0, 100), ylim=(len(rows) - 0.5, -0.75), yticks=[], xlabel="WAR, % (dotted: chance)")
    axes.spines[["top", "right", "left"]].set_visible(False)


def confusion(axes: plt.Axes, metrics: dict) -> None:
    """Draws the confusion matrix, percent of each true class."""
    counts = np.asarray(metrics["confusion"], float)
    percent = 100 * counts / counts.sum(1, keepdims=True)
    axes.imshow(np.ma.masked_equal(percent, 0), cmap="magma_r", vmin=0, vmax=100)
    for (row, column), value in np.ndenumerate(percent):
        if value:
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", size=9, color="w" if value > 45 else DARK)
    ticks = range(len(percent))
    axes.set_xticks(ticks, metrics["classes"], rotation=45, ha="right", rotation_mode="anchor", size=10)
    axes.set_yticks(ticks, metrics["classes"], size=10)
    axes.set(xlabel="predicted", ylabel="true")
    axes.set_title("confusion matrix, %", size=12, loc="left")


def probabilities(axes: plt.Axes, prediction: dict) -> None:
    """Draws the likeliest classes as bars."""
    likely = sorted(prediction["probabilities"].items(), key=lambda item: -item[1])[:SHOWN]
    for y, (name, p) in enumerate(likely):
        axes.barh(y, 100 * p, 0.5, color=RUN if y == 0 else "#c4b5d4")
        axes.text(-2, y, name, ha="right", va="center", weight="bold" if y == 0 else "normal")
        axes.text(100 * p + 2, y, f"{100 * p:.1f} %", va="center", size=11)
    axes.set(xlim=(0, 118), ylim=(SHOWN - 0.4, -0.6))
    axes.set_axis_off()


def middle_frame(clip: Path) -> np.ndarray:
    """Returns the frame in the middle of a clip, uint8 (h, w, 3)."""
    with av.open(str(clip)) as film:
        frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
    return frames[len(frames) // 2]


def _wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
