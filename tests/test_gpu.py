"""The CUDA path against the CPU's, on a machine with a GPU: `pytest -m gpu`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from check_models import FLIP, Recorded, logit_differences

from moe_engine import Engine
from moe_engine.expert_cache import CachedExperts
from moe_engine.perplexity import perplexity

pytestmark = pytest.mark.gpu

DATA = Path(__file__).parent / "data"
EXACT: dict[str, Any] = {"activations": "float", "kv_dtype": "f32", "vram_budget": "4GiB"}


@pytest.mark.parametrize("experts", ["cache", "cpu"])
def test_logits_are_the_recorded_ones(experts: str) -> None:
    recorded = Recorded.load(DATA, "stories-deepseek-Q4_K_M")
    with Engine.load(device="cuda", experts=experts, **EXACT) as engine:
        differences = logit_differences(engine, recorded)
    assert (differences > FLIP).sum() <= 5  # router near-ties


def test_perplexity_equals_the_cpus() -> None:
    text = (DATA / "heldout-4k.txt").read_text(encoding="utf-8")
    with Engine.load(device="cuda", **EXACT) as cuda, Engine.load(device="cpu", activations="float") as cpu:
        assert perplexity(cuda, text).ppl == pytest.approx(perplexity(cpu, text).ppl, rel=1e-3)


@pytest.mark.parametrize("experts", ["cache", "cpu"])
def test_kernels_for_few_tokens_keep_the_perplexity(experts: str) -> None:
    """With micro-batches of 16 tokens every product goes through the decode kernels."""
    text = (DATA / "heldout-4k.txt").read_text(encoding="utf-8")
    recorded = Recorded.load(DATA, "stories-deepseek-Q4_K_M")
    with Engine.load(device="cuda", experts=experts, vram_budget="4GiB", ubatch=16) as engine:
        ppl = perplexity(engine, text).ppl
    assert min(abs(ppl / recorded.ppl_exact - 1), abs(ppl / recorded.ppl_llama_cpp - 1)) < 0.007


@pytest.mark.parametrize(("activations", "sizes"), [("float", (1, 4, 9, None)), ("int8", (4, 9, None))])
def test_greedy_tokens_do_not_depend_on_the_cache(activations: str, sizes: tuple[int | None, ...]) -> None:
    outputs = []
    for slots in sizes:
        options = EXACT | {"activations": activations, "cache_slots": slots}
        with Engine.load(device="cuda", experts="cache", **options) as engine:
            assert isinstance(engine.experts, CachedExperts)
            outputs.append(engine.generate("Once upon a time", temperature=0, max_tokens=48).tokens)
            engine.experts.check_integrity()
    assert all(tokens == outputs[0] for tokens in outputs)


def test_the_budget_is_kept() -> None:
    with Engine.load(device="cuda", experts="cache", vram_budget="2GiB") as engine:
        assert engine.vram_plan is not None
        result = engine.generate("Once upon a time", max_tokens=32, seed=1)
        assert torch.cuda.max_memory_reserved() <= engine.vram_plan.budget - engine.vram_plan.context
        assert 0 < result.stats.peak_vram_bytes <= engine.vram_plan.budget
