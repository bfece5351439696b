"""The CUDA path against the CPU's, and decoding by a graph against decoding kernel by kernel: `pytest -m gpu`."""

from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from check_models import FLIP, Recorded, greedy_agreement, logit_differences
from filled_slots import fill_slots

from moe_engine import Engine
from moe_engine.benchmark.timeline import record
from moe_engine.decoder import EagerDecoder, StagedDecoder
from moe_engine.expert_cache import CachedExperts
from moe_engine.graph_decoder import GraphDecoder
from moe_engine.kernels.norm_rope_cache import cached_floats
from moe_engine.perplexity import perplexity

pytestmark = pytest.mark.gpu

DATA = Path(__file__).parent / "data"
EXACT: dict[str, Any] = {"activations": "float", "kv_dtype": "f32", "vram_budget": "4GiB"}
PROMPTS = ["Once upon a time", "The captain looked at the sea and said", "Hello, world!"]
LONG = 256  # tokens: far more than a cache of 9 slots keeps


def load(**options: Any) -> Engine:
    return Engine.load(**({"device": "cuda", "vram_budget": "4GiB"} | options))


def greedy(engine: Engine, prompt: str, n: int = LONG) -> list[int]:
    return engine.generate(prompt, temperature=0, max_tokens=n).tokens


def check_books(engine: Engine) -> None:
    assert isinstance(engine.decoder, GraphDecoder)
    engine.decoder.worker.settle()
    engine.decoder.worker.check_integrity()


@cache
def eager_tokens(prompt: str) -> list[int]:
    """What the decode step's kernels give without graph, worker and mailbox."""
    with load(eager=True) as engine:
        assert isinstance(engine.decoder, StagedDecoder)
        return greedy(engine, prompt)


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
    with load(experts=experts, ubatch=16) as engine:
        ppl = perplexity(engine, text).ppl
    assert min(abs(ppl / recorded.ppl_exact - 1), abs(ppl / recorded.ppl_llama_cpp - 1)) < 0.007


@pytest.mark.parametrize(("kv_dtype", "limit"), [("f16", 0.005), ("f32", 0.005), ("bf16", 0.01), ("q8_0", 0.01)])
def test_prompts_on_tensor_cores_keep_the_perplexity(kv_dtype: str, limit: float) -> None:
    text = (DATA / "heldout-4k.txt").read_text(encoding="utf-8")
    recorded = Recorded.load(DATA, "stories-deepseek-Q4_K_M")
    with load(kv_dtype=kv_dtype) as engine:
        assert engine.model.weights.backend.fused
        ppl = perplexity(engine, text).ppl
    assert abs(ppl / recorded.ppl_exact - 1) < limit


def test_any_micro_batches_give_the_logits_of_one() -> None:
    ids = [(i * 7919) % 400 for i in range(300)]
    with load(ubatch=300) as whole, load(ubatch=70) as parts:
        expected = whole.forward(ids)
        error = (parts.forward(ids) - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.median() < 0.02
    assert (error > 0.1).sum() <= 5  # router near-ties


def test_without_the_decode_step_tokens_do_not_depend_on_what_is_in_slots() -> None:
    outputs = []
    for slots in (1, 9, None):
        with Engine.load(device="cuda", experts="cache", cache_slots=slots, **EXACT) as engine:
            assert isinstance(engine.decoder, EagerDecoder)
            fill_slots(engine)
            outputs.append(greedy(engine, PROMPTS[0], 48))
    assert outputs[0] == outputs[1] == outputs[2]


# -- decoding by a graph -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [4, 9, 40, None])
def test_exact_tokens_are_the_eager_ones(slots: int | None) -> None:
    with load(exact=True, cache_slots=slots) as engine:
        tokens = greedy(engine, PROMPTS[0])
        check_books(engine)
        assert greedy(engine, PROMPTS[0]) == tokens  # from another state of the cache
    assert tokens == eager_tokens(PROMPTS[0])


def test_exact_keys_and_values_are_the_eager_ones_bit_for_bit() -> None:
    kept = []
    for options in ({"eager": True}, {"exact": True, "cache_slots": 4}, {"exact": True}):
        with load(kv_dtype="f32", ctx=512, **options) as engine:
            greedy(engine, PROMPTS[1])
            n = len(engine._in_cache[0])
            kept.append([cached_floats(cache)[0, :n].cpu() for layer in engine.cache.tensors for cache in layer])
    assert all(map(torch.equal, kept[1], kept[0]))
    assert all(map(torch.equal, kept[2], kept[0]))


@pytest.mark.parametrize("slots", [12, 40, None])
def test_an_exact_batch_gives_what_its_prompts_give_alone(slots: int | None) -> None:
    with load(exact=True, cache_slots=slots, n_sequence=3) as engine:
        results = engine.generate_batch(PROMPTS, temperature=0, max_tokens=LONG)
        check_books(engine)
    assert [result.tokens for result in results] == [eager_tokens(prompt) for prompt in PROMPTS]


@pytest.mark.parametrize(
    "options",
    [
        {"experts": "cpu"},
        {"miss": "cpu", "cache_slots": 9},
        {"miss": "fetch", "cache_slots": 9},
        {"miss": "auto", "cache_slots": 9},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_whoever_computes_a_miss_greedy_tokens_are_the_recorded_ones(options: dict[str, Any]) -> None:
    """Up to the first small margin: sums are rounded differently."""
    recorded = Recorded.load(DATA, "stories-deepseek-Q4_K_M")
    with load(**options) as engine:
        for i in range(len(recorded.llama_cpp)):
            equal, sure = greedy_agreement(engine, recorded, i)
            assert equal >= sure
        check_books(engine)


def test_statistics_add_up() -> None:
    with load(cache_slots=9) as engine:
        stats = engine.generate(PROMPTS[0], temperature=0, max_tokens=32).stats
        assert isinstance(engine.experts, CachedExperts)
        n_choice = len(engine.experts.handles) * engine.model.router.top_k
    assert stats.steps == stats.decode_tokens == 32
    assert stats.expert_hits + stats.expert_misses == 32 * n_choice
    assert stats.hit_bytes > 0
    assert stats.miss_bytes > 0
    assert stats.bound is not None
    assert 0 < stats.bound.share < 1


def test_an_abandoned_text_does_not_disturb_the_next() -> None:
    with load(exact=True, cache_slots=9) as engine:
        for _ in range(3):
            next(engine.stream(PROMPTS[1], temperature=0.9, seed=1, max_tokens=100))
            assert greedy(engine, PROMPTS[0], 20) == eager_tokens(PROMPTS[0])[:20]
        check_books(engine)


def test_sampling_follows_its_seed() -> None:
    """With a variant of sampling for each, and each in a graph of its own."""
    with load(exact=True, cache_slots=9) as engine, load(eager=True) as eager:
        for options in ({"top_k": 40}, {"top_k": 0, "top_p": 1.0}, {"top_k": 1}):
            sampled = {"seed": 5, "temperature": 1.0, "max_tokens": 40} | options
            expected = eager.generate(PROMPTS[0], **sampled).tokens
            assert [engine.generate(PROMPTS[0], **sampled).tokens for _ in range(2)] == [expected] * 2


@pytest.mark.parametrize("options", [{}, {"exact": True}, {"n_sequence": 4}], ids=lambda options: "-".join(options))
def test_the_budget_is_kept(options: dict[str, Any]) -> None:
    with load(experts="cache", vram_budget="2GiB", **options) as engine:
        assert engine.vram_plan is not None
        prompts = PROMPTS[: engine.cache.n_sequence]
        for temperature in (0.0, 0.8):  # a graph for each
            result = engine.generate_batch(prompts, max_tokens=32, seed=1, temperature=temperature)[0]
        check_books(engine)
        assert torch.cuda.max_memory_reserved() <= engine.vram_plan.budget - engine.vram_plan.context
        assert 0 < result.stats.peak_vram_bytes <= engine.vram_plan.budget


@pytest.mark.parametrize("slots", [9, None])
def test_prompts_in_steps_fill_the_kv_cache_as_micro_batches_do(slots: int | None) -> None:
    prompt = list(range(5, 45))
    with load(cache_slots=slots, n_sequence=2) as engine:
        decoder = engine.decoder
        assert isinstance(decoder, GraphDecoder)

        def kept() -> list[torch.Tensor]:
            return [cached_floats(cache)[1, : len(prompt)] for layer in engine.cache.tensors for cache in layer]

        for _ in engine.prefill.hidden(prompt, 0, 1):
            pass
        streamed = kept()
        for _ in range(2):  # launched kernel by kernel, then replayed
            decoder.prompt(1, prompt[:18], 0)
            decoder.prompt(1, prompt[18:], 18)
            for found, expected in zip(kept(), streamed, strict=True):
                assert (found - expected).norm() < 0.05 * expected.norm()


def test_timeline_of_a_step() -> None:
    """GPU events adjoin from the step's begin to its end, the CPU's lie within, and tokens stay what they were."""
    with load(experts="cpu") as engine:
        expected = greedy(engine, PROMPTS[0], 32)
        events = record(engine, engine.encode(PROMPTS[0])[0])
        gpu = [event for event in events if event.lane == "GPU"]
        assert gpu[0].start == 0
        assert all(one.end == following.start for one, following in pairwise(gpu))
        assert all(event.start <= event.end for event in events)
        on_cpu = [event for event in events if event.lane == "CPU"]
        assert on_cpu
        assert all(event.start >= 0 and event.end <= gpu[-1].end for event in on_cpu)
        assert greedy(engine, PROMPTS[0], 32) == expected
        check_books(engine)
