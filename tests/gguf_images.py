"""GGUF images that can be wrong in any way, and what the engine says of them."""

import signal
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from tiny_models import WRITABLE, in_turn, make

from moe_engine import Engine
from moe_engine.errors import MoeEngineError

FAMILIES = ("deepseek2/v3", "qwen2moe/plain")  # the second one quantized
SMALL: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
}
SECONDS = 20  # a case takes milliseconds

U32, F32, BOOL, STRING, ARRAY = 4, 6, 7, 8, 9  # types of metadata
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", U32: "I", 5: "i", F32: "f", BOOL: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass
class Key:
    name: bytes
    type: int
    payload: bytes

    def pack(self) -> bytes:
        return pack_string(self.name) + struct.pack("<I", self.type) + self.payload

    def set(self, type_id: int, value: Any) -> None:
        self.type = type_id
        is_string = type_id == STRING
        self.payload = pack_string(value) if is_string else struct.pack("<" + SCALARS[type_id], value)


@dataclass
class Tensor:
    name: bytes
    shape: list[int]  # in the file's order: contiguous dimension first
    type: int
    offset: int
    n_dim: int | None = None  # other than len(shape), if set

    def pack(self) -> bytes:
        n_dim = len(self.shape) if self.n_dim is None else self.n_dim
        sizes = struct.pack(f"<{len(self.shape)}Q", *self.shape)
        return pack_string(self.name) + struct.pack("<I", n_dim) + sizes + struct.pack("<IQ", self.type, self.offset)


@dataclass
class Image:
    """The parts of a GGUF file; `pack` writes whatever they say, possible or not."""

    keys: list[Key]
    tensors: list[Tensor]
    data: bytes
    magic: bytes = b"GGUF"
    version: int = 3
    n_tensor: int | None = None  # other than the true counts, if set
    n_key: int | None = None
    ends: list[int] = field(default_factory=list)  # of header, keys and tensor table, after packing

    @classmethod
    def parse(cls, raw: bytes) -> "Image":
        """Of a valid file."""
        n_tensor, n_key = struct.unpack_from("<QQ", raw, 8)
        pos = 24
        keys, tensors = [], []
        for _ in range(n_key):
            name, pos = read_string(raw, pos)
            (type_id,) = struct.unpack_from("<I", raw, pos)
            end = skip_value(raw, pos + 4, type_id)
            keys.append(Key(name, type_id, raw[pos + 4 : end]))
            pos = end
        for _ in range(n_tensor):
            name, pos = read_string(raw, pos)
            (n_dim,) = struct.unpack_from("<I", raw, pos)
            shape = list(struct.unpack_from(f"<{n_dim}Q", raw, pos + 4))
            tensors.append(Tensor(name, shape, *struct.unpack_from("<IQ", raw, pos + 4 + 8 * n_dim)))
            pos += 16 + 8 * n_dim
        return cls(keys, tensors, raw[-(-pos // 32) * 32 :])

    def pack(self, alignment: int = 32) -> bytes:
        n_tensor = len(self.tensors) if self.n_tensor is None else self.n_tensor
        n_key = len(self.keys) if self.n_key is None else self.n_key
        out = self.magic + struct.pack("<IQQ", self.version, n_tensor, n_key)
        self.ends = [len(out)]
        for records in (self.keys, self.tensors):
            out += b"".join(record.pack() for record in records)
            self.ends.append(len(out))
        return out + bytes(-len(out) % alignment) + self.data

    def key(self, name: str) -> Key:
        return next(key for key in self.keys if key.name.decode().endswith(name))

    def tensor(self, name: str) -> Tensor:
        return next(tensor for tensor in self.tensors if tensor.name == name.encode())


def pack_string(text: bytes | str) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def read_string(raw: bytes, pos: int) -> tuple[bytes, int]:
    (length,) = struct.unpack_from("<Q", raw, pos)
    return raw[pos + 8 : pos + 8 + length], pos + 8 + length


def skip_value(raw: bytes, pos: int, type_id: int) -> int:
    if type_id == STRING:
        return read_string(raw, pos)[1]
    if type_id != ARRAY:
        return pos + struct.calcsize("<" + SCALARS[type_id])
    item, count = struct.unpack_from("<IQ", raw, pos)
    pos += 12
    for _ in range(count):
        pos = skip_value(raw, pos, item)
    return pos


@cache
def valid(name: str) -> bytes:
    """A good file of a family."""
    types = "F32" if name == FAMILIES[0] else in_turn(*WRITABLE, "F32")
    with tempfile.TemporaryDirectory() as directory:
        return make(name, Path(directory), types, **SMALL).path.read_bytes()


@contextmanager
def time_limit() -> Iterator[None]:
    def stop(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"a damaged file kept the engine busy for {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(path: Path, device: str = "cpu") -> None:
    # Interpreted, the decode kernels that 8-bit activations lead to take most of the time limit.
    activations = "int8" if device == "cpu" else "float"
    with time_limit(), Engine.load(path, device=device, threads=1, activations=activations) as engine:
        engine.forward([1, 2, 3])


def error_of(path: Path) -> str:
    """The message of the error that the file must cause, which names the file."""
    with pytest.raises(MoeEngineError) as caught:
        run(path)
    message = str(caught.value)
    assert path.name in message
    assert len(message) < 600
    return message


def caught_from(path: Path, device: str = "cpu") -> MoeEngineError:
    """The error that a file must cause."""
    with pytest.raises(MoeEngineError) as caught:
        run(path, device)
    return caught.value
