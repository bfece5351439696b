"""Dense quantized matrices times few tokens against float64 of the gguf package's values: on a GPU, else in Triton's
interpreter.
"""

import pytest
import torch
from decode_inputs import DEVICE, TYPES, all_types, error, poisoned, random_input, random_weight, values
from torch import Tensor

from moe_engine.kernels import decode_tiles, reference
from moe_engine.kernels.decode_activations import Activations, quantize
from moe_engine.kernels.decode_matvec import is_fast, matvec, matvecs
from moe_engine.kernels.quant_tensor import QuantTensor
from moe_engine.kernels.quant_types import BY_NAME, QuantType

FAST = [type for type in TYPES if is_fast(type)]
MATRIX_ERROR = 6e-3  # 8-bit activations
FLOAT_ERROR = 1e-6


def test_quantize() -> None:
    x = random_input(3, 96) * torch.tensor([[1.0], [1e-20], [1e20]], device=DEVICE)
    x[0, 16:32] = 0.0
    q = quantize(x)
    runs = x.view(3, 6, 16)
    scale = q.pairs[..., 0]
    codes = q.codes.view(3, 6, 16).float()
    assert torch.equal(codes.abs().amax(dim=2), torch.where(runs.abs().amax(dim=2) > 0, 127.0, 0.0))
    assert ((codes * scale[..., None] - runs).abs() <= 0.501 * scale[..., None]).all()
    torch.testing.assert_close(q.pairs[..., 1], scale * codes.sum(dim=2))
    bad = torch.ones(1, 16, device=DEVICE)
    bad[0, 3] = float("nan")
    assert quantize(bad).pairs.isnan().all()


@all_types
@pytest.mark.parametrize(("n_token", "n_out", "n_block", "offset"), [(1, 19, 3, 0), (3, 5, 1, 2)])
def test_matvec(type: QuantType, n_token: int, n_out: int, n_block: int, offset: int) -> None:
    n_in = n_block * max(type.block_size, 32)
    weight = random_weight(type, n_out, n_in, offset=offset)
    x = random_input(n_token, n_in)
    out = poisoned(n_token, n_out)
    assert matvec(x, weight, out=out) is out
    exact = x.cpu().double() @ values(weight).T
    assert error(out, exact) < (2 * MATRIX_ERROR if is_fast(type) else FLOAT_ERROR)  # few elements: a wide spread


@pytest.mark.parametrize(("name", "few_rows"), [("Q4_K", 0), ("Q6_K", 22), ("IQ2_S", 22)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matvec_of_many_tokens(name: str, dtype: torch.dtype, few_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a form (8-bit activations, or bf16 from five tokens on) tokens do not depend on each other."""
    monkeypatch.setattr(decode_tiles, "FEW_ROWS", few_rows)
    weight = random_weight(BY_NAME[name], 21, 768)
    x = random_input(16, 768).to(dtype)
    exact = x.cpu().double() @ values(weight).T
    y, few = matvec(x, weight), matvec(x[:4], weight)
    for part in (y, few):
        assert error(part, exact[: len(part)]) < (MATRIX_ERROR if is_fast(weight.type) else FLOAT_ERROR)
    assert torch.equal(matvec(x[:2], weight), few[:2])
    assert torch.equal(matvec(x[:5], weight), y[:5])


@pytest.mark.parametrize("type", FAST, ids=str)
def test_matvec_on_tensor_cores(type: QuantType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_tiles, "FEW_ROWS", 0)
    weight = random_weight(type, 37, 512)
    x, residual = random_input(7, 512), random_input(7, 37, seed=1)
    exact = x.cpu().double() @ values(weight).T + residual.cpu()
    assert error(matvec(x, weight, residual=residual), exact) < MATRIX_ERROR


@pytest.mark.parametrize("type", FAST, ids=str)
@pytest.mark.parametrize("offset", [4, 1])
def test_matvec_at_any_address(type: QuantType, offset: int) -> None:
    weight = random_weight(type, 5, 512, offset=offset)
    x = random_input(1, 512)
    exact = x.cpu().double() @ values(weight).T
    on_integers = offset % 2 == 0 or type.name == "MXFP4"
    assert error(matvec(x, weight), exact) < (2 * MATRIX_ERROR if on_integers else FLOAT_ERROR)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K", "IQ1_M"])
def test_matvec_of_a_stack(name: str) -> None:
    type = BY_NAME[name]
    row_bytes = type.row_bytes(512)
    stack = random_weight(type, 3 * 7, 512).data.view(3, 7, row_bytes)
    whole = QuantTensor(stack, type, 512)
    x = random_input(3, 2, 512)
    exact = x.cpu().double() @ values(whole).transpose(1, 2)
    assert error(matvec(x, whole), exact) < MATRIX_ERROR
    some = whole.rows(2, 6)  # spaced matrices
    assert error(matvec(x, some), exact[..., 2:6]) < MATRIX_ERROR


def test_matvec_with_given_activations() -> None:
    weight = random_weight(BY_NAME["Q5_K"], 6, 256)
    x = random_input(3, 256)
    assert torch.equal(matvec(x, weight), matvec(x, weight, activations=quantize(x)))


def test_quantize_of_strided_stacks() -> None:
    x = random_input(2, 3, 80)[..., :48]
    for view in (x, x.transpose(0, 1)):
        q, flat = quantize(view), quantize(view.reshape(-1, 48))
        assert torch.equal(q.codes, flat.codes)
        assert torch.equal(q.pairs, flat.pairs)


@pytest.mark.parametrize(("name", "n_token"), [("Q4_K", 1), ("Q8_0", 3), ("IQ2_S", 2)])
def test_matvec_adds_a_residual_and_quantizes(name: str, n_token: int) -> None:
    weight = random_weight(BY_NAME[name], 48, 256)
    x, residual = random_input(n_token, 256), random_input(n_token, 48, seed=1)
    plain = matvec(x, weight)
    activations = Activations.empty(n_token, 48, x.device)
    out = matvec(x, weight, residual=residual, out_activations=activations)
    assert torch.equal(out, plain + residual)
    assert_quantized(activations, out)
    assert matvec(x, weight, residual, residual=residual) is residual
    assert torch.equal(residual, out)


def assert_quantized(activations: Activations, x: Tensor) -> None:
    """`activations` hold x, up to the last bit of a scale."""
    expected = quantize(x)
    assert ((activations.codes.int() - expected.codes.int()).abs() <= 1).all()
    assert (activations.codes != expected.codes).float().mean() < 1e-2
    torch.testing.assert_close(activations.pairs, expected.pairs, rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("name", ["Q4_K", "IQ2_S"])
def test_matvec_of_heads_that_lie_side_by_side(name: str) -> None:
    """The batch is the second dimension in memory, before and after, as the heads of attention."""
    stack = random_weight(BY_NAME[name], 3 * 16, 256).data.view(3, 16, -1)
    weight = QuantTensor(stack, BY_NAME[name], 256)
    x = random_input(2, 3, 300)[..., :256].transpose(0, 1)  # [n_batch, n_token, n_in]
    rows, activations = poisoned(2, 3 * 16), Activations.empty(2, 3 * 16, x.device)
    out = rows.view(2, 3, 16).transpose(0, 1)
    matvec(x, weight, out, out_activations=activations)
    assert torch.equal(out, matvec(x.contiguous(), weight))
    assert_quantized(activations, rows)


@pytest.mark.parametrize(
    ("names", "n_token"),
    [(("Q4_K", "Q4_K", "Q6_K"), 1), (("Q5_0", "Q8_0"), 7), (("Q4_K", "IQ2_S", "Q6_K"), 2), (("Q4_0",), 1)],
    ids=str,
)
def test_matvecs(names: tuple[str, ...], n_token: int) -> None:
    heights = (48, 21, 130)
    weights = [random_weight(BY_NAME[name], n_out, 256) for name, n_out in zip(names, heights, strict=False)]
    x = random_input(n_token, 256)
    parts = matvecs(x, weights)
    given = matvecs(x, weights, poisoned(n_token, sum(part.shape[1] for part in parts)), quantize(x))
    for part, same, weight in zip(parts, given, weights, strict=True):
        assert torch.equal(part, matvec(x, weight))
        assert torch.equal(part, same)


def test_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a GPU nor the interpreter: the reference answers."""
    monkeypatch.setattr("moe_engine.kernels.device.is_interpreted", lambda: False)
    weight = random_weight(BY_NAME["Q4_K"], 5, 256)
    weight = QuantTensor(weight.data.cpu(), weight.type, 256)
    x = random_input(2, 256).cpu()
    assert torch.equal(matvec(x, weight), reference.matvec(x, weight))
