"""What the type of the KV cache costs: bytes of a token, and the bundled model's perplexity on held-out text.

    python bench/bench_kv_types.py --out bench/results/kv_types.json

Computes on the CPU in f32, so that types differ by nothing but what the cache keeps; any machine will do.
"""

import argparse
import json
from pathlib import Path

from moe_engine import Engine
from moe_engine.kv_cache import cached_bytes
from moe_engine.perplexity import perplexity

TEXT = Path(__file__).parent.parent / "tests" / "data" / "heldout-4k.txt"
KV_TYPES = ("f32", "f16", "bf16", "q8_0")
QWEN_VALUES = 48 * 2 * 4 * 128  # of a token of Qwen3-30B-A3B: layers, keys and values, heads, values of a head


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for kv_dtype in KV_TYPES:
        with Engine.load(device="cpu", activations="float", kv_dtype=kv_dtype, ctx=512, profile=False) as engine:
            found, bundled = perplexity(engine, TEXT.read_text(encoding="utf-8")), engine.cache.token_bytes
        row = {"type": kv_dtype, "bundled_bytes": bundled, "qwen3_bytes": cached_bytes(kv_dtype, QWEN_VALUES)}
        rows.append(row | {"perplexity": found.ppl, "error": found.error, "tokens": found.tokens})
        print(rows[-1], flush=True)
    if options.out is not None:
        results = {"command": "python bench/bench_kv_types.py", "text": TEXT.name, "rows": rows}
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
