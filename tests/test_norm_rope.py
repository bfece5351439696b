"""RMSNorm, q/k norm, rotation and cache writes against plain torch: natively on a GPU, else interpreted."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from torch import Tensor

from moe_engine.kernels.decode_activations import Activations, quantize
from moe_engine.kernels.norm_rope import (
    Cache,
    Q8Cache,
    cached_floats,
    fused_rms_norm,
    latent_norm_rope_append,
    qk_norm_rope_append,
    quantize_reference,
    rms_norm_reference,
    rope_reference,
)
from moe_engine.rope import Rope, RopeConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-6
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def int32(value: int | list[int]) -> Tensor:
    return torch.tensor(value, dtype=torch.int32, device=DEVICE)


def empty_cache(kind: str, *shape: int) -> Cache:
    if kind == "q8_0":
        return Q8Cache.zeros(*shape, device=DEVICE)
    return torch.zeros(shape, dtype=DTYPES[kind], device=DEVICE)


def assert_stored(cache: Cache, expected: Tensor) -> None:
    """`cache` holds `expected` f32, up to an error of rounding either way."""
    step = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
    if isinstance(cache, Q8Cache):
        exact = quantize_reference(expected)
        assert (cache.values.int() - exact.values.int()).abs().max() <= 1
        assert (cache.values != exact.values).float().mean() < 1e-3
        torch.testing.assert_close(cache.scales, exact.scales, rtol=1e-3, atol=0)
    else:
        torch.testing.assert_close(cache.float(), expected, rtol=step[cache.dtype], atol=1e-6)


@pytest.mark.parametrize("n", [1, 1000, 7168])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(n: int, dtype: str) -> None:
    x, weight = randn(3, 2 * n).to(DTYPES[dtype])[:, :n], randn(n, seed=1)
    y = fused_rms_norm(x, weight, EPS)
    torch.testing.assert_close(y, rms_norm_reference(x, weight, EPS), rtol=1e-5, atol=1e-6)
    rounded = fused_rms_norm(x, weight, EPS, out=torch.empty(3, n, dtype=DTYPES[dtype], device=DEVICE))
    assert rounded.dtype == DTYPES[dtype]
    torch.testing.assert_close(rounded.float(), y, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("n", [48, 2048])
def test_rms_norm_quantizes(n: int) -> None:
    x, weight = randn(3, n), randn(n, seed=1)
    activations = Activations.empty(3, n, x.device)
    y = fused_rms_norm(x, weight, EPS, activations=activations)
    assert_quantized(activations, y)


def assert_quantized(activations: Activations, x: Tensor) -> None:
    """`activations` hold x, up to the last bit of a scale."""
    expected = quantize(x)
    assert ((activations.codes.int() - expected.codes.int()).abs() <= 1).all()
    assert (activations.codes != expected.codes).float().mean() < 1e-2
    torch.testing.assert_close(activations.pairs, expected.pairs, rtol=1e-2, atol=1e-4)


def test_references_are_the_engines() -> None:
    rope = Rope(RopeConfig(48, 1e4, "yarn", 4.0, 32, attention_factor=1.1), 40, torch.device(DEVICE))
    x, positions = randn(5, 3, 64), torch.arange(7, 12, device=DEVICE)
    assert torch.equal(rope_reference(x, rope.cos, rope.sin, positions, False), rope.half_split(x, 7))
    x = x[..., :48]
    assert torch.equal(rope_reference(x, rope.cos, rope.sin, positions, True), rope.interleaved(x, 7))


def test_q8_0_reference_is_ggufs() -> None:
    x = torch.cat([randn(4, 96), torch.zeros(1, 96, device=DEVICE)])
    ours = quantize_reference(x)
    theirs = quants.quantize(x.cpu().numpy(), GGMLQuantizationType.Q8_0).reshape(-1, 34)
    assert np.array_equal(ours.values.cpu().numpy().reshape(-1, 32), theirs[:, 2:].view(np.int8))
    assert np.array_equal(ours.scales.cpu().numpy().ravel(), theirs[:, :2].copy().view(np.float16).ravel())


GQA = [  # n_head, n_kv_head, d, n_rot, interleaved, norms, bias
    (8, 1, 128, 128, False, True, False),
    (4, 4, 64, 64, False, False, True),
    (3, 1, 80, 32, False, True, True),
    (6, 2, 192, 64, True, False, False),
    (3, 1, 128, 128, True, True, False),
    (4, 2, 96, 2, False, False, False),
]


@pytest.mark.parametrize("shape", GQA, ids=str)
@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
def test_qk_norm_rope_append(shape: tuple[int, int, int, int, bool, bool, bool], kind: str) -> None:
    n_head, n_kv, d, n_rot, interleaved, has_norms, has_bias = shape
    if kind == "q8_0" and d % 32:
        pytest.skip("Q8_0 needs whole blocks")
    some = [(2, int32(14)), (1, int32(0)), (1, int32([16])), (3, int32([9, 3, 0]))]
    for n_token, positions in some if DEVICE == "cuda" or kind == "f16" else some[:1]:
        run_gqa(n_head, n_kv, d, n_rot, interleaved, has_norms, has_bias, kind, n_token, positions)


def run_gqa(
    n_head: int, n_kv: int, d: int, n_rot: int, interleaved: bool, has_norms: bool, has_bias: bool, kind: str,
    n_token: int, positions: Tensor,
) -> None:  # fmt: skip
    rope = Rope(RopeConfig(n_rot, 1e4), 20, torch.device(DEVICE))
    fused = randn(n_token, (n_head + 2 * n_kv) * d)
    parts = [n_head * d, n_kv * d, n_kv * d]
    norms = (randn(d, seed=1), randn(d, seed=2)) if has_norms else None
    bias = randn(sum(parts), seed=3) if has_bias else None
    k_cache, v_cache = empty_cache(kind, 17, n_kv, d), empty_cache(kind, 17, n_kv, d)
    q, k, v = (part.unflatten(1, (-1, d)) for part in fused.split(parts, dim=1))
    append = partial(qk_norm_rope_append, norms=norms, eps=EPS, bias=bias, interleaved=interleaved)
    out = append(q, k, v, rope.cos, rope.sin, positions, k_cache, v_cache)
    rows = positions.reshape(-1).long()
    if rows.numel() < n_token:
        rows = rows + torch.arange(n_token, device=DEVICE)
    if bias is not None:
        q, k, v = (part.unflatten(1, (-1, d)) for part in (fused + bias).split(parts, dim=1))
    if norms is not None:
        q, k = rms_norm_reference(q, norms[0], EPS), rms_norm_reference(k, norms[1], EPS)
    q, k = (rope_reference(part, rope.cos, rope.sin, rows, interleaved) for part in (q, k))
    torch.testing.assert_close(out, q, rtol=1e-5, atol=2e-6)
    for cache, expected in ((k_cache, k), (v_cache, v)):
        full = torch.zeros(17, n_kv, d, device=DEVICE)
        full[rows] = expected
        assert_stored(cache, full)


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize(("n_head", "kv_lora", "n_rot"), [(6, 512, 64), (3, 64, 32), (1, 96, 32)])
def test_latent_norm_rope_append(n_head: int, kv_lora: int, n_rot: int, kind: str) -> None:
    rope = Rope(RopeConfig(n_rot, 1e4), 9, torch.device(DEVICE))
    q, kv, weight = randn(2, n_head, 48 + n_rot), randn(2, kv_lora + n_rot, seed=1), randn(kv_lora, seed=2)
    cache = empty_cache(kind, 9, kv_lora + n_rot)
    query = torch.full((2, n_head, kv_lora + n_rot), 7.0, device=DEVICE)
    out = query[..., kv_lora:]
    activations = Activations.empty(n_head * 2, 48, q.device)
    append = partial(latent_norm_rope_append, eps=EPS, out=out, q_nope=q[..., :48], activations=activations)
    append(q[..., 48:], kv, weight, rope.cos, rope.sin, int32(7), cache)
    assert_quantized(activations, q[..., :48].transpose(0, 1).reshape(-1, 48))
    assert (query[..., :kv_lora] == 7).all()
    torch.testing.assert_close(out, rope.interleaved(q[..., 48:], 7), rtol=1e-5, atol=2e-6)
    latent = rms_norm_reference(kv[:, :kv_lora], weight, EPS)
    full = torch.zeros(9, kv_lora + n_rot, device=DEVICE)
    full[7:] = torch.cat([latent, rope.interleaved(kv[:, None, kv_lora:], 7)[:, 0]], dim=-1)
    assert_stored(cache, full)


def test_sequences_and_positions_outside() -> None:
    rope = SimpleNamespace(cos=torch.ones(4, 16, device=DEVICE), sin=torch.zeros(4, 16, device=DEVICE))
    k, v = randn(6, 2, 32), randn(6, 2, 32, seed=1)
    k_cache, v_cache = empty_cache("f32", 3, 4, 2, 32), empty_cache("f32", 3, 4, 2, 32)
    # Two tokens each for three sequences; of the last one the second token is past the end, of the second the first
    qk_norm_rope_append(k, k, v, rope.cos, rope.sin, int32([1, -1, 3]), k_cache, v_cache)
    for cache, rows in ((k_cache, k), (v_cache, v)):
        full = torch.zeros(3, 4, 2, 32, device=DEVICE)
        full[0, 1:3], full[1, 0], full[2, 3] = rows[:2], rows[3], rows[4]
        assert torch.equal(cached_floats(cache), full)


def test_exact_q8_0_of_values_that_are_not_rotated() -> None:
    q, k, v = randn(1, 1, 64), randn(1, 1, 64, seed=1), randn(1, 1, 64, seed=2)
    v[..., :32] = torch.arange(32) - 15.5  # halves, and a scale that is exact
    v[..., 0] = 127
    k_cache, v_cache = Q8Cache.zeros(1, 1, 64, device=DEVICE), Q8Cache.zeros(1, 1, 64, device=DEVICE)
    table = torch.ones(1, 1, device=DEVICE)
    qk_norm_rope_append(q, k, v, table, table * 0, int32(0), k_cache, v_cache)
    exact = quantize_reference(v)
    assert torch.equal(v_cache.values, exact.values)
    assert torch.equal(v_cache.scales, exact.scales)


@pytest.mark.skipif(DEVICE == "cpu", reason="graphs need a GPU")
def test_a_graph_replays_at_any_position() -> None:
    rope = Rope(RopeConfig(64, 1e4), 50, torch.device(DEVICE))
    q, k, v, position = randn(1, 4, 64), randn(1, 2, 64), randn(1, 2, 64, seed=1), int32(3)
    caches = empty_cache("f16", 50, 2, 64), empty_cache("f16", 50, 2, 64)
    qk_norm_rope_append(q, k, v, rope.cos, rope.sin, position, *caches)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = qk_norm_rope_append(q, k, v, rope.cos, rope.sin, position, *caches)
    position.fill_(41)
    graph.replay()
    torch.testing.assert_close(out, rope.half_split(q, 41), rtol=1e-5, atol=2e-6)
    assert torch.equal(cached_floats(caches[1])[41], v[0].half().float())
