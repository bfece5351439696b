"""The benchmark's arithmetic: what is run in which order, statistics, comparison, formats, pictures' data."""

import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_engine.benchmark import plots
from moe_engine.benchmark.compare import compare, difference
from moe_engine.benchmark.environment import public_command
from moe_engine.benchmark.peers import fit_cache, fit_layers
from moe_engine.benchmark.plan import Test, all_tests, loads, numbers, pairs, snake, sweep
from moe_engine.benchmark.results import (
    Row,
    Sample,
    add_ratios,
    decode_costs,
    decode_limit,
    missing_bytes,
    prompt_costs,
    slowest,
    timing,
)
from moe_engine.benchmark.tables import parse_rows, read_rows, render, to_json
from moe_engine.benchmark.timeline import chrome_trace, events_of, packed, unpacked
from moe_engine.cli import main
from moe_engine.errors import ConfigError, MoeEngineError
from moe_engine.hardware import Bound
from moe_engine.stats import PromptCounts, Stats

SAMPLE = Path(__file__).parent / "data" / "llama-bench.json"  # written by llama.cpp's llama-bench, 3 repetitions


def row(**fields: Any) -> Row:
    """Of a generation, as `bench` writes it."""
    base = {"engine": "moe_engine", "model_type": "m", "n_prompt": 0, "n_gen": 128, "n_depth": 0, "varied": []}
    row = {**base, "options": {}, "avg_ts": 100.0, "stddev_ts": 1.0, "samples_ts": [99.0, 100.0, 101.0], **fields}
    return row if "samples_ts" in fields or "avg_ts" not in fields else {**row, "samples_ts": [row["avg_ts"]]}


# -- what is run -------------------------------------------------------------------------------------------------


def test_numbers() -> None:
    assert numbers("-p", ["512,2048", "512"]) == [512, 2048]
    assert numbers("-d", ["0-4096+1024"]) == [0, 1024, 2048, 3072, 4096]
    assert numbers("-d", ["1-8*2"]) == [1, 2, 4, 8]
    assert numbers("-n", ["3-5"]) == [3, 4, 5]


@pytest.mark.parametrize("text", ["", "x", "-1", "5-3", "1-9*1", "0-9*2", "1-9+0", "1,,2", "99999999999", "1-99999"])
def test_wrong_numbers_name_the_option(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^-p is "):
        numbers("-p", [text])


def test_product_of_tests() -> None:
    found = all_tests([512, 0], [128], [0, 4096], pairs("-pg", ["64,32"]))
    names = [test.name for test in found]
    assert names == ["pp512", "tg128", "pp64+tg32", "pp512 @ d4096", "tg128 @ d4096", "pp64+tg32 @ d4096"]
    with pytest.raises(ConfigError, match="nothing to measure"):
        all_tests([0], [0], [0])


def test_sweep_deepens_by_the_prompt() -> None:
    assert [test.name for test in sweep([256], [64], [512])] == [
        "pp256",
        "tg64",
        "pp256 @ d256",
        "tg64 @ d256",
        "pp256 @ d512",
        "tg64 @ d512",
    ]
    with pytest.raises(ConfigError, match="--sweep"):
        sweep([256, 512], [64], [512])


def test_product_of_loads() -> None:
    found = loads({"device": ["cpu"], "vram_budget": ["25%,6GiB"], "n_sequence": ["1", "4"], "exact": ["true"]})
    assert [(load["vram_budget"], load["n_sequence"]) for load in found] == [
        ("25%", 1),
        ("25%", 4),
        ("6GiB", 1),
        ("6GiB", 4),
    ]
    assert {load["exact"] for load in found} == {True}
    assert found[0].name == "vram_budget 25%, n_sequence 1"
    assert [load["ctx"] for load in loads({"ctx": ["none,64"]})] == [None, 64]
    with pytest.raises(ConfigError, match="unknown option 'speed'"):
        loads({"speed": ["9"]})
    with pytest.raises(ConfigError, match="exact is 'maybe'"):
        loads({"exact": ["maybe"]})


def test_commas_within_settings_do_not_separate() -> None:
    (one, two) = loads({"device": ["lru,decayed:half_life=64,admit=always"]})
    assert (one["device"], two["device"]) == ("lru", "decayed:half_life=64,admit=always")


def test_order_is_repetition_by_repetition_and_back() -> None:
    order = list(snake("abc", 3))
    assert [item for _, item in order] == list("abccbaabc")
    assert [repetition for repetition, _ in order] == [0] * 3 + [1] * 3 + [2] * 3


@given(st.integers(1, 8), st.sampled_from([2, 4, 6]))
def test_a_steady_drift_favours_no_row(n_item: int, repetitions: int) -> None:
    times: dict[int, list[int]] = {}
    for time, (_, item) in enumerate(snake(range(n_item), repetitions)):
        times.setdefault(item, []).append(time)
    assert len({statistics.fmean(found) for found in times.values()}) == 1


# -- results -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("theirs", json.loads(SAMPLE.read_text()))
def test_mean_and_deviation_are_llama_benchs(theirs: Row) -> None:
    test = Test(theirs["n_prompt"], theirs["n_gen"], theirs["n_depth"])
    samples = [Sample(ns * 1e-9, test.n_token) for ns in theirs["samples_ns"]]
    ours = timing(test, samples)
    for name in ("n_prompt", "n_gen", "n_depth", "samples_ns"):
        assert ours[name] == theirs[name]
    for name in ("avg_ns", "avg_ts", "stddev_ts"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-6), name
    assert ours["stddev_ns"] == pytest.approx(theirs["stddev_ns"], rel=0.01)  # theirs is computed with integers
    assert ours["samples_ts"] == pytest.approx(theirs["samples_ts"], rel=1e-5)


def test_deviation_of_one_sample_is_zero() -> None:
    found = timing(Test(8, 0), [Sample(0.5, 8)])
    assert (found["avg_ts"], found["stddev_ts"], found["stddev_ns"]) == (16.0, 0.0, 0)


def stats(hits: list[int], misses: list[int], vram: float, ram: float, step: float) -> Stats:
    return Stats(
        decode_tokens=10,
        decode_seconds=10 * step,
        steps=10,
        expert_hits=sum(hits),
        expert_misses=sum(misses),
        layer_hits=hits,
        layer_misses=misses,
        dense_bytes=1000,
        hit_bytes=200,
        cpu_bytes=30,
        pcie_bytes=40,
        gpu_wait_seconds=step,
        bound=Bound(vram, ram, step),
    )


def test_decode_costs_add_up() -> None:
    found = [Sample(1, 10, stats([6, 1], [2, 1], 0.1, 0.2, 0.4)), Sample(1, 10, stats([2, 3], [6, 3], 0.1, 0.4, 0.8))]
    costs = decode_costs(found)
    assert costs["hit_rate"] == 12 / 24
    assert costs["layer_hit_rate"] == [0.5, 0.5]
    assert costs["step_bytes"] == {"dense": 100, "vram": 20, "cpu": 3, "pcie": 4}
    assert costs["gpu_wait_share"] == pytest.approx(0.1)
    limit = decode_limit(found)
    assert limit is not None
    assert limit.term == "RAM"
    assert limit.rate == pytest.approx(20 / (10 * 0.2 + 10 * 0.4))


def test_experts_that_a_prompt_needs_do_not_count_those_copied_in_vain() -> None:
    once = PromptCounts(cached=5, streamed=6, cpu=1, unused=2, streamed_bytes=80, cpu_bytes=10)
    again = PromptCounts(cached=5, streamed=7, cpu=1, unused=0, streamed_bytes=70, cpu_bytes=10)
    assert missing_bytes([Sample(1, 8, None, once), Sample(1, 8, None, again)]) == (60 + 10 + 70 + 10) / 2
    assert missing_bytes([Sample(1, 8)]) == 0


def test_prompt_costs_add_up() -> None:
    counts = [PromptCounts(cached=6, streamed=2, streamed_bytes=200), PromptCounts(cached=2, cpu=6, cpu_bytes=600)]
    costs = prompt_costs([Sample(1, 8, None, found) for found in counts])
    assert costs == {"hit_rate": 0.5, "prompt_bytes": {"pcie": 100, "cpu": 300}}
    assert prompt_costs([Sample(1, 8)]) == {"hit_rate": None, "prompt_bytes": None}


def test_nothing_counted_is_none_not_zero() -> None:
    costs = decode_costs([Sample(1, 8, Stats(decode_tokens=8, decode_seconds=1, expert_misses=4))])
    assert (costs["hit_rate"], costs["step_bytes"], costs["gpu_wait_share"]) == (None, None, None)
    assert decode_limit([Sample(1, 8)]) is None


def test_the_slowest_term_binds() -> None:
    limit = slowest(100, {"arithmetic": 0.5, "PCIe": 2.0})
    assert limit is not None
    assert (limit.rate, limit.term) == (50, "PCIe")
    assert slowest(100, {"PCIe": 0.0}) is None


def test_ratio_is_of_the_same_test_and_options() -> None:
    a, b = {"vram_budget": "25%"}, {"vram_budget": "50%"}
    rows = [row(options=a, avg_ts=100.0), row(options=b, avg_ts=200.0), row(options=b, avg_ts=50.0, engine="ik")]
    add_ratios(rows)
    assert rows[2]["ratio"] == 4.0
    assert "ratio" not in rows[0]


# -- comparison --------------------------------------------------------------------------------------------------


def test_noise_is_that_of_welchs_test() -> None:
    """t = 2.776 at 4 degrees of freedom: equal deviations of 1, three samples a side."""
    found = difference("x", [99.0, 100.0, 101.0], [95.0, 96.0, 97.0])
    assert found.change == pytest.approx(-0.04)
    assert found.noise == pytest.approx(2.776 * (2 / 3) ** 0.5 / 100, rel=1e-3)


@pytest.mark.parametrize(
    ("after", "threshold", "status"),
    [
        ([99, 100, 101], "5%", 0),
        ([89, 90, 91], "5%", 1),  # 10 % slower, hardly any noise
        ([89, 90, 91], "15%", 0),
        ([60, 90, 120], "5%", 0),  # the same, but it may be chance
        ([109, 110, 111], "5%", 0),  # faster
        ([90], "0.05", 1),
    ],
)
def test_exit_status_of_compare(tmp_path: Path, after: list[float], threshold: str, status: int) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(to_json([row(), row(n_gen=64)]))
    new.write_text(to_json([row(avg_ts=statistics.fmean(after), samples_ts=[float(n) for n in after]), row(n_gen=32)]))
    with pytest.raises(SystemExit) as exit:
        main(["bench", "compare", str(old), str(new), "--threshold", threshold])
    assert (exit.value.code or 0) == status


def test_compare_pairs_rows_of_the_same_kind() -> None:
    found = compare([row(), row(n_gen=64), row(engine="ik")], [row(n_gen=64), row(options={"miss": "cpu"})])
    assert [d.name for d in found.differences] == ["moe_engine, m, tg64"]
    assert (len(found.only_before), len(found.only_after)) == (2, 1)
    with pytest.raises(ConfigError, match="no test in common"):
        compare([row()], [row(n_gen=64)])


def test_llama_benchs_own_files_can_be_compared() -> None:
    rows = read_rows(SAMPLE)
    assert [d.change for d in compare(rows, rows).differences] == [0.0] * 6


# -- formats -----------------------------------------------------------------------------------------------------


def test_llama_benchs_json_is_read() -> None:
    rows = read_rows(SAMPLE)
    assert [(r["n_prompt"], r["n_gen"], r["n_depth"]) for r in rows] == [
        (64, 0, 0),
        (128, 0, 0),
        (0, 16, 0),
        (64, 0, 64),
        (128, 0, 64),
        (0, 16, 64),
    ]
    assert "| pp128 @ d64 | " in render(rows, "md")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[1]",
        "[{}]",
        '[{"n_prompt": 1, "n_gen": 0, "avg_ts": 1, "stddev_ts": 0, "samples_ts": []}]',
        '[{"n_prompt": true, "n_gen": 0, "avg_ts": 1, "stddev_ts": 0, "samples_ts": [1]}]',
        '[{"n_prompt": 1, "n_gen": 0, "avg_ts": NaN, "stddev_ts": 0, "samples_ts": [1]}]',
        "[" * 100_000,
    ],
)
def test_what_is_no_result_says_so(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^file\.json: "):
        parse_rows(text, "file.json")


@given(st.binary(max_size=200), st.integers(0, 2000))
def test_damaged_json_is_an_error_or_rows(noise: bytes, at: int) -> None:
    text = SAMPLE.read_bytes()
    damaged = (text[:at] + noise + text[at + len(noise) :]).decode("utf-8", errors="replace")
    try:
        rows = parse_rows(damaged, "file.json")
    except MoeEngineError:
        return
    render(rows, "json")


def test_json_is_what_was_written() -> None:
    rows = [row(hit_rate=None, timeline=[["GPU", "waits", 1, 2, 3]]), row()]
    assert parse_rows(to_json(rows), "x") == [{**r, "n_depth": 0} for r in rows]
    lines = render(rows, "csv").splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("engine,model_type,n_prompt")


def test_table_tells_what_was_not_real() -> None:
    text = render(
        [row(model_type="qwen3moe random x", routing="recorded, a.npz", bound_share=0.5, bound_by="RAM")], "md"
    )
    assert "Random weights" in text
    assert "a.npz" in text
    assert "50% (RAM)" in text


def test_commands_tell_no_folders() -> None:
    arguments = ["bench", "-m", "/home/someone/a b.gguf", "--against", "ik=/home/someone/llama-bench", "-p", "512"]
    assert public_command(arguments) == "moe-engine bench -m 'a b.gguf' --against ik=llama-bench -p 512"


# -- pictures ----------------------------------------------------------------------------------------------------


def cached(share: float, speed: float, bound: float | None) -> Row:
    options = {"vram_budget": f"{share:.0%}"}
    hits = [share, share / 2]
    return row(
        options=options, varied=["vram_budget"], cached_share=share, avg_ts=speed, bound_ts=bound, layer_hit_rate=hits
    )


def step_events() -> list[Any]:
    """Two layers; the GPU's clock is 1000 ahead of the host's, the quickest message takes no time."""
    stamps = np.array([1100, 1120, 1200, 1300, 1310, 1310, 1000, 1400], np.int64)
    names = ("seq", "seen", "answered", "n_hit", "n_cpu", "n_now")
    fields = [(name, np.int64) for name in names]
    rows = [(3, 0, 0, 8, 0, 0), (9, 100, 190, 4, 4, 0), (10, 305, 0, 8, 0, 0)]
    copies = [("layer", np.int64), ("expert", np.int64), ("begun", np.int64), ("ended", np.int64)]
    moved = np.array([(0, 7, -90, -5), (1, 5, 195, 290)], copies)
    return list(events_of(stamps, np.array(rows, fields), moved))


def test_events_of_a_step() -> None:
    assert packed(step_events()) == [
        ["GPU", "attention, router", 0, 0, 100],
        ["GPU", "hits, shared expert", 0, 100, 120],
        ["GPU", "waits", 0, 120, 200],
        ["GPU", "attention, router", 1, 200, 300],
        ["GPU", "hits, shared expert", 1, 300, 310],
        ["GPU", "waits", 1, 310, 310],
        ["GPU", "logits, sampling", -1, 310, 400],
        ["CPU", "computes misses", 0, 100, 190],
        ["PCIe", "expert 5", 1, 195, 290],
    ]
    assert unpacked(packed(step_events())) == step_events()


def test_chrome_trace_has_a_lane_each() -> None:
    trace = chrome_trace(step_events())["traceEvents"]
    lanes = {event["tid"]: event["args"]["name"] for event in trace if event["ph"] == "M"}
    slices = [event for event in trace if event["ph"] == "X"]
    assert len(slices) == len(step_events())
    for event, found in zip(step_events(), slices, strict=True):
        assert (lanes[found["tid"]], found["ts"], found["dur"]) == (
            event.lane,
            event.start / 1000,
            (event.end - event.start) / 1000,
        )


def test_curve_over_the_cache_is_in_order_with_its_bound() -> None:
    (curve,) = plots.cache_curves([cached(0.5, 200, 300.0), cached(0.1, 100, None), cached(1.0, 500, 900.0)])
    assert (curve.x, curve.y, curve.bound) == ([0.1, 0.5, 1.0], [100, 200, 500], [None, 300.0, 900.0])
    assert plots.cache_curves([cached(0.5, 200, 300.0)]) == []


def test_prompt_curves_are_by_load_and_depth() -> None:
    rows = [row(n_prompt=n, n_gen=0, n_depth=d, avg_ts=float(n + d)) for d in (0, 64) for n in (512, 128)]
    curves = plots.prompt_curves([*rows, row()])
    assert [(curve.x, curve.y) for curve in curves] == [([128, 512], [128.0, 512.0]), ([128, 512], [192.0, 576.0])]


def test_pictures_are_written(tmp_path: Path) -> None:
    rows = [
        cached(0.1, 100, 200.0),
        cached(0.5, 200, 300.0),
        {**cached(1.0, 500, None), "timeline": packed(step_events())},
    ]
    rows += [row(n_prompt=n, n_gen=0) for n in (128, 512)]
    names, rates = plots.hit_map(rows)
    assert rates == [[0.1, 0.05], [0.5, 0.25], [1.0, 0.5]]
    assert len(names) == 3
    found = plots.write_plots(rows, tmp_path / "new")
    assert {path.name for path in found} == {
        "decode-over-cache.svg",
        "prompt-over-length.svg",
        "hit-rate-by-layer.svg",
        "step-0.svg",
        "step-0.trace.json",
    }
    assert sorted(tmp_path.glob("new/*")) == sorted(found)
    assert all("</svg>" in path.read_text() for path in found if path.suffix == ".svg")
    with pytest.raises(ConfigError, match="nothing to draw"):
        plots.write_plots([row()], tmp_path)


# -- peers' settings ---------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 100), min_size=1, max_size=12), st.integers(0, 1500), st.integers(-20, 20))
def test_fewest_layers_on_the_cpu(layers: list[int], limit: int, guess_off: int) -> None:
    """VRAM shrinks with every layer that is left out, by more or less than the layer's size."""

    def peak(n: int) -> int:
        return 100 + sum(max(1, size + guess_off) for size in layers[n:])

    fitting = [n for n in range(len(layers) + 1) if peak(n) <= limit]
    n_run = 0

    def run(n: int) -> int:
        nonlocal n_run
        n_run += 1
        return peak(n)

    found = fit_layers(run, layers, limit)
    if not fitting:
        assert found == len(layers)
    else:
        assert found in fitting
        assert found == min(fitting) or n_run >= 8  # it gives up being exact before being slow


def test_expert_cache_fits() -> None:
    mib = 1 << 20
    found = fit_cache(lambda cache: 500 * mib + cache * mib + cache * mib // 10, 1000 * mib)
    assert found >= 400
    assert 500 + 1.1 * found <= 1000
    assert fit_cache(lambda cache: 500 * mib, 400 * mib) == 0
