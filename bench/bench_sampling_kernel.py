"""Times the drawing of tokens, as a decode step does it, in CUDA graphs.

    python bench/bench_sampling_kernel.py            # on a machine without a GPU: a tiny dry run, nothing timed

Logits stay in the cache, where the product before leaves them. The tokens of the first call must be `Sampler`'s.
reference_us: of torch, the part of the work that it has an operator for: argmax, topk (64 of all), sort.
"""

from functools import partial
from typing import Any

import torch
from gpu_timing import DEVICE, Call, Report, Row, randn

if DEVICE.type == "cpu":  # must be known before the kernels are imported
    import os

    os.environ.setdefault("TRITON_INTERPRET", "1")

from moe_engine import SamplingParams
from moe_engine.kernels.sampling_kernel import FEW, SamplerState, Variant, sample
from moe_engine.sampling import Sampler

VOCABULARIES = {"DeepSeek-V2-Lite": 102400, "DeepSeek-V3": 129280, "Qwen3-30B-A3B": 151936}
OPTIONS: dict[Variant, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "few": {"temperature": 0.7, "top_k": 40, "top_p": 0.95},
    "full": {"temperature": 0.7, "top_k": 0, "top_p": 0.95},
}


def results(tiny: bool = False) -> list[Row]:
    report = Report("sampling")
    for model, n_vocab in ({"tiny": 300} if tiny else VOCABULARIES).items():
        for n_token in (2,) if tiny else (1, 8):
            logits = randn(n_token, n_vocab) * 3
            for variant in OPTIONS:
                calls: list[Call] = [partial(sample, *checked(logits, variant), variant=variant)]
                references: dict[Variant, Call] = {
                    "greedy": partial(torch.argmax, logits, 1),
                    "few": partial(torch.topk, logits, FEW),
                    "full": partial(torch.sort, logits, 1),
                }
                shape = f"{model}, {n_vocab} tokens, batch {n_token}"
                report.add("sample", variant, shape, calls, error=0.0, reference=None if tiny else references[variant])
    return report.rows


def checked(logits: torch.Tensor, variant: Variant) -> tuple[torch.Tensor, SamplerState, torch.Tensor]:
    """What `sample` takes; it has been compared with the reference at 20 positions."""
    (n_token, n_vocab), position = logits.shape, 100
    params = [SamplingParams.of(**OPTIONS[variant], seed=i) for i in range(n_token)]
    samplers, histories = [Sampler(p) for p in params], [list(range(i, i + position)) for i in range(n_token)]
    state = SamplerState(n_token, n_vocab, DEVICE)
    for i, p in enumerate(params):
        state.set(i, p, i, histories[i])
    positions = torch.full((n_token,), position, dtype=torch.int32, device=DEVICE)
    rows = logits.cpu()
    for _ in range(20 if DEVICE.type == "cuda" else 2):
        tokens = sample(logits, state, positions, variant=variant).tolist()
        expected = [draw(row, h) for draw, row, h in zip(samplers, rows, histories, strict=True)]
        if tokens != expected:
            raise SystemExit(f"{variant}, {n_vocab} tokens: drew {tokens}, the reference {expected}")
        for history, token in zip(histories, expected, strict=True):
            history.append(token)
        positions += 1
    return logits, state, positions


if __name__ == "__main__":
    results(tiny=DEVICE.type == "cpu")
