"""The safe reader of pickles reads what numpy and Python write, and refuses whatever could run."""

import builtins
import collections
import functools
import os
import pathlib
import pickle
import struct
import subprocess
import sys

import numpy as np
import pytest

from avjax.errors import AvjaxError
from avjax.utils import safe_pickle

PLAIN = {
    "train": {"audio": np.arange(12, dtype=np.float32).reshape(2, 3, 2), "id": np.array(["a$_$1", "é"])},
    "fortran": np.asfortranarray(np.arange(6, dtype=np.int64).reshape(2, 3)),
    "big": np.arange(3, dtype=">f8"),
    "objects": np.array(["text", None, {"n": 1}, np.arange(2)], object),
    "flags": np.array([True, False]),
    "empty": np.zeros((0, 4), np.float32),
    "scalar": np.float32(1.5),
    3: [
        1,
        -(2**80),
        2.5,
        True,
        None,
        b"\x00\xff",
        b"",
        "ü",
        (1, (2,)),
        {1, 2},
        frozenset({"x"}),
        1 + 2j,
        bytearray(b"q"),
    ],
}


def write(path: pathlib.Path, data: bytes) -> pathlib.Path:
    path = path / "a.pkl"
    path.write_bytes(data)
    return path


def same(a, b):
    if isinstance(b, np.ndarray):
        assert type(a) is np.ndarray
        assert (a.shape, a.dtype.newbyteorder("=")) == (b.shape, b.dtype.newbyteorder("="))
        for x, y in zip(a.ravel(), b.ravel(), strict=True):
            same(x, y)
    elif isinstance(b, dict):
        assert list(a) == list(b)
        for key in b:
            same(a[key], b[key])
    elif isinstance(b, (list, tuple)):
        assert type(a) is type(b)
        for x, y in zip(a, b, strict=True):
            same(x, y)
    else:
        assert a == b
        assert type(a) is (bytes if isinstance(b, bytearray) else type(b))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_and_plain_containers_are_read(tmp_path, protocol):
    values = dict(PLAIN)
    if protocol < 5:  # written as a call of bytearray
        values[3] = values[3][:-1]
    same(safe_pickle.load(write(tmp_path, pickle.dumps(values, protocol))), values)


def test_what_stands_twice_is_one_object(tmp_path):
    x = np.zeros(3)
    a, b = safe_pickle.load(write(tmp_path, pickle.dumps([x, x])))
    assert a is b


def test_pickle_of_python_2_and_an_old_numpy(tmp_path):
    data = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I2\ntcnumpy\ndtype\n(S'f8'\n"
        b"I0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbI00\nS'\\x00\\x00\\x00\\x00\\x00\\x00\\xf0?"
        b"\\x00\\x00\\x00\\x00\\x00\\x00\\x00@'\ntb."
    )
    np.testing.assert_array_equal(safe_pickle.load(write(tmp_path, data)), [1.0, 2.0])


RAN = []


class Hostile:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Subclass(np.ndarray):
    pass


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Hostile(os.system, "touch RAN"), "(posix|nt).system"),
        (Hostile(builtins.eval, "open('RAN', 'w')"), "(builtins|__builtin__).eval"),
        (Hostile(builtins.getattr, "x", "__class__"), "getattr"),
        (np.array([1, Hostile(os.system, "touch RAN")], object), "(posix|nt).system"),
        ({"deep": [({"er": Hostile(os.system, "touch RAN")},)]}, "(posix|nt).system"),
        (Hostile(np.load, "RAN"), "numpy.*load"),
        (Hostile(np.fromfile, "RAN"), "numpy.*fromfile"),
        (functools.partial(print), "functools.partial"),
        (pathlib.PurePosixPath("x"), "pathlib.*PurePosixPath"),
        (np.zeros(2).view(Subclass), "test_safe_pickle.Subclass"),
        (np.zeros(2, [("a", "f4")]), "an array of dtype 'V4'"),
        (np.zeros(2, "M8[s]"), "an array of dtype 'M8'"),
        (np.dtype("f4"), "a function or a dtype"),
        (len, "len"),
        (collections.OrderedDict(a=1), "collections.OrderedDict"),
    ],
)
def test_anything_else_is_refused_by_name_and_does_not_run(tmp_path, monkeypatch, value, name, protocol):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, pickle.dumps([np.zeros(1), value], protocol))
    with pytest.raises(AvjaxError, match=rf"a\.pkl: refused: .*{name}"):
        safe_pickle.load(path)
    assert os.listdir(tmp_path) == ["a.pkl"]


DTYPE = b"cnumpy\ndtype\n(V%s\nI00\nI01\ntR"


def test_a_name_is_refused_before_what_stands_ahead_of_it_runs(tmp_path, monkeypatch):
    """The first pass reads all names, so nothing runs of a pickle with one bad name at its end."""
    monkeypatch.setattr(safe_pickle._Reader, "load", lambda self: RAN.append(1))
    with pytest.raises(AvjaxError, match=r"refused: os\.system"):
        safe_pickle.load(write(tmp_path, b"cnumpy\ndtype\n0cos\nsystem\n."))
    assert RAN == []


@pytest.mark.parametrize(
    ("data", "message"),
    [
        # An extension code, a persistent id, an instance, an attribute put on a function.
        (b"\x80\x02\x82\x01.", "the opcode EXT1 at byte 2"),
        (b"Pos\n.", "the opcode PERSID"),
        (b"(cos\nsystem\no.", "os.system"),
        (b"(ios\nsystem\n.", "the opcode INST"),
        (b"cnumpy\ndtype\n(dS'__code__'\nI1\nsb.", "a change of a function"),
        (b"cnumpy\nndarray\n(tR.", "a call of numpy.ndarray"),
        # Index 4 000 000 000 of the memo.
        (b"\x80\x02Nr" + struct.pack("<I", 4_000_000_000) + b".", "index 4000000000 of the memo"),
        # Attributes of a module, by a dotted name.
        (b"\x80\x04\x8c\x05numpy\x8c\x0bdtype.mro()\x93.", r"numpy.dtype.mro\(\)"),
        # A dtype that claims not to be an object dtype: bytes would become pointers.
        (
            b"cnumpy.core.multiarray\n_reconstruct\n(tR(I1\n(I1\nt"
            + DTYPE % b"O8"
            + b"(I3\nV|\nNNNI8\nI8\nI0\ntbI00\nVabcdefgh\ntb.",
            "objects made of bytes",
        ),
        (b"cnumpy.core.multiarray\nscalar\n(" + DTYPE % b"O8" + b"VAAAAAAAA\ntR.", "objects made of bytes"),
        (DTYPE % b"V8" + b".", "dtype 'V8'"),
        (DTYPE % b"f4,O" + b".", "dtype 'f4,O'"),
        (DTYPE % b"f8" + b"(I3\nV<\nN(Vx\nt(dNNNtb.", "a structured array"),
        # An array that is larger than its bytes.
        (
            b"cnumpy.core.multiarray\n_reconstruct\n(tR(I1\n(I1000000\nI1000000\nt"
            + DTYPE % b"f8"
            + b"I00\nVabcdefgh\ntb.",
            r"an array \(1000000, 1000000\) of float64 in 8 bytes",
        ),
        (b"c_codecs\nencode\n(Vabc\nVzlib\ntR.", "the encoding 'zlib'"),
        (b"]q\x00h\x00a.", "nested in themselves"),
        # Keys so deep that hashing them would overflow the C stack: of a dict, of sets, from the memo.
        (b"})" + b"\x85" * 1000 + b"Ns.", "a key made of tuples in tuples"),
        (b"}()" + b"\x85" * 300_000 + b"Nu.", "a key made of tuples in tuples"),
        (b"\x8f()" + b"\x85" * 300_000 + b"\x90.", "a key made of tuples in tuples"),
        (b"})" + b"\x85p1\n0g1\n\x85" * 1000 + b"Ns.", "a key made of tuples in tuples"),
        (b"c__builtin__\nset\n](" + b")" + b"\x85" * 300_000 + b"e\x85R.", "a key made of tuples in tuples"),
        (b"]" * 200_000 + b"a" * 199_999 + b".", "deeper than 32"),
    ],
)
def test_programs_written_by_hand_are_refused(tmp_path, data, message):
    with pytest.raises(AvjaxError, match=f"refused: .*({message})"):
        safe_pickle.load(write(tmp_path, data))


def test_many_references_to_one_list_cost_nothing(tmp_path):
    """There would be 2³⁰ leaves if each reference were followed."""
    value = [0]
    for _ in range(30):
        value = [value, value]
    assert len(safe_pickle.load(write(tmp_path, pickle.dumps(value)))) == 2


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no pickle",
        pickle.dumps(PLAIN)[:-40],
        b"\x80\x04.",
        b"\x80\x02]]R.",
        b"\x8e" + struct.pack("<Q", 2**40) + b"a.",
        b"h\x05.",
        b"((dd.",
        b"c__builtin__\nbytes\n(I1000000000000\ntR.",
        b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"N.",
        b"\x80\x05\x96" + struct.pack("<Q", 2**62) + b"N.",
        b"T" + struct.pack("<i", -1) + b".",
    ],
)
def test_a_broken_pickle_is_a_clear_error(tmp_path, data):
    with pytest.raises(AvjaxError, match=r"a\.pkl: not a whole pickle of arrays"):
        safe_pickle.load(write(tmp_path, data))


def test_sizes_are_limited_and_files_must_exist(tmp_path, monkeypatch):
    path = write(tmp_path, pickle.dumps(np.zeros(100)))
    monkeypatch.setattr(safe_pickle, "MOST_BYTES", 100)
    with pytest.raises(AvjaxError, match=r"bytes; at most 100 are read\. Convert it to \.npz or \.h5"):
        safe_pickle.load(path)
    with pytest.raises(AvjaxError, match=r"nowhere\.pkl: no such file"):
        safe_pickle.load(tmp_path / "nowhere.pkl")


PEAK = """
import re, sys, pathlib
from avjax.utils import safe_pickle as pickles

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])

before = peak()
value = pickles.load(pathlib.Path(sys.argv[1]))
print(peak() - before, value["train"]["text"].sum())
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the peak of memory is read from Linux's /proc")
@pytest.mark.parametrize("protocol", [4, 5])
def test_a_large_file_is_in_memory_once(tmp_path, protocol):
    arrays = {name: np.ones((100, 250, 500), np.float32) for name in ("text", "audio", "vision", "more")}
    path = write(tmp_path, pickle.dumps({"train": arrays, "id": [f"a$_${i}" for i in range(1000)]}, protocol))
    assert path.stat().st_size > 200e6
    done = subprocess.run([sys.executable, "-c", PEAK, path], capture_output=True, text=True, check=True)
    kilobytes, total = map(float, done.stdout.split())
    assert total == 12.5e6
    assert 1024 * kilobytes < 1.15 * path.stat().st_size
