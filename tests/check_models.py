"""Compares models with results that were recorded from llama.cpp and from exact float32 arithmetic.

    python tests/check_models.py FOLDER [--device cpu]

FOLDER holds NAME.gguf, refs/NAME.ref.json, refs/NAME.f32.npz and text/heldout-4k.txt. The tests use the same
functions for the bundled model.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_engine import Engine
from moe_engine.perplexity import perplexity

Array = np.ndarray[Any, Any]
FLIP = 2e-3  # a larger logit difference is a router near-tie that rounding decided otherwise
SURE_MARGIN = 0.4  # greedy tokens may part where the best two logits are closer than this


@dataclass
class Recorded:
    """The recorded results of one GGUF file."""

    llama_cpp: list[dict[str, Any]]  # per prompt: prompt, tokens, greedy, greedy_margin...
    exact: dict[str, Array]  # pI.tokens, pI.top_ids, pI.top_logits, pI.last_logits, pI.greedy, pI.greedy_margin
    ppl_llama_cpp: float
    ppl_exact: float

    @classmethod
    def load(cls, folder: Path, name: str) -> "Recorded":
        values = json.loads((folder / f"{name}.ref.json").read_text())
        with np.load(folder / f"{name}.f32.npz") as arrays:
            exact = dict(arrays)
        llama_cpp = values["llama_cpp"]
        ppl = llama_cpp["perplexity"]["files"]["4k"]["ppl"]
        return cls(llama_cpp["prompts"], exact, ppl, values["float32"]["ppl_4k_f32"])


def logit_differences(engine: Engine, recorded: Recorded) -> Array:
    """Largest difference among the 20 best recorded logits, for every position of every prompt."""
    rows = []
    for i in range(len(recorded.llama_cpp)):
        logits = engine.forward(recorded.exact[f"p{i}.tokens"].tolist())
        ids = torch.from_numpy(recorded.exact[f"p{i}.top_ids"]).long()
        exact = torch.from_numpy(recorded.exact[f"p{i}.top_logits"])
        rows.append((logits.gather(1, ids) - exact).abs().amax(dim=1).numpy())
    return np.concatenate(rows)


def greedy_agreement(engine: Engine, recorded: Recorded, i: int) -> tuple[int, int]:
    """Equal leading greedy tokens of prompt `i`, and how many must be: those before the first small margin."""
    exact, margin = recorded.exact[f"p{i}.greedy"], recorded.exact[f"p{i}.greedy_margin"]
    result = engine.generate(recorded.exact[f"p{i}.tokens"].tolist(), temperature=0, max_tokens=len(exact))
    equal = int(np.cumprod(np.array(result.tokens) == exact[: len(result.tokens)]).sum())
    unsure = np.flatnonzero(margin < SURE_MARGIN)
    return equal, int(unsure[0]) if len(unsure) else len(exact)


def check_file(path: Path, refs: Path, text: str, device: str) -> bool:
    """Prints one file's figures; whether all are within their bounds."""
    recorded = Recorded.load(refs, path.stem)
    full_precision = path.stem.endswith("f16")
    with Engine.load(path, device=device, activations="float", kv_dtype="f32") as engine:
        tokens_equal = all(engine.encode(p["prompt"]) == p["tokens"] for p in recorded.llama_cpp)
        differences = logit_differences(engine, recorded)
        flips = int((differences > FLIP).sum())
        exact_greedy = [greedy_agreement(engine, recorded, i)[0] for i in range(len(recorded.llama_cpp))]
        ppl_float = perplexity(engine, text).ppl
    with Engine.load(path, device=device) as engine:
        greedy = [greedy_agreement(engine, recorded, i) for i in range(len(recorded.llama_cpp))]
        ppl = perplexity(engine, text).ppl
    off_llama, off_exact = ppl / recorded.ppl_llama_cpp - 1, ppl / recorded.ppl_exact - 1
    ok = {
        "prompt tokens": tokens_equal,
        "logits": flips <= 0.05 * len(differences),
        "perplexity": min(abs(off_llama), abs(off_exact)) < (0.001 if full_precision else 0.007),
        "greedy": all(n == 48 for n in exact_greedy) if full_precision else all(n >= sure for n, sure in greedy),
    }
    print(f"{path.name} on {device}")
    print(f"  prompt tokens equal: {tokens_equal}")
    print(
        f"  float activations: logit difference median {np.median(differences):.2e}, "
        f"{flips} of {len(differences)} positions over {FLIP}; greedy tokens equal {exact_greedy} of 48; "
        f"perplexity {ppl_float:.4f}, exact {recorded.ppl_exact:.4f} ({ppl_float / recorded.ppl_exact - 1:+.3%})"
    )
    print(
        f"  8-bit activations: perplexity {ppl:.4f} ({off_exact:+.3%} to exact, {off_llama:+.3%} to llama.cpp's "
        f"{recorded.ppl_llama_cpp:.4f}); greedy equal (needed) {[f'{n} ({sure})' for n, sure in greedy]}"
    )
    failed = [name for name, passed in ok.items() if not passed]
    print(f"  {'FAILED: ' + ', '.join(failed) if failed else 'ok'}")
    return not failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    text = (options.folder / "text" / "heldout-4k.txt").read_text(encoding="utf-8")
    refs = options.folder / "refs"
    paths = [p for p in sorted(options.folder.glob("*.gguf")) if (refs / f"{p.stem}.ref.json").exists()]
    results = [check_file(path, refs, text, options.device) for path in paths]
    raise SystemExit(0 if results and all(results) else 1)


if __name__ == "__main__":
    main()
