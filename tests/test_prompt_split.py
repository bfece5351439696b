"""The choice between decode steps and streaming for short prompts."""

from dataclasses import replace
from typing import Any

import pytest

from moe_engine import Engine
from moe_engine.kernels.launch import Launched
from moe_engine.prompt_split import PromptRates, PromptWay
from moe_engine.routing_estimate import RoutingEstimate, bundled_trace

RATES = PromptRates(pcie=50e9, dram=110e9, step_layer=70e-6, stream_layer=2.5e-3, cached_layer=2.5e-3)


@pytest.fixture(scope="module")
def way() -> PromptWay:
    """Qwen3-30B-A3B with few experts in VRAM."""
    return PromptWay(48, 128, 8, 2.4e6, 0.95, 32, RoutingEstimate(bundled_trace()))


def test_short_prompts_go_in_steps_and_long_ones_are_streamed(way: PromptWay) -> None:
    found = [way.in_steps(n, RATES) for n in (1, 8, 31, 512, 4096)]
    assert found == [True, True, True, False, False]


def test_where_nothing_is_missing_the_fixed_times_decide(way: PromptWay) -> None:
    in_vram, rates = replace(way, missing=0.0), replace(RATES, hits=1e30)
    assert in_vram.in_steps(32 * 35, rates)  # 35 steps of 70 us a layer against 2.5 ms
    assert not in_vram.in_steps(32 * 36, rates)


def test_steps_read_what_is_in_vram_each_time(way: PromptWay) -> None:
    in_vram, rates = replace(way, missing=0.0), replace(RATES, step_layer=0.0, hits=1e12)
    used = len(way.routing.counts(32, 128, 8)) * 2.4e6  # bytes
    n_step = int(2.5e-3 / (used / 1e12))
    assert in_vram.in_steps(32 * n_step, rates)
    assert not in_vram.in_steps(32 * (n_step + 1), rates)


def test_what_prompts_take_changes_the_choice(way: PromptWay) -> None:
    way = replace(way)
    assert way.in_steps(8, RATES)
    way.note(8, in_steps=True, seconds=9.0, rates=RATES)
    assert not way.in_steps(8, RATES)  # one measurement says more than an estimate
    assert way.step_factor == 3
    assert way.n_streamed == 0
    for _ in range(99):
        way.note(8, in_steps=False, seconds=9.0, rates=RATES)
    assert way.in_steps(8, RATES)
    assert way.stream_factor == pytest.approx(3.0)  # more is not believed


def test_streaming_is_tried_where_it_may_be_faster_than_steps_are(way: PromptWay) -> None:
    """A host that was busy when it was calibrated: 512 tokens, all experts in VRAM, as seen on an H200."""
    rates = replace(RATES, step_layer=250e-6, hits=1e30, stream_layer=99.0, cached_layer=5.8e-3)
    way = replace(way, missing=0.0)
    assert way.in_steps(512, rates)
    way.note(512, in_steps=True, seconds=48 * 5.08e-3, rates=rates)
    assert not way.in_steps(512, rates)  # 5.8 ms were foretold, but who knows
    assert way.in_steps(256, rates)
    compiling, slow = replace(way), replace(way)
    compiling.note(512, in_steps=False, seconds=6.0, rates=rates)
    assert not compiling.in_steps(512, rates)
    compiling.note(512, in_steps=False, seconds=48 * 2.1e-3, rates=rates)
    assert not compiling.in_steps(512, rates)
    slow.note(8192, in_steps=False, seconds=1.0, rates=rates)
    assert not slow.in_steps(512, rates)  # that says nothing of short ones
    for _ in range(2):
        slow.note(512, in_steps=False, seconds=48 * 5.8e-3, rates=rates)
    assert slow.in_steps(512, rates)


def test_steps_that_use_fewer_experts_than_estimated_say_so_of_streaming_too() -> None:
    """DeepSeek-V3's 256 experts of 25 MB; its routing may choose among far fewer."""
    way = PromptWay(4, 256, 8, 25e6, 0.96, 32, RoutingEstimate(bundled_trace()))
    rates = replace(RATES, stream_layer=1e-3)
    expected = way._step_seconds(24, rates)
    way.note(24, in_steps=True, seconds=expected / 2, rates=rates)
    assert not way.in_steps(24, rates)  # its floor is not reached either way
    way.note(24, in_steps=False, seconds=expected, rates=rates)
    for _ in range(9):
        way.note(24, in_steps=False, seconds=expected, rates=rates)
    assert way.in_steps(24, rates)  # but measured, it is what it is


def test_compiling_kernels_does_not_count(way: PromptWay, monkeypatch: pytest.MonkeyPatch) -> None:
    never, noted = replace(way), []
    never.in_steps = lambda n_token, rates: False  # type: ignore[method-assign]
    never.note = lambda n_token, in_steps, seconds, rates: noted.append(seconds)  # type: ignore[method-assign]
    with Engine.load(device="cpu", ctx=64, profile=False) as engine:
        engine.prefill._way = never
        engine.prefill([1, 2, 3])
        compute = type(engine.model).forward

        def compiling_for_an_hour(*args: Any) -> Any:
            monkeypatch.setattr(Launched, "first_seconds", Launched.first_seconds + 3600)
            return compute(*args)

        monkeypatch.setattr(type(engine.model), "forward", compiling_for_an_hour)
        engine.prefill([1, 2, 3])
    assert 0 < noted[0] < 3600
    assert -3600 < noted[1] < 0  # it did not take that hour
