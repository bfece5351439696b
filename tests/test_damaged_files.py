"""Files with random damage: an error of this package with a message, or a working engine, never anything else.

A crash of native code ends the test run, which is how it is noticed; a hang is ended by a timer.
"""

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from gguf_images import (
    ARRAY,
    BOOL,
    F32,
    FAMILIES,
    SCALARS,
    STRING,
    U32,
    Image,
    Key,
    pack_string,
    run,
    valid,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_engine.errors import MoeEngineError

HUGE = [0, 1, 2, 3, 7, 31, 32, 33, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1]
TYPE_IDS = [*range(45), 77, 133, 139, 200, 399, 2**31, 2**32 - 1]
WRONG_VALUES: list[tuple[int, Any]] = [
    (STRING, "x"),
    (STRING, ""),
    (STRING, b"\xff\xfe"),
    (BOOL, True),
    (F32, math.nan),
    (F32, math.inf),
    (F32, -1.0),
    (12, 1e300),
    (5, -1),
    (11, -(2**63)),
    (10, 2**64 - 1),
    (U32, 0),
]


@dataclass(frozen=True)
class Damage:
    """What a test case does: small numbers, so that a failure prints as something to repeat."""

    where: int
    value: int

    def pick(self, items: list[Any]) -> Any:
        return items[self.where % len(items)]

    def choose(self, items: list[Any]) -> Any:
        return items[self.value % len(items)]

    def overwrite(self, raw: bytes, start: int, stop: int, new: bytes) -> bytes:
        at = start + self.where % (stop - start)
        return (raw[:at] + new + raw[at + len(new) :])[: len(raw)]


def _scalar_keys(image: Image) -> list[Key]:
    return [key for key in image.keys if key.type in SCALARS]


def _byte_in(section: int) -> Callable[[Image, Damage], bytes]:
    def apply(image: Image, damage: Damage) -> bytes:
        raw, bounds = image.pack(), [0, *image.ends]
        return damage.overwrite(raw, bounds[section], bounds[section + 1], bytes([damage.value % 256]))

    return apply


def _word_in_metadata(image: Image, damage: Damage) -> bytes:
    raw = image.pack()
    return damage.overwrite(raw, 4, image.ends[-1], struct.pack("<Q", damage.choose(HUGE)))


def _truncate(image: Image, damage: Damage) -> bytes:
    raw = image.pack()
    # Half of the cuts into the metadata, which is the smaller part.
    return raw[: damage.where % (image.ends[-1] if damage.value % 2 else len(raw))]


def _key_value(image: Image, damage: Damage) -> bytes:
    key = damage.pick(_scalar_keys(image))
    size = len(key.payload)
    key.payload = struct.pack("<Q", damage.choose(HUGE))[:size].ljust(size, b"\0")
    return image.pack()


def _key_type(image: Image, damage: Damage) -> bytes:
    damage.pick(image.keys).set(*damage.choose(WRONG_VALUES))
    return image.pack()


def _key_array(image: Image, damage: Damage) -> bytes:
    """An array where a number is expected: empty, of differing numbers, or of a wrong type."""
    key = damage.pick(_scalar_keys(image))
    key.type = ARRAY
    key.payload = damage.choose(
        [
            struct.pack("<IQ", U32, 0),
            struct.pack("<IQII", U32, 2, 1, 2),
            struct.pack("<IQ", STRING, 1) + pack_string("x"),
            struct.pack("<IQIQ", ARRAY, 1, U32, 0),
            struct.pack("<IQ", 99, 1),
            struct.pack("<IQ", STRING, 2**61),
        ]
    )
    return image.pack()


def _array_length(image: Image, damage: Damage) -> bytes:
    key = damage.pick([key for key in image.keys if key.type == ARRAY])
    item, count = struct.unpack_from("<IQ", key.payload)
    new = damage.choose([*HUGE, count - 1, count + 1])
    key.payload = struct.pack("<IQ", item, new) + key.payload[12:]
    return image.pack()


def _drop_key(image: Image, damage: Damage) -> bytes:
    image.keys.remove(damage.pick(image.keys))
    return image.pack()


def _rename_key(image: Image, damage: Damage) -> bytes:
    damage.pick(image.keys).name += b"_"
    return image.pack()


def _duplicate_key(image: Image, damage: Damage) -> bytes:
    image.keys.append(damage.pick(image.keys))
    return image.pack()


def _swap_key_values(image: Image, damage: Damage) -> bytes:
    a, b = damage.pick(_scalar_keys(image)), damage.choose(_scalar_keys(image))
    a.type, a.payload, b.type, b.payload = b.type, b.payload, a.type, a.payload
    return image.pack()


def _count(image: Image, damage: Damage) -> bytes:
    if damage.where % 2:
        image.n_tensor = damage.choose([*HUGE, len(image.tensors) - 1, len(image.tensors) + 1])
    else:
        image.n_key = damage.choose([*HUGE, len(image.keys) - 1, len(image.keys) + 1])
    return image.pack()


def _drop_tensor(image: Image, damage: Damage) -> bytes:
    image.tensors.remove(damage.pick(image.tensors))
    return image.pack()


def _rename_tensor(image: Image, damage: Damage) -> bytes:
    tensor = damage.pick(image.tensors)
    tensor.name = damage.choose([tensor.name + b"x", b"", b"\xff", b"blk.99999999999.x", b"x" * 5000])
    return image.pack()


def _swap_tensor_names(image: Image, damage: Damage) -> bytes:
    a, b = damage.pick(image.tensors), damage.choose(image.tensors)
    a.name, b.name = b.name, a.name
    return image.pack()


def _duplicate_tensor(image: Image, damage: Damage) -> bytes:
    image.tensors.append(damage.pick(image.tensors))
    return image.pack()


def _tensor_type(image: Image, damage: Damage) -> bytes:
    damage.pick(image.tensors).type = damage.choose(TYPE_IDS)
    return image.pack()


def _tensor_size(image: Image, damage: Damage) -> bytes:
    tensor = damage.pick(image.tensors)
    dim = damage.value % len(tensor.shape)
    tensor.shape[dim] = damage.choose([*HUGE, tensor.shape[dim] - 1, tensor.shape[dim] + 1, 2 * tensor.shape[dim]])
    return image.pack()


def _tensor_rank(image: Image, damage: Damage) -> bytes:
    tensor = damage.pick(image.tensors)
    change = damage.value % 5
    if change == 0:
        tensor.shape.pop()
    elif change == 1:
        tensor.shape.append(1)
    elif change == 2:
        tensor.shape.insert(0, 1)
    elif change == 3:
        tensor.shape.reverse()
    else:
        tensor.n_dim = damage.choose(HUGE) % 2**32
    return image.pack()


def _tensor_offset(image: Image, damage: Damage) -> bytes:
    tensor = damage.pick(image.tensors)
    tensor.offset = damage.choose([*HUGE, tensor.offset + 32, tensor.offset - 32 & 2**64 - 1, 64])
    return image.pack()


def _tensor_data(image: Image, damage: Damage) -> bytes:
    """All of a tensor's numbers become NaN, infinite or huge: routers must not choose impossible experts."""
    tensor = damage.pick([tensor for tensor in image.tensors if tensor.type == 0])
    number = damage.choose([math.nan, math.inf, -math.inf, 3e38, 0.0, -3e38])
    n = math.prod(tensor.shape)
    image.data = image.data[: tensor.offset] + struct.pack("<f", number) * n + image.data[tensor.offset + 4 * n :]
    return image.pack()


def _all_data(image: Image, damage: Damage) -> bytes:
    image.data = bytes([damage.value % 256]) * len(image.data)
    return image.pack()


KINDS: dict[str, Callable[[Image, Damage], bytes]] = {
    "truncate": _truncate,
    "byte_in_header": _byte_in(0),
    "byte_in_keys": _byte_in(1),
    "byte_in_tensor_table": _byte_in(2),
    "word_in_metadata": _word_in_metadata,
    "count": _count,
    "key_value": _key_value,
    "key_type": _key_type,
    "key_array": _key_array,
    "array_length": _array_length,
    "drop_key": _drop_key,
    "rename_key": _rename_key,
    "duplicate_key": _duplicate_key,
    "swap_key_values": _swap_key_values,
    "drop_tensor": _drop_tensor,
    "rename_tensor": _rename_tensor,
    "swap_tensor_names": _swap_tensor_names,
    "duplicate_tensor": _duplicate_tensor,
    "tensor_type": _tensor_type,
    "tensor_size": _tensor_size,
    "tensor_rank": _tensor_rank,
    "tensor_offset": _tensor_offset,
    "tensor_data": _tensor_data,
    "all_data": _all_data,
}


def cases(n: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Runs a test on `n` damages, always the same ones."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        where, value = st.integers(0, 2**31), st.integers(0, 2**31) | st.integers(0, 64)
        given_damage = given(name=st.sampled_from(FAMILIES), damage=st.builds(Damage, where, value))(test)
        return settings(
            max_examples=n,
            derandomize=True,
            database=None,
            suppress_health_check=[HealthCheck.function_scoped_fixture],  # the folder is reused on purpose
        )(given_damage)

    return decorate


def check(path: Path, raw: bytes, device: str) -> None:
    path.write_bytes(raw)
    try:
        run(path, device)
    except MoeEngineError as error:
        assert str(error)  # noqa: PT017 - when the damage is harmless there is no error to expect


@pytest.mark.parametrize("kind", KINDS)
@cases(25)
def test_damage_is_an_error_or_harmless(tmp_path: Path, kind: str, name: str, damage: Damage) -> None:
    check(tmp_path / "broken.gguf", KINDS[kind](Image.parse(valid(name)), damage), "cpu")


@pytest.mark.parametrize("kind", ["count", "key_value", "drop_tensor", "tensor_type", "tensor_size", "tensor_data"])
@cases(6)
def test_damage_on_an_accelerator(tmp_path: Path, kind: str, name: str, damage: Damage) -> None:
    """Memory is planned there before anything is loaded."""
    check(tmp_path / "broken.gguf", KINDS[kind](Image.parse(valid(name)), damage), "simulated")
