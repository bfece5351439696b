"""A machine and what was measured on it: an H200 with 16 cores of a Xeon, before prompts were streamed.

Rates are from that time's bench/results: decode.json (RAM, PCIe, VRAM: medians of its rows), cpu_experts.json (1 and
512 tokens, 16 threads), gpu_kernels.json (routed experts of 1 and 4 tokens, prompts of 2048 and 8192). The fixed time
of a kernel is that of the row with all of DeepSeek-V2-Lite in VRAM; a message's round trip, a launch and PCIe by size
were measured apart. Attention of prompts was not: the number stands for it, and no test rests on it.
"""

from dataclasses import dataclass

from moe_engine.calibration import Calibration, Gpu, Product

H200 = Calibration(
    processor="Intel(R) Xeon(R) Processor",
    threads=16,
    ram_bytes=128 << 30,
    dram={16: 149e9},
    cpu_experts={
        "Q4_K": Product(193e9, 1.82e12),
        "Q6_K": Product(213e9, 1.90e12),
        "Q8_0": Product(210e9, 2.37e12),
    },
    disk=2.4e9,
    gpu=Gpu(
        name="NVIDIA H200",
        vram_bytes=139 << 30,
        copy=3.76e12,
        pcie={1 << 16: 8e9, 1 << 18: 32e9, 1 << 20: 48e9, 1 << 22: 53e9, 1 << 24: 55.2e9},
        kernel_seconds=2.4e-6,
        exchange_seconds=15e-6,
        launch_seconds=20e-6,
        decode={"Q4_K": 2.59e12, "Q6_K": 1.83e12, "Q8_0": 2.83e12},
        prompt={"Q4_K": Product(1.78e12, 354e12)},
        dequantize={"Q4_K": 0.81e12, "Q6_K": 1.07e12, "Q8_0": 1.40e12},
        matmul=780e12,
        attention=50e12,
    ),
)


@dataclass(frozen=True)
class DecodeRow:
    """One sequence, 512 to 768 tokens of context. hit_rate: what the run had; None: as recorded routing has it."""

    model: str
    share: float  # of the experts in VRAM
    hit_rate: float | None
    tokens_per_second: float
    layers: int | None = None


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
