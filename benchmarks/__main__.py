"""Measures avjax on this machine and keeps the figures as CSV.

python -m benchmarks lanes [--out benchmarks/lanes.csv] [--widths 128,768] [--clips 459] [--epochs 25] [--batch 32]
    [--repeats 3]

lanes: ETG-AVER (configs/etg_mafw.py, made-up features of a twentieth of MAFW, in the shapes of the preset lite or, 768
wide, of the paper's encoders), 5 folds x 5 seeds, trained, validated and tested in three ways: as one program (avjax's
lanes), as 25 compiled runs one after another, and as 25 runs of a plain eager PyTorch loop. Each has the same updates,
batch size, float32, and cores or GPU. They are checked to compute the same before they are timed, in turn, so that a
busy minute affects all alike; compile time is apart. Rows of other machines and other sizes stay in the CSV. MAFW's own
size is --clips=9172. On 2 cores this takes a few minutes at 128 and half an hour per repeat at 768; other programs
disturb the times. Without PyTorch (pip install torch) its row stays empty.

python -m benchmarks encoders [--out benchmarks/encoders.csv] [--encoders vit_b16,wav2vec2_base] [--dtype bfloat16]
    [--repeats 3]

encoders: each pretrained encoder at its true size, with random weights, against its PyTorch original (transformers;
eager, and on accelerators compiled too), one row for each batch. They are checked to compute the same before they are
timed, in turn; compile time is apart. Rows are added to the CSV after each encoder. About twelve minutes on 2 cores.
Without PyTorch its columns stay empty.

python -m benchmarks flow [--out benchmarks/flow.csv] [--flows dis,perceiver] [--repeats 3]

flow: the cost of the optical flow of DE-III: pairs of faces to flow, flow to images, images to features. One minute on
2 cores.

python -m benchmarks step [--out benchmarks/step.csv] [--models etg_aver,mult] [--repeats 3] [--profile FOLDER]

step: a training step of each model of the registry, systems and baselines, and its number of parameters, against an
equivalent module in PyTorch (eager, and on accelerators compiled too) that is first checked to make the same step.
Rows are added to the CSV after each model. About fifteen minutes on 2 cores. Without PyTorch its columns stay empty.
--profile instead writes a trace of our steps to FOLDER and prints where their time goes; see docs/step_profile.md.

python -m benchmarks extract [--out benchmarks/extract.csv] [--presets lite,open] [--root R] [--random] [--repeats 3]

extract: clips of a folder R with a labels.csv, or of the demo corpus, to features and sentences in an empty store:
clips per second, times real time, and seconds by stage. About five minutes per preset on 2 cores.

python -m benchmarks startup [--out benchmarks/startup.csv] [--repeats 3]

startup: seconds from the start of the first command (configs/etg_mafw.py, features already extracted) to its first
training step, in total and by part, each time as a process of its own: with an empty compile cache and with a filled
one. About three minutes on 2 cores.

python -m benchmarks scaling [--out benchmarks/scaling.csv] [--models etg_aver,de_iii] [--devices 8,64] [--batch 32]

scaling: the collectives of a training step under dp, fsdp and tp, as compiled for that many CPU devices, and the bounds
that the links of GPUs and TPUs set to efficiency (docs/scaling.md). Nothing is executed; --batch counts the clips of
one device. A compilation takes up to a minute on 2 cores, one of etg_aver_raw several.
"""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from absl import flags

from avjax import cli
from avjax.errors import AvjaxError

OUT = flags.DEFINE_string("out", None, "CSV to write; default benchmarks/<benchmark>.csv.")
WIDTHS = flags.DEFINE_list("widths", ["128", "768"], "Model widths to measure.")
CLIPS = flags.DEFINE_integer("clips", 459, "Clips of the made-up corpus.", lower_bound=60)
EPOCHS = flags.DEFINE_integer("epochs", 25, "Epochs of each run.", lower_bound=1)
BATCH = flags.DEFINE_integer("batch", 32, "Clips of an update.", lower_bound=1)
REPEATS = flags.DEFINE_integer("repeats", 3, "How often each way is timed.", lower_bound=1)
ENCODERS = flags.DEFINE_list("encoders", None, "Encoders to measure, such as vit_b16,minilm; default all.")
FLOWS = flags.DEFINE_list("flows", None, "Kinds of flow to measure, dis or perceiver; default both.")
PRESETS = flags.DEFINE_list("presets", ["lite"], "Presets whose extraction is measured.")
ROOT = flags.DEFINE_string("root", "", "Folder with clips and a labels.csv to extract; default the demo corpus.")
RANDOM = flags.DEFINE_bool("random", False, "Extract with encoders of random weights; nothing has to be fetched.")
MODELS = flags.DEFINE_list("models", None, "Models whose step is measured, such as etg_aver,mult; default all.")
PROFILE = flags.DEFINE_string("profile", None, "Folder for traces of our steps; profiles them, writes no CSV.")
DEVICES = flags.DEFINE_list("devices", ["8", "64", "256"], "Numbers of devices to compile for.")
DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "bfloat16"],
    "Of the encoders' matrix products; default bfloat16 on accelerators, float32 on CPU.",
)


def main(argv: list[str]) -> None:
    """Runs the benchmark that the arguments name."""
    name, *more = argv[1:]
    if more or name not in BENCHMARKS:
        raise AvjaxError(f"got {' '.join(argv[1:])!r}; expected one benchmark of {', '.join(BENCHMARKS)}, see --help")
    BENCHMARKS[name](Path(OUT.value or f"benchmarks/{name}.csv"))


def lanes(out: Path) -> None:
    """Measures lanes at each of `--widths`; each width is added to `out` when it is done."""
    from benchmarks import lanes as benchmark

    def measured(say: Callable[[str], None]) -> Iterator[list[dict[str, object]]]:
        for width in _numbers(WIDTHS):
            yield benchmark.measure(width, CLIPS.value, EPOCHS.value, BATCH.value, REPEATS.value, say)

    _recorded("lanes", out, benchmark, measured, f"5 folds x 5 seeds, {EPOCHS.value} epochs")


def encoders(out: Path) -> None:
    """Measures each of `--encoders`; each is added to `out` when it is done."""
    from avjax.encoders import default_dtype
    from benchmarks import encoders as benchmark
    from benchmarks import ways

    names = ways.chosen("--encoders", ENCODERS.value, benchmark.ENCODERS)
    dtype = DTYPE.value or default_dtype()

    def measured(say: Callable[[str], None]) -> Iterator[list[dict[str, object]]]:
        peaks = []
        for name in names:
            # Measured again each time: other programs may have been busy before.
            peaks.append(benchmark.peak(dtype))
            peak = max(peaks, key=lambda p: p.flops)
            say(f"{dtype}: peak {peak.flops / 1e12:.3g} TFLOP/s ({peak.source})")
            yield benchmark.measure(name, dtype, peak, REPEATS.value, say)

    _recorded("encoders", out, benchmark, measured, f"encoders at true size, {dtype}, random weights")


def flow(out: Path) -> None:
    """Measures each of `--flows`; each is added to `out` when it is done."""
    from benchmarks import flow as benchmark
    from benchmarks import ways

    names = ways.chosen("--flows", FLOWS.value, benchmark.SOURCES)

    def measured(say: Callable[[str], None]) -> Iterator[list[dict[str, object]]]:
        for name in names:
            yield [benchmark.measure(name, REPEATS.value, say)]

    _recorded("flow", out, benchmark, measured, "optical flow, random weights")


def step(out: Path) -> None:
    """Measures each of `--models`; each is added to `out` when it is done."""
    from benchmarks import step as benchmark
    from benchmarks import ways

    names = ways.chosen("--models", MODELS.value, benchmark.MODELS)
    if PROFILE.value:
        return _profiled(names, Path(PROFILE.value))

    def measured(say: Callable[[str], None]) -> Iterator[list[dict[str, object]]]:
        for name in names:
            yield benchmark.measure(name, REPEATS.value, say)

    _recorded("step", out, benchmark, measured, "training steps, random weights")


def _profiled(names: list[str], folder: Path) -> None:
    """Prints where the time of these models' steps goes, in each of their sizes."""
    from rich.console import Console

    from benchmarks import profiling
    from benchmarks import step as benchmark

    for name in names:
        for size in benchmark.sizes(name):
            fractions = profiling.measure(name, size, folder / f"{name}_{size.name}")
            Console(markup=False).print(profiling.table(f"{name} ({size.name})", fractions))


def extract(out: Path) -> None:
    """Measures each of `--presets`; each is added to `out` when it is done."""
    from avjax.features import presets
    from benchmarks import extract as benchmark
    from benchmarks import ways

    names = ways.chosen("--presets", PRESETS.value, presets.PRESETS)
    dataset, root = ("folder", ROOT.value) if ROOT.value else _demo_corpus()

    def measured(say: Callable[[str], None]) -> Iterator[list[dict[str, object]]]:
        for name in names:
            yield [benchmark.measure(dataset, root, name, RANDOM.value, REPEATS.value, say)]

    _recorded("extract", out, benchmark, measured, "extraction; stages in seconds, processes added up")


def _demo_corpus() -> tuple[str, str]:
    """Returns the data set and root of the demo corpus, which is made where it does not exist yet."""
    from rich.console import Console

    from avjax.demo import corpus

    corpus.make(corpus.folder(), Console())
    return "demo", str(corpus.folder())


def startup(out: Path) -> None:
    """Measures the starts of the first command; both rows are added to `out` at the end."""
    from rich.console import Console

    from avjax import config
    from avjax.training import data
    from benchmarks import startup as benchmark

    data.obtain(config.settings(benchmark.CONFIG), Console())

    def measured(say: Callable[[str], None]) -> Iterator[list[dict[str, object]]]:
        yield benchmark.measure([f"--config={benchmark.CONFIG}"], REPEATS.value, say)

    _recorded("startup", out, benchmark, measured, "from the start of the process to its first step")


def scaling(out: Path) -> None:
    """Compiles each of `--models` for each of `--devices`; rows are added to `out` as they are done."""
    from benchmarks import scaling as benchmark
    from benchmarks import ways

    names, devices = ways.chosen("--models", MODELS.value, benchmark.CASES), _numbers(DEVICES)

    def measured(say: Callable[[str], None]) -> Iterator[list[dict[str, object]]]:
        yield from benchmark.measure(names, devices, BATCH.value, say)

    _recorded("scaling", out, benchmark, measured, f"bounds on efficiency, {BATCH.value} clips a device")


def _recorded(
    name: str,
    out: Path,
    benchmark: ModuleType,
    measured: Callable[[Callable[[str], None]], Iterator[list[dict[str, object]]]],
    title: str,
) -> None:
    """Adds rows to `out` as they are measured, and prints all of them as the benchmark's TABLE at the end."""
    from rich.console import Console

    from benchmarks import record

    console = Console(markup=False)
    say = functools.partial(console.print, soft_wrap=True, highlight=False)
    record.forbid_cached_programs()
    circumstances = record.circumstances()
    say(
        f"{circumstances['machine']}, {circumstances['cores']} cores, {circumstances['device']}; "
        f"jax {circumstances['jax']}, torch {circumstances['torch']}"
    )
    rows = []
    for new in measured(say):
        rows += [{"benchmark": name} | row | circumstances for row in new]
        record.merge(out, rows, benchmark.KEY)
    columns = {c: heading for c, heading in benchmark.TABLE.items() if any(row[c] != "" for row in rows)}
    console.print(record.table(rows, columns, title))
    say(f"written to {out}")


def _numbers(flag: flags.FlagHolder) -> list[int]:
    if not flag.value or not all(n.isdecimal() and int(n) for n in flag.value):
        such = ",".join(flag.default)
        raise AvjaxError(f"--{flag.name}={','.join(flag.value)}; expected whole numbers above 0, such as {such}")
    return [int(n) for n in flag.value]


# First argument → function that measures and records it.
BENCHMARKS: dict[str, Callable[[Path], None]] = {
    "lanes": lanes,
    "encoders": encoders,
    "flow": flow,
    "step": step,
    "extract": extract,
    "startup": startup,
    "scaling": scaling,
}

if __name__ == "__main__":
    cli.run(main, takes="a benchmark: " + ", ".join(BENCHMARKS))
