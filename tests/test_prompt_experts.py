"""Prompts through the ring against expert by expert, for any state of cache and ring; and who computes what."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from random_blocks import random_blocks
from tensor_store import TensorStore
from torch import Tensor

from moe_engine.expert_cache import CachedExperts
from moe_engine.kernels.cpu import CpuKernels
from moe_engine.kernels.quant_tensor import QuantTensor
from moe_engine.kernels.quant_types import BY_NAME
from moe_engine.prompt_experts import PromptExperts
from moe_engine.prompt_split import PromptRates, choose_for_cpu, cpu_seconds

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
N_LAYER, N_EXPERT, TOP_K, HIDDEN, N_FF, N_TOKEN = 3, 6, 2, 64, 32, 20
DOWN = ["Q8_0", "Q4_0", "Q8_0"]  # two layouts
TOLERANCE = 0.03  # random weights, 8-bit activations on the CPU; an expert left out changes far more
SLOW_LINK = PromptRates(pcie=1.0)  # every expert would rather be computed on the CPU
SLOW_CPU = PromptRates(cpu=1.0)


def weights_of(layer: int) -> list[QuantTensor]:
    """Gate, up and down of a layer."""
    found = []
    for i, (name, n_out, n_in) in enumerate(
        (("Q8_0", N_FF, HIDDEN), ("Q8_0", N_FF, HIDDEN), (DOWN[layer], HIDDEN, N_FF))
    ):
        rows = random_blocks(BY_NAME[name], N_EXPERT * n_out, n_in, np.random.default_rng(10 * layer + i))
        found.append(QuantTensor(torch.from_numpy(rows).view(N_EXPERT, n_out, -1), BY_NAME[name], n_in))
    return found


class Layers:
    """Three MoE layers, of two layouts, with `n_slot` slots a pool that hold the experts in `resident`."""

    def __init__(
        self, n_slot: int, n_stage: int, resident: list[tuple[int, int]], exact: bool, rates: PromptRates
    ) -> None:
        scratch = torch.empty(1 << 16, device=DEVICE)
        cpu = CpuKernels(2)
        self.experts = experts = CachedExperts(DEVICE, scratch, cpu, caches=True, store=TensorStore(cpu), homes={})
        for layer in range(N_LAYER):
            experts.register(layer, *weights_of(layer))
        nbytes = sum((n_slot + n_stage) * layout.slot_bytes for layout in experts.pools)
        experts.allocate(nbytes, TOP_K, n_slot, 0, n_stage)
        choosers = [lambda x: choice(len(x), seed=9)[1]] * N_LAYER
        self.prompt = PromptExperts(experts, N_TOKEN, TOP_K, exact, choosers)
        self.prompt.rates = rates
        self.free = {layout: list(range(len(pool.slots))) for layout, pool in experts.pools.items()}
        self.fill(resident)

    def fill(self, keys: list[tuple[int, int]]) -> None:
        """Loads what is absent, as far as there are free slots."""
        for layer, expert in dict.fromkeys(keys):
            slots = self.free[self.experts.layouts[layer]]
            if slots and self.experts.slot_table[layer, expert] < 0:
                self.experts.load((layer, expert), slots.pop())

    def close(self) -> None:
        self.experts.close()


def choice(n_token: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, and choices of which some experts get many and some none."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_token, HIDDEN, generator=generator) / HIDDEN**0.5
    liking = torch.rand(N_EXPERT, generator=generator) ** 3 + 1e-6
    ids = torch.multinomial(liking.expand(n_token, -1), TOP_K, generator=generator)
    return x.to(DEVICE), ids.to(DEVICE), torch.rand(n_token, TOP_K, generator=generator).to(DEVICE)


def reference(layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Expert by expert in f32, of an engine's experts that caches nothing."""
    others = Layers(2, 2, [], exact=True, rates=PromptRates())
    found = others.experts._one_by_one(layer, x, ids, weights)
    others.close()
    return found


def error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


ALL = [(layer, expert) for layer in range(N_LAYER) for expert in range(N_EXPERT)]


@torch.inference_mode()
@pytest.mark.parametrize(
    ("n_slot", "n_stage", "rates"),
    [(2, 2, SLOW_LINK), (3, 9, SLOW_LINK), (3, 9, SLOW_CPU), (2, 2, PromptRates()), (12, 2, PromptRates())],
    ids=["cpu", "cpu and run-ahead", "copies", "both", "all in slots"],
)
def test_prompts_give_what_expert_by_expert_gives(n_slot: int, n_stage: int, rates: PromptRates) -> None:
    layers = Layers(n_slot, n_stage, ALL if n_slot == 12 else ALL[::2], exact=False, rates=rates)
    for n_token in (1, N_TOKEN):
        for layer in range(N_LAYER):
            inputs = choice(n_token, seed=layer)
            assert error(layers.prompt(layer, *inputs), reference(layer, *inputs)) < TOLERANCE
    counts = layers.prompt.counts
    assert (counts.cached > 0) == (n_slot < 12)
    if rates is SLOW_LINK:
        assert counts.cpu > 0
    if rates is SLOW_CPU:
        assert counts.cpu == 0
        assert counts.streamed_bytes > 0
    layers.close()


@torch.inference_mode()
def test_long_prompts_send_the_cpu_only_the_tokens_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_engine.prompt_experts.SHORT_PROMPT", 8)
    layers = Layers(2, 2, ALL[:2], exact=False, rates=SLOW_LINK)
    inputs = choice(N_TOKEN, seed=5)
    assert error(layers.prompt(0, *inputs), reference(0, *inputs)) < TOLERANCE
    assert layers.prompt.counts.cpu > 0
    layers.close()


@torch.inference_mode()
@settings(max_examples=8)
@example(resident=[], n_slot=5, n_stage=9, order=[0, 1, 2], n_token=6, arriving=ALL[N_EXPERT + 1 :])
@given(
    resident=st.lists(st.sampled_from(ALL), max_size=12),
    n_slot=st.integers(2, 8),
    n_stage=st.integers(2, 9),
    order=st.lists(st.integers(0, N_LAYER - 1), min_size=1, max_size=4),
    n_token=st.integers(1, 6),
    arriving=st.lists(st.sampled_from(ALL), max_size=12),
)
def test_exact_results_do_not_depend_on_the_cache(
    resident: list[tuple[int, int]],
    n_slot: int,
    n_stage: int,
    order: list[int],
    n_token: int,
    arriving: list[tuple[int, int]],
) -> None:
    """Layers in any order: what was copied ahead for one that does not follow is given up.

    Slots are filled meanwhile, also with what has just been copied ahead.
    """
    some, all_missed = (
        Layers(n_slot, n_stage, resident, exact=True, rates=SLOW_LINK),
        Layers(2, 2, [], exact=True, rates=PromptRates()),
    )
    for step, layer in enumerate(order):
        inputs = choice(n_token, seed=step)
        some.fill([key for key in arriving if key[0] == layer and step > 0])
        assert torch.equal(some.prompt(layer, *inputs), all_missed.prompt(layer, *inputs))
    assert some.prompt.counts.cpu == 0
    some.close()
    all_missed.close()


@torch.inference_mode()
def test_what_is_foreseen_of_the_next_layer_is_copied_ahead() -> None:
    inputs = [choice(N_TOKEN, seed=layer) for layer in range(N_LAYER)]
    foreseen = [inputs[0][1], inputs[1][1], inputs[1][1]]  # right for layer 1, that of layer 1 for layer 2
    layers = Layers(2, 8, [], exact=True, rates=PromptRates())
    layers.prompt.choosers = [lambda x, ids=ids: ids for ids in foreseen]  # type: ignore[misc]
    copied: list[tuple[int, int]] = []
    copy = layers.experts.store.copy

    def noted(index: int, experts: Sequence[int], slots: Tensor) -> None:
        copied.extend((index, expert) for expert in experts)
        copy(index, experts, slots)

    layers.experts.store.copy = noted  # type: ignore[method-assign]
    chosen = [set(ids.flatten().tolist()) for _, ids, _ in inputs]
    for layer in range(N_LAYER):
        assert error(layers.prompt(layer, *inputs[layer]), reference(layer, *inputs[layer])) < TOLERANCE
        if layer == 0:
            assert {expert for at, expert in copied if at == 1} == chosen[1]
    assert len(copied) == len(set(copied))  # nothing twice
    assert {expert for layer, expert in copied if layer == 2} == chosen[1] | chosen[2]
    assert layers.prompt.counts.unused == len(chosen[1] - chosen[2])
    layers.close()


@torch.inference_mode()
def test_an_interrupted_prompt_leaves_the_ring_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = Layers(2, 4, [], exact=True, rates=PromptRates())
    product = layers.prompt._product
    add, calls = product.add, []

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> None:
        calls.append(1)
        if len(calls) < 6:
            raise KeyboardInterrupt
        add(self, *args, **kwargs)

    monkeypatch.setattr(product, "add", interrupted)
    inputs = choice(N_TOKEN, seed=3)
    for _ in range(5):
        with pytest.raises(KeyboardInterrupt):
            layers.prompt(0, *inputs)
    assert error(layers.prompt(0, *inputs), reference(0, *inputs)) < TOLERANCE
    layers.close()


@given(
    counts=st.lists(st.integers(1, 500), max_size=20),
    n_elsewhere=st.integers(0, 1000),
    pcie=st.floats(1e9, 1e11),
    dram=st.floats(1e10, 4e11),
    cpu=st.floats(1e10, 1e13),
    waits=st.booleans(),
)
def test_the_cut_between_cpu_and_copies_is_the_best(
    counts: list[int], n_elsewhere: int, pcie: float, dram: float, cpu: float, waits: bool
) -> None:
    counts, nbytes, operations = sorted(counts), 3_000_000, 9_000_000
    rates = PromptRates(pcie=pcie, dram=dram, cpu=cpu)

    def seconds(n: int) -> float:
        work = sum(cpu_seconds(np.array([count]), nbytes, operations, rates).item() for count in counts[:n])
        gpu, link = (n_elsewhere + sum(counts)) * operations / rates.gpu, (len(counts) - n) * nbytes / pcie
        return max(gpu, link, work + rates.hand_over) + waits * rates.hand_over if n else max(gpu, link)

    of_cpu = np.array(counts, dtype=np.int32)
    chosen = choose_for_cpu(of_cpu, n_elsewhere, nbytes, operations, rates, waits)
    times = [seconds(n) for n in range(len(counts) + 1)]
    assert times[chosen] == pytest.approx(min(times))
    assert all(later <= earlier for earlier, later in pairwise(times[min(1, chosen) : chosen + 1]))
    faster_bus = choose_for_cpu(of_cpu, n_elsewhere, nbytes, operations, replace(rates, pcie=1e15), waits)
    assert faster_bus == 0
