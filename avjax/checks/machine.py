"""Checks of this machine: what avjax needs, and whether it is available. Nothing is downloaded."""

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
# Container → codecs of video and audio in public data sets: names of the encoder and the decoder.
_CODECS = {
    "mp4": (("libx264", "h264"), ("aac", "aac")),
    "flv": (("flv", "flv"), ("libmp3lame", "mp3")),
    "mp3": (None, ("libmp3lame", "mp3")),
    "wav": (None, ("pcm_s16le", "pcm_s16le")),
}
_AUDIO_RATE = 44100  # every container supports it


@dataclasses.dataclass(frozen=True)
class Row:
    """A check: `section`, `what` was checked, its `value`, `state` (ok, note, broken), and the `fix` or ""."""

    section: str
    what: str
    value: str
    state: str = OK
    fix: str = ""


def check() -> list[Row]:
    """Checks everything; a check that fails is reported as broken and does not stop the others."""
    rows = []
    for section, look in SECTIONS.items():
        try:
            rows += look()
        except Exception as error:  # whatever is wrong with a machine must be reported
            rows.append(Row(section, "all", f"{type(error).__name__}: {_first_line(error)}", BROKEN))
    return rows


def as_json(rows: Sequence[Row]) -> dict[str, object]:
    """Returns the rows as JSON values, with the number of broken ones."""
    return {"broken": sum(r.state == BROKEN for r in rows), "rows": [dataclasses.asdict(r) for r in rows]}


def table(rows: Sequence[Row]) -> "Table":
    """Returns the rows as a rich Table."""
    from rich.table import Table
    from rich.text import Text

    colour, last = {OK: "green", NOTE: "yellow", BROKEN: "bold red"}, ""
    out = Table("", "what", "value", "", "fix")
    for row in rows:
        if row.section != last:
            out.add_section()
        section, last = row.section if row.section != last else "", row.section
        out.add_row(section, row.what, Text(row.value), Text(row.state, colour[row.state]), Text(row.fix))
    return out


# ---- Packages --------------------------------------------------------------------------------------------------------


def packages() -> Iterator[Row]:
    """Compares Python and the required packages with the ranges in avjax's metadata."""
    yield Row("packages", "avjax", VERSION)
    try:
        required = importlib.metadata.metadata("avjax")
    except importlib.metadata.PackageNotFoundError:
        yield Row("packages", "python", platform.python_version())
        yield Row("packages", "ranges", "unknown: avjax is not installed", NOTE, "pip install -e .")
        return
    yield _in_range("packages", "python", platform.python_version(), required["Requires-Python"])
    for requirement in _requirements(""):
        yield _package("packages", requirement)


def extras() -> Iterator[Row]:
    """Checks the extras: a missing one is a note, a package outside its range is broken."""
    for extra, what in EXTRAS.items():
        rows = [_package("extras", r) for r in _requirements(extra)]
        install = f"pip install 'avjax[{extra}]'"
        if wrong := [r for r in rows if r.state == BROKEN and r.value != "missing"]:
            yield from (dataclasses.replace(r, what=f"{extra}: {r.what}", fix=install) for r in wrong)
        elif missing := [r.what for r in rows if r.state == BROKEN]:
            yield Row("extras", extra, f"lacks {', '.join(missing)} ({what})", NOTE, install)
        elif rows:
            yield Row("extras", extra, ", ".join(f"{r.what} {r.value}" for r in rows))


def _requirements(extra: str) -> list:
    """Returns the requirements of avjax, or those that one of its extras adds."""
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
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return Row(section, requirement.name, "missing", BROKEN, f"pip install '{_plain(requirement)}'")
    row = _in_range(section, requirement.name, version, str(requirement.specifier))
    return dataclasses.replace(row, fix=f"pip install '{_plain(requirement)}'") if row.state == BROKEN else row


def _in_range(section: str, what: str, version: str, needed: str) -> Row:
    from packaging.specifiers import SpecifierSet

    if SpecifierSet(needed).contains(version, prereleases=True):
        return Row(section, what, version)
    return Row(section, what, f"{version}; supported: {needed}", BROKEN)


def _plain(requirement: "Requirement") -> str:
    return f"{requirement.name}{requirement.specifier}"


# ---- The machine -----------------------------------------------------------------------------------------------------


def machine() -> Iterator[Row]:
    """Reports cores, memory, and JAX's devices."""
    yield Row("machine", "cores", f"{len(os.sched_getaffinity(0))} ({platform.machine()})")
    yield Row("machine", "memory", _gigabytes(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")))
    # Otherwise JAX takes most of an accelerator's memory away from other users.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    for device in jax.devices():
        memory = (device.memory_stats() or {}).get("bytes_limit")
        room = f", {_gigabytes(memory)} for JAX" if memory else ""
        yield Row("machine", f"device {device.id}", f"{device.platform}: {device.device_kind}{room}")
    if jax.default_backend() == "cpu" and Path("/proc/driver/nvidia/version").exists():
        seen = "an NVIDIA driver, but JAX sees no GPU"
        yield Row("machine", "GPU", seen, NOTE, "pip install 'avjax[cuda12]' or 'avjax[cuda13]'")


def folders() -> Iterator[Row]:
    """Checks the folders of data and cache, and whether the cache can be written."""
    data, cache = Path(os.environ.get("AVJAX_DATA", "~/avjax_data")).expanduser(), paths.cache()
    if data.is_dir():
        yield Row("folders", "AVJAX_DATA", str(data))
    else:
        fix = "set AVJAX_DATA to the folder of your data sets, or --config.data.root to one of them"
        yield Row("folders", "AVJAX_DATA", f"{data}: no such folder", NOTE, fix)
    above = _above(cache)
    try:
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        reason = f"{cache}: cannot be written ({error.strerror})"
        yield Row("folders", "AVJAX_CACHE", reason, BROKEN, "set AVJAX_CACHE to a folder that can be written")
        return
    free = shutil.disk_usage(above).free
    few = free < _LITTLE_DISK
    fix = "set AVJAX_CACHE to a larger disk" if few else ""
    yield Row("folders", "AVJAX_CACHE", f"{cache}, {_gigabytes(free)} free", NOTE if few else OK, fix)


def _above(path: Path) -> Path:
    """Returns the path, or the nearest folder above it that exists."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB"


# ---- Media -----------------------------------------------------------------------------------------------------------


def codecs() -> Iterator[Row]:
    """Writes a tiny file in each container and reads it like a clip."""
    if importlib.util.find_spec("av") is None:
        yield Row("codecs", "all", "not tried: no package av", NOTE, "pip install 'avjax[media]'")
        return
    with tempfile.TemporaryDirectory(prefix="avjax-") as folder:
        for container, (video, audio) in _CODECS.items():
            named = f"{container} ({', '.join(codec[1] for codec in (video, audio) if codec)})"
            yield _tried(Path(folder) / f"tiny.{container}", named, video, audio)


def _tried(path: Path, named: str, video_codec: tuple[str, str] | None, audio_codec: tuple[str, str] | None) -> Row:
    import av

    from avjax.media import audio, video

    fix = "pip install --force-reinstall av"
    if lacking := [codec[1] for codec in (video_codec, audio_codec) if codec and not _has_codec(codec[1], "r")]:
        return Row("codecs", named, f"cannot be decoded: no {', '.join(lacking)}", BROKEN, fix)
    if lacking := [codec[0] for codec in (video_codec, audio_codec) if codec and not _has_codec(codec[0], "w")]:
        return Row("codecs", named, f"has a decoder; not tried: no {', '.join(lacking)} to write it with")
    try:
        _write(path, video_codec and video_codec[0], audio_codec[0])
        if video_codec:
            video.read_frames(path, count=2)
        audio.read_audio(path)
    except (AvjaxError, av.FFmpegError) as error:
        return Row("codecs", named, f"cannot be decoded: {_first_line(error)}", BROKEN, fix)
    return Row("codecs", named, "decoded")


def _has_codec(codec: str, mode: str) -> bool:
    import av

    try:
        return bool(av.Codec(codec, mode))
    except ValueError:  # the base class of PyAV's error
        return False


def _write(path: Path, video: str | None, audio: str) -> None:
    """Writes half a second of grey frames (if there is a video codec) and a tone."""
    import av

    with av.open(str(path), "w") as container:
        streams = []
        if video:
            stream = container.add_stream(video, rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            streams.append((stream, [_grey(i) for i in range(5)]))
        streams.append((container.add_stream(audio, rate=_AUDIO_RATE, layout="mono"), [_tone()]))
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

    wave = (8000 * np.sin(np.arange(_AUDIO_RATE // 2) * 0.1)).astype(np.int16)
    frame = av.AudioFrame.from_ndarray(wave[None], "s16", "mono")
    frame.sample_rate, frame.pts, frame.time_base = _AUDIO_RATE, 0, Fraction(1, _AUDIO_RATE)
    return frame


# ---- Weights ---------------------------------------------------------------------------------------------------------


def weights() -> Iterator[Row]:
    """Reports which pretrained files are available and complete, and where the others come from."""
    from avjax.encoders import weights as files
    from avjax.encoders.registry import REGISTRY

    for name, entry in REGISTRY.items():
        try:
            cached = files.is_there(name)
        except AvjaxError as error:
            yield Row("weights", name, _first_line(error), BROKEN)
            continue
        if cached:
            yield Row("weights", name, "available, checksums match")
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
    "folders": folders,
    "codecs": codecs,
    "weights": weights,
}
