"""How good could a policy be that cannot see the future? Scores that no engine has, on a recorded stream.

    python bench/policy_limits.py --traces DIR --name trace-qwen3moe.held --out bench/results/policy_limits.json

A pool of each layer's own; a miss replaces the lowest score if its own is higher. Scores:

blend            the engine's default policy: what the past says of each expert's rate of use
transitions      that, and how often each expert followed those just used, counted as the stream goes by
rate within N    the mean rate in tokens before and after, weights halving every N tokens: as if the present rate were
                 known, but not the choices that the router makes by it
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from bench_policies import in_turns
from numpy.typing import NDArray

from moe_engine.simulator import capacity_of
from moe_engine.trace_npz import import_npz

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]


def mean_rate(used: Floats, half_life: float, *, ahead: bool = False) -> Floats:
    """[n_token, n_expert]: of the tokens up to each one, or after it."""
    decay = 2 ** (-1 / half_life)
    rate, found = np.zeros(used.shape[1], np.float32), np.empty_like(used)
    for t in range(len(used))[:: -1 if ahead else 1]:
        if ahead:
            found[t] = rate
        rate = rate * decay + used[t]
        if not ahead:
            found[t] = rate
    return found * (1 - decay)


def transitions(ids: Ids, used: Floats) -> Floats:
    """[n_token, n_expert]: mean over the experts of a token of how often each other one came next, so far."""
    n_expert = used.shape[1]
    follows, seen = np.zeros((n_expert, n_expert), np.float32), np.full(n_expert, 4, np.float32)
    usual, found = mean_rate(used, 256), np.empty_like(used)
    for t, now in enumerate(ids):
        if t:
            follows[np.ix_(ids[t - 1], now)] += 1
            seen[ids[t - 1]] += 1
        found[t] = ((follows[now] + 4 * usual[t]) / seen[now, None]).mean(axis=0)
    return found


def hits(ids: Ids, scores: Floats, slots: int) -> int:
    resident, n = np.zeros(scores.shape[1], bool), 0
    for now, score in zip(ids, scores, strict=True):
        n += int(resident[now].sum())
        for expert in now:
            if resident[expert]:
                continue
            if resident.sum() >= slots:
                may_leave = resident.copy()
                may_leave[now] = False
                lowest = int(np.where(may_leave, score, np.inf).argmin())
                if not may_leave[lowest] or score[expert] <= score[lowest]:
                    continue
                resident[lowest] = False
            resident[expert] = True
    return n


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traces", type=Path, required=True)
    parser.add_argument("--name", required=True, help="archives NAME_DOMAIN.npz, in turns of 1,024 tokens")
    parser.add_argument("--tokens", type=int, default=5120)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    traces = [import_npz(path) for path in sorted(arguments.traces.glob(f"{arguments.name}_*.npz"))]
    n_expert = max(trace.model.n_expert for trace in traces)
    ids = in_turns([trace.ids.astype(np.int32) for trace in traces], 1024)[: arguments.tokens].astype(np.int64)
    totals: dict[str, dict[str, int]] = {}
    for layer in range(ids.shape[1]):
        mine = ids[:, layer]
        used = np.zeros((len(mine), n_expert), np.float32)
        np.put_along_axis(used, mine, 1, axis=1)
        blend = 0.9 * mean_rate(used, 32) + 0.1 * mean_rate(used, 1)
        scores = {"blend": blend, "transitions": 0.6 * blend + 0.4 * transitions(mine, used)}
        for within in (64, 32, 16):
            scores[f"rate within {within}"] = mean_rate(used, within) + mean_rate(used, within, ahead=True)
        for name, score in scores.items():
            for share in ("25%", "50%"):
                of_share = totals.setdefault(name, {})
                slots = capacity_of(share, n_expert, ids.shape[2])
                of_share[share] = of_share.get(share, 0) + hits(mine, score, slots)
    rates = {name: {share: round(n / ids.size, 4) for share, n in of.items()} for name, of in totals.items()}
    result: dict[str, Any] = {"stream": arguments.name, "tokens": len(ids), "hit_rate": rates}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
