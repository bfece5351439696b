"""Parses one GGUF file: metadata and tensor table, with the tensor data mapped, never copied.

Source: the GGUF specification, versions 2 and 3. Files are untrusted: every length, count, offset and type is
checked against the file's size before it is used.
"""

import ctypes
import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_engine.errors import ModelFormatError, UnsupportedModelError
from moe_engine.kernels.quant_types import PLAIN_TYPES, QUANT_TYPES, QuantType

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4
_MAX_ARRAY_DEPTH = 4
_MAX_ELEMENTS = 1 << 44  # of a tensor


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies. `shape` is in torch's order: rows of `shape[-1]` contiguous elements."""

    name: str
    type_id: int
    shape: tuple[int, ...]
    part: int
    offset: int  # bytes from the start of the part's file
    nbytes: int  # 0 when the type is unknown

    @property
    def type(self) -> QuantType | None:
        """The tensor's type, None when this version does not know it."""
        return QUANT_TYPES.get(self.type_id) or PLAIN_TYPES.get(self.type_id)


class GGUFPart:
    """One mapped file: its metadata and the tensors whose data it holds. Raises `ModelFormatError` for damaged files,
    `UnsupportedModelError` for versions that are not read."""

    def __init__(self, path: Path, index: int) -> None:
        self.path, self.index = path, index
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError as e:
            raise ModelFormatError(f"{path}: no such file") from e
        except ValueError as e:  # an empty file cannot be mapped
            raise ModelFormatError(f"{path}: the file is empty, expected a GGUF file") from e
        except OSError as e:
            raise ModelFormatError(f"{path}: cannot be read: {e.strerror}") from e
        self.size = len(self._map)
        self._pos = 0
        self.metadata: dict[str, Any] = {}
        self.tensors: list[TensorInfo] = []
        self._read()
        self.address = np.frombuffer(self._map, np.uint8).ctypes.data

    def view(self, offset: int, nbytes: int) -> ctypes.Array[ctypes.c_ubyte]:
        """The bytes as a buffer that keeps the mapping alive."""
        buffer = (ctypes.c_ubyte * nbytes).from_address(self.address + offset)
        buffer.owner = self._map  # type: ignore[attr-defined]
        return buffer

    def drop_pages(self) -> None:
        """Takes the mapped pages out of the process."""
        self._map.madvise(mmap.MADV_DONTNEED)

    # -- reading -----------------------------------------------------------------------------------------------

    def _read(self) -> None:
        magic = self._take(4, "the magic number")
        if magic != b"GGUF":
            raise ModelFormatError(f"{self.path}: starts with {magic!r}, expected b'GGUF': not a GGUF file")
        version = self._scalar("I", "the version")
        if version not in (2, 3):
            known = "a big-endian file" if version in (2 << 24, 3 << 24) else f"GGUF version {version}"
            raise UnsupportedModelError(f"{self.path}: {known} is not supported, expected version 2 or 3")
        n_tensor = self._count("the number of tensors", min_bytes=24)
        n_key = self._count("the number of metadata keys", min_bytes=13)
        for i in range(n_key):
            key = self._string(f"metadata key {i}")
            if key in self.metadata:
                raise ModelFormatError(f"{self.path}: metadata key '{key}' appears twice")
            self.metadata[key] = self._value(self._scalar("I", f"the type of key '{key}'"), key, 0)
        headers = [self._tensor_header(i) for i in range(n_tensor)]
        self._locate(headers)

    def _fail(self, what: str, need: int) -> ModelFormatError:
        return ModelFormatError(
            f"{self.path}: truncated or damaged: {what} needs {need} bytes at offset {self._pos}, "
            f"but the file has {self.size} bytes"
        )

    def _take(self, n: int, what: str) -> bytes:
        if n > self.size - self._pos:
            raise self._fail(what, n)
        self._pos += n
        return self._map[self._pos - n : self._pos]

    def _scalar(self, code: str, what: str) -> Any:
        return struct.unpack("<" + code, self._take(struct.calcsize("<" + code), what))[0]

    def _count(self, what: str, min_bytes: int) -> int:
        count = int(self._scalar("Q", what))
        if count * min_bytes > self.size - self._pos:
            raise self._fail(f"{what} is {count}, which", count * min_bytes)
        return count

    def _string(self, what: str) -> str:
        raw = self._take(self._count(f"the length of {what}", min_bytes=1), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as e:
            raise ModelFormatError(f"{self.path}: {what} is not valid UTF-8: {raw[:40]!r}") from e

    def _value(self, type_id: int, key: str, depth: int) -> Any:
        what = f"the value of key '{key}'"
        if type_id in _SCALARS:
            return self._scalar(_SCALARS[type_id], what)
        if type_id == _STRING:
            return self._string(what)
        if type_id != _ARRAY or depth == _MAX_ARRAY_DEPTH:
            raise ModelFormatError(f"{self.path}: key '{key}' has the unknown value type {type_id}")
        item_type = self._scalar("I", what)
        if item_type in _SCALARS:
            dtype = np.dtype("<" + _SCALARS[item_type] if _SCALARS[item_type] != "?" else "?")
            count = self._count(f"the length of array '{key}'", min_bytes=dtype.itemsize)
            return np.frombuffer(self._take(count * dtype.itemsize, what), dtype).tolist()
        if item_type == _STRING:
            return self._strings(key)
        count = self._count(f"the length of array '{key}'", min_bytes=12)
        return [self._value(item_type, key, depth + 1) for _ in range(count)]

    def _strings(self, key: str) -> list[str]:
        """A string array in one tight loop: vocabularies have hundreds of thousands of entries."""
        count = self._count(f"the length of array '{key}'", min_bytes=8)
        data, pos, size, length_at = self._map, self._pos, self.size, struct.Struct("<Q").unpack_from
        strings = []
        for i in range(count):
            if pos + 8 > size:
                raise self._fail(f"entry {i} of array '{key}'", 8)
            end = pos + 8 + length_at(data, pos)[0]
            if end > size:
                self._pos = pos
                raise self._fail(f"entry {i} of array '{key}'", end - pos)
            strings.append(data[pos + 8 : end].decode("utf-8", "replace"))
            pos = end
        self._pos = pos
        return strings

    def _tensor_header(self, i: int) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, type id and offset relative to the data section."""
        name = self._string(f"the name of tensor {i}")
        n_dim = self._scalar("I", f"the number of dimensions of tensor '{name}'")
        if not 1 <= n_dim <= _MAX_DIMENSIONS:
            raise ModelFormatError(
                f"{self.path}: tensor '{name}' has {n_dim} dimensions, expected 1 to {_MAX_DIMENSIONS}"
            )
        sizes = [self._scalar("Q", f"the shape of tensor '{name}'") for _ in range(n_dim)]
        type_id = self._scalar("I", f"the type of tensor '{name}'")
        offset = self._scalar("Q", f"the offset of tensor '{name}'")
        return name, tuple(reversed(sizes)), type_id, offset

    def _locate(self, headers: list[tuple[str, tuple[int, ...], int, int]]) -> None:
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise ModelFormatError(f"{self.path}: key 'general.alignment' is {alignment!r}, expected a power of two")
        data_start = -(-self._pos // alignment) * alignment
        for name, shape, type_id, relative in headers:
            if relative % alignment:
                raise ModelFormatError(
                    f"{self.path}: tensor '{name}' starts at offset {relative}, expected a multiple of {alignment}"
                )
            nbytes = self._checked_bytes(name, shape, type_id)
            offset = data_start + relative
            if offset + nbytes > self.size:
                raise ModelFormatError(
                    f"{self.path}: truncated: tensor '{name}' needs bytes {offset} to {offset + nbytes}, but the "
                    f"file has {self.size} bytes: download or copy it again"
                )
            self.tensors.append(TensorInfo(name, type_id, shape, self.index, offset, nbytes))
        self._check_overlap()

    def _checked_bytes(self, name: str, shape: tuple[int, ...], type_id: int) -> int:
        if min(shape) < 1:
            raise ModelFormatError(f"{self.path}: tensor '{name}' has the shape {shape}, expected sizes >= 1")
        if math.prod(shape) > _MAX_ELEMENTS:
            raise ModelFormatError(
                f"{self.path}: tensor '{name}' has the shape {shape}, expected at most {_MAX_ELEMENTS} elements"
            )
        quant = QUANT_TYPES.get(type_id) or PLAIN_TYPES.get(type_id)
        if quant is None:
            return 0
        if shape[-1] % quant.block_size:
            raise ModelFormatError(
                f"{self.path}: tensor '{name}' of type {quant} has rows of {shape[-1]} elements, expected a "
                f"multiple of {quant.block_size}"
            )
        nbytes = quant.row_bytes(shape[-1])
        for size in shape[:-1]:
            nbytes *= size
        return nbytes

    def _check_overlap(self) -> None:
        end, previous = 0, ""
        for info in sorted(self.tensors, key=lambda info: (info.offset, info.nbytes)):
            if info.offset < end:
                raise ModelFormatError(f"{self.path}: the data of tensors '{previous}' and '{info.name}' overlap")
            end, previous = info.offset + info.nbytes, info.name
