"""The Triton router against `router.route`: natively on a GPU, else in Triton's interpreter."""

from functools import partial

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_engine.kernels.router import Gating, GroupRule, RouterConfig, gate, route
from moe_engine.kernels.router_kernel import NextRouter, Replay, route_and_lookup, router_logits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GATINGS: tuple[Gating, ...] = ("softmax", "sigmoid", "softmax_selected", "sqrt_softplus")
RULES: tuple[GroupRule, ...] = ("max", "top2_sum")


GROUPS = [(256, 8, 4), (160, 8, 3), (60, 5, 2), (384, 3, 1), (8, 8, 8)]


def random_table(n_expert: int, generator: torch.Generator) -> Tensor:
    return torch.randint(-1, 40, (n_expert,), dtype=torch.int32, generator=generator).to(DEVICE)


def check(logits: Tensor, config: RouterConfig, bias: Tensor | None = None) -> None:
    table = random_table(config.n_expert, torch.Generator().manual_seed(0))
    actual = route_and_lookup(logits, config, table, bias=bias)
    ids, weights = route(logits, config, bias)
    assert torch.equal(actual.ids.long(), ids)
    assert torch.equal(actual.slots, table[ids])
    torch.testing.assert_close(actual.weights, weights, rtol=1e-6, atol=1e-6)


def grid(n_token: int, n_expert: int, seed: int, step: float = 0.25) -> Tensor:
    """Logits on a grid: some are equal, the others differ by more than rounding."""
    logits = torch.randn(n_token, n_expert, generator=torch.Generator().manual_seed(seed))
    return (logits * 2 / step).round().mul(step).to(DEVICE)


@pytest.mark.parametrize("n_expert", [8, 60, 128, 384, 512])
@pytest.mark.parametrize("gating", GATINGS)
def test_equals_the_reference(n_expert: int, gating: Gating) -> None:
    for n_token, top_k, normalize in ((1, 8, True), (2, 6, False), (1, 1, False)):
        config = RouterConfig(n_expert, top_k, gating, normalize, scale=2.5)
        check(grid(n_token, n_expert, seed=top_k), config)
    check(torch.randn(2, n_expert, generator=torch.Generator().manual_seed(1)).to(DEVICE), config)


@pytest.mark.parametrize(("n_expert", "n_group", "n_used"), GROUPS)
@pytest.mark.parametrize("gating", GATINGS)
@pytest.mark.parametrize("rule", RULES)
def test_group_limits_and_bias(n_expert: int, n_group: int, n_used: int, gating: Gating, rule: GroupRule) -> None:
    config = RouterConfig(n_expert, 8, gating, True, 1.5, n_group, n_used, rule)
    # An irrational step: no two different pairs of the grid have the same sum
    check(grid(2, n_expert, seed=0, step=2**0.5 / 3), config)
    bias = torch.randn(n_expert, generator=torch.Generator().manual_seed(2)).to(DEVICE) / 10
    check(torch.randn(2, n_expert, generator=torch.Generator().manual_seed(3)).to(DEVICE), config, bias)


@settings(max_examples=40 if DEVICE == "cpu" else 15)
@given(data=st.data(), gating=st.sampled_from(GATINGS), rule=st.sampled_from(RULES), normalize=st.booleans())
def test_any_grid_of_ties(data: st.DataObject, gating: Gating, rule: GroupRule, normalize: bool) -> None:
    n_group = data.draw(st.sampled_from([1, 2, 3, 5]))
    n_expert = n_group * data.draw(st.integers(1, 12))
    n_used = data.draw(st.integers(1, n_group))
    top_k = data.draw(st.integers(1, min(9, n_expert // n_group * n_used)))
    values = st.sampled_from([-9.0, -1.0, -0.0, 0.0, 0.5, 1.0, 3.0, 7.0])
    row = st.lists(values, min_size=n_expert, max_size=n_expert)
    logits = torch.tensor(data.draw(st.lists(row, min_size=1, max_size=3)), device=DEVICE)
    config = RouterConfig(n_expert, top_k, gating, normalize, 0.75, n_group, n_used, rule)
    bias = None
    if data.draw(st.booleans()):
        biases = st.lists(st.sampled_from([-0.3, 0.0, 0.11]), min_size=n_expert, max_size=n_expert)
        bias = torch.tensor(data.draw(biases), device=DEVICE)
    assume(not near_ties(logits, config, bias))
    check(logits, config, bias)


def near_ties(logits: Tensor, config: RouterConfig, bias: Tensor | None) -> bool:
    """Whether scores that come from different logits, or sums of two of them, agree up to rounding."""
    scores = gate(logits.double(), config.gating) + (0 if bias is None else bias.double())
    kinds = scores.unflatten(1, (config.n_group, -1))
    if config.group_rule == "top2_sum" and config.n_group > 1:
        tops = kinds.topk(min(2, kinds.shape[-1]), dim=-1).values.sort(dim=-1).values
        sums = tops.sum(dim=-1)
        close = (sums[:, :, None] - sums[:, None]).abs() < 1e-6
        same = (tops[:, :, None] == tops[:, None]).all(dim=-1)
        if bool((close & ~same).any()):
            return True
    close = (scores[:, :, None] - scores[:, None]).abs() < 1e-6
    same = logits[:, :, None] == logits[:, None]
    if bias is not None:
        same = same & (bias[:, None] == bias)
    return bool((close & ~same).any())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, which interprets, reports infinities and NaN
def test_all_equal_gives_the_lowest_indices() -> None:
    table = torch.zeros(60, dtype=torch.int32, device=DEVICE)
    for value in (0.0, -3.0, float("-inf")):
        logits = torch.full((2, 60), value, device=DEVICE)
        routing = route_and_lookup(logits, RouterConfig(60, 4, "sigmoid"), table)
        assert routing.ids.tolist() == [[0, 1, 2, 3]] * 2


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, which interprets, reports infinities and NaN
def test_damaged_logits_stay_in_range() -> None:
    """NaN and infinities come from damaged files; ids index tables and must never be out of them."""
    logits = torch.randn(4, 60, generator=torch.Generator().manual_seed(0))
    logits[0], logits[1, 7], logits[2, 3], logits[3, 5:] = float("nan"), float("nan"), float("inf"), float("-inf")
    for gating in GATINGS:
        config = RouterConfig(60, 8, gating, True, 1.0, 4, 2, "top2_sum")
        routing = route_and_lookup(logits.to(DEVICE), config, torch.arange(60, dtype=torch.int32, device=DEVICE))
        assert ((routing.ids >= 0) & (routing.ids < 60)).all()
        assert torch.equal(routing.slots, routing.ids)
        assert all(len(set(row)) == 8 for row in routing.ids.tolist())


def test_tiny_softplus_scores_keep_their_digits() -> None:
    logits = torch.linspace(-30, 30, 61, device=DEVICE)[None]
    config = RouterConfig(61, 61, "sqrt_softplus")
    routing = route_and_lookup(logits, config, torch.zeros(61, dtype=torch.int32, device=DEVICE))
    torch.testing.assert_close(routing.weights, route(logits, config)[1], rtol=1e-5, atol=0)


@pytest.mark.parametrize(("n_token", "n_expert", "hidden"), [(1, 60, 96), (2, 20, 2048), (5, 33, 1000), (16, 8, 512)])
def test_with_the_router_matrix(n_token: int, n_expert: int, hidden: int) -> None:
    generator = torch.Generator().manual_seed(n_token)
    x = torch.randn(n_token, hidden, generator=generator).to(DEVICE)
    weight = torch.randn(n_expert, hidden, generator=generator).to(DEVICE) / hidden**0.5
    exact = x.double() @ weight.double().T
    logits = router_logits(x, weight)
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5)
    config, table = RouterConfig(n_expert, 4, normalize=True), random_table(n_expert, generator)
    out = route_and_lookup(x, config, table, weight=weight)
    ids, weights = route(logits, config)
    assert torch.equal(out.ids.long(), ids)
    torch.testing.assert_close(out.weights, weights, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("n_token", "hidden", "biased"), [(1, 96, True), (3, 200, False)])
def test_guessing_the_next_layer_changes_nothing_else(n_token: int, hidden: int, biased: bool) -> None:
    generator = torch.Generator().manual_seed(hidden)
    config = RouterConfig(60, 5, "sigmoid", True, 1.5, 5, 2, "top2_sum")
    x, *weights = (torch.randn(n, hidden, generator=generator).to(DEVICE) for n in (n_token, 60, 60, 60))
    biases = [torch.randn(60, generator=generator).to(DEVICE) if biased else None for _ in weights]
    table = random_table(60, generator)
    alone = route_and_lookup(x, config, table, weight=weights[0], bias=biases[0])
    assert alone.ahead is None
    following = [route_and_lookup(x, config, table, weight=weights[i], bias=biases[i]).ids for i in (1, 2)]
    assert not torch.equal(*following)
    for n_ahead in (1, 2):
        ahead = [NextRouter(weights[i], biases[i]) for i in range(1, 1 + n_ahead)]
        both = route_and_lookup(x, config, table, weight=weights[0], bias=biases[0], ahead=ahead)
        assert all(torch.equal(a, b) for a, b in zip(alone[:3], both[:3], strict=True))
        assert both.ahead is not None
        assert torch.equal(both.ahead, torch.stack(following[:n_ahead]))


def test_recorded_choices_take_the_place_of_the_experts_only() -> None:
    config = RouterConfig(n_expert=12, top_k=3, gating="softmax")
    logits, table = grid(4, 12, 5).to(DEVICE), random_table(12, torch.Generator().manual_seed(5)).to(DEVICE)
    recorded = torch.randint(0, 12, (5, 2, 3), dtype=torch.int32, device=DEVICE)
    step = torch.tensor([6], device=DEVICE)
    found = route_and_lookup(logits, config, table, replay=Replay(recorded, step, layer=1))
    expected = torch.stack([recorded[(6 + 97 * token) % 5, 1] for token in range(4)])
    assert torch.equal(found.ids, expected)
    assert torch.equal(found.slots, table[expected.long()])
    assert torch.equal(found.weights, route_and_lookup(logits, config, table).weights)


def test_no_tokens() -> None:
    table = torch.zeros(8, dtype=torch.int32, device=DEVICE)
    x, weight = torch.empty(0, 16, device=DEVICE), torch.empty(8, 16, device=DEVICE)
    assert route_and_lookup(x, RouterConfig(8, 2), table, weight=weight).ids.shape == (0, 2)


@pytest.mark.skipif(DEVICE == "cpu", reason="graphs need a GPU")
@pytest.mark.parametrize("n_token", [1, 2])
def test_in_a_graph(n_token: int) -> None:
    config = RouterConfig(256, 8, "sigmoid", True, 2.5, 8, 4, "top2_sum")
    x, weight, bias = (torch.randn(shape, device=DEVICE) for shape in ((n_token, 512), (256, 512), (256,)))
    table = torch.arange(256, dtype=torch.int32, device=DEVICE)
    ahead = NextRouter(torch.randn(256, 512, device=DEVICE), torch.randn(256, device=DEVICE))
    run = partial(route_and_lookup, x, config, table, weight=weight, bias=bias, ahead=[ahead])
    run()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        routing = run()
    x.copy_(torch.randn(n_token, 512, device=DEVICE))
    table.copy_(torch.arange(256, dtype=torch.int32).flip(0))
    graph.replay()
    ids, weights = route(router_logits(x, weight), config, bias)
    assert torch.equal(routing.ids.long(), ids)
    assert torch.equal(routing.slots, table[ids])
    torch.testing.assert_close(routing.weights, weights, rtol=1e-6, atol=1e-6)
    assert routing.ahead is not None
    assert torch.equal(routing.ahead[0].long(), route(router_logits(x, ahead.weight), config, ahead.bias)[0])
