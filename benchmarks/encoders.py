"""Times each encoder at its true size with random weights, as `avjax.encoders` runs it, against its PyTorch original.

The original is that of transformers, eager, with its default attention, and on accelerators also under
`torch.compile`. All ways have the same weights, batch and dtype, on all cores or one accelerator; inputs lie on the
device and features stay there. Ours pads lengths to buckets as for users; the original gets no padding and no mask.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from avjax.encoders import FAMILIES, Encoder, clip, weights
from avjax.errors import AvjaxError
from benchmarks import record
from benchmarks.torch import originals
from benchmarks.ways import Way, interleaved, no_pytorch, torch_device

AVJAX, PYTORCH, COMPILED = "avjax", "pytorch", "compiled"
KEY = ("benchmark", "encoder", "batch", "length", "dtype", "machine", "cores", "device")
TABLE = {
    "encoder": "encoder",
    "batch": "batch",
    "length": "length",
    "avjax_per_second": "avjax /s",
    "pytorch_per_second": "PyTorch /s",
    "compiled_per_second": "compiled /s",
    "speed_up_over_pytorch": "× PyTorch",
    "speed_up_over_compiled": "× compiled",
    "avjax_times_real_time": "× real time",
    "avjax_mfu": "MFU",
    "avjax_compile_seconds": "compile s",
}


@dataclasses.dataclass(frozen=True)
class Load:
    """The inputs of an encoder.

    Attributes:
      unit: of lengths.
      shape: (batch, length) → shape of the inputs of our encoder.
      cpu: batches to measure on a CPU, each (batch, length).
      accelerator: those to measure on an accelerator.
      rate: units per second of audio; None for other inputs.
      only: the one length that the original takes; None = any.
    """

    unit: str
    shape: Callable[[int, int], tuple[int, ...]]
    cpu: tuple[tuple[int, int], ...]
    accelerator: tuple[tuple[int, int], ...]
    rate: int | None = None
    only: int | None = None

    def batches(self) -> tuple[tuple[int, int], ...]:
        """Returns the batches to measure on the device that JAX uses."""
        return self.cpu if jax.default_backend() == "cpu" else self.accelerator


TEXTS = Load("tokens", lambda b, n: (b, n), cpu=((32, 40),), accelerator=((32, 40),))
IMAGES = Load("pixels", lambda b, n: (b, n, n, 3), cpu=((8, 224),), accelerator=((256, 224),))
WAVES = Load(
    "samples",
    lambda b, n: (b, n),
    cpu=((1, 160_000), (8, 52_800)),
    accelerator=((32, 160_000), (32, 52_800)),
    rate=16_000,
)
SPECTRA = Load(
    "frames",
    lambda b, n: (b, 80, n),
    cpu=((1, 3000), (8, 330)),
    accelerator=((32, 3000), (32, 330)),
    rate=100,
    only=3000,
)

PAIRS = Load("pixels", lambda b, n: (b, 2, 368, n, 3), cpu=((1, 496),), accelerator=((8, 496),))


def _registered(name: str, tower: str | None = None) -> Mapping[str, Any]:
    """Returns the configuration of a registered encoder."""
    config = weights.REGISTRY[name].written["config.json"]
    return clip.tower_config(config, tower) if tower else config


# Name → its configuration and its load.
ENCODERS: dict[str, tuple[Mapping[str, Any], Load]] = {
    "minilm": (_registered("minilm"), TEXTS),
    "distilbert": (_registered("distilbert"), TEXTS),
    "clip_b32_text": (_registered("clip_vit_b32", "text"), TEXTS),
    "vit_s14": (_registered("vit_s14"), IMAGES),
    "vit_b16": (_registered("vit_b16"), IMAGES),
    "clip_b32_vision": (_registered("clip_vit_b32", "vision"), IMAGES),
    "efficientnet_b2": (_registered("hsemotion_b2"), IMAGES),
    "perceiver_flow": (_registered("perceiver_flow"), PAIRS),
    "wav2vec2_base": (_registered("wav2vec2_segue"), WAVES),
    "wav2vec2_large_robust": (_registered("wav2vec2_large_robust"), WAVES),
    "data2vec_audio_base": (_registered("data2vec_audio"), WAVES),
    "whisper_tiny": (_registered("whisper_tiny_en"), SPECTRA),
    "whisper_base": (_registered("whisper_base") | {"decoder_attention_heads": 8}, SPECTRA),
}
# Dense FLOP/s of the vendor's data sheets (SXM), in float32 without tensor cores.
_PEAKS = {
    "NVIDIA H100 80GB HBM3": {"bfloat16": 989.4e12, "float32": 66.9e12},
    "NVIDIA H200": {"bfloat16": 989.4e12, "float32": 66.9e12},
}
# A timing has so many calls that those of the fastest way take this long.
_LEAST_SECONDS = 0.5
# Bounds on the difference between ways: relative to the features' standard deviation, and a cosine of pooled features.
_TOLERANCE = 1e-3
_COSINE = 0.999


@dataclasses.dataclass(frozen=True)
class Peak:
    """The peak FLOP/s of the device, and where the figure is from."""

    flops: float
    source: str


@dataclasses.dataclass(frozen=True)
class Case:
    """An encoder to measure.

    Attributes:
      original: the model in PyTorch, of the same weights as `ours`; None without PyTorch.
    """

    name: str
    load: Load
    dtype: str
    family: Any
    module: Any
    ours: Encoder
    original: Any


def measure(name: str, dtype: str, peak: Peak, repeats: int, say: Callable[[str], None]) -> list[dict[str, object]]:
    """Times an encoder of ENCODERS in each way, in turn, after checking that they compute the same.

    Args:
      name: of the encoder.
      dtype: of the matrix products, "float32" or "bfloat16".
      peak: of the device.
      repeats: how often each way is timed.
      say: called with progress messages.

    Returns:
      One row per batch. length and padded (our padded length) are in `unit`; parameters; gflops of one item without
      padding, multiplications and additions counted each; peak_tflops and peak_source; calls per timing. For each way
      (avjax; pytorch; compiled = by torch.compile): seconds_min, seconds_median and seconds_max of one call, per_second
      (items), times_real_time for audio, mfu (model FLOPs utilisation: FLOPs without padding / seconds / peak),
      compile_seconds (first call minus second call); and our two speed-ups (ratios of medians). Missing figures are "".

    Raises:
      AvjaxError: the ways do not compute the same, or JAX sees several devices, of which PyTorch would use one.
    """
    if jax.local_device_count() > 1:
        raise AvjaxError(f"JAX sees {jax.local_device_count()} devices; show it one, such as by CUDA_VISIBLE_DEVICES=0")
    case = make_case(name, dtype)
    with same_precision(case):
        return [measure_batch(case, *shape, peak, repeats, say) for shape in case.load.batches()]


@contextlib.contextmanager
def same_precision(case: Case) -> Iterator[None]:
    """Keeps float32 products exact: by default both libraries may round their factors on GPUs, each in its own way."""
    with contextlib.ExitStack() as stack:
        if case.dtype == "float32":
            stack.enter_context(jax.default_matmul_precision("float32"))
        if case.original:
            import torch

            stack.enter_context(torch.backends.cudnn.flags(enabled=True, allow_tf32=case.dtype != "float32"))
            stack.enter_context(torch.inference_mode())
        yield


def measure_batch(
    case: Case, batch: int, length: int, peak: Peak, repeats: int, say: Callable[[str], None]
) -> dict[str, object]:
    """Returns the row of one batch; see `measure`."""
    who = f"{case.name} {batch} x {length} {case.load.unit}"
    inputs, mask = made_up(case, batch, length)
    say(f"{who}: compiling")
    ways = make_ways(case, inputs, mask)
    if len(ways) > 1:
        check_ways(who, case.dtype, ways)
        say(f"{who}: {', '.join(w.name for w in ways)} compute the same")
    calls, seconds = timed_calls(ways, repeats, functools.partial(_tell, say, who))
    count, params = flops(case.module, inputs, mask)
    facts = {
        "encoder": case.name,
        "batch": batch,
        "length": length,
        "unit": case.load.unit,
        "padded": _length(case, case.ours.padded(inputs, mask)[0]),
        "dtype": case.dtype,
        "transformers": importlib.metadata.version("transformers"),
        "parameters": params,
        "gflops": count / batch / 1e9,
        "peak_tflops": peak.flops / 1e12,
        "peak_source": peak.source,
        "repeats": repeats,
        "calls": calls,
    }
    audio_seconds = batch * length / case.load.rate if case.load.rate else None
    return facts | figures(ways, seconds, batch, audio_seconds, count / peak.flops)


def _length(case: Case, inputs: np.ndarray) -> int:
    return inputs.shape[case.family.INPUTS.length_axis or 1]


def _tell(say: Callable[[str], None], who: str, repeat: str, name: str, seconds: float) -> None:
    say(f"{who}, repeat {repeat}: {name} {seconds:.3g} s")


# ---- The task -----------------------------------------------------------------------------------------------------


def make_case(name: str, dtype: str) -> Case:
    """Builds our encoder and the original with the same random weights; ours alone without PyTorch."""
    import transformers

    settings, load = ENCODERS[name]
    config = transformers.AutoConfig.for_model(**settings)
    family = FAMILIES[config.model_type]
    module = family.build(config.to_dict(), jnp.dtype(dtype), None)
    if no_pytorch():
        original, params = None, random_params(family.shapes(module.config))
    else:
        original, tensors = originals.new(config)
        params = family.convert(tensors, module.config)
        original = originals.placed(original, dtype)
    return Case(name, load, dtype, family, module, Encoder(family, module, params, {}), original)


def random_params(shapes: Mapping[str, Any]) -> Mapping[str, Any]:
    """Draws normal weights of these shapes."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.02, leaf.shape).astype(np.float32), shapes)


def made_up(case: Case, batch: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Makes noise without padding, and its mask."""
    rng, shape = np.random.default_rng(0), case.load.shape(batch, length)
    if case.family.INPUTS.text:
        inputs = rng.integers(0, case.module.config.vocab, shape).astype(np.int32)
    else:
        inputs = rng.normal(size=shape).astype(np.float32)
    return inputs, case.family.INPUTS.masked(inputs, None)


def flops(module: Any, inputs: np.ndarray, mask: np.ndarray) -> tuple[int, int]:
    """Counts the FLOPs of the products and convolutions for the batch, and the parameters.

    All else adds 2 to 3 %. XLA's own count (`cost_analysis`) counts the body of a loop once, however often it runs.
    """
    params = jax.eval_shape(module.init, jax.random.key(0), inputs, mask)
    traced = jax.make_jaxpr(module.apply)(params, inputs, mask)
    return products(traced.jaxpr), sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def products(jaxpr: Any) -> int:
    """Counts the FLOPs of the products and convolutions of a jaxpr, multiplications and additions each."""
    return sum(_products(equation) for equation in jaxpr.eqns)


def _products(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return 2 * equation.outvars[0].aval.size * math.prod(equation.invars[0].aval.shape[a] for a in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval
        return 2 * equation.outvars[0].aval.size * kernel.size // kernel.shape[params["dimension_numbers"].rhs_spec[0]]
    if name == "cond":  # a choice by platform: the same sums in another order
        return max(products(branch.jaxpr) for branch in params["branches"])
    inner = [getattr(p, "jaxpr", p) for p in params.values() if hasattr(p, "eqns") or hasattr(p, "jaxpr")]
    return params.get("length", 1) * sum(map(products, inner))


def check_ways(who: str, dtype: str, ways: Sequence[Way]) -> None:
    """Checks that all ways give the features of the first, ours; errors as of `check_agreement`."""
    features, real = ways[0].run()
    for way in ways[1:]:
        check_agreement(f"{who}: {way.name}", dtype, features, real, way.run())


def check_agreement(who: str, dtype: str, features: jax.Array, real: jax.Array, others: Any) -> None:
    """Checks that our features (b, s, d) under their mask are those of the original, a tensor (b, n, d).

    Raises:
      AvjaxError: they are not.
    """
    theirs = others.float().cpu().numpy()
    ours = np.asarray(features)[np.asarray(real)]
    if ours.size != theirs.size:
        raise AvjaxError(f"{who} gives features {theirs.shape}, avjax {ours.shape} of them; not the same encoder")
    ours = ours.reshape(theirs.shape)
    if dtype == "float32":
        what, score = "the largest difference relative to the standard deviation", np.abs(ours - theirs).max()
        score /= theirs.std()
        same, expected = score < _TOLERANCE, f"less than {_TOLERANCE}"
    else:
        what, score = "the least cosine of pooled features", _cosine(ours.mean(1), theirs.mean(1)).min()
        same, expected = score >= _COSINE, f"at least {_COSINE}"
    if not same:
        raise AvjaxError(
            f"{who} and avjax: {what} is {score:.2g}, expected {expected}; "
            "they do not compute the same, so their times cannot be compared"
        )


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


# ---- The ways -----------------------------------------------------------------------------------------------------


def make_ways(case: Case, inputs: np.ndarray, mask: np.ndarray) -> list[Way]:
    """Makes the available ways, ours first, each called twice already."""
    placed = jax.device_put(case.ours.padded(inputs, mask))
    ways = [started(AVJAX, lambda: jax.block_until_ready(case.ours.on_device(*placed)), compiles=True)]
    if case.original is None or case.load.only not in (None, _length(case, inputs)):
        return ways
    their_inputs = originals.inputs(inputs, case.dtype)
    ways.append(started(PYTORCH, functools.partial(originals.features, case.original, their_inputs), compiles=False))
    if torch_device() != "cpu":
        import torch

        compiled = torch.compile(case.original, dynamic=False)
        ways.append(started(COMPILED, functools.partial(originals.features, compiled, their_inputs), compiles=True))
    return ways


def started(name: str, run: Callable[[], Any], *, compiles: bool) -> Way:
    """Calls a new way twice; its compile time is the first call minus the second."""
    first, second = timed(run), timed(run)
    return Way(name, run, first - second if compiles else None)


def timed_calls(
    ways: Sequence[Way], repeats: int, tell: Callable[[str, str, float], None]
) -> tuple[int, dict[str, list[float]]]:
    """Returns the calls per timing, and the seconds of one call, `repeats` times for each way in turn."""
    calls = math.ceil(_LEAST_SECONDS / min(timed(way.run) for way in ways))
    many = [dataclasses.replace(way, run=functools.partial(_often, way.run, calls)) for way in ways]
    taken = interleaved(many, repeats, lambda repeat, name, seconds: tell(repeat, name, seconds / calls))
    return calls, {name: [s / calls for s in seconds] for name, seconds in taken.items()}


def _often(run: Callable[[], Any], calls: int) -> None:
    for _ in range(calls):
        run()


def timed(run: Callable[[], Any]) -> float:
    """Returns the seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


# ---- Figures ------------------------------------------------------------------------------------------------------


def peak(dtype: str) -> Peak:
    """Returns the device's peak: the vendor's figure, or that of the fastest of some large matrix products."""
    data_sheet = _PEAKS.get(jax.devices()[0].device_kind)
    if data_sheet:
        return Peak(data_sheet[dtype], "data sheet")
    sizes = (1024, 2048) if jax.default_backend() == "cpu" else (4096, 8192)
    return Peak(max(product_flops(n, dtype) for n in sizes), "matrix product")


def product_flops(size: int, dtype: str) -> float:
    """Returns the FLOP/s of the product of square matrices, the best of ten calls of either library."""
    products = [jax_product(size, dtype)] + ([] if no_pytorch() else [torch_product(size, dtype)])
    for product in products:
        product()
    return 2 * size**3 / min(timed(product) for product in 10 * products)


def jax_product(size: int, dtype: str) -> Callable[[], Any]:
    """Makes JAX's product of square matrices."""
    x = jnp.ones((size, size), dtype)
    product = jax.jit(functools.partial(jnp.matmul, precision="float32"))
    return lambda: jax.block_until_ready(product(x, x))


def torch_product(size: int, dtype: str) -> Callable[[], Any]:
    """Makes PyTorch's product of square matrices."""
    import torch

    torch.set_num_threads(record.cores())
    x = originals.placed(torch.ones(size, size), dtype)
    return lambda: originals.finished(x @ x)


def figures(
    ways: Sequence[Way], seconds: Mapping[str, Sequence[float]], batch: int, audio_seconds: float | None, least: float
) -> dict[str, object]:
    """Returns the columns of each way and of our speed-ups; "" where a way was not measured.

    Args:
      ways: those that were measured.
      seconds: of calls, by name of the way.
      batch: items of a call.
      audio_seconds: seconds of audio in the batch; None for other inputs.
      least: seconds that the batch would take at the device's peak.
    """
    out: dict[str, object] = {}
    compile_seconds = {way.name: way.compile_seconds for way in ways}
    median = {name: float(np.median(taken)) for name, taken in seconds.items()}
    for name in (AVJAX, PYTORCH, COMPILED):
        taken, typical = seconds.get(name), median.get(name)
        values = {
            "seconds_min": taken and min(taken),
            "seconds_median": typical,
            "seconds_max": taken and max(taken),
            "per_second": typical and batch / typical,
            "times_real_time": typical and audio_seconds and audio_seconds / typical,
            "mfu": typical and least / typical,
            "compile_seconds": compile_seconds.get(name),
        }
        out |= {f"{name}_{column}": "" if value is None else value for column, value in values.items()}
    for name in (PYTORCH, COMPILED):
        out[f"speed_up_over_{name}"] = median[name] / median[AVJAX] if name in median else ""
    return out
