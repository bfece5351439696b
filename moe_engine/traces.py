"""Recorded routing: which experts every token chose.

A trace file is a stream of msgpack objects: a header (a map: magic, version, model), then frames. A frame is a map:

    tokens   how many
    begins   whether its first token begins a sequence (with an empty context)
    ids      their experts, [tokens, n_layer, top_k] in that order, best first: one byte each, then, where there are
             more than 256 experts, the higher bits as bit planes of 1/8 byte each
    weights  the router's weights of these, f16 (little-endian); left out if not recorded

Whole frames are appended, so a file that was cut short is readable up to the cut.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, BinaryIO, Self

import msgpack
import numpy as np
from numpy.typing import NDArray

from moe_engine.cache_files import replacing
from moe_engine.errors import ConfigError, TraceFormatError

MAGIC, VERSION = "moe_engine trace", 1
FRAME_TOKENS = 256
_LARGEST_FRAME = 1 << 28  # bytes
Ids = NDArray[np.uint16]
Weights = NDArray[np.float16]


@dataclass(frozen=True)
class TraceModel:
    """Which model a trace is of: `n_layer` counts its MoE layers, `hash` identifies the file it was loaded from."""

    architecture: str
    n_layer: int
    n_expert: int
    top_k: int
    hash: str = ""

    def __post_init__(self) -> None:
        limits = {"n_layer": 1 << 16, "n_expert": 1 << 16, "top_k": 1 << 10}
        for name, high in limits.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
                raise ConfigError(f"{name} is {value!r}, expected an integer from 1 to {high}")
        if self.top_k > self.n_expert:
            raise ConfigError(f"top_k is {self.top_k}, more than n_expert {self.n_expert}")
        for name in ("architecture", "hash"):
            value = getattr(self, name)
            if not isinstance(value, str) or len(value) > 256:
                raise ConfigError(f"{name} is {value!r:.80}, expected a text of at most 256 characters")


@dataclass(frozen=True)
class Trace:
    """ids [n_token, n_layer, top_k] uint16, best first; weights of the same shape, f16, or None; sequences: the number
    of tokens of each, in order. Raises ConfigError if they contradict each other or the model."""

    model: TraceModel
    ids: Ids
    weights: Weights | None
    sequences: tuple[int, ...]

    def __post_init__(self) -> None:
        shape = (len(self.ids), self.model.n_layer, self.model.top_k)
        if self.ids.shape != shape:
            raise ConfigError(f"ids have shape {self.ids.shape}, expected {shape}")
        _check_ids(self.ids, self.model)
        if self.weights is not None:
            if self.weights.shape != shape:
                raise ConfigError(f"weights have shape {self.weights.shape}, expected {shape} as the ids")
            if not np.isfinite(self.weights).all():
                raise ConfigError("weights are not all finite")
        if sum(self.sequences) != len(self.ids) or any(n < 1 for n in self.sequences):
            raise ConfigError(f"sequences have {sum(self.sequences)} tokens in all, the ids {len(self.ids)}")

    @property
    def n_token(self) -> int:
        return len(self.ids)

    def save(self, path: str | Path) -> None:
        """Writes a trace file, all or nothing. Raises ConfigError if that is impossible."""
        try:
            with replacing(Path(path)) as file:
                _write(file, _header(self.model))
                first = 0
                for length in self.sequences:
                    for start in range(first, first + length, FRAME_TOKENS):
                        part = slice(start, min(start + FRAME_TOKENS, first + length))
                        weights = None if self.weights is None else self.weights[part]
                        _write(file, _packed(self.model, self.ids[part], weights, begins=start == first))
                    first += length
        except OSError as e:
            raise ConfigError(f"{path}: cannot be written: {e.strerror}") from e

    @classmethod
    def load(cls, path: str | Path) -> "Trace":
        """Reads a trace file, or as much of it as there is. Raises TraceFormatError if it is no such file."""
        objects = _objects(Path(path))
        model = _model(next(objects, None), str(path))
        ids: list[Ids] = []
        weights: list[Weights | None] = []
        sequences: list[int] = []
        for number, found in enumerate(objects):
            frame_ids, frame_weights, begins = _frame(found, model, f"{path}: frame {number}")
            if begins or not sequences:
                sequences.append(0)
            sequences[-1] += len(frame_ids)
            ids.append(frame_ids)
            weights.append(frame_weights)
        recorded = [w for w in weights if w is not None]
        if recorded and len(recorded) < len(weights):
            raise TraceFormatError(
                f"{path}: {len(recorded)} of {len(weights)} frames have weights, expected all or none"
            )
        empty = np.zeros((0, model.n_layer, model.top_k), np.uint16)
        return cls(
            model,
            np.concatenate([empty, *ids]),
            np.concatenate(recorded) if recorded else None,
            tuple(sequences),
        )


class TraceWriter:
    """Writes a trace file frame by frame; every frame is on its way to the disk when `append` returns.

    What is at the path stays until the first frame comes. Raises ConfigError if the file cannot be written.
    """

    def __init__(self, path: str | Path, model: TraceModel) -> None:
        self._path, self._model = Path(path), model
        self._file: BinaryIO | None = None
        with self._told():
            if self._path.exists():
                open(path, "r+b").close()
            elif not os.access(self._path.parent, os.W_OK):
                reason = errno.EACCES if self._path.parent.is_dir() else errno.ENOENT
                raise OSError(reason, os.strerror(reason))

    def append(self, ids: NDArray[Any], weights: NDArray[Any] | None = None, *, begins: bool = False) -> None:
        """Adds tokens of one sequence: ids [tokens, n_layer, top_k], weights of the same shape or None."""
        with self._told():
            if self._file is None:
                self._file = open(self._path, "wb", buffering=0)  # noqa: SIM115 (closed by close)
                _write(self._file, _header(self._model))
            _write(self._file, _packed(self._model, ids, weights, begins=begins))

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise ConfigError(f"{self._path}: cannot be written: {e.strerror}") from e

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _write(file: IO[bytes], value: object) -> None:
    rest = memoryview(msgpack.packb(value))
    while rest:
        rest = rest[file.write(rest) :]


def _header(model: TraceModel) -> dict[str, object]:
    return {"magic": MAGIC, "version": VERSION, "model": asdict(model)}


def _packed(model: TraceModel, ids: NDArray[Any], weights: NDArray[Any] | None, *, begins: bool) -> dict[str, object]:
    """A frame."""
    assert ids.ndim == 3
    assert ids.shape[1:] == (model.n_layer, model.top_k)
    frame = {"tokens": len(ids), "begins": begins, "ids": _pack(ids, model.n_expert)}
    if weights is not None:
        assert weights.shape == ids.shape
        frame["weights"] = weights.astype("<f2").tobytes()
    return frame


def _pack(ids: NDArray[Any], n_expert: int) -> bytes:
    flat = ids.astype(np.uint16).ravel()
    planes = [np.packbits((flat >> bit) & 1).tobytes() for bit in range(8, (n_expert - 1).bit_length())]
    return (flat & 0xFF).astype(np.uint8).tobytes() + b"".join(planes)


def _unpack(packed: bytes, count: int, n_expert: int) -> Ids:
    """Raises ValueError if `packed` has another length than `count` ids have."""
    bits = range(8, (n_expert - 1).bit_length())
    plane = (count + 7) // 8
    if len(packed) != count + len(bits) * plane:
        raise ValueError(f"{len(packed)} bytes of ids, expected {count + len(bits) * plane}")
    raw = np.frombuffer(packed, np.uint8)
    ids = raw[:count].astype(np.uint16)
    for i, bit in enumerate(bits):
        start = count + i * plane
        ids |= np.unpackbits(raw[start : start + plane], count=count).astype(np.uint16) << bit
    return ids


def _check_ids(ids: Ids, model: TraceModel) -> None:
    """Raises ConfigError if an id is no expert, or a token has one twice in a layer."""
    if ids.size and int(ids.max()) >= model.n_expert:
        raise ConfigError(f"expert {int(ids.max())}, expected less than {model.n_expert}")
    ordered = np.sort(ids, axis=-1)
    if (ordered[..., 1:] == ordered[..., :-1]).any():
        raise ConfigError("a token chose the same expert twice in one layer")


def _objects(path: Path) -> Iterator[object]:
    """The msgpack objects of a file, without the one that was cut short."""
    try:
        file = open(path, "rb")  # noqa: SIM115 (the errors of opening are told apart)
    except OSError as e:
        raise TraceFormatError(f"{path}: {'no such file' if isinstance(e, FileNotFoundError) else e.strerror}") from e
    with file:
        unpacker = msgpack.Unpacker(
            file, max_buffer_size=_LARGEST_FRAME, max_str_len=1024, max_array_len=16, max_map_len=16, max_ext_len=16
        )
        while True:
            at = unpacker.tell()
            try:
                found = unpacker.unpack()
            except msgpack.OutOfData:
                return
            except (ValueError, TypeError, OSError, msgpack.UnpackException) as e:
                raise TraceFormatError(f"{path}: byte {at} begins no msgpack object ({e or type(e).__name__})") from e
            yield found


def _model(header: object, source: str) -> TraceModel:
    if not isinstance(header, dict) or header.get("magic") != MAGIC:
        raise TraceFormatError(f"{source}: is no trace file (it does not begin with '{MAGIC}')")
    if header.get("version") != VERSION:
        raise TraceFormatError(f"{source}: has trace version {header.get('version')!r:.40}, expected {VERSION}")
    fields = header.get("model")
    names = {"architecture", "n_layer", "n_expert", "top_k", "hash"}
    if not isinstance(fields, dict) or set(fields) != names:
        raise TraceFormatError(f"{source}: key 'model' is {fields!r:.80}, expected a map of {', '.join(sorted(names))}")
    try:
        return TraceModel(**fields)
    except ConfigError as e:
        raise TraceFormatError(f"{source}: {e}") from e


def _frame(found: object, model: TraceModel, source: str) -> tuple[Ids, Weights | None, bool]:
    if not isinstance(found, dict) or not {"tokens", "begins", "ids"} <= set(found) <= {*_FRAME_KEYS}:
        raise TraceFormatError(f"{source}: is {found!r:.80}, expected a map of {', '.join(_FRAME_KEYS)}")
    for key, kind in _FRAME_KEYS.items():
        if key in found and type(found[key]) is not kind:
            raise TraceFormatError(f"{source}: '{key}' is {found[key]!r:.40}, expected {kind.__name__}")
    shape = (found["tokens"], model.n_layer, model.top_k)
    if not 1 <= shape[0] <= _LARGEST_FRAME:
        raise TraceFormatError(f"{source}: has {shape[0]} tokens, expected 1 to {_LARGEST_FRAME}")
    count = shape[0] * shape[1] * shape[2]
    try:
        ids = _unpack(found["ids"], count, model.n_expert).reshape(shape)
        _check_ids(ids, model)
    except ValueError as e:  # ConfigError is one
        raise TraceFormatError(f"{source}: {e}") from e
    weights = None
    if "weights" in found:
        if len(found["weights"]) != 2 * count:
            raise TraceFormatError(f"{source}: {len(found['weights'])} bytes of weights, expected {2 * count}")
        weights = np.frombuffer(found["weights"], "<f2").reshape(shape).astype(np.float16)
        if not np.isfinite(weights).all():
            raise TraceFormatError(f"{source}: weights are not all finite")
    return ids, weights, found["begins"]


_FRAME_KEYS = {"tokens": int, "begins": bool, "ids": bytes, "weights": bytes}
