"""Prompts through the fused kernels, on the simulated device, against the plain definition; types of the KV cache.

Where a test compares whole models, every token uses all experts: rounding cannot change who is chosen.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import TinyModel, in_turn, make
from torch import Tensor

from moe_engine import ConfigError, Engine
from moe_engine.kernels import prompt_attention
from moe_engine.kernels.decode_product import DECODE_TOKENS
from moe_engine.kernels.device import run_kernels
from moe_engine.kernels.norm_rope_cache import Q8Cache, cached_floats
from moe_engine.kv_cache import KVCache, cached_bytes
from moe_engine.layers import MixtureOfExperts, Span
from moe_engine.metadata import Metadata
from moe_engine.model import Transformer
from moe_engine.models import model_class

KV_TYPES = ("f16", "bf16", "f32", "q8_0")
CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 2}  # interpreted kernels are slow
MLA: dict[str, Any] = SMALL | {"num_hidden_layers": 2, "n_routed_experts": 4, "num_experts_per_tok": 4}
MLA |= {"n_group": 1, "topk_group": 1, "qk_rope_head_dim": 32}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bias": ("qwen2moe/all-experts", SMALL | {"num_key_value_heads": 1}),
    "norms": ("qwen3moe/plain", SMALL | {"num_key_value_heads": 1, "num_experts": 4, "num_experts_per_tok": 4}),
    "mla": ("deepseek2/v2-lite-yarn", MLA),
    "mla-q-lora": ("deepseek2/v3-legacy-yarn", MLA),
}
N_PROMPT = 36
ERROR = 0.03  # relative, of all hidden states together

Load = Callable[..., Engine]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Load]:
    """Loads one of MODELS, once for each set of options."""

    @cache
    def file(name: str) -> TinyModel:
        variant, overrides = MODELS[name]
        types = in_turn("Q8_0", "F16", "BF16", "F32", "Q5_0")
        return make(variant, tmp_path_factory.mktemp("tiny"), types, **overrides)

    @cache
    def engine(name: str, **options: Any) -> Engine:
        common: dict[str, Any] = {"ctx": 64, "threads": 1, "eager": True, "vram_budget": "64MiB", "experts": "cpu"}
        return Engine.load(file(name).path, **(common | options))

    yield engine
    engine.cache_clear()


def exact(load: Load, name: str) -> Engine:
    return load(name, device="cpu", activations="float", kv_dtype="f32")


def fused(load: Load, name: str, **options: Any) -> Engine:
    if not run_kernels(torch.empty(0)):
        pytest.skip("needs Triton's interpreter")
    engine = load(name, device="simulated", **options)
    assert engine.model.weights.backend.fused
    return engine


def random_ids(n: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(0).integers(0, 250, n)]


@torch.inference_mode()
def hidden_states(engine: Engine, splits: list[int]) -> Tensor:
    """Of a prompt that goes through the layers in parts that begin at `splits`."""
    ids, ends = torch.tensor(random_ids(N_PROMPT)), [*splits[1:], N_PROMPT]
    rows = engine.cache.sequence(0)
    parts = [engine.model.forward(ids[a:b], a, rows, engine.rope) for a, b in zip(splits, ends, strict=True) if a < b]
    return torch.cat(parts)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_are_the_exact_ones(load: Load, name: str) -> None:
    error = relative_error(hidden_states(fused(load, name), [0]), hidden_states(exact(load, name), [0]))
    assert 1e-4 < error < ERROR  # over zero: it is another path


@pytest.mark.parametrize(
    ("name", "kv_type"), [("norms", "bf16"), ("norms", "f32"), ("norms", "q8_0"), ("mla", "bf16"), ("mla", "q8_0")]
)
def test_every_type_of_cache(load: Load, name: str, kv_type: str) -> None:
    """In two parts, of which the second reads what the first has written."""
    states = hidden_states(fused(load, name, kv_dtype=kv_type), [0, 18])
    assert relative_error(states, hidden_states(exact(load, name), [0])) < ERROR


@pytest.mark.parametrize("name", ["norms", "mla"])
def test_few_tokens_between_many(load: Load, name: str) -> None:
    """The first few go through the kernels of the decode step."""
    assert DECODE_TOKENS < 17
    states = hidden_states(fused(load, name), [0, 17, 19])
    assert relative_error(states, hidden_states(exact(load, name), [0])) < ERROR


@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_every_type_of_cache_on_the_cpu(load: Load, kv_type: str) -> None:
    limit = {"f16": 1e-3, "bf16": 1e-2, "f32": 1e-5, "q8_0": 2e-2}[kv_type]
    for name in ("norms", "mla"):
        engine = load(name, device="cpu", activations="float", kv_dtype=kv_type)
        error = relative_error(hidden_states(engine, [0, 7]), hidden_states(exact(load, name), [0]))
        assert error < limit
        assert (error > 1e-5) == (kv_type != "f32")


splits = st.lists(st.integers(1, N_PROMPT - 1), max_size=6, unique=True).map(lambda found: [0, *sorted(found)])


@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(["norms", "mla"]), splits=splits)
def test_any_split_gives_the_same_attention_in_fused_kernels(load: Load, name: str, splits: list[int]) -> None:
    engine, plain = fused(load, name), exact(load, name)
    x = torch.randn(N_PROMPT, 64, generator=torch.Generator().manual_seed(1))
    residual, caches = torch.zeros_like(x), engine.cache.sequence(0)[0].tensors
    with torch.inference_mode():
        for a, b in zip(splits, [*splits[1:], N_PROMPT], strict=True):
            span = Span(a, torch.tensor([a], dtype=torch.int32))
            engine.model.blk[0].attn.prompt(x[a:b].bfloat16(), residual[a:b], span, caches, engine.rope)
        expected = plain.model.blk[0].attn(x, 0, plain.cache.sequence(0)[0], plain.rope)
    assert relative_error(residual, expected) < 1e-2


@torch.inference_mode()
@pytest.mark.parametrize("name", ["norms", "mla-q-lora"])
def test_keys_that_are_expanded_head_by_head(load: Load, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no room for two heads the results are the same bits."""
    engine = fused(load, name, kv_dtype="q8_0")
    before = hidden_states(engine, [0])
    monkeypatch.setattr(prompt_attention, "EXPANDED_BYTES", 1)
    assert torch.equal(hidden_states(engine, [0]), before)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["bias", "mla"])
def test_feed_forwards(load: Load, name: str) -> None:
    """The dense and shared ones, also gated, each by itself."""
    x = torch.randn(DECODE_TOKENS + 3, 64, generator=torch.Generator().manual_seed(1))
    for block, plain in zip(fused(load, name).model.blk, exact(load, name).model.blk, strict=True):
        ffn = block.ffn.shared if isinstance(block.ffn, MixtureOfExperts) else block.ffn
        expected = plain.ffn.shared if isinstance(plain.ffn, MixtureOfExperts) else plain.ffn
        assert ffn is not None
        assert expected is not None
        residual = x.clone()
        ffn.prompt(x.bfloat16(), residual)
        assert relative_error(residual - x, expected(x)) < 1e-2


# -- types of the KV cache -----------------------------------------------------------------------------------------


def test_q8_0_rows_are_what_gguf_reads() -> None:
    cache = KVCache([((2, 64),)], 2, 8, "q8_0", CPU)
    rows = torch.randn(3, 2, 64, generator=torch.Generator().manual_seed(1))
    (seen,) = cache.sequence(1)[0].append(4, rows)
    assert seen.shape == (7, 2, 64)
    stored = cache.tensors[0][0]
    assert isinstance(stored, Q8Cache)
    blocks = np.concatenate(
        [stored.scales[1, 4:7].numpy()[..., None].view(np.uint8), stored.values[1, 4:7].unflatten(-1, (2, 32)).numpy()
         .view(np.uint8)], axis=-1,
    )  # fmt: skip
    expected = quants.dequantize(blocks.reshape(6, 68), GGMLQuantizationType.Q8_0)
    assert np.array_equal(seen[4:].numpy().reshape(6, 64), expected)
    assert (seen[:4] == 0).all()
    assert (cached_floats(stored)[0] == 0).all()  # the other sequence
    assert relative_error(seen[4:], rows) < 0.01


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize("name", ["norms", "mla"])
def test_the_plan_knows_the_bytes_of_a_token(load: Load, name: str, kv_type: str) -> None:
    cache = load(name, device="cpu", activations="float", kv_dtype=kv_type).cache
    n_value = sum(int(np.prod(shape)) for shape in exact(load, name).model.kv_shapes[0])
    file = exact(load, name).file
    family: type[Transformer] = model_class(file.architecture, "")
    assert n_value == family.kv_values(Metadata(file.metadata, file.architecture, ""))
    assert cache.token_bytes == len(cache.tensors) * cached_bytes(kv_type, n_value)
    assert sum(x.nbytes for layer in cache.tensors for c in layer for x in (c if isinstance(c, Q8Cache) else (c,))) == (
        cache.capacity * cache.token_bytes
    )


def test_rows_that_are_not_whole_blocks_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"q8_0.*32.*80.*f16"):
        KVCache([((1, 80),)], 1, 4, "q8_0", CPU)
