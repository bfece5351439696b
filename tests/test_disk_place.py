"""Experts placed on disk: results are those of the plain placement, and only a window of them is in RAM."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

from moe_engine import CapacityError, ConfigError, Engine
from moe_engine.cli import main
from moe_engine.expert_store import ExpertStore
from moe_engine.gguf_file import GGUFFile
from moe_engine.graph_decoder import GraphDecoder
from moe_engine.placement import block_of, is_expert
from moe_engine.plan_report import as_dict
from moe_engine.planner import plan

PROMPT = [1, 2, 3, 4, 5, 6, 7, 8]
SMALL = {"num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1, "num_experts": 16}
LAST_TWO = r"blk\.[12]\..*_exps=disk"
ALL = r"_exps\.=disk"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make("qwen3moe/plain", tmp_path_factory.mktemp("model"), "F16", **SMALL).path


def load(path: Path | None, *rules: str, **options: Any) -> Engine:
    common: dict[str, Any] = {"ctx": 32, "threads": 2, "vram_budget": "64MiB", "profile": False}
    if options["device"] == "cpu":
        del common["vram_budget"]
    return Engine.load(path, place=rules, **(common | options))


def store_of(engine: Engine) -> ExpertStore:
    store = engine.experts.store  # type: ignore[attr-defined]
    assert isinstance(store, ExpertStore)
    return store


def expert_bytes(path: Path, *blocks: int) -> int:
    tensors = GGUFFile(path).tensors.items()
    return sum(info.nbytes for name, info in tensors if is_expert(name) and (not blocks or block_of(name) in blocks))


MODES: dict[str, dict[str, Any]] = {
    "cpu": {"device": "cpu"},
    "eager": {"device": "simulated", "eager": True},
    "eager, float": {"device": "simulated", "eager": True, "activations": "float"},
    "experts on the CPU": {"device": "simulated", "experts": "cpu"},
    "misses on the CPU": {"device": "simulated", "miss": "cpu", "cache_slots": 4},
    "misses fetched": {"device": "simulated", "miss": "fetch", "cache_slots": 4},
    "misses divided": {"device": "simulated", "miss": "auto", "cache_slots": 4},
    "exact": {"device": "simulated", "exact": True, "cache_slots": 4},
}


@pytest.fixture(scope="module")
def expected(path: Path) -> dict[str, list[int]]:
    """Tokens with all experts in RAM, by device."""
    tokens = {}
    for device in ("cpu", "simulated"):
        with load(path, device=device, eager=True) as engine:
            tokens[device] = engine.generate(PROMPT, temperature=0, max_tokens=3).tokens
    return tokens


@pytest.mark.parametrize("mode", MODES)
def test_tokens_are_those_of_the_plain_placement(path: Path, expected: dict[str, list[int]], mode: str) -> None:
    options = MODES[mode]
    with load(path, LAST_TWO, **options) as engine:
        assert isinstance(engine.decoder, GraphDecoder) == (options["device"] != "cpu" and not options.get("eager"))
        if isinstance(engine.decoder, GraphDecoder):  # a step's prompt tokens choose more than the window holds
            assert not engine.decoder.takes_prompts
        store = store_of(engine)
        assert store.disk_memory is not None
        if options["device"] == "cpu":  # elsewhere slots are filled at load
            assert store.disk_memory.counts().n_read == 0
            assert store.in_place
        else:
            assert store.memory.is_read(0)
        assert engine.generate(PROMPT, temperature=0, max_tokens=3).tokens == expected[options["device"]]
        if isinstance(engine.decoder, GraphDecoder):
            engine.decoder.worker.settle()
        store.disk_memory.check_integrity()
        counts = store.disk_memory.counts()
        assert counts.n_held == 0
        assert counts.n_dropped > 0
        assert counts.most_resident_bytes <= counts.limit == engine.ram_plan.window < expert_bytes(path, 1, 2)
        assert store.memory.counts().n_dropped == 0


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("qwen2moe/plain", r"blk\.0\..*_exps=disk"),
        ("qwen3moe/16-of-24", ALL),
        ("deepseek2/v2-lite-two-dense", ALL),  # MoE layers and blocks are numbered differently
        ("deepseek2/v3-no-dense", LAST_TWO),
    ],
)
def test_logits_of_other_models(name: str, rule: str, tmp_path: Path) -> None:
    path = tiny_models.make(name, tmp_path, "F16").path
    with load(path, device="cpu", activations="float") as engine:
        whole = engine.forward(PROMPT)
    with load(path, rule, device="cpu", activations="float") as engine:
        torch.testing.assert_close(engine.forward(PROMPT), whole, rtol=0, atol=1e-4 * float(whole.std()))
        memory = store_of(engine).disk_memory
        assert memory is not None
        assert memory.counts().n_read > 0


@pytest.mark.parametrize("n_slot", [12, 16])
def test_slots_are_filled_through_the_window(path: Path, expected: dict[str, list[int]], n_slot: int) -> None:
    """More experts than it holds, behind a layer that is in RAM; with 16 nothing can miss."""
    with load(path, LAST_TWO, device="simulated", miss="cpu", cache_slots=3 * n_slot) as engine:
        assert isinstance(engine.decoder, GraphDecoder)
        engine.decoder.worker.settle()
        engine.decoder.worker.check_integrity()
        assert [len(engine.decoder.worker.residents(layer)) for layer in range(3)] == [n_slot] * 3
        assert engine.generate(PROMPT, temperature=0, max_tokens=3).tokens == expected["simulated"]


def test_the_bundled_model() -> None:
    with load(None, device="cpu") as engine:
        whole = engine.generate("Once upon a time", temperature=0, max_tokens=24).tokens
    with load(None, ALL, device="cpu") as engine:
        assert engine.generate("Once upon a time", temperature=0, max_tokens=24).tokens == whole
        memory = store_of(engine).disk_memory
        assert memory is not None
        assert memory.counts().n_dropped > 0


@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_reports_say_what_is_on_disk(path: Path, device: str, capsys: pytest.CaptureFixture[str]) -> None:
    reports: list[tuple[int, int]] = []
    on_disk = expert_bytes(path, 1, 2)
    with load(path, LAST_TWO, device=device, eager=True, progress=lambda *report: reports.append(report)) as engine:
        ram = engine.ram_plan
    assert (ram.on_disk, ram.disk_layers, ram.holds_all) == (on_disk, frozenset({1, 2}), True)
    done, total = reports[-1]
    assert done == total
    assert 0.9 * (path.stat().st_size - on_disk) < total <= path.stat().st_size - on_disk
    found = as_dict(plan(path, device=device, ctx=32, place=(LAST_TWO,)))
    assert found["disk"]["experts"] == on_disk
    assert found["ram"]["experts"] == expert_bytes(path, 0)
    assert found["ram"]["window"] == ram.window > 0
    for more in ((), ("--json",)):
        with pytest.raises(SystemExit) as exit:
            main(["plan", str(path), "--device", device, "--place", LAST_TWO, *more])
        out, err = capsys.readouterr()
        assert not exit.value.code, err
        if more:
            assert json.loads(out)["disk"]["experts"] == on_disk
        else:
            assert "window of experts on disk" in out


def test_rules_on_disk_are_checked(path: Path) -> None:
    for device in ("cpu", "simulated"):
        with pytest.raises(ConfigError, match="matches no tensor"):
            load(path, "nothing_like_it=disk", device=device)
        with pytest.raises(ConfigError, match=r"'output_norm\.weight', which is no routed expert"):
            load(path, "output_norm=disk", device=device)


@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_a_budget_for_the_rest(path: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers on disk need no more than their window; where not even that is left, what would do is said."""
    monkeypatch.setattr("moe_engine.ram_plan.process_bytes", lambda: 1 << 30)
    options: dict[str, Any] = {"device": device, "ctx": 32}
    if device == "simulated":
        options["vram_budget"] = "64MiB"
    with pytest.raises(CapacityError, match="one step's experts need") as refused:
        plan(path, place=(ALL,), ram_budget="1GiB", **options)
    enough = int(str(refused.value).rpartition("ram_budget ")[2].removesuffix("MiB"))
    with load(path, ALL, **options, ram_budget=f"{enough}MiB") as engine:
        assert engine.ram_plan.holds_all
        assert engine.ram_plan.on_disk == expert_bytes(path)
    with pytest.raises(CapacityError, match="one step's experts need"):
        load(path, ALL, **options, ram_budget=f"{enough - 2}MiB")


def test_rules_and_a_budget_below_the_rest(path: Path, expected: dict[str, list[int]]) -> None:
    """Both kinds of layers are read when needed, each within its own limit."""
    rule = r"blk\.2\..*_exps=disk"
    whole = plan(path, device="cpu", ctx=32, place=(rule,)).ram
    others = whole.routed - whole.placed_on_disk
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moe_engine.loading.host_bytes", lambda *arguments: 0)
        budget = 8 << 30
        taken = budget // 8 * 7 - whole.dense - whole.window - others * 3 // 4
        patch.setattr("moe_engine.ram_plan.process_bytes", lambda: taken)
        with load(path, rule, device="cpu", ram_budget=budget) as engine:
            ram = engine.ram_plan
            assert (ram.limit, ram.window) == (others * 3 // 4, whole.window)
            assert ram.on_disk == whole.placed_on_disk + others - others * 3 // 4
            assert store_of(engine).disk_memory is not None
            assert engine.generate(PROMPT, temperature=0, max_tokens=3).tokens == expected["cpu"]


LEAST_BUDGET = r"""
import sys
from moe_engine import CapacityError, Engine

options = {"device": "cpu", "threads": 2, "place": sys.argv[1:]}
try:
    Engine.load(ram_budget="1MiB", **options)
except CapacityError as refused:
    budget = int(str(refused).rpartition("ram_budget ")[2].removesuffix("MiB")) + 4  # the error takes some too
with Engine.load(ram_budget=f"{budget}MiB", **options) as engine:
    words = engine.encode("Once upon a time there was a cat. ") * 1000
    engine.generate(words[: engine.cache.capacity - 16], temperature=0, max_tokens=16)
with open("/proc/self/status") as status:
    most = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
print(budget << 10, most)
"""


@pytest.mark.parametrize("rules", [(), (ALL,)])
def test_the_least_budget_is_kept(rules: tuple[str, ...]) -> None:
    """Of a process of its own: all that is resident of it, with a prompt as long as the context."""
    done = subprocess.run([sys.executable, "-c", LEAST_BUDGET, *rules], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    budget, most = map(int, done.stdout.split())
    assert most <= budget
