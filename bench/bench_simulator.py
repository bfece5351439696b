"""The simulator against the engine: hits and tokens/s of the same choices, policy and slots, on a CUDA machine.

    python bench/bench_simulator.py --work /tmp/models --out bench/results/simulator.json [--tiny]

Random models of the real shapes follow recorded routing (benchmark/routing.py). With miss=fetch every miss has its slot
before the step goes on, as in the simulator: hits must be equal, or the row fails. With miss=auto what is in the slots
depends on times as well: then the simulator's hits are only shown beside the engine's. Speeds are predicted from the
simulated hits by what `moe-engine calibrate` has kept, corrected by what the CPU's experts take in the same minute.
`--tiny` is a dry run on the simulated device with few layers.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from full_size import LITE, QWEN, ROUTING, begun, by_model, keep, options_of, vram_budget
from prediction import CpuNow, predicted

from moe_engine import Engine
from moe_engine.benchmark.engine_replay import simulated_hits
from moe_engine.benchmark.routing import RecordedRouting
from moe_engine.config import DEFAULT_POLICY
from moe_engine.graph_decoder import GraphDecoder
from moe_engine.policies.registry import policy_of
from moe_engine.routing_estimate import Found
from moe_engine.stats import Stats
from moe_engine.trial_switch import TRIAL


@dataclass(frozen=True)
class Row:
    model: str
    share: float  # of the experts in VRAM
    policy: str
    miss: str = "fetch"

    @property
    def name(self) -> str:
        return f"{self.model} {self.share:.0%} {self.policy} miss={self.miss}"


ROWS = [
    Row(QWEN, 0.25, "lru"),
    Row(QWEN, 0.25, "blend"),
    Row(QWEN, 0.25, DEFAULT_POLICY, "auto"),
    Row(QWEN, 0.5, "lfu-decay"),
    Row(QWEN, 0.5, DEFAULT_POLICY, "auto"),
    Row(LITE, 0.25, "lru"),
    Row(LITE, 0.25, "blend"),
    Row(LITE, 0.25, DEFAULT_POLICY, "auto"),
]


def run(path: Path, row: Row, device: str, cpu: CpuNow, n_prompt: int, n_decode: int, repeats: int) -> dict[str, Any]:
    """Decodes (first kernels compile, and the engine tries its ways; that does not count) and compares each time with
    the simulator: the median time by what is predicted, with the others' speeds."""
    n_first = n_decode if device == "simulated" else max(n_decode, 2 * TRIAL)
    options: dict[str, Any] = {"device": device, "experts": "cache", "ctx": n_prompt + n_first + 8, "miss": row.miss}
    budget = vram_budget(path, row.share, **options)
    ways: dict[str, Any] = {"policy": row.policy, "lookahead": False, "prefetch": "off"}
    prompt = [i * 7919 % 400 for i in range(n_prompt)]
    rounds = []
    with Engine.load(path, vram_budget=budget, profile=False, **ways, **options) as engine:
        decoder = engine.decoder
        assert isinstance(decoder, GraphDecoder)
        assert decoder.launched == 0
        RecordedRouting.load(ROUTING).follow(decoder.step)
        decoder.worker.settle()  # all slots are filled
        residents = [decoder.worker.residents(layer) for layer in range(len(decoder.step.experts.layouts))]
        engine.generate(prompt, temperature=0, max_tokens=n_first, ignore_eos=True)
        for _ in range(repeats):
            stats = engine.generate(prompt, temperature=0, max_tokens=n_decode, ignore_eos=True).stats
            decoder.worker.settle()
            decoder.worker.check_integrity()
            found, by_layer = compared(row, decoder, residents, stats)
            prediction: dict[str, Any] = {"decode": stats.decode_rate or 0.0, "context": n_prompt + n_decode // 2}
            found["predicted"] = predicted(path, cpu=cpu, found=by_layer, vram_budget=budget, **prediction, **options)
            rounds.append(found)
        del decoder
    rounds.sort(key=lambda found: found["predicted"]["decode"]["to_measured"] if found["predicted"] else 0.0)
    middle = rounds[len(rounds) // 2]
    middle["all"] = [
        (of["tokens_per_second"], of["predicted"] and of["predicted"]["decode"]["to_measured"]) for of in rounds
    ]
    return middle


def compared(row: Row, decoder: GraphDecoder, residents: list[Any], stats: Stats) -> tuple[dict[str, Any], list[Found]]:
    """The last generation, of these stats, with the simulator, which begins with the slots' first residents."""
    experts, choices = decoder.step.experts, decoder.step.replay
    assert choices is not None
    steps = np.setdiff1d(np.arange(1, decoder.launched + 1), decoder.idle_steps) % len(choices)
    top_k, served, pools = choices.shape[2], choices.cpu().numpy()[steps], experts.pools.values()
    hits = simulated_hits(pools, residents, policy_of(row.policy), served, experts.n_expert)[-stats.steps :]
    expected = hits.sum(axis=0).tolist()
    found: dict[str, Any] = {
        "row": row.name,
        "steps": len(hits),
        "hits": stats.expert_hits,
        "simulated_hits": sum(expected),
        "hit_rate": stats.hit_rate,
        "simulated_hit_rate": sum(expected) / (hits.size * top_k),
        "equal": stats.layer_hits == expected,
        "tokens_per_second": stats.decode_rate,
        "stats": {k: v for k, v in stats.as_dict().items() if not k.startswith("layer_")},
    }
    print(", ".join(f"{name} {value}" for name, value in found.items() if name != "stats"), flush=True)
    if row.miss == "fetch" and not found["equal"]:
        raise SystemExit(f"{row.name}: the engine's hits by layer are {stats.layer_hits}, simulated {expected}")
    missed = (hits < top_k).mean(axis=0)
    by_layer = [
        Found(n / top_k, share, top_k - n) for n, share in zip(hits.mean(axis=0).tolist(), missed.tolist(), strict=True)
    ]
    return found, by_layer


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3, help="odd")
    options = parser.parse_args()
    results = begun("python bench/bench_simulator.py", options)
    sizes = (4, 3, 1) if options.tiny else (512, options.tokens, options.repeats)
    cpu = CpuNow()
    for path, rows in by_model(ROWS, options):
        for row in rows:
            results["rows"].append(run(path, row, "simulated" if options.tiny else "cuda", cpu, *sizes))
            keep(results, options.out)


if __name__ == "__main__":
    main()
