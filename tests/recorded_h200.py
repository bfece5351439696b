"""Machines and what was measured on them: H200s with 16 cores of a Xeon.

`H200`, before prompts were streamed.
Rates are from that time's bench/results: decode.json (RAM, PCIe, VRAM: medians of its rows), cpu_experts.json (1 and
512 tokens, 16 threads), gpu_kernels.json (routed experts of 1 and 4 tokens, prompts of 2048 and 8192). The fixed time
of a kernel is that of the row with all of DeepSeek-V2-Lite in VRAM; a message's round trip, a launch and PCIe by size
were measured apart. What concerns prompts was not: the numbers stand for it, and no test rests on them.

`QUIET_H200`, a third one, as `moe-engine calibrate` gave it, and prompts of Qwen3-30B-A3B from the same run.

`BUSY_H200`, another one, while other work took some of its RAM and CPU. As `moe-engine calibrate` gave it, but for:
products of prompts, which are those of gpu_kernels.json (64 and 2048 tokens); their attention, which is of the kernel's
bench; seconds of a prompt's streamed layer, which the host was seen to take; the exchange, which is what the row with
90 % of hits leaves, and with it the 70 us of a layer of a prompt's step. layer_seconds stands for a number.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe_engine.calibration import Calibration, CpuProduct, Gpu, Product
from moe_engine.kernels.quant_types import BY_NAME


def _cpu(**rates: tuple[float, float]) -> dict[str, CpuProduct]:
    """By type, bytes and operations per second as they were calibrated when their times were still added: through the
    same two times, of 8 experts with 1 and 64 tokens."""
    found, weights = {}, 8 * 3 * 2048 * 768
    for type, (reading, multiplying) in rates.items():
        nbytes = weights / BY_NAME[type].block_size * BY_NAME[type].block_bytes
        few, many = ((2.0 * weights * n, nbytes / reading + 2.0 * weights * n / multiplying) for n in (1, 64))
        found[type] = CpuProduct.through(nbytes, few, many)
    return found


BUNDLED = 11 / 17.5
"""The host's seconds of a prompt's layer were then calibrated with the bundled model, which has more launches than
Qwen3-30B-A3B, and while streaming all in one."""

H200 = Calibration(
    processor="Intel(R) Xeon(R) Processor",
    threads=16,
    ram_bytes=128 << 30,
    dram={16: 149e9},
    cpu_experts=_cpu(
        Q4_K=(193e9, 1.82e12),
        Q6_K=(213e9, 1.90e12),
        Q8_0=(210e9, 2.37e12),
    ),
    cpu_call_seconds=1e-7,  # it is within the rates of calls of 8 experts, and the exchange
    disk=2.4e9,
    gpu=Gpu(
        name="NVIDIA H200",
        vram_bytes=139 << 30,
        copy=3.76e12,
        pcie={1 << 16: 8e9, 1 << 18: 32e9, 1 << 20: 48e9, 1 << 22: 53e9, 1 << 24: 55.2e9},
        kernel_seconds=2.4e-6,
        exchange_seconds=15e-6,
        step_seconds={16: 55e-6},
        layer_seconds=BUNDLED * 0.8e-3,
        chunk_seconds=BUNDLED * (2e-3 - 0.8e-3) / 5,
        decode={"Q4_K": 2.59e12, "Q6_K": 1.83e12, "Q8_0": 2.83e12},
        prompt={"Q4_K": Product(1.78e12, 354e12)},
        dequantize={"Q4_K": 0.81e12, "Q6_K": 1.07e12, "Q8_0": 1.40e12},
        matmul=780e12,
        attention=50e12,
    ),
)


_POOL = 128 * 3 * 2048 * 768 // 256  # blocks of all experts of a layer of Qwen3-30B-A3B
_FEW, _MANY = (6.0 * 2048 * 768 * 8 * n for n in (64, 2048))  # operations


def _pcie(*gb_per_s: float) -> dict[int, float]:
    """Rates of copies of 64 KiB and, each time, twice as much."""
    return {1 << 16 + i: rate * 1e9 for i, rate in enumerate(gb_per_s)}


BUSY_H200 = Calibration(
    processor="Intel(R) Xeon(R) Processor",
    threads=16,
    ram_bytes=128 << 30,
    dram={1: 14.5e9, 2: 27.4e9, 4: 49e9, 8: 87.1e9, 16: 131e9},
    cpu_experts=_cpu(
        Q2_K=(83.5e9, 2.45e12),
        Q4_K=(106e9, 3.95e12),
        Q5_K=(114e9, 3.56e12),
        Q6_K=(131e9, 2.42e12),
        Q8_0=(118e9, 3.63e12),
        IQ4_XS=(88.7e9, 3.46e12),
        MXFP4=(89.1e9, 3.9e12),
    ),
    cpu_call_seconds=1e-7,  # as above
    disk=None,
    gpu=Gpu(
        name="NVIDIA H200",
        vram_bytes=139 << 30,
        copy=4.16e12,
        pcie=_pcie(17.3, 26.1, 36, 43.3, 47.5, 50.9, 52.7, 53.7, 54, 54.8, 55.1),
        kernel_seconds=1.7e-6,
        exchange_seconds=42e-6,
        step_seconds={16: 28e-6},
        layer_seconds=BUNDLED * 0.8e-3,
        chunk_seconds=BUNDLED * (3e-3 - 0.8e-3) / 5,
        decode={"Q4_K": 2.72e12, "Q6_K": 1.99e12, "Q8_0": 3.45e12},
        prompt={
            "Q4_K": Product.through(_POOL * 144, (_FEW, 244.7e-6), (_MANY, 627.3e-6)),
            "Q6_K": Product.through(_POOL * 210, (_FEW, 888.5e-6), (_MANY, 1159.2e-6)),
        },
        dequantize={"Q4_K": 0.803e12, "Q6_K": 1.04e12, "Q8_0": 1.38e12},
        matmul=791e12,
        attention=400e12,
    ),
)


@dataclass(frozen=True)
class DecodeRow:
    """512 to 768 tokens of context. hit_rate: what the run had; None: as recorded routing has it."""

    model: str
    share: float  # of the experts in VRAM
    hit_rate: float | None
    tokens_per_second: float
    layers: int | None = None
    n_sequence: int = 1


DECODE_ROWS = (
    DecodeRow("qwen3-30b-a3b", 0.0, 0.0, 115.6),
    DecodeRow("qwen3-30b-a3b", 0.25, None, 142.7),
    DecodeRow("qwen3-30b-a3b", 0.25, 0.8827, 268.9),
    DecodeRow("qwen3-30b-a3b", 0.5, None, 206.0),
    DecodeRow("qwen3-30b-a3b", 0.5, 0.9898, 407.6),
    DecodeRow("qwen3-30b-a3b", 1.0, 1.0, 496.4),
    DecodeRow("deepseek-v2-lite", 0.0, 0.0, 133.2),
    DecodeRow("deepseek-v2-lite", 0.25, None, 191.4),
    DecodeRow("deepseek-v2-lite", 1.0, 1.0, 569.2),
    DecodeRow("deepseek-v3", 0.0, 0.0, 173.7, layers=7),
)

BUSY_DECODE_ROWS = (
    DecodeRow("qwen3-30b-a3b", 0.25, 0.51, 100),
    DecodeRow("qwen3-30b-a3b", 0.25, 0.9, 235),
    DecodeRow("qwen3-30b-a3b", 0.5, 0.776, 152),
    DecodeRow("qwen3-30b-a3b", 1.0, 1.0, 592),
    DecodeRow("qwen3-30b-a3b", 1.0, 1.0, 1113, n_sequence=4),
)


@dataclass(frozen=True)
class PromptRow:
    """Streamed, Qwen3-30B-A3B with 400 of its 6144 experts in VRAM."""

    tokens: int
    streamed_bytes: float
    seconds: float


BUSY_PROMPT_ROWS = (
    PromptRow(31, 5.0e9, 0.150),
    PromptRow(64, 6.6e9, 0.170),
    PromptRow(128, 8.1e9, 0.180),
    PromptRow(512, 10.8e9, 0.212),
)
BUSY_ONE_TOKEN_SECONDS = 0.015  # a prompt of one token, in a step


QUIET_H200 = Calibration(
    processor="Intel(R) Xeon(R) Processor",
    threads=16,
    ram_bytes=126 << 30,
    dram={1: 13090000000.0, 2: 24000000000.0, 4: 47700000000.0, 8: 73220000000.0, 16: 120600000000.0},
    cpu_experts=_cpu(
        Q2_K=(120300000000.0, 2181000000000.0),
        Q4_K=(105200000000.0, 3520000000000.0),
        Q5_K=(114800000000.0, 3637000000000.0),
        Q6_K=(123100000000.0, 2433000000000.0),
        Q8_0=(128100000000.0, 3341000000000.0),
        IQ4_XS=(95610000000.0, 3359000000000.0),
        MXFP4=(111000000000.0, 3238000000000.0),
    ),
    cpu_call_seconds=1.337e-05,
    disk=None,
    gpu=Gpu(
        name="NVIDIA H200",
        vram_bytes=139 << 30,
        copy=4157000000000.0,
        pcie=_pcie(17.0, 25.5, 35.1, 43.2, 47.5, 50.4, 52.5, 53.5, 54.0, 54.7, 55.0),
        kernel_seconds=1.712e-06,
        exchange_seconds=1e-07,
        step_seconds={4: 6.205e-05, 16: 8.495e-05, 32: 9.259e-05},
        layer_seconds=BUNDLED * 0.001716,
        chunk_seconds=BUNDLED * (0.003403 - 0.001716) / 9,
        decode={"Q4_K": 2825000000000.0, "Q6_K": 2202000000000.0, "Q8_0": 3190000000000.0},
        prompt={
            "Q4_K": Product(1450000000000.0, 382700000000000.0),
            "Q6_K": Product(576600000000.0, 578800000000000.0),
            "Q8_0": Product(791600000000.0, 559400000000000.0),
        },
        dequantize={"Q4_K": 800400000000.0, "Q6_K": 979300000000.0, "Q8_0": 1238000000000.0},
        matmul=780500000000000.0,
        attention=372700000000000.0,
    ),
)


@dataclass(frozen=True)
class StreamedRow:
    """share: of the used experts in VRAM; used: experts of a layer that the prompt has used."""

    tokens: int
    share: float
    used: int
    seconds: float


QUIET_PROMPT_ROWS = (
    StreamedRow(64, 0.043, 50, 0.1458),
    StreamedRow(128, 0.043, 62, 0.1727),
    StreamedRow(256, 0.043, 73, 0.2116),
    StreamedRow(512, 0.043, 83, 0.2225),
    StreamedRow(2048, 0.043, 95, 0.2337),
    StreamedRow(4096, 0.043, 99, 0.2436),
    StreamedRow(8192, 0.043, 101, 0.2736),
    StreamedRow(16384, 0.043, 103, 0.549),
    QUIET_MISSED := StreamedRow(512, 0.481, 83, 0.1633),
    StreamedRow(2048, 0.481, 95, 0.15),
    StreamedRow(8192, 0.481, 101, 0.242),
)
"""Not 1024 tokens with 4 %, which took 0.299 s, longer than 2048: perhaps a kernel compiled meanwhile, which was not
measured. The one that is called missed took longer than 2048 tokens too: its engine launched more for a chunk."""

assert QUIET_H200.gpu is not None
SLOW_HOST_H200 = replace(
    QUIET_H200,
    gpu=replace(
        QUIET_H200.gpu,
        layer_seconds=BUNDLED * 0.002582,
        chunk_seconds=BUNDLED * (0.005195 - 0.002582) / 9,
        pcie={1 << 21: 50.2e9},
    ),
)
"""A fourth one, whose host takes longer to launch kernels. Its own are the times of the host and PCIe at an expert's
size; the GPU's rates were calibrated within 6 % of the third one's, and the CPU takes no part in these rows."""

SLOW_HOST_PROMPT_ROWS = (
    StreamedRow(512, 0.043, 83, 0.2742),
    StreamedRow(2048, 0.043, 95, 0.2583),
    StreamedRow(4096, 0.043, 99, 0.2686),
    StreamedRow(8192, 0.043, 101, 0.2703),
    StreamedRow(16384, 0.043, 103, 0.5889),
    StreamedRow(512, 0.481, 83, 0.1572),
    StreamedRow(2048, 0.481, 95, 0.1878),
    StreamedRow(8192, 0.481, 101, 0.2741),
    StreamedRow(512, 1.0, 83, 0.0726),
    StreamedRow(2048, 1.0, 95, 0.0873),
    StreamedRow(8192, 1.0, 101, 0.2041),
)
"""Not 128 tokens, most of which went in steps, nor 256 and 1024, as above: they took 0.327, 0.270 and 0.458 s. How
launches and the choice count in predictions was settled with these rows, so they do not show what it is worth on other
machines."""

FIFTH_H200 = replace(
    QUIET_H200,
    gpu=replace(
        QUIET_H200.gpu,
        copy=4131e9,
        pcie=_pcie(17.3, 26.1, 35.8, 43.4, 47.6, 50.9, 52.7, 53.6, 53.3, 53.9, 54.7),
        kernel_seconds=1.723e-6,
        layer_seconds=BUNDLED * 0.002405,
        chunk_seconds=BUNDLED * (0.003446 - 0.002405) / 9,
        decode={"Q4_K": 2692e9, "Q6_K": 2234e9, "Q8_0": 3246e9},
        prompt={
            "Q4_K": Product(1385e9, 383e12),
            "Q6_K": Product(574.3e9, 679.7e12),
            "Q8_0": Product(825.2e9, 639.1e12),
        },
        dequantize={"Q4_K": 787.9e9, "Q6_K": 978.1e9, "Q8_0": 1251e9},
        matmul=780.2e12,
        attention=371.3e12,
    ),
)
"""As `moe-engine calibrate` gave it, but for the CPU, which takes no part in these rows."""

FETCH_ROWS = (
    DecodeRow("qwen3-30b-a3b", 0.25, 0.4248, 57.50),
    DecodeRow("qwen3-30b-a3b", 0.25, 0.5096, 65.43),
    DecodeRow("qwen3-30b-a3b", 0.5, 0.7570, 114.43),
    DecodeRow("deepseek-v2-lite", 0.25, 0.5077, 86.72),
    DecodeRow("deepseek-v2-lite", 0.25, 0.5889, 101.62),
)
"""`miss="fetch"`. That an expert comes in pieces was settled with these rows."""

IN_VRAM_ROWS = (("qwen3-30b-a3b", 8192, 39953.0), ("deepseek-v2-lite", 8192, 68977.0))
"""Prompts that the GPU's products bound: model, tokens, tokens/s. What activations take was settled with these."""

SIXTH_H200 = replace(
    QUIET_H200,
    dram={16: 120.2e9},
    cpu_experts={
        "Q4_K": CpuProduct(103.7e9, 3.401e12),
        "Q6_K": CpuProduct(101.2e9, 2.188e12),
        "Q8_0": CpuProduct(105.3e9, 2.806e12),
    },
    cpu_call_seconds=19.9e-6,
    gpu=replace(
        QUIET_H200.gpu,
        copy=4168e9,
        pcie=_pcie(17.4, 26.5, 36.2, 43.6, 47.5, 51.0, 52.8, 53.8, 54.2, 54.8, 55.1),
        kernel_seconds=1.639e-6,
        exchange_seconds=6.6e-6,
        step_seconds={4: 54.0e-6, 16: 68.3e-6, 32: 82.9e-6},
        layer_seconds=850e-6,
        chunk_seconds=1286e-6 / 9,
        decode={"Q4_K": 2775e9, "Q6_K": 2212e9, "Q8_0": 3169e9},
        prompt={
            "Q4_K": Product(1459e9, 388e12),
            "Q6_K": Product(559.8e9, 779.9e12),
            "Q8_0": Product(841.0e9, 629.3e12),
        },
        dequantize={"Q4_K": 812e9, "Q6_K": 983.9e9, "Q8_0": 1257e9},
        matmul=803.7e12,
        attention=370.7e12,
    ),
)
"""As `moe-engine calibrate` gave it."""

SIXTH_PROMPT_ROWS = (
    StreamedRow(128, 0.104, 49, 0.1540),
    StreamedRow(256, 0.077, 71, 0.1852),
    StreamedRow(512, 0.068, 79, 0.2029),
    StreamedRow(1024, 0.063, 87, 0.2247),
    StreamedRow(2048, 0.060, 92, 0.2301),
    StreamedRow(4096, 0.056, 98, 0.2414),
    StreamedRow(8192, 0.055, 101, 0.2565),
    StreamedRow(16384, 0.054, 103, 0.5012),
    StreamedRow(512, 0.666, 82, 0.0924),
    StreamedRow(2048, 0.622, 94, 0.1042),
    StreamedRow(8192, 0.608, 99, 0.2276),
    StreamedRow(512, 1.0, 82, 0.0413),
    StreamedRow(2048, 1.0, 94, 0.0529),
    StreamedRow(8192, 1.0, 99, 0.1929),
)
"""Three loads of Qwen3-30B-A3B. What a choice and a chunk cost the host was settled with these and the next ones."""

SIXTH_V3_ROWS = (
    StreamedRow(8, 0.72, 12, 0.0209),
    StreamedRow(31, 0.537, 17, 0.0197),
    StreamedRow(512, 0.324, 28, 0.0352),
    StreamedRow(2048, 0.263, 34, 0.0636),
    StreamedRow(4096, 0.25, 36, 0.1126),
    StreamedRow(8192, 0.235, 38, 0.2105),
    StreamedRow(16384, 0.224, 40, 0.4696),
)
"""Three dense and four MoE layers of DeepSeek-V3, of which the CPU computes some experts. How much of the memory for
copies runs ahead, and large matrices' launches, were settled with these."""


def _machine(found: dict[str, Any]) -> Calibration:
    gpu = found["gpu"]
    by_number = {key: {int(n): value for n, value in gpu[key].items()} for key in ("pcie", "step_seconds")}
    products = {type: Product(**product) for type, product in gpu["prompt"].items()}
    experts = {type: CpuProduct(**product) for type, product in found["cpu_experts"].items()}
    dram = {int(n): rate for n, rate in found["dram"].items()}
    return Calibration(
        **found | {"dram": dram, "cpu_experts": experts, "gpu": Gpu(**gpu | by_number | {"prompt": products})}
    )


@dataclass(frozen=True)
class SeenRow:
    """staging: bytes. share: of the used experts in VRAM. host: how much longer launches took beside the prompt than
    when calibrated. counts: tokens of a layer's experts, most first; None: it went in steps, with `used` experts of a
    layer in each."""

    model: str
    tokens: int
    ubatch: int
    staging: int
    share: float
    host: float
    used: float
    counts: str | None
    seconds: float


_HOSTS = json.loads((Path(__file__).parent / "data" / "h200_prompts.json").read_text())["hosts"]
LATER_ROWS = [(_machine(host["machine"]), SeenRow(**row)) for host in _HOSTS for row in host["rows"]]
"""Of a seventh and an eighth one. Nothing was settled with these."""
