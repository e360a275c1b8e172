"""Measures avjax on this machine and keeps the figures as CSV.

python -m avjax.bench lanes [--out benchmarks/lanes.csv] [--widths 128,768] [--clips N] [--epochs N] [--repeats 3]

lanes: ETG-AVER (configs/etg_mafw.py, made-up features in the shapes of the preset lite), 5 folds x 3 seeds, trained,
validated and tested in three ways: as one program (avjax's lanes), as 15 compiled runs one after another, and as 15
runs of a plain eager PyTorch loop. The same updates, batch size, float32, cores or GPU for each; checked to compute the
same before they are timed; in turn, so that a busy minute hits all alike; compile time apart. Rows of other machines
and of other sizes stay in the CSV. About five minutes on 2 cores; other programs disturb the times. Without PyTorch
(pip install torch) its row stays empty.

python -m avjax.bench encoders [--out benchmarks/encoders.csv] [--encoders vit_b16,wav2vec2_base] [--dtype bfloat16]
    [--repeats 3]

encoders: each pretrained encoder at its true size, with random weights, against its PyTorch original (transformers;
eager, and on accelerators compiled too), one row for each batch. Checked to compute the same before they are timed; in
turn; compile time apart. Rows are added to the CSV after each encoder. About twelve minutes on 2 cores. Without PyTorch
its columns stay empty.

python -m avjax.bench flow [--out benchmarks/flow.csv] [--flows dis,perceiver] [--repeats 3]

flow: what the optical flow of DE-III costs: pairs of faces to flow, flow to pictures, pictures to features. One minute
on 2 cores.

python -m avjax.bench fusions [--out benchmarks/fusions.csv] [--fusions mult,lmf] [--repeats 3]

fusions: a training step of each fusion with its default settings, and its number of parameters; where the released
system is restated in PyTorch (eager, and on accelerators compiled too), the same step there, checked to compute the
same first. Rows are added to the CSV after each fusion. About eight minutes on 2 cores. Without PyTorch its columns
stay empty.
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
CLIPS = flags.DEFINE_integer("clips", 240, "Clips of the made-up corpus.", lower_bound=60)
EPOCHS = flags.DEFINE_integer("epochs", 2, "Epochs of each run.", lower_bound=1)
REPEATS = flags.DEFINE_integer("repeats", 3, "How often each way is timed.", lower_bound=1)
ENCODERS = flags.DEFINE_list("encoders", None, "Encoders to measure, such as vit_b16,minilm; default all.")
FLOWS = flags.DEFINE_list("flows", None, "Kinds of flow to measure, dis or perceiver; default both.")
FUSIONS = flags.DEFINE_list("fusions", None, "Fusions to measure, such as mult,lmf; default all.")
DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "bfloat16"],
    "Of the encoders' matrix products; default bfloat16 on accelerators, float32 on CPU.",
)


def main(argv: list[str]) -> None:
    name, *more = argv[1:]
    if more or name not in BENCHMARKS:
        raise AvjaxError(f"got {' '.join(argv[1:])!r}; expected one benchmark of {', '.join(BENCHMARKS)}, see --help")
    BENCHMARKS[name](Path(OUT.value or f"benchmarks/{name}.csv"))


def lanes(out: Path) -> None:
    """Measures lanes at each of `--widths`; each width is added to `out` when it is done."""
    from avjax.benches import lanes as benchmark

    def measured(say: Callable[[str], None]) -> Iterator[list[dict[str, object]]]:
        for width in _widths():
            yield benchmark.measure(width, CLIPS.value, EPOCHS.value, REPEATS.value, say)

    _recorded("lanes", out, benchmark, measured, f"5 folds x 3 seeds, {EPOCHS.value} epochs")


def encoders(out: Path) -> None:
    """Measures each of `--encoders`; each is added to `out` when it is done."""
    from avjax.benches import encoders as benchmark
    from avjax.benches import ways
    from avjax.encoders import default_dtype

    names = ways.chosen("--encoders", ENCODERS.value, benchmark.ENCODERS)
    dtype = DTYPE.value or default_dtype()

    def measured(say: Callable[[str], None]) -> Iterator[list[dict[str, object]]]:
        peaks = []
        for name in names:
            # Again each time: other programs may have been busy before.
            peaks.append(benchmark.peak(dtype))
            peak = max(peaks, key=lambda p: p.flops)
            say(f"{dtype}: peak {peak.flops / 1e12:.3g} TFLOP/s ({peak.source})")
            yield benchmark.measure(name, dtype, peak, REPEATS.value, say)

    _recorded("encoders", out, benchmark, measured, f"encoders at true size, {dtype}, random weights")


def flow(out: Path) -> None:
    """Measures each of `--flows`; each is added to `out` when it is done."""
    from avjax.benches import flow as benchmark
    from avjax.benches import ways

    names = ways.chosen("--flows", FLOWS.value, benchmark.SOURCES)

    def measured(say: Callable[[str], None]) -> Iterator[list[dict[str, object]]]:
        for name in names:
            yield [benchmark.measure(name, REPEATS.value, say)]

    _recorded("flow", out, benchmark, measured, "optical flow, random weights")


def fusions(out: Path) -> None:
    """Measures each of `--fusions`; each is added to `out` when it is done."""
    from avjax.benches import fusions as benchmark
    from avjax.benches import ways

    names = ways.chosen("--fusions", FUSIONS.value, benchmark.FUSIONS)

    def measured(say: Callable[[str], None]) -> Iterator[list[dict[str, object]]]:
        for name in names:
            yield [benchmark.measure(name, REPEATS.value, say)]

    _recorded("fusions", out, benchmark, measured, "training steps of fusions, random weights")


def _recorded(
    name: str,
    out: Path,
    benchmark: ModuleType,
    measured: Callable[[Callable[[str], None]], Iterator[list[dict[str, object]]]],
    title: str,
) -> None:
    """Adds what is measured to `out` as it comes, and shows all of it as the benchmark's TABLE at the end."""
    from rich.console import Console

    from avjax.benches import record

    console = Console(markup=False)
    say = functools.partial(console.print, soft_wrap=True, highlight=False)
    record.forbid_cached_programs()
    about = record.circumstances()
    say(f"{about['machine']}, {about['cores']} cores, {about['device']}; jax {about['jax']}, torch {about['torch']}")
    rows = []
    for new in measured(say):
        rows += [{"benchmark": name} | row | about for row in new]
        record.merge(out, rows, benchmark.KEY)
    measured_here = {c: heading for c, heading in benchmark.TABLE.items() if any(row[c] != "" for row in rows)}
    console.print(record.table(rows, measured_here, title))
    say(f"written to {out}")


def _widths() -> list[int]:
    if not WIDTHS.value or not all(w.isdecimal() and int(w) for w in WIDTHS.value):
        raise AvjaxError(f"--widths={','.join(WIDTHS.value)}; expected whole numbers above 0, such as 128,768")
    return [int(w) for w in WIDTHS.value]


# First argument → what measures it and writes the figures to a file.
BENCHMARKS: dict[str, Callable[[Path], None]] = {"lanes": lanes, "encoders": encoders, "flow": flow, "fusions": fusions}

if __name__ == "__main__":
    cli.run(main, takes="a benchmark: " + ", ".join(BENCHMARKS))
