"""Every model family and file layout against transformers, with random weights."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from filled_slots import empty_slots, fill_slots
from tiny_models import WRITABLE, TinyModel, TypeOf, in_turn, make, wide
from tiny_variants import EOS, VARIANTS

from moe_engine import Engine
from moe_engine.decoder import StagedDecoder

TOLERANCE = 1e-4  # of logits with a standard deviation of 1

K_TYPES = ("Q4_K", "Q6_K", "Q5_K", "Q3_K", "Q2_K", "IQ4_XS", "Q8_0")
SMALL_TYPES = ("IQ2_XXS", "IQ3_S", "IQ4_NL", "IQ1_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ1_M", "TQ1_0", "TQ2_0", "MXFP4")
TYPES: dict[str, Callable[[], str | TypeOf]] = {
    "F16": lambda: "F16",
    "BF16": lambda: "BF16",
    "Q8_0": lambda: "Q8_0",
    "mixed": lambda: in_turn(*WRITABLE, "F32"),
    "wide-k": lambda: in_turn(*K_TYPES),
    "wide-small": lambda: in_turn(*SMALL_TYPES),
}
QUANTIZED = [
    ("qwen2moe/plain", "F16"),
    ("qwen3moe/plain", "BF16"),
    ("deepseek2/v3", "Q8_0"),
    ("deepseek2/v2-lite-legacy", "Q8_0"),
    ("qwen2moe/plain", "mixed"),
    ("qwen2moe/fused", "mixed"),
    ("qwen3moe/tied", "mixed"),
    ("deepseek2/v2-lite-yarn", "mixed"),
    ("deepseek2/v3-flat-mla", "mixed"),
    ("deepseek2/v3-next-token-block", "mixed"),
    ("qwen2moe/plain", "wide-k"),
    ("qwen3moe/plain", "wide-k"),
    ("qwen3moe/fused", "wide-k"),
    ("deepseek2/v2-lite-legacy-yarn", "wide-k"),
    ("deepseek2/v3", "wide-k"),
    ("qwen2moe/plain", "wide-small"),
    ("qwen3moe/plain", "wide-small"),
    ("deepseek2/kimi", "wide-small"),
]

Maker = Callable[..., TinyModel]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """Builds a variant, with tensor types from TYPES, once for all tests."""

    @cache
    def build(name: str, types: str = "F32", **overrides: Any) -> TinyModel:
        chosen = TYPES[types]() if types in TYPES else types
        if types.startswith("wide"):
            overrides = wide(name) | overrides
        return make(name, tmp_path_factory.mktemp("tiny"), chosen, **overrides)

    return build


def load(model: TinyModel, **options: Any) -> Engine:
    exact: dict[str, Any] = {"device": "cpu", "activations": "float", "kv_dtype": "f32", "threads": 2}
    return Engine.load(model.path, **(exact | options))


def random_ids(n: int, seed: int = 0) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(0, EOS, n).tolist()
    return ids


def clear_prompt(
    model: TinyModel, n_prompt: int = 12, n_new: int = 8, lead: float = 0.01
) -> tuple[list[int], list[int]]:
    """A prompt whose greedy continuation by transformers is a matter of more than rounding, and that one."""
    for seed in range(200):
        prompt = random_ids(n_prompt, seed)
        tokens = model.greedy(prompt, n_new, lead)
        if tokens is not None and EOS not in tokens:
            return prompt, tokens
    raise AssertionError("no clear prompt found")


def worst_by_position(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Largest error of the logits at each position."""
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    return (found.cpu() - expected).abs().amax(1)


@pytest.mark.parametrize("name", VARIANTS)
def test_reference_is_well_conditioned(tiny: Maker, name: str) -> None:
    """The other tests mean something only if no router sits on a tie that rounding decides."""
    model, ids = tiny(name), random_ids(48)
    expected = model.reference(ids)
    assert 0.7 < expected.std() < 1.4
    assert (model.reference(ids, torch.float32) - expected).abs().max() < TOLERANCE / 4


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_transformers(tiny: Maker, name: str) -> None:
    model, ids = tiny(name), random_ids(48)
    with load(model) as engine:
        logits = engine.forward(ids)
    assert worst_by_position(logits, model.reference(ids)).max() < TOLERANCE


@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_tokens_equal_transformers(tiny: Maker, name: str) -> None:
    """Decodes from the KV cache what the reference computes from the start each time."""
    model = tiny(name)
    prompt, expected = clear_prompt(model)
    with load(model) as engine:
        result = engine.generate(prompt, max_tokens=len(expected), temperature=0)
    assert result.tokens == expected


@pytest.mark.parametrize("ubatch", [1, 7, 47])
@pytest.mark.parametrize("name", ["qwen2moe/plain", "qwen3moe/gqa-3", "deepseek2/v2-lite-yarn", "deepseek2/v3"])
def test_logits_do_not_depend_on_the_micro_batch(tiny: Maker, name: str, ubatch: int) -> None:
    """With 1, every position goes through the code of a decode step."""
    model, ids = tiny(name), random_ids(48)
    with load(model, ubatch=ubatch) as engine:
        logits = engine.forward(ids)
    assert worst_by_position(logits, model.reference(ids)).max() < TOLERANCE


@pytest.mark.parametrize(("kv_dtype", "tolerance"), [("f16", 0.01), ("bf16", 0.08)])
@pytest.mark.parametrize("name", ["qwen2moe/all-experts", "deepseek2/v3"])
def test_kv_cache_types_cost_only_their_rounding(tiny: Maker, name: str, kv_dtype: str, tolerance: float) -> None:
    model, ids = tiny(name), random_ids(32)
    with load(model, kv_dtype=kv_dtype) as engine:
        error = worst_by_position(engine.forward(ids), model.reference(ids))
    assert error.median() < tolerance
    assert error.max() > TOLERANCE / 10  # the option does something


def test_forward_starts_from_an_empty_context(tiny: Maker) -> None:
    model = tiny("deepseek2/v3")
    with load(model) as engine:
        first = engine.forward(random_ids(20))
        engine.generate(random_ids(9, seed=1), max_tokens=3, temperature=0)
        again = engine.forward(random_ids(20))
    assert torch.equal(first, again)


@pytest.mark.parametrize("part", [2, 3])
def test_any_part_of_a_split_model_opens_it(tiny: Maker, part: int) -> None:
    model, ids = tiny("qwen3moe/split"), random_ids(5)
    parts = sorted(model.path.parent.iterdir())
    assert len(parts) == 3
    with Engine.load(parts[part - 1], device="cpu", activations="float", kv_dtype="f32") as engine:
        assert worst_by_position(engine.forward(ids), model.reference(ids)).max() < TOLERANCE


@pytest.mark.parametrize(("name", "types"), QUANTIZED)
def test_quantized_logits_equal_transformers(tiny: Maker, name: str, types: str) -> None:
    """With activations as floats, quantized weights cost no more accuracy than others."""
    model, ids = tiny(name, types), random_ids(32)
    with load(model) as engine:
        logits = engine.forward(ids)
    expected = model.reference(ids)
    assert worst_by_position(logits, expected).max() < TOLERANCE * max(1.0, float(expected.std()))


@pytest.mark.parametrize(("name", "types"), QUANTIZED)
def test_quantized_greedy_tokens_equal_transformers(tiny: Maker, name: str, types: str) -> None:
    model = tiny(name, types)
    prompt, expected = clear_prompt(model, n_new=4)
    with load(model) as engine:
        assert engine.generate(prompt, max_tokens=4, temperature=0).tokens == expected


@pytest.mark.parametrize(("name", "types"), QUANTIZED)
def test_int8_activations_stay_close(tiny: Maker, name: str, types: str) -> None:
    """Rounding may flip a router at some position; at most positions it must stay a rounding error."""
    model, ids = tiny(name, types), random_ids(32)
    with load(model, activations="int8", kv_dtype="f16") as engine:
        error = worst_by_position(engine.forward(ids), model.reference(ids))
    assert error.median() < 0.2
    assert error.quantile(0.8) < 0.5


def test_int8_activations_without_routing(tiny: Maker) -> None:
    """Where all experts are used there is nothing to flip: the bound holds everywhere."""
    model, ids = tiny("qwen2moe/all-experts", "Q8_0"), random_ids(32)
    with load(model, activations="int8") as engine:
        error = worst_by_position(engine.forward(ids), model.reference(ids))
    assert 1e-4 < error.max() < 0.3  # over zero: the option does something


# --- the accelerator's code, on the CPU ---------------------------------------------------------------------------

SIMULATED: dict[str, Any] = {"device": "simulated", "experts": "cache", "vram_budget": "64MiB"}


@pytest.mark.parametrize(
    ("name", "types"),
    [
        ("qwen2moe/plain", "F32"),
        ("qwen3moe/plain", "F32"),
        ("deepseek2/v3", "F32"),
        ("deepseek2/v2-lite-legacy-yarn", "Q8_0"),
        ("qwen2moe/fused", "mixed"),
        ("qwen3moe/tied", "mixed"),
        ("deepseek2/v3", "mixed"),
        ("qwen3moe/plain", "wide-k"),
        ("deepseek2/kimi", "wide-small"),
    ],
)
def test_simulated_device_equals_transformers(tiny: Maker, name: str, types: str) -> None:
    model, ids = tiny(name, types, num_hidden_layers=2), random_ids(6)
    prompt, expected = clear_prompt(model, n_prompt=4, n_new=2)
    with load(model, **SIMULATED) as engine:
        error = worst_by_position(engine.forward(ids), model.reference(ids)).max()
        tokens = engine.generate(prompt, max_tokens=2, temperature=0).tokens
    assert error < TOLERANCE
    assert tokens == expected


@pytest.mark.parametrize("name", ["qwen3moe/plain", "deepseek2/v3"])
def test_simulated_device_with_experts_on_the_cpu(tiny: Maker, name: str) -> None:
    model, ids = tiny(name, num_hidden_layers=2), random_ids(6)
    with load(model, **(SIMULATED | {"experts": "cpu"})) as engine:
        assert worst_by_position(engine.forward(ids), model.reference(ids)).max() < TOLERANCE


@pytest.mark.parametrize(
    ("name", "types", "lead"),
    [
        ("qwen2moe/plain", "F16", 0.02),
        ("qwen3moe/gqa-3", "BF16", 0.02),
        ("deepseek2/v3", "F16", 0.02),
        # products of 8-bit integers
        ("deepseek2/v2-lite-legacy-yarn", "Q8_0", 0.3),
        ("qwen2moe/fused", "mixed", 0.3),
    ],
)
def test_decode_step_equals_transformers(tiny: Maker, name: str, types: str, lead: float) -> None:
    """Its kernels one by one, with what they add to the path above: rotation, attention, router, sampling."""
    model = tiny(name, types, num_hidden_layers=2)
    prompt, expected = clear_prompt(model, n_prompt=4, n_new=3, lead=lead)
    with load(model, **SIMULATED, activations="int8", eager=True) as engine:
        assert isinstance(engine.decoder, StagedDecoder)
        assert engine.generate(prompt, max_tokens=3, temperature=0).tokens == expected


@pytest.mark.parametrize("slots", [1, 5])
@pytest.mark.parametrize("name", ["qwen3moe/plain", "deepseek2/v3"])
def test_greedy_tokens_do_not_depend_on_what_is_in_slots(tiny: Maker, name: str, slots: int) -> None:
    model = tiny(name, num_hidden_layers=2)
    prompt, expected = clear_prompt(model, n_prompt=6, n_new=4)
    with load(model, **SIMULATED, cache_slots=slots) as engine:
        fill_slots(engine)
        result = engine.generate(prompt, max_tokens=4, temperature=0)
    assert result.tokens == expected
    assert result.stats.expert_misses > 0


@pytest.mark.parametrize(("name", "types"), [("qwen3moe/plain", "F32"), ("deepseek2/v3", "mixed")])
def test_logits_do_not_depend_on_the_cache_bit_for_bit(tiny: Maker, name: str, types: str) -> None:
    """Neither on its size nor on what it holds. Mixed types make several classes of slots."""
    model, ids = tiny(name, types, num_hidden_layers=2), random_ids(6)
    results = []
    for slots in (3, 16):
        with load(model, **SIMULATED, cache_slots=slots) as engine:
            results.append(engine.forward(ids))
            experts = empty_slots(engine)
            hits = experts.hits
            results.append(engine.forward(ids))
            assert experts.hits == hits
            fill_slots(engine)
            results.append(engine.forward(ids))
            assert experts.hits > hits
    assert all(torch.equal(result, results[0]) for result in results)
