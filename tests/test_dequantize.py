"""The Triton dequantization against the gguf package: natively on a GPU, else in Triton's interpreter."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st
from random_blocks import random_blocks

from moe_engine.kernels import codebooks, dequantize, reference
from moe_engine.kernels.quant_tensor import QuantTensor
from moe_engine.kernels.quant_types import BY_NAME, QUANT_TYPES, QuantType

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
all_types = pytest.mark.parametrize("type", QUANT_TYPES.values(), ids=str)

Bytes = npt.NDArray[np.uint8]


def expected(data: Bytes, type: QuantType) -> torch.Tensor:
    values = quants.dequantize(np.ascontiguousarray(data), GGMLQuantizationType(type.id))
    return torch.tensor(values, device=DEVICE)


def place(data: Bytes, offset: int) -> torch.Tensor:
    """A copy of `data` on the device that starts `offset` bytes into a larger buffer."""
    buffer = torch.full((offset + data.size + 32,), 0xAA, dtype=torch.uint8, device=DEVICE)
    view = buffer[offset : offset + data.size].view(data.shape)
    return view.copy_(torch.from_numpy(data.copy()))


def same_bits(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equality that tells +0 from -0."""
    bits = torch.int32 if actual.dtype == torch.float32 else torch.int16
    return actual.dtype == expected.dtype and torch.equal(actual.view(bits), expected.view(bits))


def random_weight(name: str, n_rows: int, n_blocks: int, seed: int = 0) -> tuple[Bytes, QuantType, int]:
    type = BY_NAME[name]
    n_in = n_blocks * max(type.block_size, 32)
    return random_blocks(type, n_rows, n_in, np.random.default_rng(seed)), type, n_in


@pytest.fixture
def runs_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions of unpack.py, which other kernels use too, where a faster way exists."""
    monkeypatch.setattr(dequantize, "_reads_words", lambda type: False)


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions of unpack_words*.py, also in the interpreter; there in several programs."""
    monkeypatch.setattr(dequantize, "_reads_words", lambda type: type.name in dequantize.WORD_TYPES)
    monkeypatch.setattr(dequantize, "_INTERPRETER_TILE", 64 * 256)


@pytest.fixture
def small_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs, the last one partly filled, also in the interpreter."""
    monkeypatch.setattr(dequantize, "_INTERPRETER_TILE", 2048)


@all_types
@pytest.mark.usefixtures("small_tile", "runs_only")
@pytest.mark.parametrize(
    ("n_rows", "n_blocks", "offset"),
    [(1, 1, 0), (1, 3, 1), (3, 1, 2), (3, 3, 3), (7, 1, 5), (7, 3, 16), (33, 1, 6), (33, 3, 13)],
)
def test_equals_gguf(type: QuantType, n_rows: int, n_blocks: int, offset: int) -> None:
    data, type, n_in = random_weight(type.name, n_rows, n_blocks, seed=offset)
    weight = QuantTensor(place(data, offset), type, n_in)
    values = expected(data, type)
    assert same_bits(dequantize.dequantize(weight), values)
    for dtype in (torch.float16, torch.bfloat16):
        assert same_bits(dequantize.dequantize(weight, dtype=dtype), values.to(dtype))


@pytest.mark.usefixtures("words")
@pytest.mark.parametrize("name", sorted(dequantize.WORD_TYPES))
@pytest.mark.parametrize(("n_rows", "n_blocks", "offset"), [(33, 3, 16), (7, 1, 4), (3, 3, 6), (5, 1, 13)])
def test_words_equal_gguf(name: str, n_rows: int, n_blocks: int, offset: int) -> None:
    data, type, n_in = random_weight(name, n_rows, n_blocks, seed=offset)
    weight = QuantTensor(place(data, offset), type, n_in)
    values = expected(data, type)
    assert same_bits(dequantize.dequantize(weight), values)
    if offset == 6:
        for dtype in (torch.float16, torch.bfloat16):
            assert same_bits(dequantize.dequantize(weight, dtype=dtype), values.to(dtype))


@pytest.mark.usefixtures("words")
@pytest.mark.parametrize("name", ["Q4_K", "IQ3_S"])
def test_words_of_a_stack(name: str) -> None:
    data, type, n_in = random_weight(name, 2 * 3, 2)
    stack = QuantTensor(place(data.reshape(2, 3, -1), 1), type, n_in)
    values = expected(data, type).view(2, 3, n_in)
    assert same_bits(dequantize.dequantize(stack.rows(1, 3)), values[:, 1:3])


# Where the 16-bit scales of a block lie, for types whose other bytes may be anything.
SCALES = {"Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q5_K": (0, 2), "Q6_K": (208,), "IQ2_XXS": (0,)}
SCALES |= {"IQ2_S": (0,), "IQ3_XXS": (0,), "IQ1_S": (0,), "TQ1_0": (52,)}


@settings(max_examples=60)
@given(data=st.data(), name=st.sampled_from(sorted(SCALES)), n_blocks=st.integers(1, 5), offset=st.integers(0, 9))
def test_any_block_equals_gguf(data: st.DataObject, name: str, n_blocks: int, offset: int) -> None:
    type = BY_NAME[name]
    size = n_blocks * type.block_bytes
    blocks = np.frombuffer(data.draw(st.binary(min_size=size, max_size=size)), dtype=np.uint8)
    blocks = blocks.reshape(n_blocks, type.block_bytes).copy()
    scale = st.floats(width=16, allow_nan=False, allow_infinity=False)  # zeros and subnormals among them
    for field in SCALES[name]:
        scales = data.draw(st.lists(scale, min_size=n_blocks, max_size=n_blocks))
        blocks[:, field : field + 2] = np.array(scales, dtype=np.float16).view(np.uint8).reshape(-1, 2)
    weight = QuantTensor(place(blocks, offset), type, type.block_size)
    assert same_bits(dequantize.dequantize(weight), expected(blocks, type))


def test_mxfp4_smallest_and_largest_scales() -> None:
    data, type, n_in = random_weight("MXFP4", 253, 1)
    data[:, 0] = np.arange(253)  # beyond, the largest values are no longer finite
    values = expected(data, type)
    magnitudes = values[:2].abs()
    assert ((magnitudes > 0) & (magnitudes < torch.finfo(torch.float32).tiny)).any()  # subnormals
    assert same_bits(dequantize.dequantize(QuantTensor(place(data, 1), type, n_in)), values)


def test_nvfp4_every_scale() -> None:
    data, type, n_in = random_weight("NVFP4", 64, 1)
    data[:, :4] = np.arange(256).reshape(64, 4)
    assert same_bits(dequantize.dequantize(QuantTensor(place(data, 2), type, n_in)), expected(data, type))


def test_bf16_rounds_to_even_and_keeps_special_values() -> None:
    bits = [0x3F808000, 0x3F818000, 0x3F808001, 0x3F7FFFFF, 0x80000000, 0x7F7FFFFF, 0x7F800000, 0x00008000]
    data = np.array([bits], dtype=np.uint32).view(np.uint8)
    weight = QuantTensor(place(data, 3), BY_NAME["F32"], len(bits))
    actual = dequantize.dequantize(weight, dtype=torch.bfloat16)
    assert same_bits(actual, expected(data, weight.type).to(torch.bfloat16))
    nan = place(np.array([[0x7FFFFFFF]], dtype=np.uint32).view(np.uint8), 0)
    assert dequantize.dequantize(QuantTensor(nan, BY_NAME["F32"], 1), dtype=torch.bfloat16).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_writes_into_out_whose_dtype_wins(dtype: torch.dtype) -> None:
    data, type, n_in = random_weight("Q6_K", 3, 2)
    buffer = torch.full((3 * n_in + 8,), 7, dtype=dtype, device=DEVICE)
    out = buffer[4:-4].view(3, n_in)
    assert dequantize.dequantize(QuantTensor(place(data, 1), type, n_in), out=out) is out
    assert same_bits(out, expected(data, type).to(dtype))
    assert (buffer[:4] == 7).all()
    assert (buffer[-4:] == 7).all()


def test_one_dimension_and_no_rows() -> None:
    data, type, n_in = random_weight("F32", 1, 3)
    flat = QuantTensor(place(data, 0)[0], type, n_in)
    assert same_bits(dequantize.dequantize(flat), expected(data, type)[0])
    assert dequantize.dequantize(QuantTensor(flat.data[None][:0], type, n_in)).shape == (0, n_in)


@pytest.mark.usefixtures("small_tile")
@pytest.mark.parametrize("name", ["Q4_K", "IQ3_S", "MXFP4"])
def test_stack_and_rows_of_a_stack(name: str) -> None:
    data, type, n_in = random_weight(name, 3 * 5, 3)
    stack = QuantTensor(place(data.reshape(3, 5, -1), 1), type, n_in)
    values = expected(data, type).view(3, 5, n_in)
    assert same_bits(dequantize.dequantize(stack), values)
    assert same_bits(dequantize.dequantize(stack.rows(1, 4)), values[:, 1:4])
    assert same_bits(dequantize.dequantize(stack[2].rows(4, 5)), values[2, 4:])


def test_experts_side_by_side_in_a_slot() -> None:
    parts = [random_weight("IQ2_XXS", 3, 1, 0), random_weight("Q5_0", 5, 3, 1), random_weight("MXFP4", 7, 1, 2)]
    slot = place(np.concatenate([data.ravel() for data, _, _ in parts]), 1)
    start = 0
    for data, type, n_in in parts:
        part = QuantTensor(slot[start : start + data.size].view(data.shape), type, n_in)
        assert same_bits(dequantize.dequantize(part), expected(data, type))
        start += data.size


def test_uneven_rows_are_refused() -> None:
    data, type, n_in = random_weight("Q8_0", 6, 1)
    with pytest.raises(AssertionError, match="contiguous"):
        dequantize.dequantize(QuantTensor(place(data, 0)[::2], type, n_in))


@all_types
def test_reference_takes_its_own_memory(type: QuantType) -> None:
    data, type, n_in = random_weight(type.name, 3, 1)
    frozen = data.copy()
    weight = QuantTensor(torch.from_numpy(data), type, n_in)
    values = reference.dequantize(weight)
    assert same_bits(values, expected(data, type).cpu())
    values.zero_()
    assert np.array_equal(data, frozen)


def test_cpu_without_interpreter_uses_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_engine.kernels.device.is_interpreted", lambda: False)
    monkeypatch.setattr(dequantize, "_launch", None)
    data, type, n_in = random_weight("IQ1_M", 3, 1)
    weight = QuantTensor(torch.from_numpy(data), type, n_in)
    values = dequantize.dequantize(weight, dtype=torch.bfloat16)
    assert same_bits(values, expected(data, type).to(torch.bfloat16).cpu())


def test_codebooks() -> None:
    shapes = {"IQ2_XXS": (256, 8), "IQ2_XS": (512, 8), "IQ2_S": (1024, 8), "IQ3_XXS": (256, 4), "IQ3_S": (512, 4)}
    shapes |= dict.fromkeys(("IQ1_S", "IQ1_M"), (2048, 8))
    shapes |= dict.fromkeys(("IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4"), (16, 1))
    for type in QUANT_TYPES.values():
        assert codebooks.has_codebook(type.id) == (type.name in shapes)
    for name, shape in shapes.items():
        table = codebooks.codebook(BY_NAME[name].id)
        assert table.shape == shape
        assert table.dtype == np.int8
        assert table.flags.c_contiguous
    assert set(codebooks.codebook(BY_NAME["IQ2_S"].id).flat) == {8, 25, 43}
    assert set(codebooks.codebook(BY_NAME["IQ1_M"].id).flat) == {-1, 0, 1}


@pytest.mark.parametrize("name", ["Q4_0", "Q3_K", "F16"])
def test_embedding(name: str) -> None:
    data, type, n_in = random_weight(name, 33, 3)
    ids = torch.tensor([32, 0, 7, 7], device=DEVICE)
    rows = dequantize.embedding(QuantTensor(place(data, 1), type, n_in), ids)
    assert same_bits(rows, expected(data, type)[ids])


@pytest.mark.parametrize("name", ["F32", "Q8_0", "Q5_K", "IQ4_XS"])
@pytest.mark.parametrize(("rows_at_once", "n_token"), [(1, 5), (4, 1), (7, 5), (100, 1)])
def test_linear(name: str, rows_at_once: int, n_token: int) -> None:
    data, type, n_in = random_weight(name, 7, 3)
    weight = QuantTensor(place(data, 1), type, n_in)
    x = torch.randn(n_token, n_in, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    scratch = torch.full((rows_at_once * n_in + 3,), float("nan"), device=DEVICE)
    y = dequantize.linear(x, weight, scratch)
    exact = x.double() @ expected(data, type).double().t()
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-6 * exact.abs().max().item())


@pytest.mark.parametrize("room", [256 * 100, 256 * 40, 256 * 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_product(room: int, dtype: torch.dtype) -> None:
    """Matrices of three types side by side, whatever slices of them the scratch holds at once."""
    weights, values = [], []
    for name, n_rows in (("Q4_K", 10), ("Q8_0", 25), ("Q6_K", 8)):
        data, type, n_in = random_weight(name, n_rows, 256 // max(BY_NAME[name].block_size, 32))
        weights.append(QuantTensor(place(data, 0), type, n_in))
        values.append(expected(data, type))
    w = torch.cat(values).to(dtype).double()
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    scratch, exact = torch.empty(room // 2, device=DEVICE), x.double() @ w.T  # room for `room` halves
    product = dequantize.HalfProduct(weights, scratch, dtype)
    out = product(x, torch.empty(5, 43, device=DEVICE))
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))
    rounded = product(x, torch.empty(5, 43, device=DEVICE, dtype=dtype))
    torch.testing.assert_close(rounded.double(), exact, rtol=2**-7, atol=1e-2 * float(exact.abs().max()))
    total = product(x, out.clone(), add=True)
    torch.testing.assert_close(total, out + out, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_in_scratch_memory(dtype: torch.dtype) -> None:
    """Parts of stacks of two types; written again after others have used the memory."""
    stacks, values = [], []
    for name, n_rows in (("F32", 2), ("Q8_0", 5)):
        data, type, n_in = random_weight(name, 3 * n_rows, 256 // max(BY_NAME[name].block_size, 32))
        stacks.append(QuantTensor(place(data.reshape(3, n_rows, -1), 0), type, n_in))
        values.append(expected(data, type).view(3, n_rows, n_in)[1:].to(dtype))
    scratch = torch.empty(2 * (2 + 5) * 256 // 2, device=DEVICE)  # no room to spare
    halves = dequantize.Halves([stack[1:] for stack in stacks], scratch, dtype)
    for _ in range(2):
        assert all(map(torch.equal, halves(), values))
        scratch.zero_()


def test_linear_of_a_batch_is_that_of_its_members() -> None:
    data, type, n_in = random_weight("Q4_K", 4 * 7, 2)
    stack = QuantTensor(place(data.reshape(4, 7, -1), 2), type, n_in)
    x = torch.randn(4, 3, n_in, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    scratch = torch.empty(5 * n_in, device=DEVICE)
    y = dequantize.linear(x, stack, scratch)
    assert y.shape == (4, 3, 7)
    for index in range(4):
        assert torch.equal(y[index], dequantize.linear(x[index], stack[index], scratch))


def test_linear_needs_room_for_a_row() -> None:
    data, type, n_in = random_weight("Q8_0", 2, 2)
    weight = QuantTensor(place(data, 0), type, n_in)
    with pytest.raises(AssertionError, match="cannot hold a row"):
        dequantize.linear(torch.zeros(1, n_in, device=DEVICE), weight, torch.empty(n_in - 1, device=DEVICE))


@pytest.mark.gpu
def test_more_than_2_31_elements() -> None:
    row, type, n_in = random_weight("IQ1_S", 1, 16)
    n_rows = 2**31 // n_in + 3
    data = place(row, 0).expand(n_rows, -1).contiguous()
    values = dequantize.dequantize(QuantTensor(data, type, n_in), dtype=torch.float16)
    assert (values == expected(row, type).to(torch.float16)).all()
