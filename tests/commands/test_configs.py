"""Every configuration builds with all its variants; a mistake on the command line is one clear line."""

import os
import pathlib
import subprocess
import sys
import zipfile

import pytest

from avjax import config as configs
from avjax.errors import AvjaxError
from avjax.features import presets
from avjax.models.fusions import registry as fusions
from avjax.utils import paths
from tests import budget

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
PRESETS = ["lite", "open", "open_raw", "etg", "etg_raw", "deiii", "flow_dis", "flow_perceiver", "deiii_lite",
           "deiii_open", "avtca", "avtca_112", "avtca_faulty", "emoasst"]  # fmt: skip
TABLE_4 = ["w3s1", "w5s1", "w7s1", "w3s3", "w5s5", "w7s7", "flow_dinov2"]
ETG = ["full", "no_hlo", "concat_text", "concat", "no_etg", "no_tmfef", "fusion_concat", "fusion_additive",
       "weights_equal", "weights_fusion", "text_audio", "text_video", "audio_only", "video_only", "text_only",
       "ratio_weights", "summary_query", "speaker_norm", "enrol", "all_clips", "finetune", "lora",
       *PRESETS]  # fmt: skip
EMOASST = ["speaker_norm", "enrol", "all_clips", "best_epoch", "emoasst", "lite", "open", "small", "utterance",
           "label_in_query", "label_free_query", "visual_supcon", "video", "audio", "zero", "tuned"]  # fmt: skip
FUSIONS = [*fusions.variants()]
WITHOUT_TEXT = [name for name in FUSIONS if name not in ("mag", "mag_recipe")]
STREAMS = ["audio", "video", "text", "ta", "tv", "av", "tav"]
STANDARDISED = ["speaker_norm", "enrol", "all_clips"]
FUSION = [*FUSIONS, *STREAMS, *STANDARDISED, *PRESETS]
DEIII = ["full", "ife_video", "ife_audio", "ife_fusion", "none_ife", "flow_only", "video_only", "time_concat",
         "channel_concat", "sum", "early", "transformer", "small", *STANDARDISED, *PRESETS, *TABLE_4]  # fmt: skip
AVTCA = ["it1", "it4", "ct1", "ct4", "full", "softhard", "repo", "avtca_faulty", "avtca_112", *STANDARDISED]
# For every file in configs/: its name, data set and variants.
EXPECTED = {
    "configs/avtca_crema_d.py": ("avtca_crema_d", "crema_d", AVTCA),
    "configs/avtca_folder.py": ("avtca_folder", "folder", [*AVTCA, "avtca", "paper"]),
    "configs/avtca_mosei.py": ("avtca_mosei", "folder", AVTCA),
    "configs/avtca_ravdess.py": ("avtca_ravdess", "ravdess", AVTCA),
    "configs/deiii_crema_d.py": ("deiii_crema_d", "crema_d", ["crowd", "soft", *DEIII]),
    "configs/deiii_folder.py": ("deiii_folder", "folder", [*DEIII, "paper", "concat"]),
    "configs/deiii_msp_improv.py": ("deiii_msp_improv", "msp_improv", ["sessions", *DEIII]),
    "configs/deiii_ravdess.py": ("deiii_ravdess", "ravdess", DEIII),
    "configs/emoasst_folder.py": ("emoasst_folder", "folder", [*EMOASST, "paper"]),
    "configs/emoasst_meld.py": ("emoasst_meld", "meld", EMOASST),
    "configs/emoasst_ravdess.py": (
        "emoasst_ravdess",
        "ravdess_features",
        [*(name for name in EMOASST if name not in ("lite", "open", "emoasst")), "paper"],
    ),
    "configs/etg_dfew.py": ("etg_dfew", "dfew", ETG),
    "configs/etg_folder.py": ("etg_folder", "folder", ETG),
    "configs/etg_mafw.py": ("etg_mafw", "mafw", ["compound", *ETG]),
    "configs/extract_folder.py": ("extract_folder", "folder", [*PRESETS, *TABLE_4]),
    "configs/extract_mafw.py": ("extract_mafw", "mafw", [*PRESETS, *TABLE_4]),
    "configs/fusion_folder.py": ("fusion_folder", "folder", FUSION),
    "configs/fusion_mafw.py": ("fusion_mafw", "mafw", FUSION),
    "configs/mmmo.py": ("mmmo", "mmmo", ["audio", "video", "av", "all_clips", *WITHOUT_TEXT]),
    "configs/mosei.py": (
        "mosei",
        "mosei:sentiment",
        ["unaligned", "emotions", "audio", "video", "text", "av", "tav", "all_clips", *FUSIONS],
    ),
    "configs/mosi_utterance.py": (
        "mosi_utterance",
        "mosi_utterance",
        ["audio", "video", "text", "av", "tav", *STANDARDISED, *FUSIONS],
    ),
    "configs/ravdess_features.py": (
        "ravdess_features",
        "ravdess_features",
        ["audio", "video", "av", "both_aus", *STANDARDISED, *WITHOUT_TEXT],
    ),
}


def test_every_configuration_is_expected_here():
    assert paths.names("configs") == sorted(EXPECTED)


@pytest.mark.parametrize("file", EXPECTED)
def test_configuration(file):
    name, dataset, variants = EXPECTED[file]
    config = configs.load(file)
    assert (config.name, config.dataset, config.variants) == (name, dataset, "")
    assert f"--config {file}" in configs.module(file).__doc__
    with pytest.raises(AvjaxError, match="is 'qqqqqqqq'; choose one of") as caught:
        configs.load(f"{file}:qqqqqqqq")
    assert sorted(str(caught.value).partition("choose one of ")[2].split(", ")) == sorted(variants)
    for variant in variants:
        changed = configs.load(f"{file}:{variant}")
        assert changed.variants == variant
        assert _plain_keys(changed) == _plain_keys(config), "a variant must not add keys"
        _build(changed)


def _plain_keys(config):
    """Returns all keys but the settings of a fusion, which are its own."""
    return [key for key in configs.keys(config) if not key.startswith("model.settings.")]


def _build(config):
    """Whatever a configuration names must exist."""
    from avjax import models
    from avjax.datasets import registry
    from avjax.features import clip as clip_features
    from avjax.features import prompts
    from avjax.features.tables import join

    texts = clip_features.TEXTS
    if "tables" in config:
        described = join.Description.of(config.tables)
        assert set(config.model.streams) <= {*described.streams, *(["text"] if "prompts" in config else [])}
        texts = (join.TEXT_SOURCE,) if "text" in described.streams else ("",)
        if "prompts" in config:
            texts = (prompts.UTTERANCE,)
    else:
        assert config.dataset in registry.REGISTRY
        presets.preset(config.preset)
        if "prompts" in config:
            texts = (*texts, prompts.UTTERANCE)
    made = configs.typed(config)
    if "model" in config:
        models.build(made.model, 7)
        assert config.model.text_source in (texts if "text" in config.model.streams else (*texts, ""))


def test_later_variants_win_and_all_are_named():
    config = configs.load("configs/etg_mafw.py:enrol,speaker_norm")
    assert (config.protocol.standardise, config.variants) == ("speaker", "enrol,speaker_norm")


def test_rows_of_the_papers_are_settings_of_their_models():
    row = configs.load("configs/deiii_crema_d.py:flow_only,w3s3")
    assert (row.model.streams, row.model.settings.head) == (("audio", "flow"), "video")
    assert presets.preset(row.preset).flow == presets.Flow("perceiver_flow", presets.PRESETS["deiii"].image, 3, 3, 368)
    small, paper = (configs.load(f"configs/deiii_folder.py{word}") for word in ("", ":paper"))
    assert paper.model.settings == configs.load("configs/deiii_ravdess.py").model.settings != small.model.settings
    assert paper.train.learning_rate == 5e-6
    repo = configs.load("configs/avtca_ravdess.py:repo,avtca_faulty")
    assert (repo.model.name, repo.preset, repo.train.optimizer) == ("avtca_released", "avtca_faulty", "sgd")
    assert configs.load("configs/avtca_folder.py").preset == "avtca_112"
    assert configs.load("configs/avtca_folder.py:it1").model.settings.blocks == "self"


@pytest.mark.parametrize(
    ("file", "dataset", "folds"),
    [
        ("configs/deiii_crema_d.py", "crema_d", "given"),
        ("configs/deiii_crema_d.py:crowd", "crema_d:crowd", "given"),
        ("configs/deiii_crema_d.py:soft", "crema_d:soft", "given"),
        ("configs/deiii_ravdess.py", "ravdess", "speaker"),
        ("configs/deiii_msp_improv.py", "msp_improv", "speaker"),
        ("configs/deiii_msp_improv.py:sessions", "msp_improv", "given"),
        ("configs/etg_mafw.py:compound", "mafw:compound", "auto"),
        ("configs/etg_dfew.py", "dfew", "auto"),
    ],
)
def test_targets_and_folds(file, dataset, folds):
    config = configs.load(file)
    assert (config.dataset, config.protocol.folds) == (dataset, folds)


@pytest.mark.parametrize("file", ["configs/fusion_folder.py", "configs/fusion_mafw.py", "configs/mosi_utterance.py"])
def test_the_name_of_a_fusion_means_the_fusion(file):
    for name, changes in fusions.variants().items():
        assert configs.load(f"{file}:{name}").model.name == changes["model.name"], name


def test_entry_points_can_be_imported_together():
    done = call("timeit", "-n1", "import avjax.train, avjax.extract")
    assert done.returncode == 0, done.stderr


def test_overrides_without_flags():
    assert configs.load("configs/etg_mafw.py", train__epochs=3).train.epochs == 3
    with pytest.raises(AvjaxError, match=r"is 'train.epoch'; choose .* did you mean 'train.epochs'"):
        configs.load("configs/etg_mafw.py", train__epoch=3)


def test_own_file_comes_before_a_shipped_one_of_its_name(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    own = tmp_path / "configs/extract_mafw.py"
    own.write_text(paths.path("configs/extract_mafw.py").read_text().replace('"extract_mafw"', '"own"'))
    monkeypatch.chdir(tmp_path)
    assert configs.load("configs/extract_mafw.py").name == "own"
    assert configs.load("configs/etg_mafw.py").name == "etg_mafw"
    own.write_text("")
    with pytest.raises(AvjaxError, match="expected a function get_config"):
        configs.load("configs/extract_mafw.py")


def call(module, *args, cwd=REPOSITORY, path=REPOSITORY):
    env = os.environ | {"PYTHONPATH": str(path)}
    return subprocess.run([sys.executable, "-m", module, *args], cwd=cwd, env=env, capture_output=True, text=True)


@pytest.mark.parametrize(("module", "flag"), [("avjax.train", "--workdir"), ("avjax.extract", "--only")])
def test_help_comes_at_once(module, flag):
    start = budget.cpu_seconds()
    done = call(module, "--help")
    assert budget.cpu_seconds() - start < 2
    assert done.returncode == 0
    assert flag in done.stdout
    assert "--config" in done.stdout
    assert not done.stderr


FOLDER = "--config=configs/extract_folder.py"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            [FOLDER, "--config.data.rot=x"],
            "no key 'data.rot' in configs/extract_folder.py; --keys lists them; did",
        ),
        (["--config", FOLDER[9:], "--config.rot", "x"], "no key 'rot' in"),
        (["-config", FOLDER[9:], "-config.worker=1"], "did you mean 'workers'?"),
        ([FOLDER + ":light"], "variant of extract_folder is 'light'; choose one of lite, open"),
        (
            ["--config=configs/extract_foldr.py"],
            "; did you mean 'configs/extract_folder.py'?",
        ),
        (["--config=/nowhere/x.py"], "/nowhere/x.py: no such configuration file"),
        (["--config=configs"], "configs: no such configuration file"),
        ([], "Flag --config must have a value"),
        (["--config"], "Missing value for flag --config"),
        ([FOLDER, "--uot=x"], "Unknown command line flag 'uot'. Did you mean: out ?"),
        ([FOLDER, "--only=media"], "value should be one of <text>"),
        ([FOLDER, "--config.workers=many"], "invalid literal for int() with base 10: 'many'"),
        ([FOLDER, "surplus"], "unexpected arguments: surplus"),
        ([FOLDER, "--config.data.root=/nowhere"], "/nowhere: no such folder; set --config.data.root"),
        ([FOLDER, "--out=/dev/null/F"], "/dev/null/F: cannot be written (Not a directory); choose another --out"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(args, message, tmp_path):
    done = call("avjax.extract", *([] if any(a.startswith("--out") for a in args) else [f"--out={tmp_path}"]), *args)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


@pytest.mark.thorough
def test_installed_wheel_ships_what_it_needs(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path)]
    subprocess.run([*build, str(REPOSITORY)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    shipped = {p.relative_to(site).as_posix() for p in site.rglob("*") if p.is_file()}
    assert {
        "avjax/evaluation/report/templates/page.html.j2",
        "avjax/inference/model_card.md.j2",
        "avjax/_shipped/data/mafw.json",
    } <= shipped
    assert {f"avjax/_shipped/{file}" for file in EXPECTED} <= shipped
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = call("avjax.train", "--config=configs/etg_folder.py", "--config.data.features=F", cwd=elsewhere, path=site)
    assert done.returncode == 2
    assert "F: no finished feature store" in done.stderr
    mafw = call("avjax.extract", "--config=configs/extract_mafw.py", "--config.data.root=.", "--out=F",
                cwd=elsewhere, path=site)  # fmt: skip
    assert mafw.returncode == 2
    assert "no MAFW; missing" in mafw.stderr
