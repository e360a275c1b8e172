"""Readers of tensor files: safetensors, ONNX, CTranslate2's model.bin and PyTorch's pytorch_model.bin.

Nothing in a file is executed, and memory is allocated only after sizes are checked against that of the file.
Names are those of the PyTorch module that the file was made from.
"""

import io
import math
import os
import re
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from avjax.errors import AvjaxError
from avjax.utils import safe_pickle

Tensors = dict[str, np.ndarray]


def read(path: str | os.PathLike) -> Tensors:
    """Reads the tensors of a file: name → array.

    Args:
      path: `.safetensors`, `.onnx` (initializers), or `.bin`: a Whisper of CTranslate2, or a state_dict saved by
        PyTorch's `torch.save`. Types are kept, except that PyTorch's bfloat16 becomes float32. Arrays may be read-only.
        ONNX convolutions with a folded batch norm have lost their names and are called folded.<n> in order of
        computation.

    Raises:
      AvjaxError: the file is missing, truncated or of another format, or asks for more than tensors.
    """
    path = Path(path)
    if path.suffix not in _READERS:
        raise AvjaxError(f"{path}: tensors are read from files named {', '.join(f'*{s}' for s in _READERS)}")
    if not path.is_file():
        raise AvjaxError(f"{path}: no such file; put it there, or fetch it again")
    try:
        return _READERS[path.suffix](path)
    except AvjaxError as error:
        raise AvjaxError(f"{path}: {error}") from error


def _safetensors(path: Path) -> Tensors:
    import safetensors
    import safetensors.numpy

    try:
        return safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
        raise AvjaxError(f"not a readable safetensors file ({error}); fetch it again") from error


def _bin(path: Path) -> Tensors:
    with open(path, "rb") as file:
        start = file.read(4)
    if start == b"PK\x03\x04":
        return _pytorch(path)
    if start[:1] == b"\x80":
        raise AvjaxError(
            "a pickle in the format of PyTorch before 1.6, which is not read; if you trust it, convert it once: "
            "torch.save(torch.load(path, weights_only=True), path)"
        )
    return _ctranslate2(path)


# ONNX: https://onnx.ai/onnx/repo-docs/IR.html


def _onnx(path: Path) -> Tensors:
    try:
        import onnx
    except ImportError as error:
        raise AvjaxError("reading ONNX needs the package onnx: pip install onnx, or avjax[media]") from error
    from google.protobuf.message import DecodeError

    try:
        graph = onnx.load(path, load_external_data=False).graph
    except DecodeError as error:
        raise AvjaxError(f"not a readable ONNX file ({error}); fetch it again") from error
    if not graph.initializer:
        raise AvjaxError("an ONNX file without a single initializer, or not an ONNX file")
    names = [tensor.name for tensor in graph.initializer]
    names += [name for node in graph.node for name in (node.name, node.op_type, *node.input)]
    if any(isinstance(name, bytes) for name in names):  # protobuf returns bytes that are not UTF-8
        raise AvjaxError("not a readable ONNX file (names are not UTF-8); fetch it again")
    return _named({tensor.name: _initializer(tensor) for tensor in graph.initializer}, graph.node)


def _initializer(tensor: Any) -> np.ndarray:
    from onnx import external_data_helper, numpy_helper

    if external_data_helper.uses_external_data(tensor):
        raise AvjaxError(f"{tensor.name} lies in another file; save the model with its data inside")
    try:
        return numpy_helper.to_array(tensor)
    except (ValueError, TypeError, KeyError) as error:
        raise AvjaxError(f"{tensor.name}, of type {tensor.data_type} and shape {list(tensor.dims)}: {error}") from error


def _named(tensors: Tensors, nodes: Any) -> Tensors:
    """Names anonymous tensors ("onnx::MatMul_12") after the module whose node reads them.

    PyTorch's exporter folds constants: it stores the weight of a linear layer transposed, and splits the positions of
    a ViT that interpolates them into those of the class token and of the patches. Neither keeps its name.
    """
    read_by = {}  # (operation, module, last part of the node's name) → the anonymous tensor read
    for node in nodes:
        path, _, leaf = node.name.rpartition("/")
        for name in node.input:
            if name.startswith("onnx::") and name in tensors:
                read_by[node.op_type, path.strip("/").replace("/", "."), leaf] = name
    weights = {  # A linear layer has one product; others in the module are called MatMul_1, …
        f"{module}.weight": name
        for (operation, module, leaf), name in read_by.items()
        if operation == leaf == "MatMul" and tensors[name].ndim == 2
    }
    positions = {
        f"{module}.position_embeddings": (name, patches)
        for (operation, module, _), name in read_by.items()
        for patches in [n for (o, m, _), n in read_by.items() if (o, m) == ("Reshape", module)]
        if operation == "Concat" and module.endswith("embeddings") and _joinable(tensors[name], tensors[patches])
    }
    named = {new: tensors[name].T for new, name in weights.items()}
    named |= {new: np.concatenate([tensors[n] for n in pair], 1) for new, pair in positions.items()}
    folded = _folded(tensors, nodes)
    named |= {new: tensors[name] for new, name in folded.items()}
    used = {*weights.values(), *folded.values(), *(name for pair in positions.values() for name in pair)}
    return {name: tensor for name, tensor in tensors.items() if name not in used} | named


def _folded(tensors: Tensors, nodes: Any) -> dict[str, str]:
    """Maps folded.<n>.weight and .bias to the anonymous tensors that the n-th of such convolutions reads.

    Exporters number these tensors, "onnx::Conv_12" or, before 2022, "12". Nodes are in the order of computation.
    """
    read = [[n for n in node.input[1:] if n in tensors] for node in nodes if node.op_type == "Conv"]
    anonymous = [names for names in read if names and re.fullmatch(r"(onnx::Conv_)?\d+", names[0])]
    leaves = "weight", "bias"
    return {
        f"folded.{i}.{leaf}": n for i, names in enumerate(anonymous) for leaf, n in zip(leaves, names, strict=False)
    }


def _joinable(first: np.ndarray, patches: np.ndarray) -> bool:
    """Returns whether these are positions of a class token, (1, 1, width), and of patches, (1, n, width)."""
    return first.ndim == patches.ndim == 3 and first.shape == (1, 1, patches.shape[2]) and len(patches) == 1


# CTranslate2: python/ctranslate2/specs/model_spec.py, ModelSpec.save; specs/whisper_spec.py

_BINARY_VERSION = 6
_TYPES = {0: np.dtype("<f4"), 4: np.dtype("<f2")}  # type numbers of the format; others are integers and bfloat16
_LEAVES = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias", "encodings": "weight"}
# CTranslate2 stacks projections of the same input along the first axis.
_MODULES = {
    "conv1": ("conv1",),
    "conv2": ("conv2",),
    "embeddings": ("embed_tokens",),
    "position_encodings": ("embed_positions",),
    "layer_norm": ("layer_norm",),
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
    "self_attention/layer_norm": ("self_attn_layer_norm",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
    "attention/layer_norm": ("encoder_attn_layer_norm",),
    "ffn/layer_norm": ("final_layer_norm",),
    "ffn/linear_0": ("fc1",),
    "ffn/linear_1": ("fc2",),
}
_VARIABLE = re.compile(r"(encoder|decoder)/(?:layer_(\d+)/)?(.+)/(\w+)")


class _Bytes:
    """The contents of a file, consumed from the front."""

    def __init__(self, contents: bytes) -> None:
        self._rest = memoryview(contents)

    def take(self, size: int) -> memoryview:
        """Returns the next `size` bytes."""
        if size > len(self._rest):
            raise AvjaxError(f"truncated: {size} bytes announced, {len(self._rest)} left; fetch it again")
        taken, self._rest = self._rest[:size], self._rest[size:]
        return taken

    def numbers(self, layout: str) -> tuple[int, ...]:
        """Returns the next little-endian numbers of a `struct` layout."""
        layout = f"<{layout}"
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def text(self) -> str:
        """Returns the next string."""
        return bytes(self.take(*self.numbers("H"))).rstrip(b"\0").decode(errors="replace")

    def __len__(self) -> int:
        return len(self._rest)


def _ctranslate2(path: Path) -> Tensors:
    file = _Bytes(path.read_bytes())
    (version,) = file.numbers("I")
    if version != _BINARY_VERSION:
        raise AvjaxError(
            f"neither a file of torch.save nor a model.bin of CTranslate2: starts with {version}, "
            f"expected its version {_BINARY_VERSION}"
        )
    spec = file.text()
    if spec != "WhisperSpec":
        raise AvjaxError(f"a model of CTranslate2 called {spec!r}, expected 'WhisperSpec'")
    _, count = file.numbers("II")  # the spec's revision only adds settings
    variables = dict(_variable(file) for _ in range(count))
    (count,) = file.numbers("I")
    for alias, name in [(file.text(), file.text()) for _ in range(count)]:
        if name not in variables:
            raise AvjaxError(f"alias {alias} of {name}, which is not in the file")
        variables[alias] = variables[name]
    if len(file):
        raise AvjaxError(f"{len(file)} bytes too long")
    return dict(part for name, tensor in variables.items() if tensor is not None for part in _hub_parts(name, tensor))


def _variable(file: _Bytes) -> tuple[str, np.ndarray | None]:
    """Reads the next variable; None for settings, which are scalars and the alignment heads."""
    name = file.text()
    (rank,) = file.numbers("B")
    shape = file.numbers(f"{rank}I")
    kind, size = file.numbers("BI")
    contents = file.take(size)
    if not rank or name == "decoder/alignment_heads":
        return name, None
    if kind not in _TYPES:
        raise AvjaxError(f"{name} is quantised (type {kind}); convert the model with --quantization float16 or float32")
    try:
        return name, np.frombuffer(contents, _TYPES[kind]).reshape(shape)
    except ValueError as error:
        raise AvjaxError(f"{name}: {size} bytes for shape {shape} of {_TYPES[kind]} ({error})") from error


def _hub_parts(name: str, tensor: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name in the hub's layout, tensor) for each projection stacked in a variable."""
    if name == "decoder/projection/weight":
        yield "proj_out.weight", tensor
        return
    match = _VARIABLE.fullmatch(name)
    if not match or match[3] not in _MODULES or match[4] not in _LEAVES:
        raise AvjaxError(f"{name} is not a known variable of a Whisper of CTranslate2")
    side, layer, modules = match[1], match[2], _MODULES[match[3]]
    if tensor.shape[0] % len(modules):
        raise AvjaxError(f"{name} of shape {tensor.shape} does not split into {', '.join(modules)}")
    prefix = f"model.{side}." if layer is None else f"model.{side}.layers.{layer}."
    for module, part in zip(modules, np.split(tensor, len(modules)), strict=True):
        if module.endswith("k_proj") and match[4] == "bias":
            # Whisper's keys have no bias; CTranslate2 stores zeros.
            if part.any():
                raise AvjaxError(f"{name}: the bias of the keys is not zero, so this is no Whisper")
        else:
            yield f"{prefix}{module}.{_LEAVES[match[4]]}", part


# PyTorch: torch/serialization.py, _save. data.pkl describes the state_dict, data/<key> hold the storages.

_LARGEST_DESCRIPTION = 1 << 24  # bytes; a thousand tensors take 200 kB


class _Storage(NamedTuple):
    dtype: np.dtype
    key: str
    size: int


class _Tensor(NamedTuple):
    """The arguments of torch._utils._rebuild_tensor_v2, in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    requires_grad: bool
    hooks: dict
    metadata: Any = None


class _Ordered(dict):
    """Replaces OrderedDict; its attributes, the _metadata of a state_dict, are dropped."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__()

    def __setstate__(self, state: object) -> None:
        pass


def _tensor(*arguments: Any) -> _Tensor:
    tensor = _Tensor(*arguments)
    if not isinstance(tensor.storage, _Storage):
        raise TypeError("a tensor without a storage")
    if not _sizes(tensor.offset, *tensor.shape, *tensor.strides) or len(tensor.shape) != len(tensor.strides):
        raise ValueError("a tensor with invalid sizes")
    return tensor


# The only names that data.pkl may use, and their replacements.
_ADMITTED: safe_pickle.Admitted = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("collections", "OrderedDict"): _Ordered,
    ("torch", "FloatStorage"): np.dtype("<f4"),
    ("torch", "HalfStorage"): np.dtype("<f2"),
    ("torch", "BFloat16Storage"): np.dtype(jnp.bfloat16),
    ("torch", "LongStorage"): np.dtype("<i8"),
}


def _pytorch(path: Path) -> Tensors:
    try:
        with zipfile.ZipFile(path) as archive:
            members = _members(archive, path.stat().st_size)
            tensors = _state_dict(_unpickled(archive.read(members["data.pkl"])))
            storages = {t.storage: _storage(archive, members, t.storage) for t in tensors.values()}
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, ValueError) as error:  # all raised by zipfile
        raise AvjaxError(f"not a readable file of torch.save ({error}); fetch it again") from error
    return {name: _strided(name, tensor, storages[tensor.storage]) for name, tensor in tensors.items()}


def _members(archive: zipfile.ZipFile, file_size: int) -> dict[str, zipfile.ZipInfo]:
    """Returns the members by their names within the only folder of the archive."""
    members = {member.filename.partition("/")[2]: member for member in archive.infolist()}
    if "data.pkl" not in members:
        raise AvjaxError("a zip without data.pkl, so not a file of torch.save")
    stored = all(m.compress_type == zipfile.ZIP_STORED for m in archive.infolist())
    if not stored or sum(m.file_size for m in archive.infolist()) > file_size:
        raise AvjaxError("members are compressed or overlap, which torch.save never does; not unpacked")
    if members["data.pkl"].file_size > _LARGEST_DESCRIPTION:
        raise AvjaxError(f"data.pkl has {members['data.pkl'].file_size} bytes, expected {_LARGEST_DESCRIPTION} at most")
    if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
        raise AvjaxError("saved on a big-endian machine; save it again on a little-endian one")
    return members


def _unpickled(program: bytes) -> object:
    """Unpickles data.pkl, which may contain plain values and what `_ADMITTED` lists."""
    try:
        return safe_pickle.unpickle(io.BytesIO(program), len(program), _ADMITTED, _persistent_storage)
    except safe_pickle.Refused as error:
        raise AvjaxError(f"data.pkl asks for {error}, which tensors do not need; refused") from error
    except safe_pickle.BROKEN as error:
        raise AvjaxError(f"data.pkl is malformed ({error}); fetch it again") from error


def _persistent_storage(reference: Any) -> _Storage:
    """Returns the storage of a persistent id."""
    kind, dtype, key, _, size = reference
    stored = getattr(dtype, "function", None)
    if kind != "storage" or not isinstance(stored, np.dtype) or type(key) is not str or not _sizes(size):
        raise ValueError("a reference to something other than a storage")
    return _Storage(stored, key, size)


def _sizes(*numbers: Any) -> bool:
    """Returns whether these are possible sizes of arrays."""
    return all(type(n) is int and 0 <= n < 1 << 48 for n in numbers)


def _state_dict(contents: Any) -> dict[str, _Tensor]:
    if not isinstance(contents, dict):
        raise AvjaxError(f"data.pkl describes a {type(contents).__name__}, expected a state_dict")
    if any(type(name) is not str for name in contents):
        raise AvjaxError("data.pkl describes a dict whose keys are not names, expected a state_dict")
    if others := [name for name, value in contents.items() if not isinstance(value, _Tensor)]:
        raise AvjaxError(f"{', '.join(others[:5])}: not tensors; save the model's state_dict alone")
    return contents


def _storage(archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo], storage: _Storage) -> np.ndarray:
    """Reads the elements of a storage (size,)."""
    member = members.get(f"data/{storage.key}")
    expected = storage.size * storage.dtype.itemsize
    if member is None or member.file_size != expected:
        got = "not there" if member is None else f"{member.file_size} bytes"
        raise AvjaxError(f"data/{storage.key} is {got}, expected {expected} bytes; fetch it again")
    elements = np.frombuffer(archive.read(member), storage.dtype)
    return elements.astype(np.float32) if storage.dtype == jnp.bfloat16 else elements


def _strided(name: str, tensor: _Tensor, elements: np.ndarray) -> np.ndarray:
    _, offset, shape, strides, *_ = tensor
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    # The product also refuses strides of 0, with which a small file could describe a tensor of any size.
    if math.prod(shape) > elements.size or (0 not in shape and last >= elements.size):
        raise AvjaxError(f"{name}: shape {shape}, strides {strides} from {offset} exceed a storage of {elements.size}")
    in_bytes = [s * elements.itemsize for s in strides]
    try:
        return np.lib.stride_tricks.as_strided(elements[offset:], shape, in_bytes, writeable=False)
    except ValueError as error:
        raise AvjaxError(f"{name}: {error}") from error


_READERS: Mapping[str, Callable[[Path], Tensors]] = {".safetensors": _safetensors, ".onnx": _onnx, ".bin": _bin}
