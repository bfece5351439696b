"""The Triton prompt attention against `attention.attention`: natively on a GPU, else in Triton's interpreter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_engine.kernels import prompt_attention as module
from moe_engine.kernels.attention import attention
from moe_engine.kernels.norm_rope_cache import Cache, Q8Cache, cached_floats, quantize_reference
from moe_engine.kernels.prompt_attention import Tuning, grouped_prompt_attention, prompt_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
# ||out - reference|| / ||reference|| on the same cached values, of an f32 result: queries and probabilities are rounded
TOLERANCE = {"f16": 1e-3, "bf16": 6e-3}
SMALL = Tuning(rows=16, keys=32, num_warps=4, num_stages=2)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def check(kind: str, n_head: int, n_kv: int, d: int, d_value: int, position: int, n_token: int) -> None:
    n_key = position + n_token
    key, value = randn(n_key, n_kv, d, seed=1), randn(n_key, n_kv, d_value, seed=2)
    key, value = key.to(DTYPES[kind]), value.to(DTYPES[kind])
    query = 2 * randn(n_token, n_head, d)
    out = torch.empty(n_token, n_head, d_value, device=DEVICE)
    actual = prompt_attention(query, key, value, d**-0.5, position, out=out, tuning=SMALL)
    assert actual is out
    assert relative_error(actual, attention(query, key.float(), value.float(), d**-0.5, position)) < TOLERANCE[kind]


@pytest.mark.parametrize("kind", TOLERANCE)
@pytest.mark.parametrize("shape", [(4, 2, 128, 128, 31, 32), (3, 1, 80, 24, 1, 50), (2, 2, 192, 128, 100, 17)], ids=str)
def test_causal(kind: str, shape: tuple[int, int, int, int, int, int]) -> None:
    check(kind, *shape)


@settings(max_examples=8)
@given(position=st.integers(0, 70), n_token=st.integers(1, 70))
def test_any_position(position: int, n_token: int) -> None:
    check("f16", 2, 1, 16, 16, position, n_token)


@pytest.mark.parametrize("tuning", [None, Tuning(32, 16, 4, 1), Tuning(16, 64, 4, 2)])
def test_tiles_do_not_matter(tuning: Tuning | None) -> None:
    key, value, query = randn(150, 1, 32, seed=1).half(), randn(150, 1, 32, seed=2).half(), randn(140, 2, 32)
    actual = prompt_attention(query, key, value, 0.2, 10, tuning=tuning, out=torch.empty_like(query))
    assert relative_error(actual, attention(query, key.float(), value.float(), 0.2, 10)) < 1e-3


def test_shared_keys_and_any_strides() -> None:
    """As MLA calls it: parts of wider rows, keys head by head."""
    n_key, n_token, n_head, position = 45, 40, 3, 5
    query, shared = randn(n_token, n_head, 48).bfloat16(), randn(n_token, n_head, 16, seed=1).half()
    key, value = randn(n_head, n_key, 32, seed=2).half(), randn(n_key, n_head, 24, seed=3).half()
    rows = randn(n_key, 80, seed=4).half()
    out = torch.full((n_token, 5, 24), 7.0, device=DEVICE).bfloat16()
    prompt_attention(
        query[..., :32],
        key.transpose(0, 1),
        value,
        0.15,
        position,
        query_shared=shared,
        key_shared=rows[:, 64:],
        out=out[:, 1:4],
        tuning=SMALL,
    )
    whole_query = torch.cat([query[..., :32].float(), shared.float()], dim=-1)
    whole_key = torch.cat([key.transpose(0, 1), rows[:, None, 64:].expand(-1, n_head, -1)], dim=-1)
    expected = attention(whole_query, whole_key.float(), value.float(), 0.15, position)
    assert relative_error(out[:, 1:4], expected) < 4e-3
    assert (out[:, ::4] == 7).all()


def test_large_scores_do_not_overflow() -> None:
    query, key, value = randn(20, 2, 64) * 50, randn(20, 1, 64, seed=1).half() * 50, randn(20, 1, 64, seed=2).half()
    actual = prompt_attention(query, key, value, 1.0, 0, tuning=SMALL)
    assert relative_error(actual, attention(query.half().float(), key.float(), value.float(), 1.0, 0)) < 4e-3


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("heads_at_once", [1, 2, 3])
def test_any_cache(kind: str, heads_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies beyond the position is anything, and is not read into the result."""
    position, n_token, n_kv, d = 9, 24, 3, 32
    monkeypatch.setattr(module, "EXPANDED_BYTES", heads_at_once * 2 * 2 * (position + n_token) * d)

    def cached(seed: int) -> Cache:
        x = randn(position + n_token + 7, n_kv, d, seed=seed)
        cache = quantize_reference(x) if kind == "q8_0" else x.to(DTYPES[kind])
        for plane in cache if isinstance(cache, Q8Cache) else (cache,):
            plane[position + n_token :] = float("nan") if plane.is_floating_point() else 99
        return cache

    caches, query = (cached(1), cached(2)), randn(n_token, 2 * n_kv, d)
    actual = grouped_prompt_attention(query, *caches, 0.2, position)
    keys, values = (cached_floats(cache)[: position + n_token] for cache in caches)
    assert relative_error(actual, attention(query, keys, values, 0.2, position)) < 6e-3


@pytest.mark.gpu
@pytest.mark.parametrize("kind", TOLERANCE)
@pytest.mark.parametrize(("n_token", "position"), [(512, 0), (2048, 4096), (1000, 131)])
def test_full_size(kind: str, n_token: int, position: int) -> None:
    """Grouped queries and MLA at the dimensions of published models."""
    n_key = position + n_token
    key, value = (randn(n_key, 4, 128, seed=seed).to(DTYPES[kind]) for seed in (1, 2))
    query = randn(n_token, 32, 128).to(DTYPES[kind])
    actual = prompt_attention(query, key, value, 128**-0.5, position)
    expected = attention(query.float(), key.float(), value.float(), 128**-0.5, position)
    assert relative_error(actual, expected) < 6e-3
    shared, rows = randn(n_token, 32, 64, seed=3).to(key.dtype), randn(n_key, 64, seed=4).to(key.dtype)
    key, value = (randn(n_key, 32, 128, seed=seed).to(key.dtype) for seed in (5, 6))
    actual = prompt_attention(query, key, value, 0.07, position, query_shared=shared, key_shared=rows)
    keys = torch.cat([key, rows[:, None].expand(-1, 32, -1)], dim=-1).float()
    queries = torch.cat([query, shared], dim=-1).float()
    assert relative_error(actual, attention(queries, keys, value.float(), 0.07, position)) < 6e-3
