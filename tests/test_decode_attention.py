"""The Triton decode attention against `attention.attention`: natively on a GPU, else in Triton's interpreter."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from moe_engine.kernels import decode_attention as module
from moe_engine.kernels.attention import attention
from moe_engine.kernels.decode_activations import Activations, quantize
from moe_engine.kernels.decode_attention import GROUPED, LATENT, Tuning, decode_attention
from moe_engine.kernels.norm_rope import Cache, Q8Cache, cached_floats, quantize_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
# ||out - reference|| / ||reference|| on the same cached values; f16 products round queries and probabilities
TOLERANCE = {"f32": 1e-5, "f16": 1e-3, "bf16": 2e-4, "q8_0": 2e-3}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every program of the grid costs the interpreter time."""
    if DEVICE == "cpu":
        monkeypatch.setattr(module, "GROUPED", replace(GROUPED, n_program=8))
        monkeypatch.setattr(module, "LATENT", replace(LATENT, n_program=4))
        monkeypatch.setattr(module, "_COMBINED_WIDTH", 256)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def int32(value: int | list[int]) -> Tensor:
    return torch.tensor(value, dtype=torch.int32, device=DEVICE)


def as_cache(x: Tensor, kind: str) -> Cache:
    return quantize_reference(x) if kind == "q8_0" else x.to(DTYPES[kind])


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def spoil(cache: Cache, start: int) -> None:
    """What lies beyond the position is anything, and must not be read into the result."""
    for plane in cache if isinstance(cache, Q8Cache) else (cache,):
        plane[start:] = float("nan") if plane.is_floating_point() else 99


def check_grouped(
    kind: str, n_head: int, n_kv: int, d: int, n_token: int, n_key: int, tuning: Tuning | None = None
) -> None:
    capacity = n_key + 37
    k_cache, v_cache = (as_cache(randn(capacity, n_kv, d, seed=seed), kind) for seed in (1, 2))
    query, position = randn(n_token, n_head, d) * 2, n_key - n_token
    keys, values = (cached_floats(cache)[:n_key] for cache in (k_cache, v_cache))
    for cache in (k_cache, v_cache):
        spoil(cache, n_key)
    actual = decode_attention(query, k_cache, v_cache, int32(position), d**-0.5, tuning=tuning)
    expected = attention(query, keys, values, d**-0.5, position)
    assert relative_error(actual, expected) < TOLERANCE[kind]


def check_latent(kind: str, n_head: int, d_value: int, n_rot: int, n_token: int, n_key: int) -> None:
    width = d_value + n_rot
    cache = as_cache(randn(n_key + 5, width, seed=1), kind)
    query, position = randn(n_token, n_head, width) * 2, n_key - n_token
    seen = cached_floats(cache)[:n_key]
    spoil(cache, n_key)
    actual = decode_attention(query, cache, None, int32([position]), width**-0.5, d_value=d_value)
    expected = attention(query, seen[:, None], seen[:, None, :d_value], width**-0.5, position)
    assert relative_error(actual, expected) < TOLERANCE[kind]


@pytest.mark.parametrize("kind", TOLERANCE)
@pytest.mark.parametrize(("n_head", "n_kv", "d"), [(8, 1, 128), (3, 1, 64), (6, 2, 80), (2, 2, 192)])
@pytest.mark.parametrize("n_token", [1, 3])
def test_grouped(kind: str, n_head: int, n_kv: int, d: int, n_token: int) -> None:
    if kind == "q8_0" and d % 32:
        pytest.skip("Q8_0 needs whole blocks")
    for n_key in (1, 2, 63, 64, 65, 130):
        if n_key >= n_token and (DEVICE == "cuda" or (n_token == 1 and kind == "f16") or n_key == 65):
            check_grouped(kind, n_head, n_kv, d, n_token, n_key)


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_long_context_and_many_rows(kind: str) -> None:
    check_grouped(kind, 8, 1, 64, 1, 600)
    check_grouped(kind, 16, 2, 64, 8, 70)  # 64 rows
    check_grouped(kind, 24, 1, 64, 5, 70)  # 120 rows: two blocks of them


@pytest.mark.parametrize("kind", TOLERANCE)
def test_wide_heads_and_many_rows(kind: str) -> None:
    """What takes the most shared memory."""
    check_grouped(kind, 4, 1, 256, 8, 70)


def test_tunings_agree() -> None:
    for tuning in (Tuning(16, 16, 3, 4, 1), Tuning(16, 64, 1, 4, 2), Tuning(32, 128, 64, 8, 1)):
        check_grouped("f16", 40, 1, 64, 1, 257, tuning)


@pytest.mark.parametrize("kind", TOLERANCE)
@pytest.mark.parametrize(("n_head", "n_token"), [(16, 1), (5, 2), (128 if DEVICE == "cuda" else 40, 1)])
def test_latent(kind: str, n_head: int, n_token: int) -> None:
    if DEVICE == "cpu" and n_head == 40 and kind != "f16":
        pytest.skip("too slow in the interpreter")
    for n_key in (2, 63, 65, 200) if DEVICE == "cuda" else (65,):
        check_latent(kind, n_head, 512, 64, n_token, n_key)


def test_latent_of_other_widths() -> None:
    check_latent("f16", 3, 64, 32, 1, 70)
    check_latent("q8_0", 4, 32, 32, 4, 70)
    check_latent("f32", 4, 32, 8, 1, 70)


def test_small_heads() -> None:
    check_grouped("f32", 4, 2, 8, 1, 70)
    check_grouped("f16", 4, 2, 20, 1, 70)


@pytest.mark.parametrize("latent", [False, True])
def test_batch_of_sequences(latent: bool) -> None:
    n_sequence, capacity, n_head, n_kv, d = 3, 96, 4, 1 if latent else 2, 96
    shape = (n_sequence, capacity, d) if latent else (n_sequence, capacity, n_kv, d)
    k, v = randn(*shape, seed=1).half(), randn(*shape, seed=2).half()
    query, positions = randn(n_sequence, 2, n_head, d), [70, -2, 3]
    d_value = 64 if latent else d
    actual = decode_attention(query, k, None if latent else v, int32(positions), 0.1, d_value=d_value)
    assert (actual[1] == 0).all()  # an idle sequence
    for i in (0, 2):
        keys = k[i, : positions[i] + 2].float().view(-1, n_kv, d)
        values = keys[..., :64] if latent else v[i, : positions[i] + 2].float()
        assert relative_error(actual[i], attention(query[i], keys, values, 0.1, positions[i])) < 1e-3


def test_large_scores_do_not_overflow() -> None:
    k, v, query = randn(70, 1, 64).half() * 50, randn(70, 1, 64, seed=1).half(), randn(1, 8, 64, seed=2) * 50
    actual = decode_attention(query, k, v, int32(69), 1.0)
    assert relative_error(actual, attention(query, k.float(), v.float(), 1.0, 69)) < 1e-3


def test_result_in_a_given_tensor() -> None:
    k, v, query = randn(70, 2, 64), randn(70, 2, 64, seed=1), randn(2, 8, 64, seed=2)
    out = torch.full_like(query, 7.0)
    assert decode_attention(query, k, v, int32(40), 0.125, out=out) is out
    assert torch.equal(out, decode_attention(query, k, v, int32(40), 0.125))


def test_quantizes_its_result() -> None:
    k, v, query = randn(2, 70, 2, 32), randn(2, 70, 2, 32, seed=1), randn(2, 3, 4, 32, seed=2)
    for shape in ((6, 4 * 32), (4 * 6, 32)):
        activations = Activations.empty(*shape, query.device)
        out = decode_attention(query, k, v, int32([40, 66]), 0.125, activations=activations)
        rows = out.view(6, 4, 32) if shape[0] == 6 else out.view(6, 4, 32).transpose(0, 1)
        expected = quantize(rows.reshape(shape))
        assert ((activations.codes.int() - expected.codes.int()).abs() <= 1).all()
        torch.testing.assert_close(activations.pairs, expected.pairs, rtol=1e-2, atol=1e-4)


@pytest.mark.skipif(DEVICE == "cpu", reason="graphs need a GPU")
@pytest.mark.parametrize("latent", [False, True])
def test_a_graph_replays_at_any_position(latent: bool) -> None:
    capacity, d, n_kv = 5000, 576 if latent else 128, 1 if latent else 4
    k, v, query = randn(capacity, n_kv, d).half(), randn(capacity, n_kv, d, seed=1).half(), randn(1, 32, d, seed=2)
    d_value, position = 512 if latent else d, int32(0)
    k_cache, v_cache = (k[:, 0], None) if latent else (k, v)
    run = partial(decode_attention, query, k_cache, v_cache, position, d**-0.5, d_value=d_value)
    run()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    values = (k if latent else v)[..., :d_value]
    for at in (0, 31, 511, 4999):
        position.fill_(at)
        graph.replay()
        expected = attention(query, k[: at + 1].float(), values[: at + 1].float(), d**-0.5, at)
        assert relative_error(out, expected) < 1e-3
