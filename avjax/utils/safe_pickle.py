"""Reads untrusted pickles: arrays and plain containers, without running code.

A pickle is a program. This reader allows dict, list, tuple, set, str, bytes, numbers, None, and what a caller admits
(for `load`, numpy arrays and scalars of plain numbers and text), and refuses everything else by name. It makes two
passes: it reads the opcodes without running them, then runs them with replacements for numpy's own functions, which
trust their input (a forged dtype turns bytes into pointers).

Both passes read from the file, and arrays are not copied, so memory holds the content of the file once. Only protocols
0 to 2 write arrays as text, which is then in memory as well.
"""

import math
import pickle
import pickletools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from avjax.errors import AvjaxError

MOST_BYTES = 2**34
_DEEPEST = 32
# Opcodes that make plain values and containers, store and recall them, or call admitted names. Excluded are opcodes
# that make instances of classes, look up names in registries, or take bytes from outside the file.
_OPCODES = {
    "PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "DUP",
    "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET",
    "NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
    "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8",
    "EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
    "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "EMPTY_SET", "ADDITEMS", "FROZENSET",
    "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD",
}  # fmt: skip
# Opcodes of long data → size of their length field in bytes. The first pass skips the data.
_LONG = {"BINSTRING": 4, "BINUNICODE": 4, "BINUNICODE8": 8, "BINBYTES": 4, "BINBYTES8": 8, "BYTEARRAY8": 8, "FRAME": 8}
_DTYPE = re.compile(r"[?]|[bBhHiIlLqQefdgO]|b1|[iu][1248]|f(2|4|8|16)|c(8|16)|[USO][1-9]\d{0,6}")


def load(path: Path) -> object:
    """Reads a pickle of arrays and plain containers, written by any Python and any numpy.

    Returns:
      The value. Arrays are `np.ndarray`s in this machine's byte order, read-only where they are the file's own bytes;
      object arrays hold plain values; byte strings of Python 2 become text (Latin-1), a bytearray becomes bytes.

    Raises:
      AvjaxError: there is no such file, it is larger than `MOST_BYTES`, holds anything else (the message names it), is
        nested too deeply or in itself, or is not a complete pickle.
    """
    if not path.is_file():
        raise AvjaxError(f"{path}: no such file")
    if (size := path.stat().st_size) > MOST_BYTES:
        raise AvjaxError(f"{path}: {size:,} bytes; at most {MOST_BYTES:,} are read. Convert it to .npz or .h5")
    try:
        with path.open("rb") as file:
            return _plain(unpickle(file, size, _ADMITTED), {}, 0)
    except Refused as error:
        raise AvjaxError(f"{path}: refused: {error}. Only numpy arrays and plain containers are read from pickles; "
                         "convert the file to .npz where you trust it") from error  # fmt: skip
    except BROKEN as error:
        raise AvjaxError(f"{path}: not a whole pickle of arrays ({type(error).__name__}: {error})") from error


class Refused(Exception):
    """A pickle asks for something that is not allowed; the message names it."""


# A broken pickle fails in any of these ways.
BROKEN = (
    pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError,
    MemoryError, UnicodeError,
)  # fmt: skip
# (module, name) → its replacement.
Admitted = Mapping[tuple[str, str], object]


def unpickle(file: BinaryIO, size: int, admitted: Admitted, refer: Callable[[object], object] | None = None) -> object:
    """Runs the program of a pickle after checking all its opcodes.

    Args:
      file: the pickle, positioned at its start.
      size: its number of bytes.
      admitted: the only names that it may use; they become `Call`s.
      refer: persistent id → the object outside the file; None refuses persistent ids.

    Raises:
      Refused: the pickle asks for anything else.
      BROKEN: it is not a complete pickle.
    """
    _inspect(file, size, admitted, _OPCODES | ({"BINPERSID"} if refer else set()))
    file.seek(0)
    return _Reader(file, admitted, refer).load()


def _inspect(file: BinaryIO, size: int, admitted: Admitted, opcodes: Collection[str]) -> None:
    """Refuses disallowed opcodes, names, memo indices and keys before anything is executed."""
    stack = _Stack()
    for count, (opcode, argument, at) in enumerate(_opcodes(file, size), 1):
        if opcode.name not in opcodes:
            raise Refused(f"the opcode {opcode.name} at byte {at}")
        if opcode.name == "GLOBAL":
            _admitted(admitted, *argument.split(" ", 1))
        # The memo is as large as its highest index: one number could request gigabytes.
        if opcode.name in ("PUT", "LONG_BINPUT") and not 0 <= argument <= count:
            raise Refused(f"index {argument} of the memo after {count} opcodes")
        stack.follow(opcode, argument)


class _Stack:
    """Nesting depths of the tuples on the stack: hashing a deep one as a key would overflow the C stack."""

    def __init__(self) -> None:
        self._depths: list[int] = []
        self._marks: list[int] = []
        self._memo: dict[object, int] = {}

    def follow(self, opcode: pickletools.OpcodeInfo, argument: object) -> None:
        """Pops what an opcode takes, and pushes what it makes."""
        name, depths = opcode.name, self._depths
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self._memo[len(self._memo) if name == "MEMOIZE" else argument] = depths[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            depths.append(self._memo[argument])
        elif name == "DUP":
            depths.append(depths[-1])
        elif name == "MARK":
            self._marks.append(len(depths))
        elif name == "POP" and self._marks and self._marks[-1] == len(depths):
            self._marks.pop()
        else:
            taken = self._taken(opcode)
            _check_keys(name, taken)
            made = [1 + max(taken, default=0) if "TUPLE" in name else 0] * len(opcode.stack_after)
            depths += made[opcode.stack_before.index(pickletools.markobject) :] if _is_marked(opcode) else made

    def _taken(self, opcode: pickletools.OpcodeInfo) -> list[int]:
        start = self._marks.pop() if _is_marked(opcode) else len(self._depths) - len(opcode.stack_before)
        if not 0 <= start <= len(self._depths):
            raise EOFError(f"{opcode.name} of an empty stack")
        taken, self._depths[start:] = self._depths[start:], []
        return taken


def _is_marked(opcode: pickletools.OpcodeInfo) -> bool:
    return pickletools.markobject in opcode.stack_before


def _check_keys(name: str, taken: Sequence[int]) -> None:
    """Refuses keys of dicts and members of sets that are tuples of tuples."""
    keys = {"SETITEM": taken[1:2], "SETITEMS": taken[::2], "DICT": taken[::2], "ADDITEMS": taken, "FROZENSET": taken}
    if max(keys.get(name, ()), default=0) > 1:
        raise Refused("a key made of tuples in tuples")


def _opcodes(file: BinaryIO, size: int) -> Iterator[tuple[pickletools.OpcodeInfo, object, int]]:
    """Yields (opcode, argument, position) of each opcode; `pickletools.genops` fails at bytes in Python 2's protocol 0.

    A long argument is None: it is only checked to be within the `size` bytes of the file.
    """
    name = ""
    while name != "STOP":
        at, code = file.tell(), file.read(1)
        if not code:
            raise EOFError("it ends without a STOP")
        if not (opcode := pickletools.code2op.get(code.decode("latin1"))):
            raise ValueError(f"no opcode {code!r}, at byte {at}")
        name = opcode.name
        if name in _LONG:
            _step_over(file, name, size)
            yield opcode, None, at
        else:
            reader = type(file).readline if name == "STRING" else opcode.arg and opcode.arg.reader
            yield opcode, reader(file) if reader else None, at


def _step_over(file: BinaryIO, name: str, size: int) -> None:
    """Skips long data within the file; a forged length would request as much memory in the second pass."""
    length = int.from_bytes(file.read(_LONG[name]), "little")
    if file.tell() + length > size:
        raise EOFError(f"{name} of {length} bytes, of which it has {size - file.tell()}")
    if name != "FRAME":  # which holds the opcodes that follow
        file.seek(length, 1)


def _admitted(admitted: Admitted, module: str, name: str) -> object:
    if (module, name) not in admitted:
        raise Refused(f"{module}.{name}")
    return admitted[module, name]


class _Reader(pickle.Unpickler):
    def __init__(self, file: BinaryIO, admitted: Admitted, refer: Callable[[object], object] | None) -> None:
        super().__init__(file, encoding="latin1")
        self._names, self._refer = admitted, refer

    def find_class(self, module: str, name: str) -> "Call":
        return Call(_admitted(self._names, module, name))

    def persistent_load(self, pid: object) -> object:
        return self._refer(pid)


class Call:
    """The replacement of an admitted name: a pickle can call it, but not change it."""

    __slots__ = ("function",)

    def __init__(self, function: object) -> None:
        self.function = function

    def __call__(self, *arguments: object) -> object:
        """Calls the replacement."""
        return self.function(*arguments)

    def __setstate__(self, state: object) -> None:
        raise Refused("a change of a function")


class _Dtype:
    """Replaces `numpy.dtype`: only a name and a byte order, whatever else its state contains."""

    __slots__ = ("name", "order")

    def __init__(self, name: object, align: object = False, copy: object = True) -> None:
        name = name.decode("latin1") if isinstance(name, bytes) else name
        if not isinstance(name, str) or not _DTYPE.fullmatch(name):
            raise Refused(f"an array of dtype {name!r}")
        self.name, self.order = name, "="

    def __setstate__(self, state: tuple) -> None:
        _, order, subarray, names, fields, *_ = state
        if (subarray, names, fields) != (None, None, None) or order not in ("<", ">", "|", "="):
            raise Refused(f"a structured array (byte order {order!r}, fields {names!r})")
        self.order = order

    def made(self) -> np.dtype:
        return np.dtype(self.name).newbyteorder(self.order)


class _Array:
    """Replaces an array that numpy's `_reconstruct` makes and whose state fills it later."""

    __slots__ = ("state",)

    def __init__(self, *unused: object) -> None:
        self.state = None

    def __setstate__(self, state: tuple) -> None:
        self.state = state

    def made(self, plain: Callable[[object], object]) -> np.ndarray:
        """Returns the array; `plain` converts the elements of an object array."""
        _, shape, dtype, fortran, data = self.state
        order = "F" if fortran else "C"
        if _dtype(dtype).hasobject and isinstance(data, list):
            return _of_objects([plain(v) for v in data], shape, order)
        return _of_bytes(data, dtype, shape, order)


def _dtype(dtype: object) -> np.dtype:
    if not isinstance(dtype, _Dtype):
        raise Refused(f"{type(dtype).__name__} instead of a dtype")
    return dtype.made()


def _of_bytes(data: object, dtype: object, shape: tuple, order: str) -> np.ndarray:
    made, shape = _dtype(dtype), tuple(map(int, shape))
    if made.hasobject:
        raise Refused("objects made of bytes")
    data = data.encode("latin1") if isinstance(data, str) else data  # a byte string of Python 2
    if min(shape, default=0) < 0 or math.prod(shape) * made.itemsize != len(data):
        raise Refused(f"an array {shape} of {made} in {len(data)} bytes")
    return np.frombuffer(data, made).reshape(shape, order=order).astype(made.newbyteorder("="), copy=False)


def _of_objects(values: list, shape: tuple, order: str) -> np.ndarray:
    flat = np.empty(len(values), object)
    for i, value in enumerate(values):
        flat[i] = value
    return flat.reshape(tuple(map(int, shape)), order=order)


def _scalar(dtype: object, data: object = b"") -> object:
    return _of_bytes(data, dtype, (1,), "C")[0]


def _ndarray(*arguments: object) -> None:
    raise Refused("a call of numpy.ndarray")


def _bytes(text: str, encoding: str) -> bytes:
    """Replaces `_codecs.encode(text, "latin1")`, as protocols below 3 write bytes."""
    if encoding not in ("latin1", "latin-1"):
        raise Refused(f"text in the encoding {encoding!r}")
    return text.encode("latin1")


def _set(members: Sequence = ()) -> set:
    """Replaces `set(list)`, as protocols below 4 write sets."""
    if any(type(member) is tuple and any(type(m) is tuple for m in member) for member in members):
        raise Refused("a key made of tuples in tuples")
    return set(members)


def _frozenset(members: Sequence = ()) -> frozenset:
    return frozenset(_set(members))


def _no_bytes() -> bytes:
    """Replaces `bytes()`, as protocols below 3 write empty bytes; the real one would make any number of zeros."""
    return b""


_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")
_NUMERIC = ("numpy.core.numeric", "numpy._core.numeric")
_ADMITTED: Admitted = {
    ("numpy", "ndarray"): _ndarray,  # an argument of _reconstruct, never called
    ("numpy", "dtype"): _Dtype,
    **{(module, "_reconstruct"): _Array for module in _MULTIARRAY},
    **{(module, "scalar"): _scalar for module in _MULTIARRAY},
    **{(module, "_frombuffer"): _of_bytes for module in _NUMERIC},
    ("_codecs", "encode"): _bytes,
    **{(module, name): kind for module in ("builtins", "__builtin__") for name, kind in
       (("set", _set), ("frozenset", _frozenset), ("complex", complex), ("bytes", _no_bytes))},
}  # fmt: skip


def _plain(value: object, done: dict[int, object], depth: int) -> object:
    """Returns `value` with arrays instead of their replacements; repeated references stay one object.

    `done` maps the ids of converted objects, which `value` keeps alive, to the results.
    """
    if depth > _DEEPEST:
        raise Refused(f"containers nested in themselves, or deeper than {_DEEPEST}")
    if id(value) not in done:
        done[id(value)] = _made_plain(value, lambda v: _plain(v, done, depth + 1))
    return done[id(value)]


def _made_plain(value: object, plain: Callable[[object], object]) -> object:
    if isinstance(value, dict):
        return {plain(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return type(value)(plain(v) for v in value)
    if isinstance(value, _Array):
        return value.made(plain)
    if isinstance(value, (Call, _Dtype)):
        raise Refused("a function or a dtype as a value")
    return bytes(value) if isinstance(value, bytearray) else value
