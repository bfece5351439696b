"""Cache policies on recorded routing: hits of each at each size, and how they recover when the domain changes.

    python bench/bench_policies.py --traces DIR --out bench/results/policies.json [--plot docs/domain-switch.png]

DIR holds archives NAME.MODE_DOMAIN.npz (moe_engine/trace_npz.py). Streams are every archive by itself; for each
NAME.MODE its domains in turns of 1,024 tokens ("mixed"); and in turns of 200 ("switch"). Pools are one for each layer,
or one for all. LRU here is the better of its two pools, as for a user who may choose; targets are relative to that.
"""

import argparse
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_engine.config import DEFAULT_POLICY
from moe_engine.kernels.policy import replay
from moe_engine.policies.registry import policy_of
from moe_engine.simulator import BOUND, capacity_of
from moe_engine.trace_npz import import_npz

SHARES = ("6.25%", "12.5%", "25%", "50%")
TURN, SWITCH = 1024, 200  # tokens of a domain
WINDOW = 10  # tokens of a point of the recovery curve
SHOWN = ("lru", "lfu", "lfu-decay", "class-lru", "least-stale", DEFAULT_POLICY)
POLICIES = (
    "lru",
    "lfu",
    "least-stale",
    "class-lru",
    "lfu-decay",
    "lfu-decay:half_life=24",
    "lfu-decay:half_life=24,admit=second-touch",
    "lfu-decay:half_life=24,admit=better-than-victim,admit_half_life=24",
    "lru:admit=better-than-victim,admit_half_life=24",
    "blend",
    "blend:admit=outranks,margin=1",
    "blend:admit=outranks,margin=1.25",
    DEFAULT_POLICY,
    "blend:admit=outranks,margin=2",
    BOUND,
)
Ids = NDArray[np.int32]


@dataclass(frozen=True)
class Stream:
    name: str
    kind: str  # domain, mixed or switch
    ids: Ids  # [n_token, n_layer, top_k]
    n_expert: int

    def served(self, policy: str, share: str, shared: bool) -> NDArray[np.int32]:
        """Hits, and misses that were given a slot, `[2, n_token, n_layer]`."""
        n_layer, top_k = self.ids.shape[1:]
        slots, layers, spec = capacity_of(share, self.n_expert, top_k), range(n_layer), policy_of(policy)
        return np.concatenate(
            [
                replay(spec, self.ids[:, pool.start : pool.stop], pool, n_layer, self.n_expert, slots * len(pool))
                for pool in ([layers] if shared else [layers[i : i + 1] for i in layers])
            ],
            axis=2,
        )


def in_turns(parts: list[Ids], length: int) -> Ids:
    """Runs of `length` tokens from each part in turn, as far as the shortest reaches."""
    n = min(map(len, parts)) // length
    return np.concatenate([part[i * length : (i + 1) * length] for i in range(n) for part in parts])


def streams(folder: Path) -> Iterator[Stream]:
    groups: dict[str, list[Stream]] = {}
    for path in sorted(folder.glob("*.*_*.npz")):
        trace = import_npz(path)
        stream = Stream(path.stem, "domain", trace.ids.astype(np.int32), trace.model.n_expert)
        groups.setdefault(path.stem.partition("_")[0], []).append(stream)
        yield stream
    for name, group in groups.items():
        n_expert = max(stream.n_expert for stream in group)  # archives do not say, a rare expert may be in one only
        parts = [stream.ids for stream in group]
        length = min(TURN, min(map(len, parts)))
        yield Stream(name, "mixed", in_turns(parts, length), n_expert)
        yield Stream(name, "switch", in_turns(parts, SWITCH), n_expert)


def table(all_streams: list[Stream], threads: int) -> list[dict[str, Any]]:
    rows = [
        {"stream": stream, "policy": policy, "share": share, "shared": shared}
        for stream in all_streams
        if stream.kind != "switch"
        for policy in POLICIES
        for share in SHARES
        for shared in (False, True)
    ]

    def run(row: dict[str, Any]) -> dict[str, Any]:
        stream: Stream = row["stream"]
        hits, fetched = stream.served(row["policy"], row["share"], row["shared"])
        return {
            **row,
            "stream": stream.name,
            "kind": stream.kind,
            "hit_rate": round(float(hits.sum()) / stream.ids.size, 5),
            "fetched": round(float(fetched.sum()) / stream.ids.size, 5),
        }

    with ThreadPoolExecutor(threads) as pool:  # replays run without the GIL
        return list(pool.map(run, rows))


def fewer_misses(rows: list[dict[str, Any]], policy: str) -> list[dict[str, Any]]:
    """By how much less than the better LRU a policy misses, for each stream, size and pool."""
    rate = {(r["stream"], r["kind"], r["policy"], r["share"], r["shared"]): r["hit_rate"] for r in rows}
    found = []
    for (stream, kind, name, share, shared), value in rate.items():
        if name != policy:
            continue
        lru = max(rate[stream, kind, "lru", share, either] for either in (False, True))
        found.append(
            {"stream": stream, "kind": kind, "share": share, "shared": shared, "fewer": 1 - (1 - value) / (1 - lru)}
        )
    return found


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean hit rates, and of each policy the least of what it saves against the better LRU."""
    found: dict[str, Any] = {}
    for policy in POLICIES:
        saved = fewer_misses(rows, policy)
        for shared in (False, True):
            for share in SHARES:
                mine = [r for r in rows if (r["policy"], r["share"], r["shared"]) == (policy, share, shared)]
                fewer = [s["fewer"] for s in saved if (s["share"], s["shared"]) == (share, shared)]
                place = found.setdefault(policy, {}).setdefault("one pool" if shared else "pool per layer", {})
                place[share] = {
                    "hit_rate": round(float(np.mean([r["hit_rate"] for r in mine])), 4),
                    "fetched": round(float(np.mean([r["fetched"] for r in mine])), 4),
                    "fewer_misses_mean": round(float(np.mean(fewer)), 4),
                    "fewer_misses_least": round(float(np.min(fewer)), 4),
                }
    return found


def recovery(all_streams: list[Stream], share: str) -> dict[str, list[float]]:
    """Hit rate by tokens since a change of domain: one pool for all layers, mean over models, texts and changes."""
    switching = [stream for stream in all_streams if stream.kind == "switch"]
    curves = {}
    for policy in POLICIES:
        of_streams = []
        for stream in switching:
            rate = stream.served(policy, share, True)[0].sum(axis=1) / stream.ids[0].size
            turns = rate.reshape(-1, SWITCH // WINDOW, WINDOW)[5:]  # the first ones fill the pool
            of_streams.append(turns.mean(axis=(0, 2)))
        curves[policy] = np.mean(of_streams, axis=0).round(4).tolist()
    return curves


def seconds_per_step(stream: Stream, policy: str) -> dict[str, float]:
    """What a layer step costs the native policy, at 25 % in one pool; all misses ask for a victim here."""
    start = time.process_time()
    hits, _ = stream.served(policy, "25%", True)
    seconds = time.process_time() - start
    return {
        "accesses_per_second": round(stream.ids.size / seconds),
        "ns_per_layer_step": round(1e9 * seconds / hits.size),
        "misses_per_layer_step": round(stream.ids.shape[2] - float(hits.mean()), 2),
    }


def compact(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Hit rates in the order of SHARES, by stream, policy and pools."""
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for row in rows:
        of_policy = found.setdefault(f"{row['stream']} {row['kind']}", {}).setdefault(row["policy"], {})
        of_policy.setdefault("one pool" if row["shared"] else "pool per layer", []).append(row["hit_rate"])
    return found


def lines(value: Any, depth: int = 0) -> str:
    """JSON with a line for each of the inner objects."""
    if depth == 3 or not isinstance(value, dict | list):
        return json.dumps(value)
    pairs = value.items() if isinstance(value, dict) else ((None, item) for item in value)
    inner = [("" if key is None else f"{json.dumps(key)}: ") + lines(item, depth + 1) for key, item in pairs]
    begin, end = "{}" if isinstance(value, dict) else "[]"
    indent = "\n" + " " * (depth + 1)
    return begin + indent + ("," + indent).join(inner) + indent[:-1] + end


def plot(curves: dict[str, list[float]], path: Path) -> None:
    """Needs matplotlib: the extra `plot`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    tokens = [WINDOW * (i + 0.5) for i in range(SWITCH // WINDOW)]
    for policy in SHOWN:
        axes.plot(tokens, curves[policy], label=policy, linewidth=2.5 if policy == DEFAULT_POLICY else 1.2)
    axes.set_xlabel("tokens since the domain has changed")
    axes.set_ylabel("hit rate, 25 % of the experts in one pool")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traces", type=Path, required=True, help="folder of .npz archives")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--plot", type=Path, help="PNG file to write")
    parser.add_argument("--time", action="store_true", help="also time native replay")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    found = list(streams(arguments.traces))
    rows = table(found, arguments.threads)
    curves = recovery(found, "25%")
    largest = max(found, key=lambda stream: stream.ids.size if stream.kind == "domain" else 0)
    result = {
        "default": DEFAULT_POLICY,
        "streams": {f"{s.name} {s.kind}": len(s.ids) for s in found},
        "summary": summary(rows),
        "default_against_better_lru": fewer_misses(rows, DEFAULT_POLICY),
        "recovery": {"tokens": WINDOW, "curves": curves},
        "hit_rates": compact(rows),
    }
    if arguments.time:
        result["cost"] = {policy: seconds_per_step(largest, policy) for policy in POLICIES}
    arguments.out.write_text(lines(result) + "\n")
    if arguments.plot is not None:
        plot(curves, arguments.plot)


if __name__ == "__main__":
    main()
