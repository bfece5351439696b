"""Checks and times the whole engine on a CUDA machine: one script, one call.

    python bench/check_gpu.py --work /tmp/models --out results.json [--tiny]

Writes full-size random models, loads each within a VRAM budget, runs a prompt and decodes, while a thread
reads the device's memory as nvidia-smi does. `--tiny` is a dry run on the simulated device with a few layers, where
decoding is eager.
"""

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from full_size import written
from gpu_watch import GpuWatch

from moe_engine import Engine
from moe_engine.config import format_size
from moe_engine.expert_cache import CachedExperts
from moe_engine.graph_decoder import GraphDecoder
from moe_engine.perplexity import perplexity

ROOT = Path(__file__).parent.parent
BUDGET = 6 << 30


def check_bundled(device: str) -> dict[str, Any]:
    """Generates and scores with the bundled model on the device and on the CPU; the exact path must equal the eager."""
    text = (ROOT / "tests" / "data" / "heldout-4k.txt").read_text(encoding="utf-8")
    text = text if device == "cuda" else text[:2500]
    found: dict[str, Any] = {}
    runs: dict[str, dict[str, Any]] = {
        "cpu": {"device": "cpu", "activations": "float"},
        "cpu_int8": {"device": "cpu"},
        "device_cache": {"device": device, "experts": "cache", "vram_budget": "2GiB"},
        "device_cpu_experts": {"device": device, "experts": "cpu", "vram_budget": "2GiB"},
        "device_eager": {"device": device, "experts": "cache", "vram_budget": "2GiB", "eager": True},
        "device_exact": {"device": device, "experts": "cache", "vram_budget": "2GiB", "exact": True, "cache_slots": 8},
    }
    for name, options in runs.items():
        with Engine.load(None, profile=False, **options) as engine:
            result = engine.generate("Once upon a time", temperature=0, max_tokens=48)
            scored = perplexity(engine, text)
        found[name] = {"tokens": result.tokens, "text": result.text, "ppl": scored.ppl, **rates(result.stats.as_dict())}
        print(f"bundled, {name}: ppl {scored.ppl:.4f}; {result.stats.summary()}", flush=True)
    exact = found["cpu"]["ppl"]
    for name, bound in {"device_cache": 1e-3, "device_cpu_experts": 7e-3, "cpu_int8": 7e-3}.items():
        assert abs(found[name]["ppl"] / exact - 1) < bound, (name, found[name]["ppl"], exact)
    assert found["device_exact"]["tokens"] == found["device_eager"]["tokens"], found
    return found


def rates(stats: dict[str, Any]) -> dict[str, Any]:
    keys = ("prompt_rate", "decode_rate", "hit_rate", "bound", "gpu_wait_seconds", "pcie_bytes", "peak_vram_bytes")
    return {key: stats[key] for key in keys}


def check_full_size(path: Path, device: str, experts: str, n_prompt: int, n_decode: int) -> dict[str, Any]:
    """Loads a full-size file within the budget and runs it; the peak must stay below the budget."""
    vram_budget = BUDGET if device == "cuda" else 2 << 30
    watch, context = GpuWatch.of(device), 0
    if watch.status is not None:
        torch.cuda.empty_cache()
        # What the device holds without this process's tensors: the CUDA context, and other processes if any.
        context = watch.status.used() - torch.cuda.memory_reserved()
    with watch:
        started = time.perf_counter()
        with Engine.load(path, device=device, experts=experts, vram_budget=vram_budget, profile=False) as engine:
            loaded = time.perf_counter() - started
            prompt = [(i * 7919) % 400 for i in range(n_prompt)]
            result = engine.generate(prompt, temperature=0, max_tokens=n_decode)
            assert isinstance(engine.experts, CachedExperts)
            slots = engine.experts.n_slot
            if isinstance(engine.decoder, GraphDecoder):
                engine.decoder.worker.settle()
                engine.decoder.worker.check_integrity()
            plan = str(engine.vram_plan)
        reserved = torch.cuda.max_memory_reserved() if watch.status is not None else 0
    found = {
        "file": path.name,
        "experts": experts,
        "budget": vram_budget,
        "load_seconds": loaded,
        "slots": slots,
        "plan": plan,
        "peak_reserved": reserved,
        "context": context,
        "peak_nvidia_smi": watch.peak,
        "prompt_tokens": n_prompt,
        **rates(result.stats.as_dict()),
    }
    print(
        f"{path.name}, experts {experts}: loaded in {loaded:.1f} s, {slots} slots; {result.stats.summary()}; "
        f"peak by nvidia-smi {format_size(watch.peak)} of {format_size(vram_budget)}, of it context "
        f"{format_size(context)}\n  plan: {plan}",
        flush=True,
    )
    assert len(result.tokens) > 0
    assert watch.peak <= vram_budget, (watch.peak, vram_budget)
    return found


def open_seconds(path: Path) -> float:
    """Time to read a file's header and build its tokenizer."""
    from moe_engine import GGUFFile, Tokenizer

    started = time.perf_counter()
    Tokenizer.from_metadata(GGUFFile(path).metadata, str(path))
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/tmp/moe_engine_bench"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    device = "simulated" if options.tiny else "cuda"
    results: dict[str, Any] = {
        "command": "python bench/check_gpu.py",
        "gpu": "none" if options.tiny else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "bundled": check_bundled(device),
        "full_size": [],
    }
    for name in ("qwen3-30b-a3b", "deepseek-v2-lite"):
        path = options.work / f"{name}.gguf"
        with written(name, path, layers=2 if options.tiny else None):
            seconds = open_seconds(path)
            print(f"{path.name}: header and tokenizer opened in {seconds:.2f} s", flush=True)
            for experts in ("cache", "cpu"):
                found = check_full_size(path, device, experts, *((4, 2) if options.tiny else (512, 64)))
                results["full_size"].append({**found, "open_seconds": seconds})
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    print("all checks passed")


if __name__ == "__main__":
    main()
