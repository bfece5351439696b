"""The simulator against a brute-force model of a cache, written independently, on a synthetic trace."""

import json
import sys
from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from moe_engine.cli import main
from moe_engine.errors import ConfigError
from moe_engine.policies.registry import NATIVE, policy_names, policy_of
from moe_engine.simulator import BOUND, Replays, capacity_of, simulate
from moe_engine.traces import Trace, TraceModel

N_LAYER, N_EXPERT, TOP_K = 3, 9, 2


def synthetic(n_token: int, seed: int = 0, n_expert: int = N_EXPERT) -> Trace:
    """Skewed and sticky choices, so that policies differ."""
    rng = np.random.default_rng(seed)
    ids = np.empty((n_token, N_LAYER, TOP_K), np.uint16)
    for layer in range(N_LAYER):
        likes = rng.random(n_expert) ** 3
        for token in range(n_token):
            likes = 0.9 * likes + 0.1 * rng.random(n_expert)
            ids[token, layer] = np.argsort(-likes * rng.random(n_expert))[:TOP_K]
    weights = rng.random(ids.shape).astype(np.float16)
    return Trace(TraceModel("synthetic", N_LAYER, n_expert, TOP_K), ids, weights, (n_token,))


def brute_force_lru(streams: list[list[list[int]]], slots: int, start: list[int]) -> list[list[int]]:
    """Hits of every step. Residents in a list, oldest use first."""
    hits = []
    for steps in streams:
        order, of_stream = list(start), []
        for served in steps:
            n = 0
            for key in served:
                n += key in order
                if key not in order and len(order) == slots:
                    order.remove(next(k for k in order if k not in served))
                order = [k for k in order if k != key] + [key]
            of_stream.append(n)
        hits.append(of_stream)
    return hits


def brute_force_optimum(steps: list[list[int]], slots: int, bypass: bool) -> int:
    """Most hits over all choices of what to keep after every step."""

    @cache
    def best(at: int, held: frozenset[int]) -> int:
        if at == len(steps):
            return 0
        served = frozenset(steps[at])
        kept = frozenset[int]() if bypass else served
        optional = (held | served) - kept
        room = min(slots - len(kept), len(optional))
        follow = (best(at + 1, kept | set(more)) for more in combinations(sorted(optional), room))
        return len(held & served) + max(follow)

    return best(0, frozenset())


def rows(trace: Trace, layer: int) -> list[list[int]]:
    found: list[list[int]] = trace.ids[:, layer].tolist()
    return found


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("slots", [2, 3, 5, 9])
def test_lru_of_each_layer(slots: int, warm: bool) -> None:
    trace = synthetic(200)
    start = list(reversed(range(slots))) if warm else []
    expected = brute_force_lru([rows(trace, layer) for layer in range(N_LAYER)], slots, start)
    # The general way and that of stack distances: in a pool of one layer, least-stale is LRU.
    for outcome in simulate(trace, ["lru", "least-stale"], [slots], warm=warm):
        assert outcome.hits == tuple(sum(hits) for hits in expected)
        assert outcome.accesses == (200 * TOP_K,) * N_LAYER


@pytest.mark.parametrize("warm", [False, True])
def test_lru_of_a_shared_pool(warm: bool) -> None:
    trace = synthetic(100)
    keys: NDArray[np.int64] = trace.ids + np.arange(N_LAYER)[:, None] * N_EXPERT
    start = [layer * N_EXPERT + e for e in reversed(range(4)) for layer in reversed(range(N_LAYER))] if warm else []
    (hits,) = brute_force_lru([keys.reshape(-1, TOP_K).tolist()], 4 * N_LAYER, start)
    (outcome,) = simulate(trace, ["lru"], [4], warm=warm, shared=True)
    assert sum(outcome.hits) == sum(hits)
    if not warm:
        assert outcome.hits == tuple(sum(hits[layer::N_LAYER]) for layer in range(N_LAYER))


@pytest.mark.parametrize("largest", [1, 30, 32767])
def test_stack_distances_and_replay_agree_across_blocks(monkeypatch: pytest.MonkeyPatch, largest: int) -> None:
    monkeypatch.setattr("moe_engine.stack_distance._BLOCK", 7 * N_LAYER * N_EXPERT)
    monkeypatch.setattr("moe_engine.stack_distance._LARGEST", largest)  # of short integers
    trace = synthetic(100)
    outcomes = simulate(trace, ["lru", "least-stale"], [2, 4, 8])  # in a pool of one layer these are the same
    assert [o.hits for o in outcomes[:3]] == [o.hits for o in outcomes[3:]]


RULES = ("always", "second-touch", "better-than-victim", "outranks")


@pytest.mark.parametrize("name", [*NATIVE, "belady", "belady-bypass"])
@pytest.mark.parametrize("shared", [False, True])
def test_native_replay_is_that_of_the_classes(name: str, shared: bool) -> None:
    rules = [f":admit={rule}" for rule in RULES] + [":floor=2", ":floor=4,admit=outranks"]
    for rule in rules if name != "belady-bypass" else ("",):
        spec = policy_of(name + rule)
        for seed, warm, capacity in ((0, False, 2), (1, True, 5)):
            trace = synthetic(120, seed)
            found = Replays(trace, warm, shared, None)
            plainly = Replays(trace, warm, shared, None, native=False)
            hits, fetched = found.served(spec, capacity)
            for by_twin, by_class in zip((hits, fetched), plainly.served(spec, capacity), strict=True):
                assert by_twin.tolist() == by_class.tolist(), spec.text
            assert (hits + fetched <= TOP_K).all()


@pytest.mark.parametrize("name", ["lru", "lfu", "blend"])
def test_a_floor_of_all_slots_is_a_pool_for_each_layer(name: str) -> None:
    trace = synthetic(120)
    (alone,) = simulate(trace, [name], [4], warm=True)
    floors = [simulate(trace, [f"{name}:floor={n}"], [4], warm=True, shared=True)[0] for n in (0, 4)]
    assert floors[1].hits == alone.hits != floors[0].hits


@pytest.mark.parametrize("slots", [2, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_belady_is_the_optimum(slots: int, seed: int) -> None:
    trace = synthetic(24, seed, n_expert=6)
    with_bypass, without = (simulate(trace, [name], [slots])[0] for name in (BOUND, "belady"))
    for layer in range(N_LAYER):
        assert without.hits[layer] == brute_force_optimum(rows(trace, layer), slots, bypass=False)
        assert with_bypass.hits[layer] == brute_force_optimum(rows(trace, layer), slots, bypass=True)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("warm", [False, True])
def test_nothing_beats_the_bound(shared: bool, warm: bool) -> None:
    trace = synthetic(150)
    names = [name for name in policy_names() if name != BOUND]
    policies = [f"{name}:admit={rule}" for name in names for rule in RULES]
    sizes = [10, 20, 30]
    for outcome in simulate(
        trace, policies, [3, N_EXPERT], warm=warm, shared=shared, profile=trace, expert_bytes=sizes
    ):
        assert outcome.to_belady >= 0
        missed = [n - hits for n, hits in zip(outcome.accesses, outcome.hits, strict=True)]
        assert outcome.bytes == 10 * missed[0] + 20 * missed[1] + 30 * missed[2]
        assert all(n / TOP_K <= steps <= min(n, 150) for n, steps in zip(missed, outcome.missed_steps, strict=True))
        if outcome.capacity == N_EXPERT and warm:
            assert outcome.hit_rate == 1


def test_capacities() -> None:
    assert [capacity_of(text, 64, 8) for text in ("5%", "25%", "29%", "100%", "12", "64", "0.5%")] == [
        8, 16, 18, 64, 12, 64, 8,
    ]  # fmt: skip
    for text in ("", "%", "-1", "2.5", "x", "nan%", "0", "65", "0%", "100.1%"):
        with pytest.raises(ConfigError, match=r"expected .*experts per layer"):
            capacity_of(text, 64, 8)
    assert [capacity_of(text, 64, 8, 1 << 20) for text in ("20MiB", "1kB", "1GiB")] == [20, 8, 64]
    with pytest.raises(ConfigError, match="size of an expert is not known"):
        capacity_of("1GiB", 64, 8)
    with pytest.raises(ConfigError, match="capacity is 1"):
        simulate(synthetic(3), ["lru"], [1])


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit:
        main(["trace", *arguments])
    out, err = capsys.readouterr()
    assert not exit.value.code, err
    return out


def test_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file, archive, again = (str(tmp_path / name) for name in ("a.trace", "a.npz", "b.trace"))
    trace = synthetic(40)
    trace.save(file)
    run(capsys, "export", file, "-o", archive)
    run(capsys, "import", archive, "-o", again)
    assert Path(file).read_bytes() == Path(again).read_bytes()
    assert json.loads(run(capsys, "info", again, "--json"))["tokens"] == 40
    assert "synthetic" in run(capsys, "info", again)

    options = ("--policy", "lru", "--policy", "random:seed=3", "--capacity", "50%,3", "--expert-bytes", "1KiB")
    assert "random:seed=3" in run(capsys, "simulate", file, *options)
    results = json.loads(run(capsys, "simulate", archive, *options, "--json"))["results"]
    assert [(r["policy"], r["capacity"]) for r in results] == [
        ("lru", 3), ("lru", 4), ("random:seed=3", 3), ("random:seed=3", 4),
    ]  # fmt: skip
    for result, outcome in zip(results, simulate(trace, ["lru", "random:seed=3"], [3, 4]), strict=True):
        assert (result["hits"], result["accesses"]) == (sum(outcome.hits), 40 * N_LAYER * TOP_K)
        assert result["bytes"] == 1024 * (result["accesses"] - result["hits"])


def test_the_advice_is_what_the_simulation_says(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace, file = synthetic(60), str(tmp_path / "a.trace")
    trace.save(file)
    options = ("simulate", file, "--policy", "lru", "--policy", "lfu", "--policy", "belady", "--capacity", "2,4,7")
    found = json.loads(run(capsys, *options, "--expert-bytes", "256MiB", "--recommend", "--json"))
    # A GiB is one slot more in each of three layers, and a third of another: not whole, so not counted.
    for step, capacity in zip(found["steps"], (2, 4, 7), strict=True):
        rates = {o.policy: o.hit_rate for o in simulate(trace, ["lru", "lfu"], [capacity])}
        (more,) = simulate(trace, [step["policy"]], [capacity + 1])
        assert step["hit_rate"] == rates[step["policy"]] == max(rates.values())
        assert step["missed"] == pytest.approx((1 - step["hit_rate"]) * N_LAYER * TOP_K * 2**28)
        assert step["saved"] == pytest.approx(1 - (1 - more.hit_rate) / (1 - step["hit_rate"]))
    worth = [step for step in found["steps"] if step["saved"] >= 0.05]
    assert found["recommended"] == found["steps"][min(len(worth), 2)]
    # A slot in every layer is three GiB, of which one saves a third.
    (large,) = json.loads(run(capsys, *options[:-1], "4", "--expert-bytes", "1GiB", "--recommend", "--json"))["steps"]
    assert large["saved"] == pytest.approx(found["steps"][1]["saved"] / 3)
    assert "recommended: " in run(capsys, *options, "--expert-bytes", "256MiB", "--recommend")
    with pytest.raises(SystemExit):
        main(["trace", *options, "--recommend"])
    assert "give -m MODEL or --expert-bytes" in capsys.readouterr().err


def test_plot(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, picture = str(tmp_path / "a.trace"), tmp_path / "a.png"
    synthetic(20).save(file)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(SystemExit):
            main(["trace", "simulate", file, "--plot", str(picture)])
        assert "moe-engine[plot]" in capsys.readouterr().err
    pytest.importorskip("matplotlib")
    run(capsys, "simulate", file, "--plot", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_command_line_errors_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["trace", "simulate", str(tmp_path / "none.trace")])
    assert capsys.readouterr().err == f"error: {tmp_path / 'none.trace'}: no such file\n"
