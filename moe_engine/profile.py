"""Which experts earlier runs of a model used most, so that its slots begin with them.

One msgpack file per model (by its fingerprint) in the user's cache folder, replaced in one step:

    magic, version, model
    n_layer, n_expert
    counts     f32 [n_layer, n_expert], little-endian: uses of late, as the decode worker counts them
    resident   bits [n_layer, n_expert]: what was in a slot
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt

from moe_engine.cache_files import cache_folder, replace_file

MAGIC, VERSION = "moe_engine profile", 1
_LARGEST_FILE = 1 << 24

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Profile:
    """counts f32, resident bool, both `[n_layer, n_expert]`. model: `GGUFFile.fingerprint`."""

    model: str
    counts: npt.NDArray[np.float32]
    resident: npt.NDArray[np.bool_]

    def best_first(self) -> list[tuple[int, int]]:
        """All (layer, expert): what was resident, then the rest, those used most first."""
        order = np.lexsort((-self.counts.ravel(), ~self.resident.ravel()))
        return [divmod(int(key), self.counts.shape[1]) for key in order]

    def save(self) -> None:
        """Replaces what is kept of the model; where that is impossible, it says so and goes on."""
        n_layer, n_expert = self.counts.shape
        packed = msgpack.packb(
            {
                "magic": MAGIC,
                "version": VERSION,
                "model": self.model,
                "n_layer": n_layer,
                "n_expert": n_expert,
                "counts": self.counts.astype("<f4").tobytes(),
                "resident": np.packbits(self.resident).tobytes(),
            }
        )
        try:
            replace_file(path_of(self.model), packed)
        except OSError as error:
            log.warning("the use of experts is not kept: %s: %s", error.filename or "cache folder", error.strerror)


def path_of(model: str) -> Path:
    """Where the profile of a model is kept. model: its file's fingerprint."""
    return cache_folder() / f"profile-{model}.msgpack"


def load_profile(model: str, n_layer: int, n_expert: int) -> Profile | None:
    """What is kept of a model, None if nothing is; a file that is not in order is reported and ignored."""
    try:
        path = path_of(model)
        with open(path, "rb") as file:
            packed = file.read(_LARGEST_FILE + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("ignored: %s: cannot be read: %s", error.filename, error.strerror)
        return None
    try:
        return _parse(packed, model, (n_layer, n_expert))
    except ValueError as error:
        log.warning("ignored: %s: %s", path, error)
        return None


def _parse(packed: bytes, model: str, shape: tuple[int, int]) -> Profile:
    """Raises ValueError saying what is wrong."""
    if len(packed) > _LARGEST_FILE:
        raise ValueError(f"has more than {_LARGEST_FILE} bytes")
    try:
        found: Any = msgpack.unpackb(packed)
    except Exception as error:  # msgpack raises many kinds, ValueError and RecursionError among them
        raise ValueError("is damaged") from error
    if not isinstance(found, dict) or found.get("magic") != MAGIC or found.get("version") != VERSION:
        raise ValueError(f"is no profile of version {VERSION}")
    if (found.get("model"), found.get("n_layer"), found.get("n_expert")) != (model, *shape):
        raise ValueError("is of another model")
    counts, resident, size = found.get("counts"), found.get("resident"), shape[0] * shape[1]
    if not isinstance(counts, bytes) or len(counts) != 4 * size:
        raise ValueError(f"'counts' is not {4 * size} bytes")
    if not isinstance(resident, bytes) or len(resident) != (size + 7) // 8:
        raise ValueError(f"'resident' is not {(size + 7) // 8} bytes")
    values = np.frombuffer(counts, "<f4").reshape(shape).astype(np.float32)
    if not (np.isfinite(values).all() and (values >= 0).all()):
        raise ValueError("'counts' are not all finite and at least 0")
    bits = np.unpackbits(np.frombuffer(resident, np.uint8), count=size)
    return Profile(model, values, bits.reshape(shape).astype(bool))
