"""The examples of CONTRIBUTING.md, applied to a copy of the tree: what they add is listed and usable."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
GUIDE = ROOT / "CONTRIBUTING.md"
if not GUIDE.is_file():
    pytest.skip("the guide is checked in a checkout", allow_module_level=True)
# A fenced block whose first line names a file, or "run" for code to run.
BLOCK = re.compile(r"^```(python|json|diff) (\S+)\n(.*?)^```$", re.M | re.S)
# The claims of the guide, checked by calls of a user.
CHECKS = """
import pathlib, sys
import jax, numpy as np
from avjax import config, encoders, models
from avjax.datasets import registry as datasets
from avjax.models.fusions import registry as fusions

assert "gated_mean" in fusions.comparable(("audio", "video"))
made = models.build(config.load("configs/fusion_folder.py:gated_mean,av").model, 6)
batch = {s: np.zeros((2, 3, 5), np.float32) for s in made.streams}
batch |= {f"{s}_mask": np.ones((2, 3), bool) for s in made.streams}
output, variables = jax.eval_shape(made.module.init_with_output, jax.random.key(0), batch)
assert output.logits["fusion"].shape == (2, 6), output.logits
assert "gate" in variables["params"]

root = pathlib.Path(sys.argv[1])
for name in ("a01_joy_1", "a01_anger_1", "a02_joy_1", "other"):
    (root / f"{name}.mp4").write_bytes(b"film")
corpus = datasets.index("stage_plays", str(root))
assert [(c.id, c.label, c.speaker) for c in corpus.clips] == [
    ("a01_anger_1", "anger", "a01"), ("a01_joy_1", "joy", "a01"), ("a02_joy_1", "joy", "a02"),
], corpus.clips
assert corpus.task.classes == ("joy", "anger")

mini = encoders.load("vit_mini", pool="first", random=True)
features, _ = mini(*mini.prepare(np.zeros((2, 64, 64, 3), np.uint8)))
assert features.shape == (2, 32), features.shape
"""


def blocks(kind: str) -> list[tuple[str, str]]:
    """Returns (file, content) of the blocks of a kind, in order."""
    return [(name, content) for language, name, content in BLOCK.findall(GUIDE.read_text()) if language == kind]


def apply(tree: pathlib.Path, name: str, diff: str) -> None:
    """Replaces the only occurrence of a diff's old lines in a file by its new lines; indentation counts."""
    lines = diff.splitlines(keepends=True)
    old, new = ("".join(line[1:] for line in lines if line[0] in f" {sign}") for sign in "-+")
    text = (tree / name).read_text()
    assert text.count(old) == 1, f"{name}: the lines of this diff occur {text.count(old)} times, expected once:\n{diff}"
    (tree / name).write_text(text.replace(old, new))


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Makes a copy of the package with all examples applied."""
    out = tmp_path_factory.mktemp("tree")
    for folder in ("avjax", "configs", "data"):
        shutil.copytree(ROOT / folder, out / folder, ignore=shutil.ignore_patterns("__pycache__"))
    written = blocks("json") + [(name, content) for name, content in blocks("python") if name != "run"]
    assert len(written) == 3
    for name, content in written:
        assert not (out / name).exists()
        (out / name).write_text(content)
    assert len(blocks("diff")) == 5
    for name, diff in blocks("diff"):
        apply(out, name, diff)
    return out


def run(tree: pathlib.Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(tree), "AVJAX_CACHE": str(tree / "cache")}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.budget(30)
def test_what_the_guide_adds_is_listed_and_usable(tree, tmp_path):
    snippets = [content for name, content in blocks("python") if name == "run"]
    assert len(snippets) == 2
    done = run(tree, "\n".join([*snippets, CHECKS]), str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "GatedMean" in done.stdout
    assert "random, seed" in done.stdout


def test_a_diff_that_does_not_fit_is_refused(tree):
    with pytest.raises(AssertionError, match="occur 0 times"):
        apply(tree, "avjax/datasets/registry.py", " no such line\n+another\n")


def test_new_files_are_free_of_lint(tree):
    files = [name for name, _ in blocks("python") if name != "run"]
    for command in (["check"], ["format", "--check"]):
        options = ["--no-cache", "--config", str(ROOT / "pyproject.toml")]
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *options, *files], cwd=tree, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
