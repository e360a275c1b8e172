"""Settings: every key refuses a wrong type, a wrong word and a wrong range before anything is read or written."""

import dataclasses
import math
import pathlib
import sys
from collections.abc import Iterator

import pytest
from absl import flags

from avjax import cli, models, train
from avjax.datasets import registry
from avjax.errors import AvjaxError
from avjax.features import presets
from avjax.models import emoasst
from avjax.models.fusions import registry as fusions
from avjax.settings import (
    AugmentSettings,
    EtgAverSettings,
    ExtractSettings,
    FusionSettings,
    PromptSettings,
    Settings,
    TrainSettings,
    of_config,
)
from avjax.training import data
from tests import synthetic

WORD = "qqqq"
# Every part, including optional ones.
WHOLE = (
    Settings(train=TrainSettings(augment=AugmentSettings()), prompts=PromptSettings()),
    Settings(model=FusionSettings("de_iii", streams=("audio", "video", "flow"), settings=fusions.settings("de_iii"))),
    Settings(model=FusionSettings("emoasst", settings=emoasst.settings()), prompts=PromptSettings()),
    ExtractSettings(),
)
# Keys whose texts are the user's own, or name a path.
FREE = {"name", "variants", "data.root", "data.features", "protocol.only", "model.encoders.preset"}


def wrong(key: str, value: object) -> Iterator[object]:
    """Yields invalid values of a key: of another type, unknown words, beyond the limits."""
    if isinstance(value, bool):
        yield from (WORD, 2)
    elif isinstance(value, int):
        yield from (WORD, 1.5, -1)
    elif isinstance(value, float):
        yield from (WORD, math.nan, math.inf, -1.0)
    elif isinstance(value, str):
        yield from (3, *(() if key in FREE else (WORD,)))
    elif isinstance(value, tuple):
        yield from (WORD, 3)
    elif isinstance(value, dict):
        yield from (WORD, {WORD: 1})


def changed(plain: dict, key: str, value: object) -> dict:
    first, _, rest = key.partition(".")
    return plain | {first: changed(plain[first], rest, value) if rest else value}


ROWS = {
    (type(valid).__name__, getattr(getattr(valid, "model", None), "name", ""), key, repr(bad)): (valid, key, bad)
    for valid in WHOLE
    for key, value, _ in valid.rows()
    for bad in wrong(key, value)
}


def check(plain: dict) -> None:
    """Checks settings as `avjax.train` does before anything is read."""
    made = of_config(plain)
    if isinstance(made, Settings):
        models.check(made.model)
        data.check(made)
    else:
        registry.check(made.dataset)
        presets.preset(made.preset)


@pytest.mark.parametrize(("valid", "key", "bad"), ROWS.values(), ids=[f"{m or t}-{k}-{b}" for t, m, k, b in ROWS])
def test_a_value_that_does_not_fit_is_one_line_with_its_key(valid, key, bad):
    check(valid.to_dict())
    with pytest.raises(AvjaxError) as caught:
        check(changed(valid.to_dict(), key, bad))
    assert key.rpartition(".")[2] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_table_is_long_enough_and_every_key_has_a_meaning():
    assert len(ROWS) >= 150
    assert all(len(meaning) > 5 for valid in WHOLE for _, _, meaning in valid.rows())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.seeds": (1, 1)}, r"train.seeds is \(1, 1\); expected one or more, each once"),
        ({"train.seeds": ()}, "expected one or more"),
        ({"train.seeds": (2**32,)}, "expected at least 0 and at most"),
        ({"train.epochs": 0}, "train.epochs is 0; expected at least 1"),
        ({"train.warmup": 1.5}, "expected at least 0 and at most 1"),
        ({"train.rates": (("(", 0.1),)}, r"train.rates: '\(' is no regular expression"),
        ({"train.rates": (("a", -1.0),)}, "factor -1.0"),
        ({"train.rates": (("a",),)}, "expected 2 values"),
        ({"protocol.fold_count": 1}, "expected at least 2"),
        ({"protocol.validation": 1.0}, "below 1"),
        ({"protocol.folds": "leave"}, "choose one of auto, given, speaker, stratified"),
        ({"model.streams": ("audio", "audio")}, "each once"),
        ({"model.streams": ()}, "one or more"),
        ({"model.streams": ("audio", "smell")}, "choose one of text, audio, video"),
        ({"model.loss_weights": (1.0, 1.0)}, "expected 4 values"),
        ({"model.text_source": ""}, "model.text_source is empty"),
        ({"model.text_source": "given"}, "text of tables"),
        ({"model.text_source": "utterance"}, "requires a configuration with prompts"),
        ({"model.name": "mult"}, "choose one of etg_aver, etg_aver_raw"),
        ({"model.encoders.frozen": ("(",)}, "model.encoders.frozen: .* no regular expression"),
        ({"model.encoders.lora.targets": ("(",)}, "model.encoders.lora.targets"),
        ({"preset": "light"}, "preset is 'light'.*did you mean 'lite'"),
        ({"dataset": "foldr"}, "dataset is 'foldr'.*did you mean 'folder'"),
    ],
)
def test_what_does_not_go_together(changes, message):
    plain = Settings().to_dict()
    for key, value in changes.items():
        plain = changed(plain, key, value)
    with pytest.raises(AvjaxError, match=message):
        check(plain)


@pytest.mark.parametrize(
    ("name", "own", "message"),
    [
        ("mult", {"width": 41}, "model.settings.width is 41; expected a multiple of heads, 10"),
        ("mfn", {"dropouts": (0.1, 0.1)}, "model.settings.dropouts is .* expected 5 values"),
        ("mfn", {"dropouts": (0.1, 0.1, 0.1, 0.1, 1.0)}, "expected at least 0 and below 1"),
        ("lmf", {"widths": {"text": 3}}, "model.settings.widths has text; expected text, audio, video"),
        ("lmf", {"widths": {"text": 3, "audio": 3, "smell": 3}}, "did you mean|choose one of text, audio, video"),
        ("nothing", {}, "model.name is 'nothing'; choose one of"),
        ("etg_aver", {}, "has other settings"),
    ],
)
def test_own_settings_of_models(name, own, message):
    with pytest.raises(AvjaxError, match=message):
        models.check(FusionSettings(name, settings=own))


def test_settings_are_read_back_as_they_are_written():
    for valid in WHOLE:
        assert type(valid).of(valid.to_dict()) == valid
        assert dataclasses.replace(valid, preset="open").preset == "open"
    with pytest.raises(AvjaxError, match=r"the configuration key is 'trian'; choose one of .* did you mean 'train'"):
        Settings.of({"trian": {}})
    assert EtgAverSettings.of({"streams": ["text", "audio", "video"]}).streams == ("text", "audio", "video")
    assert TrainSettings(learning_rate=1).learning_rate == 1.0


# ---- The command line -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("settings") / "F"
    synthetic.write_store(root, synthetic.make(clips=12, speakers=3))
    return root


def run(monkeypatch, *args: str) -> object:
    """Runs `avjax.train` in this process; returns the exit status."""
    flags.FLAGS.unparse_flags()
    for name in [name for name in flags.FLAGS if name.startswith("config.")]:  # each key given becomes a flag
        delattr(flags.FLAGS, name)
    monkeypatch.setattr(sys, "argv", ["train", *args])
    with pytest.raises(SystemExit) as ended:
        cli.run(train.main)
    return ended.value.code


COMMAND_LINE = [
    "train.optimizer=lion",
    "train.schedule=step",
    "train.seeds=1,1",
    "train.epochs=0",
    "train.epochs=many",
    "train.rates=3",
    "protocol.select=test",
    "protocol.standardise=speakers",
    "mesh.preset=ddp",
    "mesh.lane=-1",
    "data.mode=cloud",
    "model.dtype=float16",
    "model.settings.dropout=1.0",
    "preset=light",
    "dataset=foldr",
    "weights.random=maybe",
]


def test_nothing_is_read_or_claimed(features, tmp_path, monkeypatch, capsys):
    workdir = tmp_path / "W"
    base = ("--config=configs/fusion_folder.py:concat", f"--config.data.features={features}", f"--workdir={workdir}")
    monkeypatch.setattr("avjax.training.data.obtain", lambda *_: pytest.fail("data were read"))
    for change in COMMAND_LINE:
        assert run(monkeypatch, *base, f"--config.{change}") == 2, change
        output = capsys.readouterr().err
        assert output.startswith("error: "), change
        assert output.count("\n") == 1, change
        assert not workdir.exists(), change


@pytest.mark.thorough
def test_the_corrected_command_runs_in_the_same_directory(features, tmp_path, monkeypatch):
    workdir = tmp_path / "W"
    base = ("--config=configs/fusion_folder.py:concat", f"--config.data.features={features}", f"--workdir={workdir}")
    assert run(monkeypatch, *base, "--config.train.optimizer=lion") == 2
    small = ("train.epochs=1", "train.epochs_per_call=1", "model.settings.width=8", "train.seeds=1,")
    assert run(monkeypatch, *base, *(f"--config.{change}" for change in small)) in (0, None)
    assert (workdir / "report.html").is_file()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["configs/etg_folder.py"], "a configuration is given with --config configs/etg_folder.py"),
        (["--config=configs/etg_folder.py", "--data.root=R"], "--data.root: a key of the configuration is written"),
        (
            ["--config=configs/extract_folder.py"],
            "extract_folder is a configuration of avjax.extract; avjax.train takes",
        ),
        (["--keys"], "--config"),
    ],
)
def test_what_is_often_written_is_answered_in_one_line(args, message, monkeypatch, capsys):
    assert run(monkeypatch, *args) == 2
    assert message in (output := capsys.readouterr().err)
    assert output.count("\n") == 1


def test_keys_lists_every_key_with_value_and_meaning(monkeypatch, capsys):
    status = run(monkeypatch, "--config=configs/etg_folder.py:open", "--config.train.epochs=3", "--keys")
    assert status in (0, None)
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line for line in lines}
    assert rows.keys() >= {key for key, _, _ in Settings().rows()}
    assert rows["train.epochs"].split() == ["train.epochs", "3", "maximum", "number", "of", "epochs"]
    assert "'open'" in rows["preset"]


def test_own_settings_of_models_mean_what_their_modules_say(monkeypatch, capsys):
    run(monkeypatch, "--config=configs/fusion_folder.py:mult", "--keys")
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "blocks of a crossmodal transformer" in rows["model.settings.layers"]
    assert "in the last perceptron" in rows["model.settings.out_dropout"]
    assert models.meanings("emoasst")["queries"].startswith("m of the visual fusion module")


def test_of_repeated_flags_the_last_wins(monkeypatch, capsys):
    twice = ("--config=configs/etg_mafw.py", "--config.train.epochs=3", "--config.train.epochs=4")
    run(monkeypatch, *twice, "--config=configs/etg_folder.py:open", "--keys")
    out = capsys.readouterr().out
    assert "etg_folder" in out
    assert "train.epochs  " in out
    assert [line.split()[1] for line in out.splitlines() if line.startswith("train.epochs ")] == ["4"]
