"""Files that torch writes: read without torch, so that nothing in them runs. Only writing needs torch.

Both formats, zip archives and the one before torch 1.6, hold a pickle that refers to storages: flat arrays of numbers.
Only the pickle opcodes that torch writes for tensors in dicts, lists and tuples are accepted, and every size is
compared with the file's before it is used.
"""

import io
import mmap
import pickle
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import ml_dtypes  # noqa: F401  (teaches numpy bfloat16)
import numpy as np

from convert.errors import InputError, first_line
from convert.files import replacing
from convert.untrusted import refuse_pointer

# How torch's two formats begin.
ZIP_MAGIC = b"PK\x03\x04"
MAGIC = (ZIP_MAGIC, b"\x80\x02\x8a\nl\xfc\x9cF\xf9")

OLD_FORMAT = (0x1950A86A20F9469CFC6C, 1001)
"""The number that marks the format before torch 1.6, and its version."""
PICKLE_BYTES = 2**20
"""Longest pickle: names and shapes of some 7,000 tensors."""
_OPCODES = re.compile(
    "PROTO|STOP|MARK|NONE|NEWTRUE|NEWFALSE|BININT[12]?|LONG1|BINFLOAT|BINUNICODE|EMPTY_(DICT|LIST|TUPLE)|TUPLE[123]?"
    "|APPENDS?|SETITEMS?|(LONG_)?BIN(GET|PUT)|GLOBAL|REDUCE|BUILD|BINPERSID"
)
_TYPES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}

OpenStorage = Callable[[np.dtype, str, int], np.ndarray]
"""Returns a storage's numbers, given their type, the storage's key and the size that the pickle claims."""


def is_torch_file(path: Path) -> bool:
    """Tell whether a file begins like torch's."""
    with path.open("rb") as file:
        return file.read(16).startswith(MAGIC)


def load_torch(path: Path, checked: bool = True) -> Any:
    """Return a file's dicts, lists and numbers, with tensors as read-only arrays that are mapped, not read.

    Types are as stored, bfloat16 as in ml_dtypes. With `checked`, all numbers of a zip archive are read once to check
    its checksums. Raises InputError.
    """
    try:
        refuse_pointer(path)
        with path.open("rb") as file:
            is_zip = file.read(4) == ZIP_MAGIC
        return _load_zip(path, checked) if is_zip else _load_old(path)
    except InputError:
        raise
    except Exception as error:  # a damaged file makes zipfile and pickle raise many kinds
        raise InputError(f"{path}: not a torch file that can be read safely ({first_line(error)})") from error


def import_torch(purpose: str) -> Any:
    """Return the torch module. Raises InputError that names the purpose when it is not installed."""
    try:
        import torch
    except ModuleNotFoundError as error:
        raise InputError(f"{purpose} needs PyTorch: pip install torch") from error
    return torch


def save_torch(path: Path, content: Any) -> None:
    """Write arrays, alone or in dicts, as tensors in torch's format; the file replaces its predecessor in one step.

    Raises InputError when torch is not installed, and OSError.
    """
    torch = import_torch(f"writing {path}")

    def as_tensors(item: Any) -> Any:
        if isinstance(item, dict):
            return {name: as_tensors(value) for name, value in item.items()}
        return torch.from_numpy(np.array(item)) if isinstance(item, np.ndarray) else item

    content = as_tensors(content)
    with replacing(path) as temporary, temporary.open("wb") as file:
        torch.save(content, file)


class _Unpickler(pickle.Unpickler):
    """Builds the object that torch's pickle describes; names of anything but dense tensors are refused."""

    def __init__(self, content: bytes, open_storage: OpenStorage, n_bytes: int):
        super().__init__(io.BytesIO(content))
        self._open_storage = open_storage
        self._n_left = 2 * n_bytes  # tied weights are one storage under two names
        self._names: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): _StateDict,
            ("torch._utils", "_rebuild_tensor_v2"): self._rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): self._rebuild_parameter,
            ("torch._utils", "_rebuild_parameter_with_state"): self._rebuild_parameter,
            ("torch._tensor", "_rebuild_from_type_v2"): self._rebuild_with_attributes,
            ("torch", "Tensor"): "Tensor",
            ("torch.nn.parameter", "Parameter"): "Parameter",
            **{("torch", name): name for name in _TYPES},
        }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._names:
            raise ValueError(f"it asks for {module}.{name}, but only dense tensors are read")
        return self._names[module, name]

    def persistent_load(self, reference: Any) -> np.ndarray:
        kind, type_name, key, _device, size, *_ = reference
        if kind != "storage" or not isinstance(key, str) or not _is_size(size):
            raise ValueError(f"it refers to {reference!r}, which is not a storage")
        return self._open_storage(np.dtype(_TYPES[type_name]), key, size)

    def _rebuild_tensor(
        self,
        storage: np.ndarray,
        offset: int,
        shape: Any,
        strides: Any,
        _requires_grad: Any = None,
        _hooks: Any = None,
        lazily: Any = None,
    ) -> np.ndarray:
        if lazily:  # the storage holds other numbers than the tensor: negated or conjugated ones
            raise ValueError(f"a tensor is stored with {lazily!r}; save its clone()")
        if not all(map(_is_size, (offset, *shape, *strides))) or len(shape) != len(strides):
            raise ValueError(f"a tensor has an invalid shape {shape}, strides {strides} or offset {offset}")
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if 0 not in shape and last >= storage.size:
            raise ValueError(f"a tensor of shape {shape} reaches beyond its storage of {storage.size} numbers")
        itemsize = storage.dtype.itemsize
        self._n_left -= int(np.prod(shape, dtype=object)) * itemsize
        if self._n_left < 0:
            raise ValueError("its tensors claim more numbers than it holds")
        return np.lib.stride_tricks.as_strided(
            storage[offset:], shape, [stride * itemsize for stride in strides], writeable=False
        )

    def _rebuild_parameter(self, tensor: np.ndarray, *_: Any) -> np.ndarray:
        return tensor

    def _rebuild_with_attributes(self, rebuild: Any, kind: Any, arguments: Any, attributes: Any) -> np.ndarray:
        """Rebuild a tensor that has Python attributes, which are dropped."""
        if rebuild not in (self._rebuild_tensor, self._rebuild_parameter):
            raise ValueError("it describes a tensor in a way that torch does not")
        return rebuild(*arguments)


class _StateDict(dict):
    """Stands in for OrderedDict: made empty and filled item by item; its attributes (`_metadata`) are dropped."""

    def __init__(self) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass


def _load_zip(path: Path, checked: bool) -> Any:
    with zipfile.ZipFile(path) as archive:
        (content,) = (info for info in archive.infolist() if info.filename.endswith("/data.pkl"))
        folder = content.filename.removesuffix("data.pkl")

        def record(info: zipfile.ZipInfo, limit: int) -> bytes:
            if info.file_size > limit or info.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{info.filename} is compressed, or longer than {limit:,} bytes")
            return archive.read(info)

        def open_storage(dtype: np.dtype, key: str, size: int) -> np.ndarray:
            info = archive.getinfo(f"{folder}data/{key}")
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != size * dtype.itemsize:
                raise ValueError(f"{info.filename} is compressed, or does not hold {size} numbers of type {dtype}")
            with path.open("rb") as file:
                file.seek(info.header_offset + 26)
                n_name, n_extra = struct.unpack("<HH", file.read(4))
            storage = _part(mapped, dtype, info.header_offset + 30 + n_name + n_extra, size)
            if checked and zlib.crc32(storage.view(np.uint8).data) != info.CRC:
                raise ValueError(f"{info.filename} does not match its checksum")
            return storage

        if f"{folder}byteorder" in archive.NameToInfo:
            byte_order = record(archive.getinfo(f"{folder}byteorder"), limit=16)
            if byte_order != b"little":
                raise ValueError(f"its byte order is {byte_order!r}, not little")
        mapped = _map(path)
        stream = io.BytesIO(record(content, PICKLE_BYTES))
        return _Unpickler(_next_pickle(stream), open_storage, path.stat().st_size).load()


def _load_old(path: Path) -> Any:
    """Read the format before torch 1.6: five pickles end to end, then every storage after its size."""
    n_bytes = path.stat().st_size
    with path.open("rb") as file:
        head = io.BytesIO(file.read(PICKLE_BYTES))
        mark, version, system, content, keys = (_next_pickle(head) for _ in range(5))
        sizes: dict[str, tuple[np.dtype, int]] = {}
        places: dict[str, int] = {}

        def note_size(dtype: np.dtype, key: str, size: int) -> np.ndarray:
            if sizes.setdefault(key, (dtype, size)) != (dtype, size):
                raise ValueError(f"storage {key} is described twice, differently")
            return np.broadcast_to(np.zeros((), dtype), size)

        def load(pickled: bytes, open_storage: OpenStorage = note_size) -> Any:
            return _Unpickler(pickled, open_storage, n_bytes).load()

        if (load(mark), load(version)) != OLD_FORMAT:
            raise ValueError("it does not begin as torch's old format does")
        if not load(system)["little_endian"]:
            raise ValueError("its byte order is not little")
        load(content)
        place = head.tell()
        for key in load(keys):
            dtype, size = sizes[key]
            file.seek(place)
            if file.read(8) != struct.pack("<q", size):
                raise ValueError(f"storage {key} does not hold {size} numbers")
            places[key] = place + 8
            place += 8 + size * dtype.itemsize
        if place != n_bytes:
            raise ValueError(f"its storages end at byte {place} of {n_bytes}")
        mapped = _map(path)
        return load(content, lambda dtype, key, size: _part(mapped, dtype, places[key], size))


def _next_pickle(stream: io.BytesIO) -> bytes:
    """Return a stream's next pickle. Raises ValueError for opcodes that torch does not write, and excessive sizes."""
    begin = stream.tell()
    limit = len(stream.getbuffer())
    for opcode, argument, _ in pickletools.genops(stream):
        if not _OPCODES.fullmatch(opcode.name) or (opcode.name == "LONG_BINPUT" and int(argument or 0) > limit):
            raise ValueError(f"its pickle holds {opcode.name} {argument!r}, which torch does not write")
    return stream.getvalue()[begin : stream.tell()]


def _map(path: Path) -> mmap.mmap:
    """Map a file, once for all of its storages: each mapping takes a file descriptor, and the limit may be 256."""
    with path.open("rb") as file:
        return map_file(file)


def map_file(file: IO[bytes]) -> mmap.mmap:
    """Map an open file to read it; privately, since some network disks refuse shared mappings."""
    return mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)


def _part(mapped: mmap.mmap, dtype: np.dtype, place: int, size: int) -> np.ndarray:
    """Return a storage of a mapped file; NumPy refuses one that exceeds the file."""
    return np.ndarray((size,), dtype, mapped, place) if size else np.empty(0, dtype)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63
