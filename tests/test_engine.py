"""Text generation through the public interface."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from filled_slots import fill_slots

from moe_engine import CapacityError, ConfigError, Engine, EngineConfig
from moe_engine.config import format_size, parse_size
from moe_engine.decoder import EagerDecoder
from moe_engine.engine import Prompt
from moe_engine.expert_cache import CachedExperts

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.load(device="cpu", threads=2) as engine:
        yield engine


def test_result_is_whole(engine: Engine) -> None:
    result = engine.generate(PROMPT, max_tokens=12, seed=3)
    assert result.prompt_tokens == engine.tokenizer.encode(PROMPT)
    assert len(result.tokens) == 12
    assert result.finish_reason == "length"
    assert result.text == engine.tokenizer.decode(result.tokens)
    assert result.stats.prompt_tokens == len(result.prompt_tokens)
    assert result.stats.prefilled_tokens == len(result.prompt_tokens) - 1
    assert engine.generate([1], max_tokens=1).stats.prompt_rate is None  # it decodes
    assert result.stats.decode_tokens == 12
    assert result.stats.peak_ram_bytes > 0


def test_stream_pieces_make_the_text_and_seed_repeats(engine: Engine) -> None:
    options: dict[str, Any] = {"max_tokens": 24, "seed": 11, "temperature": 1.3, "top_k": 0, "top_p": 1.0}
    stream = engine.stream(PROMPT, **options)
    pieces = list(stream)
    assert len(pieces) > 1
    assert "".join(pieces) == stream.result().text == engine.generate(PROMPT, **options).text


def test_no_prompts_give_no_results(engine: Engine) -> None:
    assert engine.generate_batch([], max_tokens=4) == []


def test_zero_tokens(engine: Engine) -> None:
    result = engine.generate(PROMPT, max_tokens=0)
    assert (result.text, result.tokens) == ("", [])


@pytest.mark.parametrize("n_stop", [1, 2])
def test_stop_strings_cut_the_text_even_inside_tokens(engine: Engine, n_stop: int) -> None:
    full = engine.generate(PROMPT, max_tokens=40, temperature=0).text
    stop = full[17:23]  # straddles tokens
    stops = [stop, "\0never"][:n_stop]
    result = engine.generate(PROMPT, max_tokens=40, temperature=0, stop=stops)
    assert result.text == full[: full.index(stop)]
    assert result.finish_reason == "stop"
    pieces = list(engine.stream(PROMPT, max_tokens=40, temperature=0, stop=stops))
    assert "".join(pieces) == result.text


def test_stop_token_ends_the_text(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    full = engine.generate(PROMPT, max_tokens=10, temperature=0)
    monkeypatch.setattr(engine.tokenizer, "stop_ids", frozenset({full.tokens[4]}))
    result = engine.generate(PROMPT, max_tokens=10, temperature=0)
    assert result.tokens == full.tokens[: full.tokens.index(full.tokens[4])]
    assert result.finish_reason == "stop"


def test_the_end_of_text_can_be_ignored(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = engine.generate("Once upon a time", temperature=0, max_tokens=6, ignore_eos=True).tokens
    monkeypatch.setattr(engine.tokenizer, "stop_ids", frozenset({expected[2]}))
    assert len(engine.generate("Once upon a time", temperature=0, max_tokens=6).tokens) == 2
    assert engine.generate("Once upon a time", temperature=0, max_tokens=6, ignore_eos=True).tokens == expected


def test_a_batch_of_prompts_alone_stays_in_its_caches() -> None:
    with Engine.load(device="cpu", n_sequence=2, ctx=32) as engine:
        prompts = [[1, 2, 3, 4], [5, 6, 7, 8]]
        assert [result.tokens for result in engine.generate_batch(prompts, max_tokens=0)] == [[], []]
        assert engine.generate_batch(prompts, max_tokens=0)[0].stats.reused_tokens == 6


def test_context_is_a_limit() -> None:
    with Engine.load(device="cpu", ctx=16, threads=1) as small:
        assert len(small.generate([5] * 10, max_tokens=50, temperature=0).tokens) == 7  # the 17th is never stored
        with pytest.raises(CapacityError, match="17 tokens"):
            small.generate([5] * 17)


def test_micro_batches_do_not_change_the_result(engine: Engine) -> None:
    ids = engine.tokenizer.encode("The captain looked at the sea and said, 'It was not so long ago that we met.'")
    options: dict[str, Any] = {"device": "cpu", "activations": "float", "kv_dtype": "f32", "threads": 1}
    with Engine.load(**options) as whole, Engine.load(ubatch=5, **options) as small:
        torch.testing.assert_close(small.forward(ids), whole.forward(ids), atol=1e-4, rtol=0)


def test_a_batch_gives_what_its_prompts_give_alone() -> None:
    options: dict[str, Any] = {"device": "cpu", "activations": "float", "kv_dtype": "f32", "ctx": 64, "threads": 2}
    prompts: list[Prompt] = [PROMPT, [39, 449, 78], "The captain"]
    with Engine.load(n_sequence=3, **options) as many, Engine.load(**options) as one:
        results = many.generate_batch(prompts, temperature=0, max_tokens=8)
        assert [result.text for result in results] == [
            one.generate(prompt, temperature=0, max_tokens=8).text for prompt in prompts
        ]
        assert results[0].stats is results[2].stats
        assert results[0].stats.decode_tokens == 24
        with pytest.raises(ConfigError, match="n_sequence"):
            many.generate_batch([*prompts, "x"])


def test_what_two_prompts_share_is_computed_once(engine: Engine) -> None:
    first = engine.generate([39, 449, 78, 11], temperature=0, max_tokens=4)
    ids = [39, 449, 78, 11, *first.tokens[:3], 5]
    reused = engine.generate(ids, temperature=0, max_tokens=4)
    assert reused.stats.reused_tokens == 7
    engine.forward([1])  # forgets
    again = engine.generate(ids, temperature=0, max_tokens=4)
    assert again.stats.reused_tokens == 0
    assert again.tokens == reused.tokens


@pytest.mark.parametrize("prompt", [[], "", [9999], [-1], [1.5], [True], [{"role": "user"}, 3]])
def test_bad_prompts_are_named(engine: Engine, prompt: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"token|prompt"):
        engine.generate(prompt)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"device": "gpu"}, "device"),
        ({"device": "cuda:99"}, "cuda:99"),
        ({"device": "cpu", "experts": "cache"}, "experts"),
        ({"device": "cpu", "ctx": 1 << 20}, "ctx"),
        ({"threads": 0}, "threads"),
        ({"vram_budget": "6 GB of it"}, "6 GB of it"),
        ({"activations": "int4"}, "int8, float"),
        ({"kv_dtype": "q4"}, "f16"),
        ({"vrambudget": "1GiB"}, "known|vram_budget"),
        ({"exact": "false"}, "exact is 'false', expected True or False"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        Engine.load(**options)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("6GiB", 6 << 30), ("500 MB", 500_000_000), ("1.5g", 1_500_000_000), ("1024", 1024), (7, 7), ("64 kib", 65536)],
)
def test_sizes(text: str | int, nbytes: int) -> None:
    assert parse_size(text) == nbytes
    assert EngineConfig(vram_budget=text).vram_budget == text


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1 PiB", "1,5GB", "1e9", True, 1.5, None])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_size(text)


def test_format_size() -> None:
    assert [format_size(n) for n in (0, 1023, 1 << 20, 5 << 30)] == ["0 B", "1023 B", "1.0 MiB", "5.00 GiB"]


# -- the path of accelerators, on the simulated one ----------------------------------------------------------------

SIMULATED: dict[str, Any] = {"device": "simulated", "activations": "float", "kv_dtype": "f32", "ctx": 64, "ubatch": 16}


def test_too_small_a_budget_says_what_is_needed() -> None:
    with pytest.raises(CapacityError, match=r"needs at least .* dense weights .* KV cache .* the budget is 5\.0 MiB"):
        Engine.load(vram_budget="5MiB", **SIMULATED)


def test_experts_fall_back_to_the_cpu_only_when_asked_to_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_engine.kernels.device.is_interpreted", lambda: False)
    with Engine.load(experts="cpu", **SIMULATED) as engine:
        assert engine.vram_plan is not None
        without_slots = engine.vram_plan.budget - engine.vram_plan.slots
    with pytest.raises(CapacityError, match="slots for one token's experts"):
        Engine.load(vram_budget=without_slots, experts="cache", **SIMULATED)
    with Engine.load(vram_budget=without_slots, experts="auto", **SIMULATED) as engine:
        assert isinstance(engine.experts, CachedExperts)
        assert not engine.experts.caches
        assert engine.generate([1, 2, 3], max_tokens=2).stats.hit_rate == 0.0


@pytest.mark.parametrize(
    ("slots", "activations"),
    [
        (1, "float"),
        (None, "float"),
        # few tokens through the decode kernels, whose stand-in without a GPU or interpreter is exact
        (7, "int8"),
        (None, "int8"),
    ],
)
def test_tokens_do_not_depend_on_what_is_in_slots(
    slots: int | None, activations: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path of prompts, which also decodes where the decode step cannot."""
    monkeypatch.setattr("moe_engine.kernels.device.is_interpreted", lambda: False)  # fast stand-ins
    ids = [39, 449, 78, 11, 1302, 0]
    with Engine.load(device="cpu", activations="float", kv_dtype="f32", ctx=64, threads=1) as cpu:
        expected = cpu.generate(ids, temperature=0, max_tokens=6).tokens
    with Engine.load(experts="cache", cache_slots=slots, **(SIMULATED | {"activations": activations})) as engine:
        assert isinstance(engine.decoder, EagerDecoder)
        assert fill_slots(engine).holds_all == (slots is None)
        result = engine.generate(ids, temperature=0, max_tokens=6)
    assert result.tokens == expected
    assert result.stats.expert_hits > 0
    assert (result.stats.expert_misses > 0) == (slots is not None)
