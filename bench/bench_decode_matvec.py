"""Times the products of dense quantized matrices and few tokens, with the rounding of the activations.

Each is compared with f64 first. Copies of the matrix take turns, so that the cache does not hold them. The bytes of a
row are those of the matrix once. Reference: torch in bf16 on expanded weights.
"""

from functools import partial

import torch
from gpu_timing import DEVICE, Report, Row, check, copies, exact_values, randn, random_weight

from moe_engine.kernels.decode_matvec import matvec

# n_out, n_in
MATRICES = {
    "head, Qwen3-30B-A3B": (151936, 2048),
    "q, Qwen3-30B-A3B": (4096, 2048),
    "output, Qwen3-30B-A3B": (2048, 4096),
    "q of the heads, DeepSeek-V3": (24576, 1536),
    "output, DeepSeek-V3": (7168, 16384),
}


def matrix(report: Report, name: str, n_out: int, n_in: int, type: str, tokens: tuple[int, ...]) -> None:
    weight = random_weight(type, n_out, n_in)
    few = weight.rows(0, min(256, n_out))
    weights = [weight, *(random_weight(type, n_out, n_in) for _ in range(copies(weight.nbytes) - 1))]
    plain = torch.zeros(n_out, n_in, dtype=torch.bfloat16, device=DEVICE).normal_()
    for n_token in tokens:
        x = randn(n_token, n_in)
        out = torch.empty(n_token, n_out, device=DEVICE)
        exact = x.double() @ exact_values(few).T
        y = matvec(x, weight, out)
        report.add(
            "matrix",
            type,
            f"{name}, {n_token} tokens",
            [partial(matvec, x, w, out) for w in weights],
            error=check(f"{name} {type}", y[:, : len(few.data)], exact, 1e-2),
            n_bytes=weight.nbytes,
            reference=partial(torch.matmul, x.bfloat16(), plain.T),
        )


def results(tiny: bool = False) -> list[Row]:
    report = Report("decode matvec")
    if tiny:
        matrix(report, "tiny", 48, 512, "Q4_K", (1, 6))
        return report.rows
    for name, (n_out, n_in) in MATRICES.items():
        for type in ("Q4_K", "Q6_K", "Q8_0"):
            matrix(report, name, n_out, n_in, type, (1, 2, 4, 8, 16) if name.startswith("head") else (1,))
    return report.rows
