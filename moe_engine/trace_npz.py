"""Traces as numpy archives (.npz), to exchange them with other tools.

ids        [tokens, MoE layers, top-k], any integer type, best first
weights    the same shape, floating-point; `w` is understood too; optional
seqlen     [2] int64: tokens of every sequence, and how many of these are its prompt (not kept: written as 0); optional
sequences  [n] int64: tokens of each sequence, where they differ; optional, goes before seqlen
n_expert   int64; optional: without it there are as many experts as the largest id says
model      [2] texts: architecture and hash; optional
"""

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_engine.cache_files import replacing
from moe_engine.errors import ConfigError, TraceFormatError
from moe_engine.traces import Trace, TraceModel

_KNOWN = ("ids", "weights", "w", "seqlen", "sequences", "n_expert", "model")
_LARGEST = 1 << 33  # bytes of an archive, unpacked


def export_npz(trace: Trace, path: str | Path) -> None:
    """Writes a trace with names as above. Raises ConfigError if the file cannot be written."""
    arrays: dict[str, NDArray[Any]] = {
        "ids": trace.ids.astype(np.uint8) if trace.model.n_expert <= 256 else trace.ids,
        "n_expert": np.array(trace.model.n_expert, np.int64),
        "model": np.array([trace.model.architecture, trace.model.hash]),
    }
    if trace.weights is not None:
        arrays["weights"] = trace.weights
    if len(set(trace.sequences)) == 1:
        arrays["seqlen"] = np.array([trace.sequences[0], 0], np.int64)
    else:
        arrays["sequences"] = np.array(trace.sequences, np.int64)
    try:
        with replacing(Path(path)) as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    except OSError as e:
        raise ConfigError(f"{path}: cannot be written: {e.strerror}") from e


def import_npz(path: str | Path, n_expert: int | None = None) -> Trace:
    """Reads an archive; `n_expert` goes before what it says. Raises TraceFormatError if it holds no trace."""
    arrays = _arrays(Path(path))
    if "ids" not in arrays:
        raise TraceFormatError(f"{path}: has no array 'ids' [tokens, MoE layers, top-k]")
    ids = arrays["ids"]
    if ids.ndim != 3 or ids.dtype.kind not in "iu" or not ids.size:
        raise _wrong(path, "ids", ids, "integers [tokens, MoE layers, top-k], at least one")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= 1 << 16:
        raise TraceFormatError(f"{path}: array 'ids' has ids from {low} to {high}, expected 0 to {(1 << 16) - 1}")
    weights = arrays.get("weights", arrays.get("w"))
    if weights is not None and (weights.shape != ids.shape or weights.dtype.kind != "f"):
        raise _wrong(path, "weights", weights, f"floating-point {list(ids.shape)}")
    architecture, digest = _texts(path, arrays)
    n_expert = n_expert or _n_expert(path, arrays) or high + 1
    try:
        with np.errstate(over="ignore"):  # what is too large for f16 becomes infinite, which Trace refuses
            half = None if weights is None else weights.astype(np.float16)
        model = TraceModel(architecture, ids.shape[1], n_expert, ids.shape[2], digest)
        return Trace(model, ids.astype(np.uint16), half, _sequences(path, arrays, len(ids)))
    except ConfigError as e:
        raise TraceFormatError(f"{path}: {e}") from e


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > _LARGEST:
            raise TraceFormatError(f"{path}: unpacks to {size} bytes, expected at most {_LARGEST}")
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in _KNOWN if name in archive}
    except FileNotFoundError as e:
        raise TraceFormatError(f"{path}: no such file") from e
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError) as e:
        raise TraceFormatError(f"{path}: is no readable .npz archive ({e})") from e


def _texts(path: str | Path, arrays: dict[str, NDArray[Any]]) -> tuple[str, str]:
    model = arrays.get("model")
    if model is None:
        return "unknown", ""
    if model.shape != (2,) or model.dtype.kind != "U":
        raise _wrong(path, "model", model, "two texts")
    return str(model[0]), str(model[1])


def _n_expert(path: str | Path, arrays: dict[str, NDArray[Any]]) -> int | None:
    n_expert = arrays.get("n_expert")
    if n_expert is None:
        return None
    if n_expert.shape != () or n_expert.dtype.kind not in "iu":
        raise _wrong(path, "n_expert", n_expert, "one integer")
    return int(n_expert)


def _sequences(path: str | Path, arrays: dict[str, NDArray[Any]], n_token: int) -> tuple[int, ...]:
    lengths, seqlen = arrays.get("sequences"), arrays.get("seqlen")
    if lengths is not None:
        if lengths.ndim != 1 or lengths.dtype.kind not in "iu":
            raise _wrong(path, "sequences", lengths, "integers [sequences]")
        return tuple(int(n) for n in lengths)
    if seqlen is None:
        return (n_token,)
    if seqlen.shape != (2,) or seqlen.dtype.kind not in "iu":
        raise _wrong(path, "seqlen", seqlen, "two integers")
    length = int(seqlen[0])
    if length < 1 or n_token % length:
        raise TraceFormatError(f"{path}: array 'seqlen' says {length} tokens a sequence, which do not divide {n_token}")
    return (length,) * (n_token // length)


def _wrong(path: str | Path, name: str, array: NDArray[Any], expected: str) -> TraceFormatError:
    return TraceFormatError(f"{path}: array '{name}' is {array.dtype} {list(array.shape)}, expected {expected}")
