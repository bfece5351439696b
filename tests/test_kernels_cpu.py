"""The compiled CPU kernels against the `gguf` package's decoder and float64 arithmetic."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf.quants
import numpy as np
import numpy.typing as npt
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st
from random_blocks import random_blocks

from moe_engine.errors import ConfigError, NativeLibraryError
from moe_engine.kernels import _cpu, cpu
from moe_engine.kernels.cpu import CpuKernels, ExpertHandle, available_tiers
from moe_engine.kernels.quant_tensor import QuantTensor
from moe_engine.kernels.quant_types import BY_NAME, QUANT_TYPES, QuantType

ALL_TYPES = [pytest.param(t, id=t.name) for t in QUANT_TYPES.values()]
FLOAT_NAMES = ("F32", "F16", "BF16")
POOLS = {
    (threads, floats): CpuKernels(threads, float_activations=floats)
    for threads in (1, 3, 4)
    for floats in (False, True)
}


@pytest.fixture(params=available_tiers())
def tier(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _cpu.tier()
    _cpu.set_tier(request.param)
    yield request.param
    _cpu.set_tier(before)


def decoded(rows: npt.NDArray[np.uint8], type: QuantType) -> npt.NDArray[np.float32]:
    out: npt.NDArray[np.float32] = gguf.quants.dequantize(rows, GGMLQuantizationType(type.id))
    return out


def random_weight(type: QuantType, shape: tuple[int, ...], rng: np.random.Generator) -> QuantTensor:
    n_rows = int(np.prod(shape[:-1]))
    rows = random_blocks(type, n_rows, shape[-1], rng)
    return QuantTensor(torch.from_numpy(rows).reshape(*shape[:-1], -1), type, shape[-1])


def exact(weight: QuantTensor) -> torch.Tensor:
    """The weights in float64, by the reference decoder."""
    rows = weight.data.reshape(-1, weight.data.shape[-1]).contiguous().numpy()
    return torch.from_numpy(decoded(rows, weight.type)).to(torch.float64).reshape(weight.shape)


def random_x(shape: tuple[int, ...], rng: np.random.Generator) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    return float((value.to(torch.float64) - truth).norm() / truth.norm())


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("type", ALL_TYPES)
@pytest.mark.parametrize("n_rows", [1, 7, 37])
def test_dequantize_is_bit_identical(type: QuantType, n_rows: int, tier: str) -> None:
    n_in = 37 if type.block_size == 1 else 3 * type.block_size
    weight = random_weight(type, (n_rows, n_in), np.random.default_rng(n_rows))
    expected = torch.from_numpy(decoded(weight.data.numpy(), type))
    for threads in (1, 3):
        assert same_bits(POOLS[threads, False].dequantize(weight), expected)


@pytest.mark.parametrize("name", ["MXFP4", "NVFP4"])
def test_every_scale_byte(name: str, tier: str) -> None:
    type = BY_NAME[name]
    n_blocks = 253 if name == "MXFP4" else 256  # the largest powers of two overflow
    blocks = np.random.default_rng(0).integers(0, 256, (n_blocks, type.block_bytes), dtype=np.uint8)
    blocks[:, : 1 if name == "MXFP4" else 4] = np.arange(n_blocks, dtype=np.uint8)[:, None]
    weight = QuantTensor(torch.from_numpy(blocks), type, type.block_size)
    assert same_bits(POOLS[1, False].dequantize(weight), torch.from_numpy(decoded(blocks, type)))


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "F16"])
def test_every_half_precision_scale(name: str, tier: str) -> None:
    type = BY_NAME[name]
    finite = np.arange(65536, dtype=np.uint32)
    finite = finite[(finite >> 10) & 31 != 31].astype(np.uint16)
    blocks = np.random.default_rng(0).integers(0, 256, (len(finite), type.block_bytes), dtype=np.uint8)
    blocks[:, :2] = finite.view(np.uint8).reshape(-1, 2)
    if name == "Q4_K":
        blocks[:, 2:4] = blocks[::-1, :2]
    weight = QuantTensor(torch.from_numpy(blocks), type, type.block_size)
    assert same_bits(POOLS[3, False].dequantize(weight), torch.from_numpy(decoded(blocks, type)))


def row_lengths(type: QuantType) -> tuple[int, ...]:
    """Whole chunks of 256, and for smaller blocks rows that end inside a chunk."""
    return {1: (5, 64, 301), 32: (32, 224, 544), 64: (64, 320, 512)}.get(type.block_size, (256, 768))


@pytest.mark.parametrize("floats", [False, True], ids=["int8", "float"])
@pytest.mark.parametrize("type", ALL_TYPES)
def test_linear(type: QuantType, floats: bool, tier: str) -> None:
    rng = np.random.default_rng(type.id)
    limit = 1e-5 if floats or type.name in FLOAT_NAMES else 1e-2
    for n_in in row_lengths(type):
        weight = random_weight(type, (29, n_in), rng)
        for n_tokens in (1, 2, 7):
            x = random_x((n_tokens, n_in), rng)
            y = POOLS[3, floats].linear(x, weight)
            assert y.shape == (n_tokens, 29)
            assert relative_error(y, x.to(torch.float64) @ exact(weight).T) < limit


@pytest.mark.parametrize("type", ALL_TYPES)
def test_the_largest_sums(type: QuantType, tier: str) -> None:
    n_in = max(row_lengths(type))
    weight = random_weight(type, (5, n_in), np.random.default_rng(15))
    truth = exact(weight)
    x = truth.sign()  # products of one row do not cancel: short sums must not overflow
    y = POOLS[1, False].linear(x.to(torch.float32), weight)
    assert relative_error(y.diag(), (x @ truth.T).diag()) < 1e-2


@pytest.mark.parametrize("floats", [False, True], ids=["int8", "float"])
@pytest.mark.parametrize("name", ["Q4_K", "Q8_0", "IQ3_S", "BF16"])
def test_linear_with_a_stack(name: str, floats: bool) -> None:
    rng = np.random.default_rng(1)
    weight = random_weight(BY_NAME[name], (3, 10, 512), rng)
    weight = QuantTensor(weight.data[:, 2:9], weight.type, 512)  # matrices with gaps between them
    x = random_x((3, 5, 512), rng)
    truth = torch.einsum("bti,boi->bto", x.to(torch.float64), exact(weight))
    assert relative_error(POOLS[3, floats].linear(x, weight), truth) < 1e-2
    assert same_bits(POOLS[3, floats].linear(x, weight)[1], POOLS[1, floats].linear(x[1], weight[1]))


def test_linear_with_strided_rows_and_leading_dimensions() -> None:
    rng = np.random.default_rng(2)
    weight = random_weight(BY_NAME["Q6_K"], (20, 512), rng)
    every_other = QuantTensor(weight.data[::2], weight.type, 512)
    x = random_x((512, 2, 3), rng).permute(1, 2, 0)
    y = POOLS[3, False].linear(x, weight)
    assert y.shape == (2, 3, 20)
    assert same_bits(POOLS[3, False].linear(x, every_other), y[..., ::2].contiguous())
    assert POOLS[1, False].linear(x[:0], weight).shape == (0, 3, 20)


def test_zero_activations_give_zero() -> None:
    weight = random_weight(BY_NAME["Q4_K"], (8, 512), np.random.default_rng(3))
    for scale in (0.0, 1e-44):
        assert float(POOLS[1, False].linear(torch.full((1, 512), scale), weight).abs().max()) < 1e-30


def test_a_nan_is_not_lost(tier: str) -> None:
    weight = random_weight(BY_NAME["Q4_K"], (8, 512), np.random.default_rng(3))
    x = torch.ones(2, 512)
    x[1, 300] = torch.nan
    y = POOLS[1, False].linear(x, weight)
    assert y[0].isfinite().all()
    assert y[1].isnan().all()


@pytest.mark.parametrize("floats", [False, True], ids=["int8", "float"])
@pytest.mark.parametrize("type", ALL_TYPES)
def test_a_token_is_alone_in_its_arithmetic(type: QuantType, floats: bool, tier: str) -> None:
    rng = np.random.default_rng(4)
    n_in = 512 if type.block_size > 1 else 261
    weight, x = random_weight(type, (70, n_in), rng), random_x((6, n_in), rng)  # more: test_kernels_cpu_gemm.py
    together = POOLS[3, floats].linear(x, weight)
    for some in (slice(0, 1), slice(1, 3), slice(1, 6), slice(5, 6)):
        assert same_bits(POOLS[1, floats].linear(x[some], weight), together[some].contiguous())


@pytest.mark.parametrize("type", ALL_TYPES)
def test_many_tokens_and_long_rows(type: QuantType, tier: str) -> None:
    """Rows of more than eight chunks of 256, some of which end inside one, which tokens share decoded."""
    rng = np.random.default_rng(6)
    n_in = {1: 2333, 32: 2336, 64: 2368}.get(type.block_size, 2560)
    weight, x = random_weight(type, (17, n_in), rng), random_x((41, n_in), rng)
    truth = x.to(torch.float64) @ exact(weight).T
    for n_tokens in (8, 9, 41):
        together = POOLS[3, False].linear(x[:n_tokens], weight)
        assert relative_error(together, truth[:n_tokens]) < 1e-2
        if tier in ("scalar", "avx2"):  # higher ones have other forms for many
            assert same_bits(POOLS[1, False].linear(x[7:8], weight), together[7:8].contiguous())


def test_gather() -> None:
    weight = random_weight(BY_NAME["Q5_K"], (50, 256), np.random.default_rng(5))
    ids = torch.tensor([49, 0, 7, 7])
    expected = torch.from_numpy(decoded(weight.data.numpy(), weight.type))[ids]
    assert same_bits(POOLS[3, False].gather(weight, ids), expected)
    assert POOLS[1, False].gather(weight, ids[:0]).shape == (0, 256)
    with pytest.raises(IndexError):
        POOLS[1, False].gather(weight, torch.tensor([50]))


# Types of gate, up and down: the common mixes, fallbacks, floats beside integers, gate and up that read their input in
# different orders.
MIXES = [
    ("Q4_K", "Q4_K", "Q6_K"),
    ("Q8_0", "Q5_0", "Q4_0"),
    ("MXFP4", "MXFP4", "MXFP4"),
    ("IQ2_XXS", "IQ3_XXS", "IQ4_NL"),
    ("BF16", "Q4_K", "F16"),
    ("F32", "F32", "Q8_0"),
    ("NVFP4", "TQ2_0", "Q5_1"),
    ("Q2_K", "IQ2_XXS", "IQ2_XS"),
]
N_EXPERT, HIDDEN, N_FF = 6, 256, 160


def random_experts(kernels: CpuKernels, mix: tuple[str, str, str], rng: np.random.Generator) -> ExpertHandle:
    n_ff = 256 if any(BY_NAME[name].block_size == 256 for name in mix[2:]) else N_FF
    gate, up = (random_weight(BY_NAME[name], (N_EXPERT, n_ff, HIDDEN), rng) for name in mix[:2])
    return kernels.register_experts(gate, up, random_weight(BY_NAME[mix[2]], (N_EXPERT, HIDDEN, n_ff), rng))


def exact_ffn(handle: ExpertHandle, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    gate, up, down = exact(handle.gate), exact(handle.up), exact(handle.down)
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token, row in enumerate(x.to(torch.float64)):
        for expert, weight in zip(ids[token].tolist(), weights[token].tolist(), strict=True):
            if expert >= 0:
                h = torch.nn.functional.silu(gate[expert] @ row) * (up[expert] @ row)
                out[token] += weight * (down[expert] @ h)
    return out


def random_routing(
    n_tokens: int, k: int, rng: np.random.Generator, skip: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = random_x((n_tokens, HIDDEN), rng) * 0.1
    ids = rng.permuted(np.tile(np.arange(N_EXPERT), (n_tokens, 1)), axis=1)[:, :k]
    ids = np.where(rng.random(ids.shape) < skip, -1, ids)
    return x, torch.from_numpy(ids), torch.from_numpy(rng.random((n_tokens, k), dtype=np.float32))


@pytest.mark.parametrize("floats", [False, True], ids=["int8", "float"])
@pytest.mark.parametrize("mix", MIXES, ids="-".join)
def test_expert_ffn(mix: tuple[str, str, str], floats: bool, tier: str) -> None:
    rng = np.random.default_rng(6)
    kernels = POOLS[4, floats]  # which cut 160 rows within blocks
    handle = random_experts(kernels, mix, rng)
    for n_tokens, k in ((1, 2), (2, 6), (5, 1), (33, 3)):
        x, ids, weights = random_routing(n_tokens, k, rng, skip=0.1)
        out = kernels.expert_ffn(handle, x, ids, weights)
        assert relative_error(out, exact_ffn(handle, x, ids, weights)) < (1e-5 if floats else 2e-2)


@pytest.mark.parametrize("floats", [False, True], ids=["int8", "float"])
def test_many_tokens_on_one_expert(floats: bool, tier: str) -> None:
    rng = np.random.default_rng(7)
    handle = random_experts(POOLS[3, floats], MIXES[0], rng)
    x, _, weights = random_routing(150, 2, rng)
    ids = torch.full((150, 2), 4)  # the same expert twice a token
    out = POOLS[3, floats].expert_ffn(handle, x, ids, weights)
    assert relative_error(out, exact_ffn(handle, x, ids, weights)) < (1e-5 if floats else 2e-2)


@pytest.mark.parametrize("floats", [False, True], ids=["int8", "float"])
@pytest.mark.parametrize("mix", MIXES, ids="-".join)
def test_expert_ffn_of_a_token_is_its_own(mix: tuple[str, str, str], floats: bool, tier: str) -> None:
    rng = np.random.default_rng(8)
    handle = random_experts(POOLS[1, floats], mix, rng)
    n_tokens = 40 if floats else 6  # with more an expert's integer products take another form
    x, ids, weights = random_routing(n_tokens, 3, rng)
    together = POOLS[3, floats].expert_ffn(handle, x, ids, weights)
    assert same_bits(POOLS[1, floats].expert_ffn(handle, x, ids, weights), together)
    for some in (slice(0, 1), slice(2, 4), slice(1, n_tokens)):
        alone = POOLS[1, floats].expert_ffn(handle, x[some], ids[some], weights[some])
        assert same_bits(alone, together[some].contiguous())


def test_experts_in_the_background() -> None:
    rng = np.random.default_rng(10)
    kernels = CpuKernels(2)
    handle = random_experts(kernels, MIXES[0], rng)
    assert kernels.finish_expert_ffn() == 0
    for _ in range(20):
        x, ids, weights = random_routing(4, 2, rng)
        only = sorted(set(ids.flatten().tolist()))[1:]
        out = torch.full_like(x, float("nan"))
        kernels.begin_expert_ffn(handle, x, ids.int(), weights, only, out)
        expected = POOLS[3, False].expert_ffn(
            handle, x, torch.where(torch.isin(ids, torch.tensor(only)), ids, -1), weights
        )
        assert kernels.finish_expert_ffn() > 0
        assert same_bits(out, expected)


def test_fused_gate_up_view() -> None:
    rng = np.random.default_rng(9)
    fused = random_weight(BY_NAME["Q4_K"], (N_EXPERT, 2 * 256, HIDDEN), rng)
    down = random_weight(BY_NAME["Q6_K"], (N_EXPERT, HIDDEN, 256), rng)
    kernels = POOLS[3, False]
    views = [fused.rows(0, 256), fused.rows(256, 512)]
    copies = [QuantTensor(view.data.contiguous(), view.type, view.n_in) for view in views]
    x, ids, weights = random_routing(4, 2, rng)
    apart = kernels.expert_ffn(kernels.register_experts(views[0], views[1], down), x, ids, weights)
    assert same_bits(apart, kernels.expert_ffn(kernels.register_experts(copies[0], copies[1], down), x, ids, weights))


def test_experts_in_a_host_buffer() -> None:
    rng = np.random.default_rng(14)
    kernels = POOLS[3, False]
    handle = random_experts(kernels, MIXES[0], rng)
    moved = []
    for weight in (handle.gate, handle.up, handle.down):
        data = cpu.host_buffer(weight.nbytes).view(weight.data.shape)
        data.copy_(weight.data)
        moved.append(QuantTensor(data, weight.type, weight.n_in))
    job = random_routing(4, 2, rng)
    assert same_bits(kernels.expert_ffn(kernels.register_experts(*moved), *job), kernels.expert_ffn(handle, *job))
    with pytest.raises(ValueError, match="byte"):
        cpu.host_buffer(0)
    with pytest.raises(MemoryError):
        cpu.host_buffer(1 << 60)


def test_a_host_buffer_is_freed_with_its_tensor() -> None:
    n_bytes = 64 << 20
    for _ in range(3):
        before = resident_bytes()
        part = cpu.host_buffer(n_bytes).fill_(1)[:10]  # a view keeps all of it
        assert resident_bytes() - before > n_bytes // 2
        del part
        assert resident_bytes() - before < n_bytes // 2


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_no_pairs_give_zeros() -> None:
    handle = random_experts(POOLS[3, False], MIXES[0], np.random.default_rng(10))
    x = torch.ones(3, HIDDEN)
    for ids in (torch.full((3, 2), -1), torch.empty((3, 0), dtype=torch.int64)):
        out = POOLS[3, False].expert_ffn(handle, x, ids, torch.ones(ids.shape))
        assert torch.equal(out, torch.zeros(3, HIDDEN))


def test_wrong_arguments() -> None:
    kernels = POOLS[1, False]
    handle = random_experts(kernels, MIXES[0], np.random.default_rng(11))
    x, weights = torch.ones(1, HIDDEN), torch.ones(1, 1)
    for expert in (N_EXPERT, -2):
        with pytest.raises(AssertionError, match=f"expert id {expert}"):
            kernels.expert_ffn(handle, x, torch.tensor([[expert]]), weights)
    with pytest.raises(AssertionError):
        kernels.linear(torch.ones(1, 128), handle.gate[0])
    with pytest.raises(ConfigError, match="threads"):
        CpuKernels(0)


@settings(max_examples=30)
@given(
    name=st.sampled_from(sorted(BY_NAME)),
    n_rows=st.integers(1, 40),
    n_blocks=st.integers(1, 12),
    n_tokens=st.integers(1, 9),
    threads=st.sampled_from([1, 3]),
)
def test_any_shape(name: str, n_rows: int, n_blocks: int, n_tokens: int, threads: int) -> None:
    type = BY_NAME[name]
    rng = np.random.default_rng(n_rows)
    weight = random_weight(type, (n_rows, n_blocks * type.block_size), rng)
    x = random_x((n_tokens, weight.n_in), rng)
    truth = x.to(torch.float64) @ exact(weight).T
    size = (x.to(torch.float64).abs() @ exact(weight).abs().T).norm()  # sums of a few terms may cancel
    for floats, limit in ((False, 1e-2), (True, 1e-6)):
        error = (POOLS[threads, floats].linear(x, weight).to(torch.float64) - truth).norm()
        assert float(error / size) < limit


def test_environment_lowers_the_tier(monkeypatch: pytest.MonkeyPatch) -> None:
    program = "from moe_engine.kernels.cpu import CpuKernels; print(CpuKernels(1).tier)"
    for value, expected in (("scalar", "scalar"), ("fast", "ConfigError")):
        monkeypatch.setenv("MOE_ENGINE_CPU_TIER", value)
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert (done.stdout.strip() or done.stderr).find(expected) >= 0


def test_a_missing_library_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import moe_engine.kernels

    monkeypatch.delattr(moe_engine.kernels, "_cpu")
    monkeypatch.setitem(sys.modules, "moe_engine.kernels._cpu", None)
    spec = importlib.util.spec_from_file_location("cpu_without_library", cpu.__file__)
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(NativeLibraryError, match="pip install"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_calls_from_several_threads() -> None:
    rng = np.random.default_rng(12)
    kernels = POOLS[3, False]
    handle = random_experts(kernels, MIXES[0], rng)
    jobs = [random_routing(n, 2, rng) for n in (1, 2, 9, 1, 3, 1, 17, 1)]
    expected = [kernels.expert_ffn(handle, *job) for job in jobs]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(20):
            results = threads.map(lambda job: kernels.expert_ffn(handle, *job), jobs)
            assert all(map(same_bits, results, expected))


def test_pools_come_and_go() -> None:
    weight = random_weight(BY_NAME["Q8_0"], (64, 256), np.random.default_rng(13))
    x = torch.ones(1, 256)
    expected = POOLS[1, False].linear(x, weight)
    for threads in (1, 2, 5) * 20:
        assert same_bits(CpuKernels(threads).linear(x, weight), expected)
