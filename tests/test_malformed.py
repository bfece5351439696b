"""Malformed files: the error names the file, what was found and what was expected."""

import math
import struct
from pathlib import Path
from typing import Any

import pytest
from gguf_images import (
    ARRAY,
    BOOL,
    F32,
    FAMILIES,
    STRING,
    U32,
    Image,
    Key,
    Tensor,
    caught_from,
    error_of,
    run,
    skip_value,
    valid,
)

from moe_engine.errors import ModelFormatError, UnsupportedModelError
from moe_engine.planner import plan


@pytest.fixture
def image() -> Image:
    return Image.parse(valid("deepseek2/v3"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "broken.gguf"


@pytest.mark.parametrize("name", FAMILIES)
def test_the_unbroken_file_runs(path: Path, name: str) -> None:
    raw = valid(name)
    assert Image.parse(raw).pack() == raw
    path.write_bytes(raw)
    run(path)


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


@pytest.mark.parametrize("type_id", [0, 0xFFFFFF])
def test_sizes_beyond_all_files_are_refused(image: Image, path: Path, type_id: int) -> None:
    tensor = image.tensor("blk.1.ffn_down_exps.weight")
    tensor.type, tensor.shape[0] = type_id, 1 << 62
    path.write_bytes(image.pack())
    message = error_of(path)
    assert "'blk.1.ffn_down_exps.weight' has the shape" in message
    assert str(1 << 62) in message


def test_plan_too_refuses_more_chosen_experts_than_there_are(image: Image, path: Path) -> None:
    image.key("expert_used_count").set(U32, 200)
    path.write_bytes(image.pack())
    with pytest.raises(ModelFormatError, match=r"deepseek2\.expert_used_count"):
        plan(path, device="cpu")


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


@pytest.mark.parametrize("name", ["token_embd.weight", "output_norm.weight", "blk.1.ffn_down_exps.weight"])
def test_missing_tensor_is_named_on_an_accelerator(image: Image, path: Path, name: str) -> None:
    image.tensors.remove(image.tensor(name))
    path.write_bytes(image.pack())
    assert name in str(caught_from(path, "simulated"))
