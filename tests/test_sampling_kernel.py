"""Drawing on the GPU against `Sampler`: natively on a GPU, else in Triton's interpreter."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_engine import SamplingParams
from moe_engine.kernels.sampling_kernel import FEW, SamplerState, Variant, sample, variant_for
from moe_engine.kernels.sampling_triton import top_keys
from moe_engine.kernels.sampling_triton import uniform as uniform_kernel
from moe_engine.sampling import Sampler, uniform

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VARIANTS: tuple[Variant, ...] = ("greedy", "few", "full")
PADDING = 3  # rows past the vocabulary, with logits that would win

# The numpy that interprets reports infinities and NaN
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def params_of(**options: Any) -> SamplingParams:
    return SamplingParams.of(**{"seed": 1, "repeat_penalty": 1.0, **options})


def padded(logits: Tensor) -> Tensor:
    return torch.nn.functional.pad(logits, (0, PADDING), value=1e9).to(DEVICE)


def positions_of(histories: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor([len(h) for h in histories], dtype=torch.int32, device=DEVICE)


def state_of(
    n_vocab: int, params: Sequence[SamplingParams], histories: Sequence[Sequence[int]], suppress: Sequence[int] = ()
) -> SamplerState:
    state = SamplerState(len(params), n_vocab, DEVICE, suppress)
    for i, (p, history) in enumerate(zip(params, histories, strict=True)):
        assert p.seed is not None
        state.set(i, p, p.seed, history)
    return state


def check(
    steps: Sequence[Tensor] | Tensor,
    params: Sequence[SamplingParams],
    histories: Sequence[Sequence[int]],
    suppress: Sequence[int] = (),
    variant: Variant | None = None,
) -> list[list[int]]:
    """Draws at each step, with the histories that grow from it, as the reference does; returns the histories."""
    state, known = state_of(steps[0].shape[1], params, histories, suppress), [list(h) for h in histories]
    samplers = [Sampler(p, suppress) for p in params]
    for logits in steps:
        tokens = sample(padded(logits), state, positions_of(known), variant=variant or variant_for(params))
        expected = [draw(row, h) for draw, row, h in zip(samplers, logits, known, strict=True)]
        assert tokens.tolist() == expected
        for history, token in zip(known, expected, strict=True):
            history.append(token)
    assert not state.bad.any()
    return known


def random_steps(n_step: int, n_token: int, n_vocab: int, seed: int = 0) -> Tensor:
    return torch.randn(n_step, n_token, n_vocab, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("n_vocab", [1, 63, 1601])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": 0, "repeat_penalty": 1.3},
        {},
        {"top_k": FEW, "top_p": 1.0, "temperature": 4.0},
        {"top_k": 1, "repeat_penalty": 0.7},
        {"top_k": 20, "top_p": 0.5, "repeat_penalty": 1.1},
        {"top_k": 0, "top_p": 1.0, "temperature": 2.0},
        {"top_k": 0, "top_p": 0.999, "temperature": 3.0, "repeat_penalty": 1.1},
        {"top_k": 1200, "top_p": 1.0, "min_p": 0.01, "temperature": 5.0},
        {"top_k": 100, "top_p": 0.7},
    ],
)
def test_equals_the_reference(n_vocab: int, options: dict[str, Any]) -> None:
    check(random_steps(2, 2, n_vocab), [params_of(**options, seed=seed) for seed in (7, 2**62)], [[0], [0] * 9])


def test_best_tokens_of_blocks_of_groups() -> None:
    """So large a vocabulary that the best are searched in three levels; many ties."""
    steps = (random_steps(1, 1, 17000, seed=1) * 2).round()
    check(steps, [params_of(top_k=60, top_p=1.0, temperature=3.0, repeat_penalty=1.1)], [[3]])


def test_flat_distributions_reach_every_chunk() -> None:
    params = params_of(top_k=0, top_p=1.0, temperature=1e4)
    (drawn,) = check(random_steps(8, 1, 3000), [params], [[0]])
    assert len({token // 512 for token in drawn}) > 2


@settings(max_examples=30 if DEVICE == "cpu" else 25)
@given(data=st.data(), variant=st.sampled_from(VARIANTS))
def test_any_parameters_and_ties(data: st.DataObject, variant: Variant) -> None:
    n_vocab, n_token = data.draw(st.sampled_from([1, 7, 40])), data.draw(st.integers(1, 2))
    options = st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([0.0] if variant == "greedy" else [0.0, 1e-6, 0.5, 1.0, 30.0]),
            "top_k": st.integers(1, FEW) if variant == "few" else st.sampled_from([0, 1, 5, 100]),
            "top_p": st.sampled_from([1e-6, 0.25, 0.5, 0.9, 1.0]),
            "min_p": st.sampled_from([0.0, 0.1, 0.5, 1.0]),
            "repeat_penalty": st.sampled_from([0.5, 1.0, 1.5]),
            "seed": st.integers(0, 2**63 - 1),
        }
    )
    params = [SamplingParams.of(**data.draw(options)) for _ in range(n_token)]
    token = st.integers(0, n_vocab - 1)
    histories = [data.draw(st.lists(token, min_size=1, max_size=70)) for _ in params]
    suppress = data.draw(st.lists(token, max_size=n_vocab - 1, unique=True))
    row = st.lists(st.sampled_from([-9.0, -1.0, -0.0, 0.0, 0.5, 3.0]), min_size=n_vocab, max_size=n_vocab)
    logits = torch.tensor([data.draw(row) for _ in params])
    check([logits], params, histories, suppress, variant)


@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_logits_give_the_lowest_tokens(variant: Variant) -> None:
    top_k = {"greedy": 0, "few": 2, "full": 100}[variant]
    params = params_of(temperature=0.0 if variant == "greedy" else 1.0, top_k=top_k, top_p=1.0)
    (history,) = check([torch.zeros(1, 300)] * 4, [params], [[0]], [0], variant)
    assert set(history[1:]) <= set(range(1, top_k + 2))


@pytest.mark.parametrize("variant", VARIANTS)
def test_history_is_the_last_64_tokens(variant: Variant) -> None:
    """A penalty so high that nothing recent is drawn again: of 65 tokens only the oldest is left, each in its turn."""
    params = params_of(temperature=0 if variant == "greedy" else 0.01, top_k=1, repeat_penalty=1000)
    (history,) = check([torch.linspace(5, 4, 65)[None]] * 5, [params], [[64, 0, 64, *range(1, 63)]], variant=variant)
    assert history[-5:] == [63, 0, 64, 1, 2]


def test_histories_may_hold_what_is_no_token() -> None:
    check([torch.randn(1, 20)] * 5, [params_of(repeat_penalty=1.5)], [[21, 20, 3, *[4] * 61]])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_damaged_logits_are_flagged(variant: Variant, value: float) -> None:
    logits = torch.randn(3, 200)
    logits[1, 77] = value
    params = [params_of(temperature=0 if variant == "greedy" else 1.0)] * 3
    state = state_of(200, params, [[1, 2, 77]] * 3, suppress=[77])
    tokens = sample(padded(logits), state, positions_of([[0] * 3] * 3), variant=variant)
    assert state.bad.tolist() == [0, 1, 0]
    assert ((tokens >= 0) & (tokens < 200)).all()
    sample(padded(torch.zeros(3, 200)), state, positions_of([[0] * 4] * 3), variant=variant)
    assert state.bad.tolist() == [0, 1, 0]
    state.set(1, params[1], 1, [])
    assert not state.bad.any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_suppressed_stays_in_range(variant: Variant) -> None:
    params = [params_of(temperature=0 if variant == "greedy" else 1.0)]
    state = state_of(5, params, [[1]], suppress=range(5))
    assert sample(padded(torch.randn(1, 5)), state, positions_of([[1]]), variant=variant).tolist() == [0]


@pytest.mark.parametrize("variant", ["few", "full"])
def test_sequences_do_not_depend_on_the_batch(variant: Variant) -> None:
    logits = random_steps(1, 4, 700)[0]
    kinds: list[dict[str, Any]] = [{}, {"temperature": 0}, {"temperature": 3.0, "top_p": 1.0}, {"repeat_penalty": 2.0}]
    params = [params_of(**kind, seed=i) for i, kind in enumerate(kinds)]
    histories = [list(range(i + 1)) for i in range(4)]
    together = sample(padded(logits), state_of(700, params, histories), positions_of(histories), variant=variant)
    for i in range(4):
        state = state_of(700, params[i : i + 1], histories[i : i + 1])
        alone = sample(padded(logits[i : i + 1]), state, positions_of(histories[i : i + 1]), variant=variant)
        assert alone.tolist() == together[i : i + 1].tolist()


@pytest.mark.parametrize("variant", VARIANTS)
def test_idle_sequences_stay_as_they_are(variant: Variant) -> None:
    state = state_of(50, [params_of(temperature=0)] * 2, [[1], [2]])
    ring, flags = state.ring.clone(), state.flags.clone()
    out = torch.full((2,), 99, dtype=torch.int32, device=DEVICE)
    logits = torch.full((2, 50), float("nan"))
    sample(padded(logits), state, torch.tensor([-1, 0], dtype=torch.int32, device=DEVICE), out, variant=variant)
    assert out.tolist() == [99, 99]
    assert torch.equal(state.ring, ring)
    assert torch.equal(state.flags, flags)
    assert not state.bad.any()
    assert sample(padded(logits[:0]), state, out[:0], variant=variant).shape == (0,)


def test_variants_serve_their_parameters() -> None:
    greedy, few, more, full = params_of(temperature=0, top_k=0), params_of(), params_of(top_k=65), params_of(top_k=0)
    assert [variant_for([p]) for p in (greedy, few, more, full)] == ["greedy", "few", "full", "full"]
    assert [variant_for([greedy, p]) for p in (few, full)] == ["few", "full"]


@triton.jit
def write_uniform(seed, position, out):  # type: ignore[no-untyped-def]
    i = tl.program_id(0)
    tl.store(out + i, uniform_kernel(tl.load(seed + i), tl.load(position + i)))


def test_random_numbers_are_the_reference_s() -> None:
    seeds, places = [0, 1, 2**32 - 1, 2**32, 2**63 - 1, 0x123456789ABCDEF], [0, 1, 131071, 2**31 - 1, 5, 6]
    out = torch.empty(6, dtype=torch.float64, device=DEVICE)
    position = torch.tensor(places, dtype=torch.int32, device=DEVICE)
    write_uniform[6,](torch.tensor(seeds, device=DEVICE), position, out)
    assert out.tolist() == [uniform(*pair) for pair in zip(seeds, places, strict=True)]


@triton.jit  # type: ignore[untyped-decorator]
def write_top_keys(keys, out, LOG_N: tl.constexpr, LOG_K: tl.constexpr):  # type: ignore[no-untyped-def]
    best = top_keys(tl.load(keys + tl.arange(0, 2**LOG_N)), LOG_N, LOG_K)
    tl.store(out + tl.arange(0, 2**LOG_K), best)


@pytest.mark.parametrize(("log_n", "log_k"), [(1, 1), (4, 4), (7, 6), (8, 2), (9, 6)])
def test_top_keys(log_n: int, log_k: int) -> None:
    keys = torch.randint(-(2**63), 2**63 - 1, (2**log_n,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    out = torch.empty(2**log_k, dtype=torch.int64, device=DEVICE)
    write_top_keys[1,](keys, out, log_n, log_k)
    assert torch.equal(out, keys.sort(descending=True).values[: 2**log_k])


@pytest.mark.skipif(DEVICE == "cpu", reason="graphs need a GPU")
@pytest.mark.parametrize("variant", VARIANTS)
def test_in_a_graph(variant: Variant) -> None:
    """One graph serves other logits, parameters, histories and positions."""
    steps = random_steps(4, 8, 20000)
    options = {"temperature": 0.0 if variant == "greedy" else 1.5, "top_p": 0.999, "repeat_penalty": 1.2}
    params = [params_of(**options, top_k=0 if variant == "full" else FEW - i, seed=i) for i in range(8)]
    state = SamplerState(8, 20000, DEVICE)
    logits, positions = padded(steps[0]), torch.zeros(8, dtype=torch.int32, device=DEVICE)
    sample(logits, state, positions, variant=variant)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = sample(logits, state, positions, variant=variant)
    histories = [list(range(20 * i + 1)) for i in range(8)]
    for i, p in enumerate(params):
        state.set(i, p, i, histories[i])
    for step in steps:
        logits.copy_(padded(step))
        positions.copy_(positions_of(histories))
        graph.replay()
        expected = [Sampler(p)(row, history) for p, row, history in zip(params, step, histories, strict=True)]
        assert tokens.tolist() == expected
        for history, token in zip(histories, expected, strict=True):
            history.append(token)
