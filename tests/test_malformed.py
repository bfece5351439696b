"""Damaged and hostile files: an error of this package with a useful message, or a working engine, never anything else.

A crash of native code ends the test run, which is how it is noticed; a hang is ended by a timer.
"""

import math
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import WRITABLE, FileOptions, in_turn, make

from moe_engine import Engine
from moe_engine.errors import MoeEngineError, UnsupportedModelError

FAMILIES = ("deepseek2/v3", "qwen2moe/plain")  # the second one quantized
SMALL: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
}
SECONDS = 20  # a case takes milliseconds


# --- GGUF images that can be wrong in any way --------------------------------------------------------------------

U32, F32, BOOL, STRING, ARRAY = 4, 6, 7, 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", U32: "I", 5: "i", F32: "f", BOOL: "?", 10: "Q", 11: "q", 12: "d"}


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
        self.payload = pack_string(value) if is_string else struct.pack("<" + _SCALARS[type_id], value)


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
        return pos + struct.calcsize("<" + _SCALARS[type_id])
    item, count = struct.unpack_from("<IQ", raw, pos)
    pos += 12
    for _ in range(count):
        pos = skip_value(raw, pos, item)
    return pos


# --- running one ---------------------------------------------------------------------------------------------------


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


@pytest.fixture(scope="session")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], bytes]:
    """The bytes of a good file of a family."""

    @cache
    def read(name: str) -> bytes:
        types = "F32" if name == FAMILIES[0] else in_turn(*WRITABLE, "F32")
        return make(name, tmp_path_factory.mktemp("valid"), types, **SMALL).path.read_bytes()

    return read


@pytest.fixture
def image(valid: Callable[[str], bytes]) -> Image:
    return Image.parse(valid("deepseek2/v3"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "broken.gguf"


@pytest.mark.parametrize("name", FAMILIES)
def test_the_unbroken_file_runs(valid: Callable[[str], bytes], path: Path, name: str) -> None:
    raw = valid(name)
    assert Image.parse(raw).pack() == raw
    path.write_bytes(raw)
    run(path)


# --- random damage -------------------------------------------------------------------------------------------------

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
    return [key for key in image.keys if key.type in _SCALARS]


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
            deadline=None,
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
def test_damage_is_an_error_or_harmless(
    valid: Callable[[str], bytes], path: Path, kind: str, name: str, damage: Damage
) -> None:
    check(path, KINDS[kind](Image.parse(valid(name)), damage), "cpu")


@pytest.mark.parametrize("kind", ["count", "key_value", "drop_tensor", "tensor_type", "tensor_size", "tensor_data"])
@cases(10)
def test_damage_on_an_accelerator(
    valid: Callable[[str], bytes], path: Path, kind: str, name: str, damage: Damage
) -> None:
    """Memory is planned there before anything is loaded."""
    check(path, KINDS[kind](Image.parse(valid(name)), damage), "simulated")


@pytest.mark.parametrize("name", ["token_embd.weight", "output_norm.weight", "blk.1.ffn_down_exps.weight"])
def test_missing_tensor_is_named_on_an_accelerator(image: Image, path: Path, name: str) -> None:
    image.tensors.remove(image.tensor(name))
    path.write_bytes(image.pack())
    assert name in str(_caught(path, "simulated"))


# --- messages ------------------------------------------------------------------------------------------------------


def test_missing_file(path: Path) -> None:
    assert "no such file" in error_of(path).lower()


def test_directory(tmp_path: Path) -> None:
    error_of(tmp_path)


def test_empty_file(path: Path) -> None:
    path.write_bytes(b"")
    assert "empty" in error_of(path)


@pytest.mark.parametrize("magic", [b"FUGG", b"ggml", b"PK\3\4", bytes(4)])
def test_wrong_magic(image: Image, path: Path, magic: bytes) -> None:
    image.magic = magic
    path.write_bytes(image.pack())
    assert "GGUF" in error_of(path)


@pytest.mark.parametrize("version", [0, 1, 4, 2**32 - 1])
def test_wrong_version(image: Image, path: Path, version: int) -> None:
    image.version = version
    path.write_bytes(image.pack())
    assert str(version) in error_of(path)


def test_big_endian(image: Image, path: Path) -> None:
    image.version = 3 << 24
    path.write_bytes(image.pack())
    assert "endian" in error_of(path)


def test_version_2_is_read(image: Image, path: Path) -> None:
    image.version = 2
    path.write_bytes(image.pack())
    run(path)


@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_truncated_data_names_both_sizes(image: Image, path: Path, share: float) -> None:
    raw = image.pack()
    kept = image.ends[-1] + int((len(raw) - image.ends[-1]) * share)
    path.write_bytes(raw[:kept])
    message = error_of(path)
    assert "truncated" in message
    assert str(kept) in message


@pytest.mark.parametrize(
    ("type_id", "words"),
    [
        (4, ["Q4_2", "retired"]),
        (5, ["Q4_3", "retired"]),
        (31, ["Q4_0_4_4", "retired"]),
        (33, ["Q4_0_8_8", "retired"]),
        (38, ["retired"]),
        (9, ["Q8_1"]),
        (41, ["Q1_0"]),
        (77, ["77"]),
        (139, ["IQ4_K", "ik_llama"]),
        (202, ["202", "ik_llama"]),
        (26, ["I32"]),
    ],
)
def test_type_is_named(image: Image, path: Path, type_id: int, words: list[str]) -> None:
    name = "blk.1.ffn_down_exps.weight"
    image.tensor(name).type = type_id
    path.write_bytes(image.pack())
    message = error_of(path)
    for word in (name, *words):
        assert word in message


def test_row_that_is_no_multiple_of_the_block(image: Image, path: Path) -> None:
    name = "blk.1.ffn_down_exps.weight"
    image.tensor(name).type = 12  # Q4_K: 256 elements, where rows have 32
    path.write_bytes(image.pack())
    message = error_of(path)
    for word in (name, "Q4_K", "32", "256"):
        assert word in message


@pytest.mark.parametrize(
    "name",
    [
        "token_embd.weight",
        "output_norm.weight",
        "blk.0.attn_norm.weight",
        "blk.0.ffn_up.weight",
        "blk.1.attn_v_b.weight",
    ]
    + [f"blk.1.ffn_{part}_exps.weight" for part in ("gate", "up", "down")]
    + ["blk.1.attn_q_a_norm.weight", "blk.1.attn_kv_a_mqa.weight", "blk.1.attn_output.weight"],
)
def test_missing_tensor_is_named(image: Image, path: Path, name: str) -> None:
    image.tensors.remove(image.tensor(name))
    path.write_bytes(image.pack())
    message = error_of(path)
    assert name in message
    assert "missing" in message


@pytest.mark.parametrize(
    ("name", "dimension", "found", "expected"),
    [
        ("blk.0.attn_norm.weight", 0, 16, 32),
        ("blk.0.attn_output.weight", 1, 31, 32),
        ("blk.1.attn_output.weight", 0, 32, 96),
        ("blk.1.ffn_gate_inp.weight", 1, 7, 8),
        ("blk.1.exp_probs_b.bias", 0, 5, 8),
        ("blk.1.ffn_up_exps.weight", 2, 7, 8),
        ("blk.1.ffn_gate_exps.weight", 1, 30, 32),
        ("output.weight", 0, 16, 32),
    ],
)
def test_wrong_shape_shows_both(image: Image, path: Path, name: str, dimension: int, found: int, expected: int) -> None:
    tensor = image.tensor(name)
    assert tensor.shape[dimension] == expected
    tensor.shape[dimension] = found
    path.write_bytes(image.pack())
    message = error_of(path)
    assert name in message
    assert str(found) in message
    assert str(expected) in message


def test_unused_tensor_is_named(image: Image, path: Path) -> None:
    """Leaving out a tensor of a model silently gives wrong results."""
    sinks = Tensor(b"blk.0.attn_sinks.weight", [1], 0, len(image.data))
    image.tensors.append(sinks)
    image.data += bytes(32)
    path.write_bytes(image.pack())
    assert "blk.0.attn_sinks.weight" in error_of(path)


def test_duplicate_tensor_is_named(image: Image, path: Path) -> None:
    image.tensors.append(image.tensor("output.weight"))
    path.write_bytes(image.pack())
    assert "output.weight" in error_of(path)


def test_duplicate_key_is_named(image: Image, path: Path) -> None:
    image.keys.append(image.key("block_count"))
    path.write_bytes(image.pack())
    assert "deepseek2.block_count" in error_of(path)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt-oss", "", "../errors", "__init__", "Deepseek2"])
def test_unsupported_architecture_lists_the_supported(image: Image, path: Path, architecture: str) -> None:
    image.key("general.architecture").set(STRING, architecture)
    path.write_bytes(image.pack())
    with pytest.raises(UnsupportedModelError) as caught:
        run(path)
    for word in (architecture, "deepseek2", "qwen2moe", "qwen3moe", path.name):
        assert word in str(caught.value)


@pytest.mark.parametrize("key", ["general.architecture", "block_count", "attention.head_count", "expert_used_count"])
def test_missing_key_is_named(image: Image, path: Path, key: str) -> None:
    image.keys.remove(image.key(key))
    path.write_bytes(image.pack())
    message = error_of(path)
    assert key in message
    assert "missing" in message


@pytest.mark.parametrize(
    ("key", "type_id", "value"),
    [
        ("attention.head_count", U32, 0),
        ("attention.head_count", STRING, "four"),
        ("block_count", U32, 0),
        ("block_count", BOOL, True),
        ("block_count", F32, 2.0),
        ("embedding_length", U32, 0),
        ("expert_used_count", U32, 0),
        ("expert_used_count", U32, 9),
        ("expert_count", U32, 0),
        ("expert_group_count", U32, 3),
        ("expert_group_used_count", U32, 5),
        ("expert_gating_func", U32, 9),
        ("expert_weights_norm", U32, 1),
        ("expert_weights_scale", F32, math.nan),
        ("attention.layer_norm_rms_epsilon", F32, math.nan),
        ("attention.layer_norm_rms_epsilon", F32, -1.0),
        ("attention.layer_norm_rms_epsilon", STRING, "small"),
        ("attention.kv_lora_rank", U32, 0),
        ("attention.key_length_mla", U32, 1),
        ("rope.dimension_count", U32, 0),
        ("rope.dimension_count", U32, 48),
        ("rope.dimension_count", U32, 15),
        ("rope.freq_base", F32, 0.0),
        ("rope.freq_base", F32, math.inf),
        ("context_length", U32, 0),
    ],
)
def test_bad_value_names_the_key(image: Image, path: Path, key: str, type_id: int, value: Any) -> None:
    image.key(key).set(type_id, value)
    path.write_bytes(image.pack())
    message = error_of(path)
    assert f"deepseek2.{key}" in message
    assert str(value).rstrip("0").rstrip(".") in message


@pytest.mark.parametrize("alignment", [0, 7, 48, 2**32 - 1])
def test_impossible_alignment(image: Image, path: Path, alignment: int) -> None:
    image.keys.append(Key(b"general.alignment", U32, struct.pack("<I", alignment)))
    path.write_bytes(image.pack())
    message = error_of(path)
    assert "general.alignment" in message
    assert str(alignment) in message


def test_other_alignment_is_honoured(image: Image, path: Path) -> None:
    image.keys.append(Key(b"general.alignment", U32, struct.pack("<I", 16)))
    path.write_bytes(image.pack(alignment=16))
    run(path)


def test_more_embeddings_than_tokens_run(image: Image, path: Path) -> None:
    """Converters do not always add padding tokens; the reverse would let a token have no embedding."""
    tokens, types = image.key("ggml.tokens"), image.key("ggml.token_type")
    _, n = struct.unpack_from("<IQ", tokens.payload)
    cut = skip_value(struct.pack("<IQ", STRING, n - 2) + tokens.payload[12:], 0, ARRAY)
    tokens.payload = struct.pack("<IQ", STRING, n - 2) + tokens.payload[12:cut]
    types.payload = struct.pack("<IQ", 5, n - 2) + types.payload[12:-8]
    path.write_bytes(image.pack())
    run(path)


# --- split files ---------------------------------------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    model = make("deepseek2/v3", tmp_path / "split", file=FileOptions(tensors_per_part=16), **SMALL)
    found = sorted(model.path.parent.iterdir())
    assert len(found) == 3
    return found


def test_split_runs(parts: list[Path]) -> None:
    run(parts[0])


@pytest.mark.parametrize("missing", [1, 2])
def test_missing_part_is_named(parts: list[Path], missing: int) -> None:
    parts[missing].unlink()
    assert parts[missing].name in error_of(parts[0])


def test_missing_first_part_is_named(parts: list[Path]) -> None:
    parts[0].unlink()
    assert parts[0].name in error_of(parts[1])


def test_swapped_parts(parts: list[Path]) -> None:
    other = parts[1].with_name("other")
    parts[1].rename(other)
    parts[2].rename(parts[1])
    other.rename(parts[2])
    assert "split.no" in error_of(parts[1])


def test_the_same_part_twice(parts: list[Path]) -> None:
    parts[2].write_bytes(parts[1].read_bytes())
    error_of(parts[2])


def test_renamed_part(parts: list[Path]) -> None:
    """A part under a name of its own is not the whole model."""
    assert "split.count" in error_of(parts[0].rename(parts[0].with_name("whole.gguf")))


def test_part_of_another_split(parts: list[Path]) -> None:
    for number, part in enumerate(parts[:2]):
        part.rename(part.with_name(f"tiny-{number + 1:05d}-of-00002.gguf"))
    assert "split.count" in error_of(parts[0].with_name("tiny-00001-of-00002.gguf"))


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        (0, "split.count", 2),
        (2, "split.count", 2),
        (0, "split.no", 7),
        (2, "split.no", 7),
        (0, "split.tensors.count", 5),
    ],
)
def test_wrong_split_key(parts: list[Path], part: int, key: str, value: int) -> None:
    image = Image.parse(parts[part].read_bytes())
    image.key(key).set(U32, value)
    parts[part].write_bytes(image.pack())
    message = str(_caught(parts[0]))
    assert key in message
    assert str(value) in message


def test_truncated_part_is_named(parts: list[Path]) -> None:
    parts[1].write_bytes(parts[1].read_bytes()[:-1000])
    message = str(_caught(parts[0]))
    assert parts[1].name in message
    assert "truncated" in message


def test_tensor_in_two_parts(parts: list[Path]) -> None:
    first, second = (Image.parse(part.read_bytes()) for part in parts[:2])
    second.tensors[0].name = first.tensors[0].name
    parts[1].write_bytes(second.pack())
    assert first.tensors[0].name.decode() in str(_caught(parts[0]))


def _caught(path: Path, device: str = "cpu") -> MoeEngineError:
    with pytest.raises(MoeEngineError) as caught:
        run(path, device)
    return caught.value
