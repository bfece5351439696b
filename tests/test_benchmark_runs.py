"""`moe-engine bench` from the command line to the rows, on the CPU and on the simulated device, and beside a peer."""

import json
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models

from moe_engine import Engine
from moe_engine.benchmark import ours
from moe_engine.benchmark.environment import ModelFacts
from moe_engine.benchmark.peers import layer_bytes
from moe_engine.benchmark.plan import Load, Test, loads
from moe_engine.benchmark.results import Row, Sample
from moe_engine.benchmark.session import Session
from moe_engine.cli import main
from moe_engine.errors import ConfigError
from moe_engine.graph_decoder import GraphDecoder
from moe_engine.inspection import inspect_file
from moe_engine.kernels.mailbox import new_stamps

DATA = Path(__file__).parent / "data"
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}  # interpreted kernels are slow
Bench = Callable[..., tuple[int, str, str]]


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Bench:
    def run(*arguments: str) -> tuple[int, str, str]:
        """Exit status, stdout, stderr."""
        monkeypatch.setattr("sys.argv", ["moe-engine", "bench", *arguments])
        with pytest.raises(SystemExit) as exit:
            main(["bench", *arguments])
        return (int(exit.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make("qwen3moe/plain", tmp_path_factory.mktemp("model"), "F16", **SMALL).path


def test_bundled_model_gives_rows_like_llama_benchs(bench: Bench) -> None:
    arguments = [
        "--device",
        "cpu",
        "-p",
        "8",
        "-n",
        "2",
        "-d",
        "0,4",
        "-r",
        "2",
        "-t",
        "1,2",
        "-o",
        "json",
        "-oe",
        "md",
    ]
    status, out, err = bench(*arguments)
    assert status == 0, err
    rows = json.loads(out)
    kinds = [(row["n_threads"], row["n_prompt"], row["n_gen"], row["n_depth"]) for row in rows]
    assert kinds == [(t, p, n, d) for t in (1, 2) for d in (0, 4) for p, n in ((8, 0), (0, 2))]
    theirs = json.loads((DATA / "llama-bench.json").read_text())[0]
    same = {
        "build_commit",
        "cpu_info",
        "gpu_info",
        "backends",
        "model_filename",
        "model_type",
        "model_size",
        "model_n_params",
        "n_batch",
        "n_ubatch",
        "n_threads",
        "type_k",
        "type_v",
        "n_prompt",
        "n_gen",
        "n_depth",
        "test_time",
        "avg_ns",
        "stddev_ns",
        "avg_ts",
        "stddev_ts",
        "samples_ns",
        "samples_ts",
    }
    for row in rows:
        assert same <= set(row)
        assert all(type(row[name]) is type(theirs[name]) for name in same)
        assert len(row["samples_ts"]) == 2
        assert row["peak_ram"] > 1 << 24
        assert row["environment"]["command"] == "moe-engine bench " + " ".join(arguments)
        assert row["environment"]["dram_rate"] > 0
    assert rows[1]["bound_by"] == "RAM"
    assert rows[1]["avg_ts"] / rows[1]["bound_ts"] == pytest.approx(rows[1]["bound_share"])
    assert "| pp8 @ d4 |" in err
    with Engine.load(device="cpu") as engine:
        file = engine.file
    assert rows[0]["model_size"] == sum(info.nbytes for info in file.tensors.values())


def test_sweep_has_a_line_for_each_depth(bench: Bench) -> None:
    status, out, err = bench("--device", "cpu", "--sweep", "-p", "4", "-n", "2", "-d", "8", "-r", "1")
    assert status == 0, err
    lines = [line.split() for line in out.splitlines()]
    assert lines[0][:4] == ["engine", "PP", "TG", "N_KV"]
    assert [line[1:4] for line in lines[1:4]] == [["4", "2", "0"], ["4", "2", "4"], ["4", "2", "8"]]


def test_policies_are_compared(bench: Bench) -> None:
    policies = "lru,blend:admit=outranks,floor=2"
    status, out, err = bench(
        *("--device", "cpu", "-p", "0", "-n", "1", "-r", "1", "-o", "json"), "--policy", policies, "--policy", "lfu"
    )
    assert status == 0, err
    rows = json.loads(out)
    assert [row["options"]["policy"] for row in rows] == ["lru", "blend:admit=outranks,floor=2", "lfu"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "x"], "-p is 'x'"),
        (["-o", "yaml"], "output is 'yaml'"),
        (["--random", "gpt"], "random model 'gpt'"),
        (["--random", "deepseek-v3", "-m", "x.gguf"], "either --model or --random"),
        (["--set", "speed=1"], "unknown option 'speed'"),
        (["--set", "speed"], "--set is 'speed'"),
        (["--policy", "pinned-lru"], "'pinned-lru' has no native twin"),
        (["--against", "vllm=x"], "--against is 'vllm=x'"),
        (["--against", "ik=/nowhere/llama-bench"], "/nowhere/llama-bench: cannot be run"),
        (["-m", "nowhere.gguf"], "nowhere.gguf: no such file"),
        (["--routing", "nowhere.npz"], "nowhere.npz: no such file"),
        (["--vram-budget", "10%"], "has no VRAM"),
        (["--vram-budget", "1GiB"], "vram_budget is '1GiB', but device 'cpu' has no VRAM"),
        (["--layers", "2", "--mix", "q6_k"], "--layers, --mix: only with --random"),
        (["--vram-budget", "110%"], "vram_budget is '110%'"),
        (["-p", "4000"], "ctx is 4001"),
        (["compare", "a.json", "b.json", "--threshold", "x"], "threshold is 'x'"),
        (["compare", "a.json", "b.json"], "a.json: cannot be read"),
        (["plot", "a.json", "--to", "x"], "a.json: cannot be read"),
    ],
)
def test_wrong_options_are_one_line(bench: Bench, arguments: list[str], message: str) -> None:
    device = [] if arguments[0] in ("compare", "plot") else ["--device", "cpu"]
    status, out, err = bench(*device, *arguments)
    assert (status, out) == (1, "")
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_interrupted_run_shows_what_there_is(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = ours.Ours.run

    def run(self: ours.Ours, test: Test, repetition: int) -> Sample:
        if repetition == 1 and test.n_gen:
            raise KeyboardInterrupt
        return measured(self, test, repetition)

    monkeypatch.setattr(ours.Ours, "run", run)
    status, out, _ = bench("--device", "cpu", "-p", "4", "-n", "2", "-r", "2", "-o", "json")
    assert status == 130
    assert [len(row["samples_ts"]) for row in json.loads(out)] == [1, 1]


def simulated(path: Path, **lists: str) -> list[Load]:
    return loads({"device": ["simulated"], "threads": ["2"], **{name: [text] for name, text in lists.items()}})


def test_share_of_the_experts_is_kept(tiny: Path) -> None:
    """The budget leaves the share and at most two experts more for slots."""
    found = inspect_file(tiny)
    for share in (0.5, 1.0):
        (load,) = simulated(tiny, vram_budget=f"{share:.0%}")
        options = ours.engine_options(tiny, ModelFacts.of(tiny), load, 16)
        assert options["experts"] == "cache"
        slots = Engine.plan(tiny, **options).slots
        assert slots == pytest.approx(int(share * found.routed_bytes) + 2 * sum(found.expert_bytes), abs=1024)
    (none,) = simulated(tiny, vram_budget="0%")
    assert ours.engine_options(tiny, ModelFacts.of(tiny), none, 16)["experts"] == "cpu"


def test_decode_rows_of_the_gpu_path(tiny: Path, tmp_path: Path) -> None:
    """The worker's counts against recorded routing, of which it is known what the slots held."""
    ids = np.broadcast_to(np.array([[0, 1, 2], [5, 6, 7]]), (4, 2, 3)).copy()
    routing = tmp_path / "routing.npz"
    np.savez(routing, ids=ids, n_expert=8)
    options = simulated(tiny, vram_budget="none", miss="cpu", cache_slots="12")
    (decode,) = Session(tiny, options, [Test(0, 1)], 1, routing).run()
    assert decode["routing"] == "recorded, routing.npz"
    assert decode["n_slot"] == 12
    assert decode["cached_share"] == 12 / 16
    assert decode["layer_hit_rate"][0] == 1.0  # the first experts of each layer are loaded first
    assert 0 < decode["hit_rate"] <= 1
    per_step = decode["step_bytes"]
    expert = inspect_file(tiny).expert_bytes[0]
    assert per_step["vram"] + per_step["cpu"] == pytest.approx(6 * expert, rel=0.01)
    assert decode["bound_by"] in ("VRAM", "RAM")
    assert decode["bound_share"] > 0
    assert 0 <= decode["gpu_wait_share"] <= 1


def test_stamps_do_not_change_tokens(tiny: Path) -> None:
    options: dict[str, Any] = {"device": "simulated", "threads": 2, "ctx": 16, "vram_budget": "64MiB"}
    with Engine.load(tiny, **options) as engine:
        expected = engine.generate([1], max_tokens=1, temperature=0).tokens
        decoder = engine.decoder
        assert isinstance(decoder, GraphDecoder)
        decoder.step.stamps = new_stamps(decoder.step.mailbox, engine.device)
        decoder.forget_captures()
        assert engine.generate([1], max_tokens=1, temperature=0).tokens == expected


def test_recorded_routing_needs_the_gpu_path() -> None:
    path = DATA.parent.parent / "bench" / "data" / "routing.npz"
    with pytest.raises(ConfigError, match="--routing needs"):
        Session(bundled(), loads({"device": ["cpu"]}), [Test(0, 1)], 1, path).run()


def bundled() -> Path:
    from moe_engine.loading import bundled_model

    return bundled_model()


# -- peers -------------------------------------------------------------------------------------------------------

PEER = """#!{python}
import json, sys
arguments = sys.argv[1:]
if "--help" in arguments:
    print("-p, --n-prompt <n>\\n-n, --n-gen <n>\\n-d, --n-depth <n>\\n-o, --output <f>\\n-ncmoe, --n-cpu-moe <n>")
    sys.exit()
with open({log!r}, "a") as log:
    log.write(json.dumps(arguments) + "\\n")
value = dict(zip(arguments[::2], arguments[1::2]))
rows = []
for depth in value.get("-d", "0").split(","):
    sizes = [(int(n), 0) for n in value["-p"].split(",")] + [(0, int(n)) for n in value["-n"].split(",")]
    for prompt, gen in sizes:
        if prompt or gen:
            speeds = dict(avg_ts=50.0, stddev_ts=0.0, samples_ts=[50.0])
            rows.append(dict(n_prompt=prompt, n_gen=gen, n_depth=int(depth), **speeds))
print("ggml: some noise")
print(json.dumps(rows))
"""


def peer(folder: Path) -> tuple[Path, Path]:
    """A program that acts like llama-bench, and the file in which it notes how it was called."""
    binary, log = folder / "llama-bench", folder / "log"
    binary.write_text(PEER.format(python=sys.executable, log=str(log)))
    binary.chmod(binary.stat().st_mode | stat.S_IXUSR)
    return binary, log


def test_peer_runs_the_same_in_turns(bench: Bench, tmp_path: Path) -> None:
    binary, log = peer(tmp_path)
    options = ("--device", "cpu", "-t", "1", "-p", "4,8", "-n", "2", "-d", "0,4", "-r", "2")
    status, out, err = bench(*options, "--against", f"llama-bench={binary}", "-o", "json")
    assert status == 0, err
    rows: list[Row] = json.loads(out)
    mine = [row for row in rows if row["engine"] == "moe_engine"]
    theirs = [row for row in rows if row["engine"] == "llama-bench"]
    assert len(mine) == len(theirs) == 6
    for our, their in zip(mine, theirs, strict=True):
        assert [our[n] for n in ("n_prompt", "n_gen", "n_depth")] == [
            their[n] for n in ("n_prompt", "n_gen", "n_depth")
        ]
        assert their["samples_ts"] == [50.0, 50.0]
        assert their["ratio"] == pytest.approx(our["avg_ts"] / 50)
    calls = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(calls) == 2
    value = dict(zip(calls[0][::2], calls[0][1::2], strict=True))
    assert Path(value["-m"]) == bundled()
    assert (value["-p"], value["-n"], value["-d"], value["-t"]) == ("4,8", "2", "0,4", "1")
    assert (value["-r"], value["-ngl"], value["-ub"]) == ("1", "0", "512")


def test_peer_that_fails_or_is_none(bench: Bench, tmp_path: Path) -> None:
    binary, _ = peer(tmp_path)
    binary.write_text(binary.read_text().replace('print("ggml: some noise")', 'sys.exit("out of memory")'))
    options = ("--device", "cpu", "-p", "4", "-n", "0", "-r", "1", "--against")
    status, _, err = bench(*options, f"llama-bench={binary}")
    assert status == 1
    assert "ended with status 1: out of memory" in err
    binary.write_text(f"#!{sys.executable}\nprint('usage: something')\n")
    status, _, err = bench(*options, f"ik={binary}")
    assert "is no llama-bench" in err
    status, _, err = bench("--batch", "2", *options, f"ik={binary}")
    assert "decodes one sequence" in err


def test_layer_bytes_are_of_routed_experts(tiny: Path) -> None:
    sizes = layer_bytes(tiny)
    assert len(sizes) == 2
    assert sum(sizes) == inspect_file(tiny).routed_bytes
    sizes = layer_bytes(bundled())
    assert sizes[0] == 0  # dense
    assert all(sizes[1:])


def test_accelerate_runs_the_same_shape(bench: Bench) -> None:
    pytest.importorskip("accelerate")
    options = ("--device", "cpu", "-p", "4", "-n", "2", "-d", "2", "-r", "1", "--against", "accelerate", "-o", "json")
    status, out, err = bench(*options)
    assert status == 0, err
    theirs = [row for row in json.loads(out) if row["engine"] == "accelerate"]
    assert [(row["n_prompt"], row["n_gen"], row["n_depth"]) for row in theirs] == [(4, 0, 2), (0, 2, 2)]
    assert all(row["ratio"] > 0 for row in theirs)


@pytest.mark.parametrize("name", ["qwen3moe/plain", "qwen2moe/plain", "deepseek2/v2-lite", "deepseek2/v3"])
def test_accelerate_gets_the_files_dimensions(name: str, tmp_path: Path) -> None:
    """The configuration found from a file has the same parameters, by shape, as the one the file was made of."""
    import torch
    from transformers import AutoModelForCausalLM

    from moe_engine.benchmark.accelerate_peer import hf_config
    from moe_engine.gguf_file import GGUFFile

    made = tiny_models.make(name, tmp_path, "F16")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config(GGUFFile(made.path)))
    assert type(model) is type(made.hf_model)

    def shapes(model: Any) -> dict[str, torch.Size]:
        inside = ("embed_tokens", "lm_head")  # files pad the vocabulary
        return {n: p.shape for n, p in model.named_parameters() if not any(part in n for part in inside)}

    assert shapes(model) == shapes(made.hf_model)
