"""Predictions against hand-computed cases and recorded runs; plans of files that hold no weights."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from header_files import write_header
from recorded_h200 import (
    BUSY_DECODE_ROWS,
    BUSY_H200,
    BUSY_ONE_TOKEN_SECONDS,
    BUSY_PROMPT_ROWS,
    DECODE_ROWS,
    FETCH_ROWS,
    FIFTH_H200,
    H200,
    IN_VRAM_ROWS,
    QUIET_H200,
    QUIET_PROMPT_ROWS,
    SLOW_HOST_H200,
    SLOW_HOST_PROMPT_ROWS,
    DecodeRow,
    PromptRow,
    StreamedRow,
)

from moe_engine import CapacityError, ConfigError, Engine
from moe_engine.benchmark.random_writer import MODELS
from moe_engine.calibration import Calibration, Product
from moe_engine.cli import main
from moe_engine.costs import BEHIND_CHOICE, PromptLayer, StepCosts, layer_terms, miss_seconds
from moe_engine.decode_step import PROMPT_TOKENS
from moe_engine.inspection import inspect_file
from moe_engine.loading import bundled_model
from moe_engine.model_work import ModelWork
from moe_engine.plan_advice import doubling
from moe_engine.plan_report import as_dict, lines
from moe_engine.planner import Plan, plan
from moe_engine.predict import Predictor, RunShape
from moe_engine.routing_estimate import RoutingEstimate, bundled_trace
from moe_engine.simulated_speed import SimulatedModel
from moe_engine.simulator import simulate
from moe_engine.traces import Trace, TraceModel

GIB = 1 << 30


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A file of a real model's shape without its bytes."""
    folder = tmp_path_factory.mktemp("headers")

    def path(model: str, layers: int | None = None) -> Path:
        file = folder / f"{model}.gguf"
        if not file.exists():
            write_header(model, file, layers)
        return file

    return path


# -- arithmetic ------------------------------------------------------------------------------------------------


def test_a_step_is_the_sum_of_what_does_not_overlap() -> None:
    costs = StepCosts(kernels=1.0, reads=2.0, hits=3.0, misses=5.0, exchange=0.5)
    assert costs.terms == {"kernels": 1.0, "reads": 2.0, "misses": 5.0, "exchange": 0.5}
    assert costs.seconds == 8.5
    assert replace(costs, hits=6.0).seconds == 9.0
    assert replace(costs, hits=6.0).terms == {"kernels": 1.0, "reads": 2.0, "hits": 6.0}


def test_copies_and_cpu_share_the_ram() -> None:
    assert miss_seconds(100, 0, cpu=50, ram=80) == 2.0
    assert miss_seconds(100, 100, cpu=50, ram=80) == 2.5


def test_a_product_goes_through_two_measurements() -> None:
    found = Product.through(10.0, (1.0, 3.0), (5.0, 5.0))  # half a second an operation, 2.5 for the weights
    assert found == Product(4.0, 2.0)
    assert found.seconds(10.0, 1.0) == 3.0
    assert Product.through(10.0, (1.0, 2.0), (4.0, 2.0)) == Product(5.0, 2.0)  # bound by weights alone


def layer(**changes: object) -> PromptLayer:
    values = {
        "missing": [1, 1],
        "cached": [10],
        "nbytes": 100,
        "dense": 1.0,
        "gpu_expert": 0.5,
        "gpu_token": 0.125,
        "launches": 0.25,
    }
    return PromptLayer(**(values | changes))  # type: ignore[arg-type]


def test_a_layer_waits_for_its_copies_or_its_products() -> None:
    products = 1.0 + 3 * 0.5 + 12 * 0.125
    waited = BEHIND_CHOICE * 0.25  # behind the router's choice, for the host
    assert layer_terms(layer(), pcie=50.0) == {"misses": 4.0 + waited, "gpu": products + waited, "launches": 0.25}
    assert layer_terms(layer(missing=[]), pcie=50.0)["misses"] == 0.0


# -- against recorded runs -------------------------------------------------------------------------------------


def test_work_of_a_file(header: Callable[..., Path]) -> None:
    file = header("qwen3-30b-a3b")
    found, inspected, shape = plan(file, device="cpu").work, inspect_file(file), MODELS["qwen3-30b-a3b"]
    assert found.expert_bytes == inspected.routed_bytes
    assert found.active_bytes == inspected.active_bytes
    assert (found.n_block, len(found.experts), found.top_k) == (48, 48, 8)
    assert found.experts[0].n_weight == 3 * shape.hidden * shape.n_ff_expert
    assert found.kv_bytes == 48 * 2 * 4 * 128 * 2
    assert found.attention_operations == 48 * 32 * 4 * 128
    attention = 2 * 4096 * 2048 + 2 * 512 * 2048
    assert found.prompt_weights == 48 * (attention + 128 * 2048)
    assert sum(found.dense.values()) == inspected.dense_bytes - 151936 * 2048 * 144 // 256  # without the embedding


@pytest.mark.parametrize(
    ("machine", "row"),
    [*((H200, row) for row in DECODE_ROWS), *((BUSY_H200, row) for row in BUSY_DECODE_ROWS)],
    ids=lambda value: f"{value.model}-{value.hit_rate}-{value.n_sequence}" if isinstance(value, DecodeRow) else "",
)
def test_decode_is_predicted_within_a_fifth(machine: Calibration, row: DecodeRow, header: Callable[..., Path]) -> None:
    work = plan(header(row.model, row.layers), device="cpu").work
    n = len(work.experts)
    share = row.share if row.hit_rate is None else row.hit_rate
    where = ((share,) * n, (1.0,) * n, (row.hit_rate is not None,) * n)
    shape = RunShape(*where, ubatch=512, n_sequence=row.n_sequence)
    found = Predictor(work, machine, RoutingEstimate(bundled_trace())).decode(shape, context=640)
    assert found.rate == pytest.approx(row.tokens_per_second, rel=0.2)
    assert found.seconds == pytest.approx(sum(found.terms.values()))


@pytest.mark.parametrize("row", FETCH_ROWS, ids=lambda row: f"{row.model}-{row.hit_rate}")
def test_fetched_misses_are_predicted_within_a_tenth(row: DecodeRow, header: Callable[..., Path]) -> None:
    work = plan(header(row.model), device="cpu").work
    n, hits = len(work.experts), row.hit_rate or 0.0
    shape = RunShape((hits,) * n, (1.0,) * n, (True,) * n, ubatch=512, fetches=True)
    found = Predictor(work, FIFTH_H200, RoutingEstimate(bundled_trace())).decode(shape, context=576)
    assert found.binding == "misses"
    assert found.rate == pytest.approx(row.tokens_per_second, rel=0.1)


@pytest.mark.parametrize(("model", "tokens", "rate"), IN_VRAM_ROWS)
def test_prompts_in_vram_are_predicted_within_a_tenth(
    model: str, tokens: int, rate: float, header: Callable[..., Path]
) -> None:
    work = plan(header(model), device="cpu").work
    n = len(work.experts)
    shape = RunShape((1.0,) * n, (1.0,) * n, (True,) * n, ubatch=tokens, ctx=tokens)
    found = Predictor(work, FIFTH_H200, Used(work.n_expert)).streamed(shape, tokens)
    assert found.binding == "gpu"
    assert found.rate == pytest.approx(rate, rel=0.1)


def test_sequences_of_a_step_share_experts_that_do_not_move(header: Callable[..., Path]) -> None:
    work = plan(header("qwen3-30b-a3b"), device="cpu").work
    shape = RunShape((0.0,) * 48, (1.0,) * 48, (True,) * 48, ubatch=512)
    one, eight = (
        Predictor(work, H200, RoutingEstimate(bundled_trace(), n)).found(replace(shape, n_sequence=n))[0].misses
        for n in (1, 8)
    )
    assert one == work.top_k
    assert one < eight < 8 * one


class Used(RoutingEstimate):
    """As many experts as a run has used, all with as many tokens."""

    def __init__(self, n_used: int) -> None:
        self.n_used = n_used

    def counts(self, n_token: int, n_expert: int, top_k: int) -> list[int]:
        return [-(-n_token * top_k // self.n_used)] * self.n_used


@pytest.fixture
def busy(header: Callable[..., Path]) -> tuple[ModelWork, RunShape]:
    work = plan(header("qwen3-30b-a3b"), device="cpu").work
    return work, RunShape((400 / 6144,) * 48, (1.0,) * 48, (False,) * 48, ubatch=16384, ctx=16384)


@pytest.mark.parametrize("row", BUSY_PROMPT_ROWS, ids=lambda row: str(row.tokens))
def test_streamed_prompts_are_predicted_within_a_quarter(row: PromptRow, busy: tuple[ModelWork, RunShape]) -> None:
    work, shape = busy
    missing = row.streamed_bytes / (work.expert_bytes / work.n_expert)
    found = Predictor(work, BUSY_H200, Used(round(missing / (1 - shape.shares[0])))).streamed(shape, row.tokens)
    assert found.rate == pytest.approx(row.tokens / row.seconds, rel=0.25)


@pytest.mark.parametrize(
    ("machine", "row"),
    [
        *((QUIET_H200, row) for row in QUIET_PROMPT_ROWS),
        *((SLOW_HOST_H200, row) for row in SLOW_HOST_PROMPT_ROWS),
    ],
    ids=lambda value: f"{value.tokens}-{value.share}-{value.used}" if isinstance(value, StreamedRow) else "",
)
def test_streamed_prompts_are_predicted_within_a_fifth(
    machine: Calibration, row: StreamedRow, busy: tuple[ModelWork, RunShape]
) -> None:
    work, shape = busy
    shape = replace(shape, shares=(row.share,) * 48)
    found = Predictor(work, machine, Used(row.used)).streamed(shape, row.tokens)
    assert found.rate == pytest.approx(row.tokens / row.seconds, rel=0.2)


def test_launches_are_those_of_the_calibrated_model() -> None:
    assert plan(bundled_model(), device="cpu").work.launches == 1
    assert BUSY_H200.gpu
    rates = BUSY_H200.rates("Q4_K", launches=0.5)
    assert (rates.stream_layer, rates.cached_layer) == (1.5e-3, 0.4e-3)


def test_short_prompts_take_steps(busy: tuple[ModelWork, RunShape]) -> None:
    work, shape = busy
    predictor = Predictor(work, BUSY_H200, RoutingEstimate(bundled_trace()))
    found = predictor.prompt(shape, 1)
    assert found == predictor.in_steps(shape, 1)
    assert found.rate == pytest.approx(1 / BUSY_ONE_TOKEN_SECONDS, rel=0.2)
    steps = [predictor.in_steps(shape, n).seconds for n in (1, PROMPT_TOKENS, PROMPT_TOKENS + 1, 2 * PROMPT_TOKENS)]
    assert steps == sorted(steps)
    assert steps[3] == pytest.approx(2 * steps[1], rel=0.01)
    assert BUSY_H200.gpu
    slower = replace(BUSY_H200.gpu, step_seconds={4: 28e-6, PROMPT_TOKENS: 1.0})
    later = replace(predictor, machine=replace(BUSY_H200, gpu=slower))
    assert later.in_steps(shape, 4) == predictor.in_steps(shape, 4)
    assert later.in_steps(shape, 5).terms["kernels"] == work.n_block
    assert predictor.prompt(shape, 2048) == predictor.streamed(shape, 2048)
    assert predictor.prompt(replace(shape, ctx=16), 1) == predictor.streamed(shape, 1)  # no room for a step
    assert predictor.prompt(replace(shape, fetches=True), 1) == predictor.streamed(shape, 1)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit:
        main(list(arguments))
    return int(exit.value.code or 0), *capsys.readouterr()


def routed_by_chance(n_token: int = 60, n_layer: int = 48) -> Trace:
    """Of Qwen3-30B-A3B's shape; later layers have fewer favourites."""
    likes = np.linspace(0, 3, 128) * np.linspace(0.5, 2, n_layer)[:, None]
    noise = np.random.default_rng(0).gumbel(size=(n_token, n_layer, 128))
    ids = np.argsort(-(likes + noise), axis=2)[..., :8].astype(np.uint16)
    return Trace(TraceModel("qwen3moe", n_layer, 128, 8), ids, None, (n_token,))


def test_speeds_from_simulated_hits(header: Callable[..., Path]) -> None:
    file, trace = header("qwen3-30b-a3b"), routed_by_chance()
    simulated, (outcome,) = SimulatedModel(file, trace, H200), simulate(trace, ["lru"], [32])
    inspected = inspect_file(file)
    assert sum(simulated.expert_bytes) * 128 == pytest.approx(inspected.routed_bytes, rel=0.01)
    found = simulated.decode(outcome)
    # By hand: the CPU reads what each layer has missed, and copies for later take the rest of the RAM's rate.
    missed = [(n - hits) / 60 for n, hits in zip(outcome.accesses, outcome.hits, strict=True)]
    nbytes = sum(n * size for n, size in zip(missed, simulated.expert_bytes, strict=True))
    copied = sum(n / 60 * size for n, size in zip(outcome.missed_steps, simulated.expert_bytes, strict=True))
    assert found.terms["misses"] == pytest.approx((nbytes + copied) / 149e9, rel=0.05)
    assert found.terms["exchange"] == pytest.approx(sum(outcome.missed_steps) / 60 * 15e-6)
    (all_in,) = simulate(trace, ["lru"], [128], warm=True)
    assert simulated.decode(all_in).rate == pytest.approx(496, rel=0.2)  # as recorded with all experts in slots


def test_simulate_command_predicts(
    header: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hardware, file, model = tmp_path / "h200.msgpack", tmp_path / "a.trace", str(header("qwen3-30b-a3b"))
    H200.save(hardware)
    trace = routed_by_chance()
    trace.save(file)
    simulated = SimulatedModel(Path(model), trace, H200)
    options = ("simulate", str(file), "--policy", "lru", "--capacity", "4GiB,50%", "--hardware", str(hardware))
    code, out, err = run(capsys, "trace", *options, "-m", model, "--json", "--recommend")
    assert code == 0, err
    found = json.loads(out)
    slot = sum(simulated.expert_bytes)
    for result, capacity in zip(found["results"], (4 * GIB // slot, 64), strict=True):
        (outcome,) = simulate(trace, ["lru"], [capacity], expert_bytes=simulated.expert_bytes)
        assert result["capacity"] == capacity
        assert result["bytes"] == outcome.bytes
        assert result["tokens_per_second"] == pytest.approx(simulated.decode(outcome).rate)
    for step, result in zip(found["steps"], found["results"], strict=True):
        (more,) = simulate(trace, ["lru"], [step["capacity"] + GIB // slot])
        assert step["rate"] == pytest.approx(result["tokens_per_second"])
        assert step["rate_with_another_gib"] == pytest.approx(simulated.decode(more).rate)
    code, out, err = run(capsys, "trace", *options, "-m", model, "--recommend")
    assert code == 0, err
    assert "predicted tok/s" in out
    assert "tok/s instead of" in out

    small = tmp_path / "small.msgpack"
    assert H200.gpu is not None
    replace(H200, gpu=replace(H200.gpu, vram_bytes=5 * GIB)).save(small)
    cpu_only, other = tmp_path / "cpu.msgpack", tmp_path / "other.trace"
    replace(H200, gpu=None).save(cpu_only)
    routed_by_chance(4, 3).save(other)
    for arguments, error in (
        (options, "give its file with -m"),
        ((*options, "-m", model, "--expert-bytes", "1MiB"), "give one of them"),
        ((*options[:-1], str(cpu_only), "-m", model), "has no GPU"),
        (("simulate", str(other), "-m", model), "3 MoE layers with 8 of 128 experts"),
        ((*options[:-1], str(small), "-m", model, "--recommend"), "no capacity to recommend"),
    ):
        code, _, err = run(capsys, "trace", *arguments)
        assert code == 1
        assert error in err
        assert len(err.splitlines()) == 1


# -- routing ---------------------------------------------------------------------------------------------------


def test_hits_are_the_simulators() -> None:
    ids = np.random.default_rng(0).integers(0, 16, (400, 3, 1)).astype(np.uint16)
    ids = np.concatenate([ids, (ids + 1) % 16], axis=2)
    trace = Trace(TraceModel("x", 3, 16, 2), ids, None, (400,))
    found = RoutingEstimate(trace).found(0.25)
    # What the second half adds to a replay is what it hits in a warm cache
    whole, half = (simulate(t, ["lru"], [4])[0].hits for t in (trace, Trace(trace.model, ids[:200], None, (200,))))
    hits = sum(whole) - sum(half)
    assert found.hit_rate == pytest.approx(hits / (200 * 3 * 2))
    assert found.misses == pytest.approx((200 * 3 * 2 - hits) / (200 * 3))
    assert RoutingEstimate(trace).found(0.0).misses == 2
    assert RoutingEstimate(trace).found(1.0).hit_rate == 1.0


def test_hit_rates_grow_with_the_cache() -> None:
    routing = RoutingEstimate(bundled_trace())
    rates = [routing.found(share / 40).hit_rate for share in range(41)]
    assert rates == sorted(rates)
    assert (rates[0], rates[-1]) == (0.0, 1.0)


@pytest.mark.parametrize(("n_token", "n_expert", "top_k"), [(1, 128, 8), (64, 64, 6), (8192, 256, 8)])
def test_counts_are_those_of_the_tokens(n_token: int, n_expert: int, top_k: int) -> None:
    counts = RoutingEstimate(bundled_trace()).counts(n_token, n_expert, top_k)
    assert top_k <= len(counts) <= n_expert
    assert counts == sorted(counts, reverse=True)
    assert sum(counts) == pytest.approx(n_token * top_k, rel=0.1)
    assert min(counts) >= 1
    assert max(counts) <= n_token


# -- plans -----------------------------------------------------------------------------------------------------


def planned(file: Path, **options: object) -> Plan:
    return plan(file, machine=H200, elsewhere=True, **options)  # type: ignore[arg-type]


def test_a_plan_adds_up(header: Callable[..., Path]) -> None:
    found = as_dict(planned(header("qwen3-30b-a3b"), vram_budget="8GiB"))
    vram = found["vram"]
    assert sum(n for name, n in vram.items() if name != "budget") == vram["budget"] == 8 * GIB
    assert found["experts"]["movable"] == 48 * 128
    assert vram["expert slots"] == pytest.approx(found["experts"]["in_slots"] * 2.86e6, rel=0.01)
    assert found["ram"]["experts"] == inspect_file(header("qwen3-30b-a3b")).routed_bytes
    assert [prompt["tokens"] for prompt in found["prompts"]] == [512, 2048]  # 8192 exceed the context
    assert json.loads(json.dumps(found)) == found


def test_more_of_everything_is_no_slower(header: Callable[..., Path]) -> None:
    file = header("deepseek-v2-lite")
    small, large = (planned(file, vram_budget=budget, ctx=8192) for budget in ("4GiB", "10GiB"))
    assert small.decode
    assert large.decode
    assert small.decode.rate < large.decode.rate
    assert all(a.rate <= b.rate for a, b in zip(small.prompts, large.prompts, strict=True))
    assert small.hit_rate < large.hit_rate
    on_disk = planned(file, vram_budget="4GiB", ctx=8192, ram_budget="5GiB")
    assert on_disk.ram.limit
    assert on_disk.on_disk == inspect_file(file).routed_bytes - on_disk.ram.limit
    assert on_disk.ram.limit < 5 * GIB * 7 // 8  # the process itself takes some
    assert on_disk.decode
    assert on_disk.decode.rate < small.decode.rate
    assert on_disk.decode.terms["disk"] > 0


def test_a_disk_whose_rate_is_not_known_is_said(header: Callable[..., Path]) -> None:
    known = planned(header("qwen3-30b-a3b"), vram_budget="4GiB", ctx=8192, ram_budget="5GiB")
    assert known.machine is not None
    unknown = replace(known, machine=replace(known.machine, disk=None))
    assert [("not in the speeds" in {what for _, what, _ in lines(found)}) for found in (known, unknown)] == [
        False,
        True,
    ]


def test_only_layers_on_disk_are_read_from_it(header: Callable[..., Path]) -> None:
    file = header("deepseek-v2-lite")

    def planned_with(layers: str) -> Plan:
        return planned(file, vram_budget="4GiB", ctx=8192, place=(rf"blk\.({layers})\..*_exps=disk",))

    two, four = planned_with("3|4"), planned_with("3|4|5|6")
    assert two.decode
    assert four.decode
    assert 0 < two.decode.terms["disk"] == pytest.approx(four.decode.terms["disk"] / 2, rel=0.2)
    assert [in_ram < 1 for in_ram in two.run_shape.in_ram] == [layer in (2, 3) for layer in range(26)]
    for few, many in zip(two.prompts, four.prompts, strict=True):
        assert 0 < few.terms["disk"] < many.terms["disk"]


def test_what_doubles_the_speed_does(header: Callable[..., Path]) -> None:
    file = header("qwen3-30b-a3b")
    small = planned(file, vram_budget="4GiB")
    text = doubling(small)["decode"]
    budget = text.removeprefix("vram_budget ").partition(",")[0]
    assert small.decode
    assert (decode := planned(file, vram_budget=budget).decode)
    assert round(decode.rate) == int(text.split()[-2])
    assert decode.rate >= 2 * small.decode.rate


def test_homes_decide_who_computes(header: Callable[..., Path]) -> None:
    file = header("qwen3-30b-a3b")
    cached, on_cpu, placed = (
        planned(file, vram_budget="24GiB", **options)
        for options in ({}, {"experts": "cpu"}, {"place": (r"_exps\.=cuda:0",)})
    )
    assert cached.decode
    assert on_cpu.decode
    assert placed.decode
    assert cached.decode.terms.get("misses") is None  # all fit
    assert placed.decode.rate == pytest.approx(cached.decode.rate)
    assert placed.vram
    assert placed.vram.placed == inspect_file(file).routed_bytes
    assert (placed.n_movable, placed.in_ram, on_cpu.n_slot, on_cpu.hit_rate) == (0, 0, 0, 0.0)
    assert on_cpu.prompts[0].binding == "cpu"
    assert doubling(on_cpu)["decode"].startswith("experts cache, vram_budget")


def test_without_a_gpu_everything_is_on_the_cpu(header: Callable[..., Path]) -> None:
    machine = replace(H200, gpu=None)
    found = plan(header("qwen3-30b-a3b"), machine=machine, elsewhere=True)
    assert found.vram is None
    assert found.decode
    active = 1.10e9 + 0.83e9  # routed and dense bytes of a token
    assert found.decode.rate == pytest.approx(149e9 / active, rel=0.3)
    with pytest.raises(ConfigError, match="no GPU"):
        plan(header("qwen3-30b-a3b"), machine=machine, elsewhere=True, vram_budget="8GiB")


def test_the_bundled_model_is_planned_as_it_is_loaded() -> None:
    options: dict[str, Any] = {"device": "simulated", "vram_budget": "64MiB", "ctx": 64, "ubatch": 32}
    found = plan(**options)
    with Engine.load(**options) as engine:
        assert engine.vram_plan == found.vram
        assert found.n_slot == pytest.approx(engine.experts.n_slot, rel=0.05)  # type: ignore[attr-defined]
    assert found.decode is None  # no machine, no speed
    assert found.prompts == []


def test_what_does_not_fit_says_what_would(header: Callable[..., Path]) -> None:
    file = header("qwen3-30b-a3b")
    with pytest.raises(CapacityError) as refused:
        planned(file, vram_budget="4GiB", ctx=32768, experts="cache")
    message = str(refused.value)
    for remedy in message.partition("What would do: ")[2].split(", or "):
        name, value = remedy.replace("'", "").split()
        changed = {"vram_budget": "4GiB", "ctx": 32768, "experts": "cache"}
        changed[name] = int(value) if value.isdigit() else value
        planned(file, **(changed if name != "device" else {"device": "cpu"}))
    least = int(message.partition("vram_budget ")[2].partition("MiB")[0])
    with pytest.raises(CapacityError):
        planned(file, vram_budget=f"{least - 1}MiB", ctx=32768, experts="cache")
    assert ", or ctx " in message


# -- the command line ------------------------------------------------------------------------------------------


def test_plan_command(header: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hardware, file = tmp_path / "h200.msgpack", str(header("qwen3-30b-a3b"))
    H200.save(hardware)
    options = ("--hardware", str(hardware), "--vram-budget", "8GiB", "--ctx", "8192")
    code, out, err = run(capsys, "plan", file, *options, "--json")
    assert code == 0, err
    expected = planned(Path(file), vram_budget="8GiB", ctx=8192)
    assert json.loads(out) == json.loads(json.dumps(as_dict(expected)))
    code, out, err = run(capsys, "plan", file, *options)
    assert code == 0, err
    for part in ("expert slots", "page-locked", "prompt of 8192", "decode", "to double it", "estimate"):
        assert part in out


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("--hardware", "nowhere"), "nowhere: cannot be read"),
        (("--vram-budget", "much"), "size 'much'"),
        (("--batch", "9"), "n_sequence is 9"),
        (("--ctx", "10000000"), "ctx is 10000000"),
        (("--trace", "nowhere.npz"), "nowhere.npz"),
        (("--ram-budget", "-1"), "size '-1'"),
    ],
)
def test_plan_command_errors(
    arguments: tuple[str, ...], error: str, header: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "plan", str(header("qwen3-30b-a3b")), *arguments)
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert error in err
    assert len(err.splitlines()) == 1


def test_a_trace_of_another_model_is_refused(
    header: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "x.npz"
    np.savez(trace, ids=np.zeros((8, 2, 1), np.uint8), n_expert=4)
    code, _, err = run(capsys, "plan", str(header("qwen3-30b-a3b")), "--trace", str(trace), "--vram-budget", "8GiB")
    assert code == 1
    assert "the trace is of 2 MoE layers with 1 of 4 experts a token, but" in err
