"""Whether exact greedy tokens of the decode graph are those of the eager path, for caches of several sizes, on CUDA.

    python bench/check_exact.py FILE...

FILE: a small trained model; the bundled one is checked by `pytest -m gpu`. Ends with 1 where tokens differ.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_engine import Engine

N_TOKEN = 256
PROMPTS = ("Once upon a time", "The sea is not the land, and")


def tokens(path: Path, **options: Any) -> list[list[int]]:
    """Of each prompt twice: the second time the cache is in another state."""
    with Engine.load(path, vram_budget="4GiB", profile=False, **options) as engine:
        return [
            engine.generate(prompt, temperature=0, max_tokens=N_TOKEN, ignore_eos=True).tokens
            for prompt in PROMPTS
            for _ in range(2)
        ]


def differs(path: Path, device: str, slots: Sequence[int | None]) -> bool:
    expected = tokens(path, device=device, eager=True)
    found = {n: tokens(path, device=device, exact=True, cache_slots=n) for n in slots}
    for n, got in found.items():
        same = [sum(a == b for a, b in zip(*both, strict=True)) for both in zip(got, expected, strict=True)]
        print(f"{path.name}, {'all' if n is None else n} slots of a size: equal {same} of {N_TOKEN}", flush=True)
    return any(got != expected for got in found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--slots", type=int, nargs="*", default=[8, 16, 40], help="beside as many as there are experts")
    options = parser.parse_args()
    different = [differs(path, options.device, [*options.slots, None]) for path in options.files]
    raise SystemExit(int(any(different)))


if __name__ == "__main__":
    main()
