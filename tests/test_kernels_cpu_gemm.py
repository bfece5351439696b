"""The many-token form of the CPU kernels: against float64, against the few-token form, bit for bit with itself."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from test_kernels_cpu import (
    ALL_TYPES,
    FLOAT_NAMES,
    POOLS,
    exact,
    exact_ffn,
    random_weight,
    random_x,
    relative_error,
    same_bits,
)

from moe_engine.kernels import _cpu
from moe_engine.kernels.cpu import CpuKernels, ExpertHandle, available_tiers
from moe_engine.kernels.quant_tensor import QuantTensor
from moe_engine.kernels.quant_types import BY_NAME, QuantType

MANY = 11  # the largest many_threshold() of csrc/dispatch.h
THREADS = {(n, floats): CpuKernels(n, float_activations=floats) for n in (1, 2, 3, 4) for floats in (False, True)}
MODES = pytest.mark.parametrize("floats", [False, True], ids=["int8", "float"])


def use(tier: str) -> None:
    if tier not in available_tiers():
        pytest.skip(f"this processor (or compiler) lacks {tier}")
    _cpu.set_tier(tier)


@pytest.fixture(params=["scalar", "avx2", "avx512", "avx512vnni", "avx512vbmi", "amx"])
def tier(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _cpu.tier()
    use(request.param)
    yield request.param
    _cpu.set_tier(before)


def row_length(type: QuantType) -> int:
    """Several chunks of 256 and, where blocks are smaller, a part of one."""
    return {1: 549, 32: 544, 64: 576}.get(type.block_size, 768)


@MODES
@pytest.mark.parametrize("type", ALL_TYPES)
def test_linear(type: QuantType, floats: bool, tier: str) -> None:
    rng = np.random.default_rng(type.id)
    weight = random_weight(type, (67, row_length(type)), rng)
    truth = exact(weight)
    limit = 1e-5 if floats or type.name in FLOAT_NAMES else 1e-2
    for n_tokens in (1, 2, 5, 17, 33, 64, 130):
        x = random_x((n_tokens, weight.n_in), rng)
        assert relative_error(POOLS[3, floats].linear(x, weight), x.to(torch.float64) @ truth.T) < limit


@MODES
@pytest.mark.parametrize("type", ALL_TYPES)
def test_a_token_is_alone_in_its_arithmetic(type: QuantType, floats: bool, tier: str) -> None:
    rng = np.random.default_rng(1)
    weight = random_weight(type, (83, row_length(type)), rng)
    x = random_x((130, weight.n_in), rng)
    together = THREADS[1, floats].linear(x, weight)
    for some in (slice(0, MANY), slice(3, 20), slice(50, 130)):
        assert same_bits(THREADS[1, floats].linear(x[some], weight), together[some].contiguous())
    for threads in (2, 3, 4):
        assert same_bits(THREADS[threads, floats].linear(x, weight), together)


@pytest.mark.parametrize("type", ALL_TYPES)
def test_both_forms_agree(type: QuantType, tier: str) -> None:
    """Integer sums are the same; only their scaled addition runs in another order."""
    rng = np.random.default_rng(2)
    weight = random_weight(type, (40, row_length(type)), rng)
    x = random_x((MANY, weight.n_in), rng)
    few = torch.cat([POOLS[1, False].linear(row, weight) for row in x.split(1)])
    assert relative_error(POOLS[1, False].linear(x, weight), few.to(torch.float64)) < 2e-6


@pytest.mark.parametrize("type", ALL_TYPES)
def test_amx_gives_the_bits_of_avx512vnni(type: QuantType, tier: str) -> None:
    if tier != "amx":
        pytest.skip("a test of amx alone")
    rng = np.random.default_rng(3)
    weight, x = random_weight(type, (50, row_length(type)), rng), random_x((70, row_length(type)), rng)
    with_amx = POOLS[3, False].linear(x, weight)
    use("avx512vnni")
    assert same_bits(POOLS[3, False].linear(x, weight), with_amx)


@MODES
@pytest.mark.parametrize("n_out", [1, 15, 16, 17, 100])
@pytest.mark.parametrize("name", ["Q4_0", "Q6_K", "NVFP4"])
def test_any_number_of_rows(name: str, n_out: int, floats: bool, tier: str) -> None:
    rng = np.random.default_rng(n_out)
    weight = random_weight(BY_NAME[name], (3, n_out + 3, 256), rng)
    weight = QuantTensor(weight.data[:, 2:-1], weight.type, 256)  # matrices with gaps between them
    x = random_x((3, 300, 256), rng)
    truth = torch.einsum("bti,boi->bto", x.to(torch.float64), exact(weight))
    assert relative_error(POOLS[3, floats].linear(x, weight), truth) < (1e-5 if floats else 1e-2)


def test_shortest_rows(tier: str) -> None:
    rng = np.random.default_rng(4)
    weight, x = random_weight(BY_NAME["Q8_0"], (20, 32), rng), random_x((40, 32), rng)
    assert relative_error(POOLS[3, False].linear(x, weight), x.to(torch.float64) @ exact(weight).T) < 1e-2


def test_a_nan_stays_with_its_token(tier: str) -> None:
    weight = random_weight(BY_NAME["Q4_K"], (8, 512), np.random.default_rng(5))
    x = torch.ones(20, 512)
    x[18, 300] = torch.nan
    y = POOLS[1, False].linear(x, weight)
    assert y[18].isnan().all()
    assert y[torch.arange(20) != 18].isfinite().all()


# Types of gate, up and down, hidden size, feed-forward size.
LAYERS = [
    ("Q4_K", "Q4_K", "Q6_K", 256, 512),
    ("Q8_0", "Q5_1", "Q4_0", 96, 160),
    ("MXFP4", "MXFP4", "IQ4_NL", 288, 96),
    ("IQ3_S", "BF16", "Q2_K", 256, 256),
    ("Q4_0", "Q8_0", "F16", 64, 37),
    ("F32", "F16", "Q8_0", 40, 64),
    ("Q4_K", "Q4_K", "Q4_K", 3072, 256),  # of which the cache has room for 48 rows
]
N_EXPERT = 5
Routing = tuple[torch.Tensor, torch.Tensor]


def loads(rng: np.random.Generator) -> dict[str, Routing]:
    """Expert ids and weights [n_tokens, k] of very uneven loads."""
    around_the_threshold = torch.repeat_interleave(torch.arange(N_EXPERT), torch.tensor([6, 7, 9, 10, 11]))
    ids = {
        "all to one": torch.full((150, 1), 3),
        "twice the same": torch.full((40, 2), 1),
        "one has most": torch.from_numpy(np.minimum(rng.geometric(0.6, (90, 2)) - 1, N_EXPERT - 1)),
        "around the threshold": around_the_threshold[:, None],
        "with gaps": torch.from_numpy(rng.integers(-1, N_EXPERT, (70, 3))),
    }
    return {name: (i, torch.from_numpy(rng.random(tuple(i.shape), dtype=np.float32))) for name, i in ids.items()}


def random_experts(
    kernels: CpuKernels, layer: tuple[str, str, str, int, int], rng: np.random.Generator
) -> ExpertHandle:
    gate, up, down, hidden, n_ff = layer
    return kernels.register_experts(
        random_weight(BY_NAME[gate], (N_EXPERT, n_ff, hidden), rng),
        random_weight(BY_NAME[up], (N_EXPERT, n_ff, hidden), rng),
        random_weight(BY_NAME[down], (N_EXPERT, hidden, n_ff), rng),
    )


@MODES
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: "-".join(layer[:3]))
def test_expert_ffn(layer: tuple[str, str, str, int, int], floats: bool, tier: str) -> None:
    rng = np.random.default_rng(6)
    handle = random_experts(POOLS[3, floats], layer, rng)
    for ids, weights in loads(rng).values():
        x = random_x((len(ids), layer[3]), rng) * 0.1
        out = THREADS[1, floats].expert_ffn(handle, x, ids, weights)
        # Three roundings to 8 bits one after the other; each product alone keeps within 1e-2.
        assert relative_error(out, exact_ffn(handle, x, ids, weights)) < (1e-5 if floats else 2e-2)
        for threads in (2, 3, 4):
            assert same_bits(THREADS[threads, floats].expert_ffn(handle, x, ids, weights), out)


@MODES
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: "-".join(layer[:3]))
def test_expert_ffn_of_a_token_is_its_own(layer: tuple[str, str, str, int, int], floats: bool, tier: str) -> None:
    rng = np.random.default_rng(7)
    handle = random_experts(POOLS[3, floats], layer, rng)
    x, weights = random_x((90, layer[3]), rng) * 0.1, torch.ones(90, 2)
    ids = torch.tensor([[0, 2], [1, 2]]).repeat(45, 1)
    together = POOLS[3, floats].expert_ffn(handle, x, ids, weights)
    for some in (slice(0, 2 * MANY), slice(13, 57), slice(60, 90)):  # each expert keeps at least MANY
        alone = POOLS[1, floats].expert_ffn(handle, x[some], ids[some], weights[some])
        assert same_bits(alone, together[some].contiguous())
