"""Plans of files that hold no weights, speeds of simulated hits, and the commands that print them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recorded_h200 import H200

from moe_engine import CapacityError, ConfigError, Engine
from moe_engine.cli import main
from moe_engine.inspection import inspect_file
from moe_engine.plan_advice import doubling
from moe_engine.plan_report import as_dict, lines
from moe_engine.planner import Plan, plan
from moe_engine.simulated_speed import SimulatedModel
from moe_engine.simulator import simulate
from moe_engine.traces import Trace, TraceModel

GIB = 1 << 30


# -- simulated hits ----------------------------------------------------------------------------------------------


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
    # By hand: the CPU reads what each layer has missed, and some copies for later take the rest of the RAM's rate.
    missed = [(n - hits) / 60 for n, hits in zip(outcome.accesses, outcome.hits, strict=True)]
    nbytes = sum(n * size for n, size in zip(missed, simulated.expert_bytes, strict=True))
    copied = sum(n / 60 * size for n, size in zip(outcome.missed_steps, simulated.expert_bytes, strict=True))
    assert found.terms["misses"] == pytest.approx((nbytes + copied / 3) / 149e9, rel=0.05)
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
