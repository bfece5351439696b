"""The GGUF reader against files written by the gguf package."""

from contextlib import suppress
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_engine import GGUFFile, ModelFormatError, UnsupportedModelError
from moe_engine.kernels.quant_types import BY_NAME, QUANT_TYPES
from moe_engine.loading import bundled_model


def test_types_equal_the_gguf_packages() -> None:
    for quant in QUANT_TYPES.values():
        assert gguf.GGML_QUANT_SIZES[T(quant.id)] == (quant.block_size, quant.block_bytes)
        assert T(quant.id).name == quant.name
    readable = {"F32", "F16"} | {t.name for t in gguf.quants._type_traits}
    assert set(BY_NAME) >= readable - {"Q8_1", "Q8_K"}


VALUES = {
    "t.u8": ("uint8", 200),
    "t.i8": ("int8", -3),
    "t.u16": ("uint16", 60000),
    "t.i16": ("int16", -30000),
    "t.u32": ("uint32", 4_000_000_000),
    "t.i32": ("int32", -5),
    "t.u64": ("uint64", 1 << 60),
    "t.i64": ("int64", -(1 << 60)),
    "t.f32": ("float32", 0.5),
    "t.f64": ("float64", 0.1),
    "t.bool": ("bool", True),
    "t.text": ("string", "naïve ▁ text"),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "test")
    for key, (kind, value) in VALUES.items():
        getattr(writer, f"add_{kind}")(key, value)
    writer.add_array("t.texts", ["a", "", "ü"])
    writer.add_array("t.ints", [1, -2, 3])
    writer.add_array("t.floats", [0.5, -1.5])
    writer.add_array("t.flags", [True, False])
    writer.add_tensor("f32", np.arange(6, dtype=np.float32).reshape(2, 3))
    q8 = gguf.quants.quantize(np.random.default_rng(0).standard_normal((2, 3, 64)).astype(np.float32), T.Q8_0)
    writer.add_tensor("q8", q8, raw_dtype=T.Q8_0)
    writer.add_tensor("ids", np.arange(5, dtype=np.int32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "a.gguf"


def test_metadata_of_every_type(path: Path) -> None:
    metadata = GGUFFile(path).metadata
    for key, (_, value) in VALUES.items():
        assert metadata[key] == value
        assert type(metadata[key]) is type(value)
    assert metadata["t.texts"] == ["a", "", "ü"]
    assert metadata["t.ints"] == [1, -2, 3]
    assert metadata["t.floats"] == [0.5, -1.5]
    assert metadata["t.flags"] == [True, False]


def test_tensors_are_views_of_the_file(path: Path) -> None:
    file = GGUFFile(path)
    reader = {t.name: t for t in gguf.GGUFReader(path).tensors}
    q8 = file.tensor("q8")
    assert q8.shape == (2, 3, 64)
    assert np.array_equal(q8.data.numpy(), reader["q8"].data)
    assert q8.data.data_ptr() == file.tensor("q8").data.data_ptr()  # the mapping itself, not a copy
    assert file.tensor("f32").data.numpy().view(np.float32).tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(UnsupportedModelError, match="ids"):
        file.tensor("ids")


def test_views_outlive_the_file(path: Path) -> None:
    data = GGUFFile(path).tensor("f32").data
    assert data.numpy().view(np.float32).sum() == 15


def test_whole_bundled_model_equals_the_gguf_packages_reading() -> None:
    file, reader = GGUFFile(bundled_model()), gguf.GGUFReader(bundled_model())
    assert list(file.tensors) == [t.name for t in reader.tensors]
    for tensor in reader.tensors:
        info = file.tensors[tensor.name]
        assert (info.type_id, info.offset, info.nbytes) == (tensor.tensor_type, tensor.data_offset, tensor.n_bytes)
        assert list(info.shape) == tensor.shape.tolist()[::-1]
    fields = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert file.metadata == {key: field.contents() for key, field in fields.items()}


@settings(max_examples=150, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_headers_raise_our_error(path: Path, data: st.DataObject) -> None:
    raw = bytearray(path.read_bytes())
    if data.draw(st.booleans(), label="truncate"):
        raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    broken = path.with_name("broken.gguf")
    broken.write_bytes(raw)
    with suppress(ModelFormatError):
        file = GGUFFile(broken)
        for name, info in file.tensors.items():
            if info.type_id in QUANT_TYPES:
                assert int(file.tensor(name).data.long().sum()) >= 0  # every byte can be read
