"""Times norms, and what happens to queries and keys between the projections and attention.

Each is compared with its reference first, the same in torch.
"""

from functools import partial

import torch
from gpu_timing import DEVICE, Report, Row, check, int32, randn
from torch import Tensor

from moe_engine.kernels.decode_activations import Activations
from moe_engine.kernels.norm_rope import (
    Cache,
    Q8Cache,
    fused_rms_norm,
    latent_norm_rope_append,
    qk_norm_rope_append,
    rms_norm_reference,
    rope_reference,
)

EPS = 1e-6


def norms(report: Report, widths: tuple[int, ...]) -> None:
    for n in widths:
        x, weight = randn(1, n), randn(n, seed=1)
        expected = rms_norm_reference(x, weight, EPS)
        for kernel, activations in (("norm", None), ("norm, 8 bits", Activations.empty(1, n, DEVICE))):
            run = partial(fused_rms_norm, x, weight, EPS, activations=activations)
            reference = partial(rms_norm_reference, x, weight, EPS)
            report.add(kernel, "f32", str(n), [run], error=check(kernel, run(), expected, 1e-6), reference=reference)


def rotations(report: Report, capacity: int) -> None:
    cos, sin = randn(capacity, 64), randn(capacity, 64, seed=1)
    q, k, v, norm = randn(1, 32, 128), randn(1, 4, 128), randn(1, 4, 128), (randn(128), randn(128))
    position = int32(capacity - 1)
    for kind in ("f16", "q8_0"):
        caches: list[Cache] = [
            Q8Cache.zeros(capacity, 4, 128, device=DEVICE) if kind == "q8_0" else randn(capacity, 4, 128).half()
            for _ in range(2)
        ]
        run = partial(qk_norm_rope_append, q, k, v, cos, sin, position, *caches, norms=norm, eps=EPS)

        def reference() -> Tensor:
            rope_reference(rms_norm_reference(k, norm[1], EPS), cos, sin, position[None], False)
            return rope_reference(rms_norm_reference(q, norm[0], EPS), cos, sin, position[None], False)

        error = check("rope", run(), reference(), 1e-6)
        report.add("q/k norm, rope, append", kind, "Qwen3-30B-A3B", [run], error=error, reference=reference)
    q_pe, kv, weight, latents = randn(1, 16, 192)[..., 128:], randn(1, 576), randn(512), randn(capacity, 576).half()
    cos, sin = cos[:, :32].contiguous(), sin[:, :32].contiguous()
    out = randn(1, 16, 576)[..., 512:]
    turn = partial(latent_norm_rope_append, q_pe, kv, weight, cos, sin, position, latents, eps=EPS, out=out)

    def plain() -> Tensor:
        rms_norm_reference(kv[:, :512], weight, EPS)
        rope_reference(kv[:, None, 512:], cos, sin, position[None], True)
        return rope_reference(q_pe, cos, sin, position[None], True)

    error = check("rope", turn(), plain(), 1e-6)
    report.add("latent norm, rope, append", "f16", "DeepSeek-V2-Lite", [turn], error=error, reference=plain)


def results(tiny: bool = False) -> list[Row]:
    torch.manual_seed(0)
    report = Report("norm and rotation")
    norms(report, (64,) if tiny else (2048, 7168))
    rotations(report, 3 if tiny else 4096)
    return report.rows
