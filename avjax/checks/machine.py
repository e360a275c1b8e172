"""This machine: what avjax needs of it, and whether it is there. Nothing is downloaded."""

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from avjax.errors import AvjaxError
from avjax.utils import paths
from avjax.utils.version import VERSION

if TYPE_CHECKING:
    from packaging.requirements import Requirement
    from rich.table import Table

OK, NOTE, BROKEN = "ok", "note", "broken"
EXTRAS = {
    "media": "to open clips",
    "export": "to export models",
    "beam": "to extract on many machines",
    "gcs": "for feature stores on Google Cloud Storage",
    "parity": "to compare with PyTorch",
}
_LITTLE_DISK = 5e9  # bytes: features of a few thousand clips, or the larger encoders
# Container → codecs of picture and sound that public data sets come in, as they are written and as they are read.
_CODECS = {
    "mp4": (("libx264", "h264"), ("aac", "aac")),
    "flv": (("flv", "flv"), ("libmp3lame", "mp3")),
    "mp3": (None, ("libmp3lame", "mp3")),
    "wav": (None, ("pcm_s16le", "pcm_s16le")),
}
_SOUND_RATE = 44100  # one that every container takes


@dataclasses.dataclass(frozen=True)
class Row:
    """One thing looked at: `section`, `what`, what was `found`, `state` (ok, note, broken), how to `mend` it or ""."""

    section: str
    what: str
    found: str
    state: str = OK
    mend: str = ""


def check() -> list[Row]:
    """Looks at everything; what cannot even be looked at is broken, and stops nothing else."""
    rows = []
    for section, look in SECTIONS.items():
        try:
            rows += look()
        except Exception as error:  # whatever is wrong with a machine must not keep it from being said
            rows.append(Row(section, "all", f"{type(error).__name__}: {_first_line(error)}", BROKEN))
    return rows


def as_json(rows: Sequence[Row]) -> dict[str, object]:
    return {"broken": sum(r.state == BROKEN for r in rows), "rows": [dataclasses.asdict(r) for r in rows]}


def table(rows: Sequence[Row]) -> "Table":
    """The rows as a rich Table."""
    from rich.table import Table
    from rich.text import Text

    colour, last = {OK: "green", NOTE: "yellow", BROKEN: "bold red"}, ""
    out = Table("", "what", "found", "", "to mend it")
    for row in rows:
        if row.section != last:
            out.add_section()
        section, last = row.section if row.section != last else "", row.section
        out.add_row(section, row.what, Text(row.found), Text(row.state, colour[row.state]), Text(row.mend))
    return out


# ---- Packages --------------------------------------------------------------------------------------------------------


def packages() -> Iterator[Row]:
    """Python, avjax, and what it requires, against the ranges in its metadata."""
    yield Row("packages", "avjax", VERSION)
    try:
        about = importlib.metadata.metadata("avjax")
    except importlib.metadata.PackageNotFoundError:
        yield Row("packages", "python", platform.python_version())
        yield Row("packages", "ranges", "unknown: avjax runs without being installed", NOTE, "pip install -e .")
        return
    yield _in_range("packages", "python", platform.python_version(), about["Requires-Python"])
    for requirement in _requirements(""):
        yield _package("packages", requirement)


def extras() -> Iterator[Row]:
    """The optional parts; a missing one is to be known, a package outside its range is broken."""
    for extra, what in EXTRAS.items():
        rows = [_package("extras", r) for r in _requirements(extra)]
        install = f"pip install 'avjax[{extra}]'"
        if wrong := [r for r in rows if r.state == BROKEN and r.found != "missing"]:
            yield from (dataclasses.replace(r, what=f"{extra}: {r.what}", mend=install) for r in wrong)
        elif missing := [r.what for r in rows if r.state == BROKEN]:
            yield Row("extras", extra, f"lacks {', '.join(missing)} ({what})", NOTE, install)
        elif rows:
            yield Row("extras", extra, ", ".join(f"{r.what} {r.found}" for r in rows))


def _requirements(extra: str) -> list:
    """What avjax requires, or one of its extras beyond that."""
    from packaging.requirements import Requirement

    try:
        stated = map(Requirement, importlib.metadata.requires("avjax") or ())
    except importlib.metadata.PackageNotFoundError:
        return []
    return [
        r
        for r in stated
        if (not r.marker or r.marker.evaluate({"extra": extra})) and ("extra" in str(r.marker or "")) == bool(extra)
    ]


def _package(section: str, requirement: "Requirement") -> Row:
    try:
        found = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return Row(section, requirement.name, "missing", BROKEN, f"pip install '{_plain(requirement)}'")
    row = _in_range(section, requirement.name, found, str(requirement.specifier))
    return dataclasses.replace(row, mend=f"pip install '{_plain(requirement)}'") if row.state == BROKEN else row


def _in_range(section: str, what: str, found: str, needed: str) -> Row:
    from packaging.specifiers import SpecifierSet

    if SpecifierSet(needed).contains(found, prereleases=True):
        return Row(section, what, found)
    return Row(section, what, f"{found}; supported is {needed}", BROKEN)


def _plain(requirement: "Requirement") -> str:
    return f"{requirement.name}{requirement.specifier}"


# ---- The machine -----------------------------------------------------------------------------------------------------


def machine() -> Iterator[Row]:
    """Cores, memory, and JAX's devices."""
    yield Row("machine", "cores", f"{len(os.sched_getaffinity(0))} ({platform.machine()})")
    yield Row("machine", "memory", _gigabytes(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")))
    # Or JAX would take most of an accelerator's memory away from whoever is using it.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    for device in jax.devices():
        memory = (device.memory_stats() or {}).get("bytes_limit")
        room = f", {_gigabytes(memory)} for JAX" if memory else ""
        yield Row("machine", f"device {device.id}", f"{device.platform}: {device.device_kind}{room}")
    if jax.default_backend() == "cpu" and Path("/proc/driver/nvidia/version").exists():
        seen = "an NVIDIA driver, but JAX sees no GPU"
        yield Row("machine", "GPU", seen, NOTE, "pip install 'avjax[cuda12]' or 'avjax[cuda13]'")


def places() -> Iterator[Row]:
    """Where data and cache are, and whether they can be written."""
    data, cache = Path(os.environ.get("AVJAX_DATA", "~/avjax_data")).expanduser(), paths.cache()
    if data.is_dir():
        yield Row("places", "AVJAX_DATA", str(data))
    else:
        mend = "set AVJAX_DATA to where data sets are, or --config.data.root to one"
        yield Row("places", "AVJAX_DATA", f"{data}; not there", NOTE, mend)
    above = _above(cache)
    try:
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        found = f"{cache}: cannot be written ({error.strerror})"
        yield Row("places", "AVJAX_CACHE", found, BROKEN, "set AVJAX_CACHE to a folder that can be written")
        return
    free = shutil.disk_usage(above).free
    few = free < _LITTLE_DISK
    mend = "set AVJAX_CACHE to a larger disk" if few else ""
    yield Row("places", "AVJAX_CACHE", f"{cache}, {_gigabytes(free)} free", NOTE if few else OK, mend)


def _above(path: Path) -> Path:
    """The nearest of a path and the folders above it that is there."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB"


# ---- Media -----------------------------------------------------------------------------------------------------------


def codecs() -> Iterator[Row]:
    """Writes a tiny file in each container and reads it as clips are read."""
    if importlib.util.find_spec("av") is None:
        yield Row("codecs", "all", "not tried: no package av", NOTE, "pip install 'avjax[media]'")
        return
    with tempfile.TemporaryDirectory(prefix="avjax-") as folder:
        for container, (picture, sound) in _CODECS.items():
            named = f"{container} ({', '.join(codec[1] for codec in (picture, sound) if codec)})"
            yield _tried(Path(folder) / f"tiny.{container}", named, picture, sound)


def _tried(path: Path, named: str, picture: tuple[str, str] | None, sound: tuple[str, str] | None) -> Row:
    import av

    from avjax.media import audio, video

    mend = "pip install --force-reinstall av"
    if lacking := [codec[1] for codec in (picture, sound) if codec and not _known(codec[1], "r")]:
        return Row("codecs", named, f"cannot be decoded: no {', '.join(lacking)}", BROKEN, mend)
    if lacking := [codec[0] for codec in (picture, sound) if codec and not _known(codec[0], "w")]:
        return Row("codecs", named, f"has a decoder; not tried: no {', '.join(lacking)} to write it with")
    try:
        _write(path, picture and picture[0], sound[0])
        if picture:
            video.read_frames(path, count=2)
        audio.read_audio(path)
    except (AvjaxError, av.FFmpegError) as error:
        return Row("codecs", named, f"cannot be decoded: {_first_line(error)}", BROKEN, mend)
    return Row("codecs", named, "decoded")


def _known(codec: str, mode: str) -> bool:
    import av

    try:
        return bool(av.Codec(codec, mode))
    except ValueError:  # PyAV's own error for it is one
        return False


def _write(path: Path, picture: str | None, sound: str) -> None:
    """Writes half a second of a grey picture (if there is a codec for it) and a tone."""
    import av

    with av.open(str(path), "w") as container:
        streams = []
        if picture:
            stream = container.add_stream(picture, rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            streams.append((stream, [_grey(i) for i in range(5)]))
        streams.append((container.add_stream(sound, rate=_SOUND_RATE, layout="mono"), [_tone()]))
        for stream, frames in streams:
            for frame in frames:
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))


def _grey(number: int) -> Any:
    import av

    frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 40 * number, np.uint8), "rgb24")
    frame.pts = number
    return frame


def _tone() -> Any:
    import av

    wave = (8000 * np.sin(np.arange(_SOUND_RATE // 2) * 0.1)).astype(np.int16)
    frame = av.AudioFrame.from_ndarray(wave[None], "s16", "mono")
    frame.sample_rate, frame.pts, frame.time_base = _SOUND_RATE, 0, Fraction(1, _SOUND_RATE)
    return frame


# ---- Weights ---------------------------------------------------------------------------------------------------------


def weights() -> Iterator[Row]:
    """Which pretrained files are here, whole; and where the others come from."""
    from avjax.encoders import weights as files
    from avjax.encoders.registry import REGISTRY

    for name, entry in REGISTRY.items():
        try:
            there = files.is_there(name)
        except AvjaxError as error:
            yield Row("weights", name, _first_line(error), BROKEN)
            continue
        if there:
            yield Row("weights", name, "here, checksums right")
        elif entry.sources:
            yield Row("weights", name, f"absent; fetched at first use: {' or '.join(map(str, entry.sources))}")
        else:
            yield Row("weights", name, f"absent, and no source is known ({entry.what})", NOTE)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


SECTIONS: dict[str, Callable[[], Iterator[Row]]] = {
    "packages": packages,
    "extras": extras,
    "machine": machine,
    "places": places,
    "codecs": codecs,
    "weights": weights,
}
