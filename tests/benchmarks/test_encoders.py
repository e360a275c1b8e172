"""The benchmark of encoders compares like with like, rejects what differs, and computes its figures correctly."""

import csv
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avjax.errors import AvjaxError
from benchmarks import encoders as benchmark
from benchmarks import record
from benchmarks.encoders import Load, Peak
from benchmarks.torch import originals
from tests.benched import assert_one_line, bench, committed, needs_torch

PEAK = Peak(1e12, "made up")
SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
CONVS = {"conv_dim": [4, 4], "conv_kernel": [10, 3], "conv_stride": [5, 2]}
POSITIONS = {"num_conv_pos_embedding_groups": 2, "num_conv_pos_embeddings": 4}
WHISPER = {
    "d_model": 8,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 12,
    "max_source_positions": 20,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "vocab_size": 9,
    "pad_token_id": 0,
}

EFFICIENTNET = {
    "model_type": "efficientnet",
    "padding": "same",
    "width_coefficient": 0.1,
    "depth_coefficient": 0.4,
    "hidden_dim": 128,
    "image_size": 64,
}
PERCEIVER = {
    "model_type": "perceiver",
    "train_size": [10, 12],
    "num_latents": 6,
    "d_latents": 8,
    "d_model": 322,
    "num_self_attends_per_block": 1,
    "num_self_attention_heads": 2,
    "num_cross_attention_heads": 1,
}


def like(load: Load, *batches, **changes) -> Load:
    """Returns a load with other batches."""
    return dataclasses.replace(load, cpu=batches, accelerator=batches, **changes)


TINY = {
    "text": ({"model_type": "bert", "vocab_size": 30} | SIZES, like(benchmark.TEXTS, (2, 9))),
    "image": ({"model_type": "vit", "image_size": 8, "patch_size": 4} | SIZES, like(benchmark.IMAGES, (3, 8))),
    "faces": (EFFICIENTNET, like(benchmark.IMAGES, (2, 64))),
    "flow": (
        PERCEIVER,
        like(benchmark.PAIRS, (1, 12), shape=lambda b, n: (b, 2, 10, n, 3)),
    ),
    "audio": ({"model_type": "wav2vec2"} | SIZES | CONVS | POSITIONS, like(benchmark.WAVES, (1, 800), (2, 600))),
    "whisper": ({"model_type": "whisper"} | WHISPER, like(benchmark.SPECTRA, (1, 40), (2, 6), only=40)),
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Makes encoders small and timings short."""
    monkeypatch.setattr(benchmark, "ENCODERS", TINY)
    monkeypatch.setattr(benchmark, "_LEAST_SECONDS", 0.01)


def measured(name: str, dtype: str = "float32", repeats: int = 2) -> tuple[list[dict], list[str]]:
    """Returns the rows and the messages."""
    messages: list[str] = []
    return benchmark.measure(name, dtype, PEAK, repeats, messages.append), messages


# ---- Rows ---------------------------------------------------------------------------------------------------------


@needs_torch
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param("text", "float32", marks=pytest.mark.budget(8)),  # imports PyTorch
        ("image", "float32"),
        ("image", "bfloat16"),
        *(pytest.param(name, "float32", marks=pytest.mark.thorough) for name in ("faces", "flow", "audio", "whisper")),
    ],
)
def test_rows(name, dtype):
    rows, messages = measured(name, dtype)
    assert [(r["batch"], r["length"]) for r in rows] == list(benchmark.ENCODERS[name][1].batches())
    row = rows[0]
    assert (row["encoder"], row["dtype"], row["repeats"]) == (name, dtype, 2)
    assert any(line.endswith("avjax, pytorch compute the same") for line in messages)
    for way in ("avjax", "pytorch"):
        low, median, high = (row[f"{way}_seconds_{k}"] for k in ("min", "median", "max"))
        assert 0 < low <= median <= high
        assert row[f"{way}_per_second"] == pytest.approx(row["batch"] / median)
        assert row[f"{way}_mfu"] == pytest.approx(row["gflops"] * 1e9 * row["batch"] / median / 1e12)
    assert row["speed_up_over_pytorch"] == row["pytorch_seconds_median"] / row["avjax_seconds_median"]
    assert row["avjax_compile_seconds"] > 0
    empty = {column for column, value in row.items() if value == ""}
    assert {c for c in row if c.startswith("compiled_")} | {"pytorch_compile_seconds"} <= empty


@needs_torch
def test_the_ways_are_timed_in_turn():
    _, messages = measured("text", repeats=3)
    timed = [line.split(": ")[1].split()[0] for line in messages if "repeat" in line]
    assert timed == 3 * ["avjax", "pytorch"]


@pytest.mark.thorough
def test_audio_is_measured_against_its_own_length(no_torch):
    rows, _ = measured("audio")
    for row, seconds in zip(rows, (0.05, 2 * 0.0375), strict=True):
        assert row["avjax_times_real_time"] == pytest.approx(seconds / row["avjax_seconds_median"])
        assert row["padded"] > row["length"]
    assert measured("text")[0][0]["avjax_times_real_time"] == ""


@needs_torch
def test_a_length_that_the_original_does_not_take_is_measured_for_ours_alone():
    full, short = measured("whisper")[0]
    assert full["pytorch_seconds_median"] > 0
    assert (short["pytorch_seconds_median"], short["speed_up_over_pytorch"]) == ("", "")
    assert short["avjax_seconds_median"] > 0


def test_without_pytorch_its_columns_are_empty(no_torch):
    rows, messages = measured("text")
    others = {value for c, value in rows[0].items() if c.startswith(("pytorch_", "compiled_", "speed_up_"))}
    assert others == {""}
    assert rows[0]["avjax_per_second"] > 0
    assert not any("compute the same" in line for line in messages)


@needs_torch
def test_on_an_accelerator_the_compiled_original_is_a_third_way(monkeypatch):
    import torch

    monkeypatch.setattr(torch, "compile", lambda model, dynamic: model)
    monkeypatch.setattr(benchmark, "torch_device", lambda: "cuda")
    monkeypatch.setattr(originals, "placed", lambda x, dtype: x)
    (row,), messages = measured("image")
    assert any("avjax, pytorch, compiled compute the same" in line for line in messages)
    assert row["speed_up_over_compiled"] == row["compiled_seconds_median"] / row["avjax_seconds_median"]
    assert row["compiled_compile_seconds"] != ""


# ---- What is compared ---------------------------------------------------------------------------------------------


@needs_torch
@pytest.mark.parametrize(
    ("dtype", "of_what"), [("float32", "relative to the standard"), ("bfloat16", "cosine of pooled")]
)
def test_ways_that_do_not_agree_are_not_timed(monkeypatch, dtype, of_what):
    right = originals.inputs
    monkeypatch.setattr(originals, "inputs", lambda inputs, dtype: right(inputs[:, ::-1].copy() ** 3, dtype))
    with pytest.raises(AvjaxError, match=rf"image 3 x 8 pixels: pytorch and avjax: the .* {of_what}.* cannot be comp"):
        measured("image", dtype)


@needs_torch
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bounds_of_agreement(dtype):
    import torch

    features = np.random.default_rng(0).normal(size=(2, 4, 8)).astype(np.float32)
    real = np.arange(4)[None] < np.array([[3], [3]])

    def check(others):
        benchmark.check_agreement("x", dtype, jnp.asarray(features), jnp.asarray(real), torch.from_numpy(others))

    check(features[:, :3])
    check(features[:, :3] + 0.0005)
    with pytest.raises(AvjaxError, match="expected"):
        check(features[:, :3] + 0.2)
    with pytest.raises(AvjaxError, match="nan"):
        check(features[:, :3] * np.nan)
    with pytest.raises(AvjaxError, match=r"features \(2, 4, 8\), avjax \(6, 8\)"):
        check(features)


def test_several_devices_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "local_device_count", lambda: 4)
    with pytest.raises(AvjaxError, match="JAX sees 4 devices; show it one"):
        measured("text")


def test_batches_go_by_the_device(monkeypatch):
    load = benchmark.Load("tokens", lambda b, n: (b, n), cpu=((1, 2),), accelerator=((3, 4),))
    assert load.batches() == ((1, 2),)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert load.batches() == ((3, 4),)


# ---- Sizes and counts ---------------------------------------------------------------------------------------------

PARAMETERS = {
    "minilm": 22_565_376,
    "distilbert": 66_362_880,
    "vit_s14": 22_056_192,
    "vit_b16": 85_798_656,
    "clip_b32_text": 63_165_952,
    "clip_b32_vision": 87_454_464,
    "efficientnet_b2": 7_667_210,
    "perceiver_flow": 41_057_134,
    "wav2vec2_base": 94_370_816,
    "wav2vec2_large_robust": 315_437_568,
    "data2vec_audio_base": 93_163_520,
    "whisper_tiny": 8_208_384,
    "whisper_base": 20_590_592,
}
TRUE_SIZE = dict(benchmark.ENCODERS)
QUICK = ("minilm", "vit_s14", "whisper_tiny")
true_sizes = pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.thorough) for name in TRUE_SIZE]
)


def true_module(name):
    """Builds the module at its true size."""
    import transformers

    from avjax.encoders import FAMILIES

    config = transformers.AutoConfig.for_model(**TRUE_SIZE[name][0])
    family = FAMILIES[config.model_type]
    return family, family.build(config.to_dict(), jnp.float32, None)


@true_sizes
def test_encoders_have_their_true_size(name):
    family, module = true_module(name)
    assert sum(v.size for v in jax.tree.leaves(family.shapes(module.config))) == PARAMETERS[name]


@needs_torch
@true_sizes
def test_originals_exist_at_their_true_size(name):
    import torch
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(**TRUE_SIZE[name][0]))
    assert sum(p.numel() for p in model.parameters()) >= PARAMETERS[name]


def block(steps: int, width: int, inner: int) -> int:
    """Counts the FLOPs of a transformer layer: four projections, a feed-forward layer of two, scores and context."""
    return 2 * steps * (4 * width**2 + 2 * width * inner) + 2 * 2 * steps**2 * width


def test_flops_are_those_counted_by_hand():
    by_hand = 12 * block(197, 768, 3072) + 2 * 196 * (16 * 16 * 3) * 768
    _, module = true_module("vit_b16")
    counted, parameters = benchmark.flops(module, np.zeros((2, 224, 224, 3), np.float32), np.ones(2, bool))
    assert counted == 2 * by_hand
    assert parameters == PARAMETERS["vit_b16"]


def test_flops_of_convolutions_are_those_counted_by_hand():
    steps, by_hand, before = 16_000, 0, 1
    _, module = true_module("wav2vec2_base")
    for width, kernel, stride in module.config.convs:
        steps = (steps - kernel) // stride + 1
        by_hand += 2 * steps * before * kernel * width
        before = width
    by_hand += 2 * steps * 512 * 768 + 2 * steps * 768 * (768 // 16) * 128 + 12 * block(steps, 768, 3072)
    counted, _ = benchmark.flops(module, np.zeros((1, 16_000), np.float32), np.ones((1, 16_000), bool))
    assert by_hand <= counted < 1.001 * by_hand, "means over time may be the rest"


def test_flops_in_loops_count_each_time_and_of_a_choice_the_larger():
    def function(x):
        x = jax.lax.map(lambda row: row @ x, x[:, None])[:, 0]
        return jax.lax.platform_dependent(x, cpu=lambda x: x, default=lambda x: x @ x)

    traced = jax.make_jaxpr(jax.jit(function))(np.zeros((5, 5), np.float32))
    assert benchmark.products(traced.jaxpr) == 2 * (2 * 5**3)


# ---- The peak -----------------------------------------------------------------------------------------------------


def test_the_peak_of_a_known_device_is_the_vendors(monkeypatch):
    class Device:
        device_kind = "NVIDIA H200"

    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    assert benchmark.peak("bfloat16") == Peak(989.4e12, "data sheet")
    assert benchmark.peak("float32") == Peak(66.9e12, "data sheet")


def test_the_peak_of_others_is_the_fastest_product(monkeypatch):
    monkeypatch.setattr(benchmark, "product_flops", lambda size, dtype: {1024: 7.0, 2048: 5.0}[size])
    assert benchmark.peak("float32") == Peak(7.0, "matrix product")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_flops_of_a_product_are_of_the_fastest_call(monkeypatch, dtype):
    seconds = iter([4.0, 2.0, 0.5] + 50 * [3.0])

    def timed(run):
        run()
        return next(seconds)

    monkeypatch.setattr(benchmark, "timed", timed)
    assert benchmark.product_flops(64, dtype) == 2 * 64**3 / 0.5


# ---- The command and its record -----------------------------------------------------------------------------------


@pytest.mark.thorough
def test_a_real_encoder_is_measured_and_recorded(tmp_path):
    out = tmp_path / "encoders.csv"
    command = ["encoders", "--encoders=minilm", "--dtype=bfloat16", "--repeats=1", f"--out={out}"]
    done = bench(*command)
    assert done.returncode == 0, done.stderr
    with out.open() as file:
        (row,) = csv.DictReader(file)
    assert (row["encoder"], row["batch"], row["length"]) == ("minilm", "32", "40")
    assert int(row["padded"]) >= 40
    assert (row["dtype"], row["parameters"], row["repeats"]) == ("bfloat16", "22565376", "1")
    assert row["peak_source"] == "matrix product"
    assert float(row["avjax_per_second"]) > 1
    assert row["jax"] == jax.__version__
    assert "compiled /s" not in done.stdout, "nothing was compiled by PyTorch; the table has no column for it"
    assert "minilm" in done.stdout.split("encoders at true size, bfloat16")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--encoders=smell"], "smell is not among minilm, distilbert"), (["--dtype=int8"], "float32|bfloat16")],
)
def test_mistakes_are_one_line(arguments, message):
    assert_one_line(bench("encoders", *arguments), message)


def test_committed_results_can_be_added_to():
    rows = committed("encoders", benchmark.KEY)
    assert {row["encoder"] for row in rows} == set(TRUE_SIZE)
    (row, *_), _ = measured("text", repeats=1)
    assert list(rows[0]) == ["benchmark", *row, *record.circumstances()]
