"""The dense part of a layer for a prompt: attention with its norm, and the shared expert or dense feed-forward.

    python bench/bench_prompt_layer.py            # needs a CUDA device; writes bench/results/prompt_layer.json
    python bench/bench_prompt_layer.py --tiny     # a dry run on any machine: results are checked, not timed

The layers are the engine's own classes with random weights in the types of Q4_K_M files. Each is first compared, with
few tokens, with the same class in plain f32. `tflops` counts the multiplications and additions of the matrix products,
of attention those below the diagonal. `launches` are kernels on the GPU.
"""

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

if not torch.cuda.is_available():  # must be known before the kernels are imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

from bench_attention_part import half_size
from gpu_timing import DEVICE, Call, Report, check, matmul_rate, randn, random_weight
from torch import Tensor

from moe_engine.backend import AcceleratorBackend
from moe_engine.budget import SCRATCH_ELEMENTS
from moe_engine.kernels.norm_rope import fused_rms_norm
from moe_engine.kernels.quant_tensor import QuantTensor
from moe_engine.kv_cache import KVCache
from moe_engine.layers import GroupedQueryAttention, Span, SwiGLU
from moe_engine.metadata import Metadata
from moe_engine.models.deepseek2 import LatentAttention, MLADimensions
from moe_engine.rope import Rope, RopeConfig
from moe_engine.weights import Weights

RESULTS = Path(__file__).parent / "results" / "prompt_layer.json"
TOKENS = (512, 2048, 8192, 16384)
CHECKED_TOKENS = 512
LIMIT = 2e-2  # relative error against plain f32; bf16 rounds weights, activations and results of products
EPS = 1e-6


@dataclass(frozen=True)
class Model:
    name: str
    hidden: int
    n_head: int
    n_kv: int = 0  # 0: MLA
    d: int = 128  # of a head; MLA's nope part and values
    q_lora: int = 0
    kv_lora: int = 512
    n_rot: int = 64
    n_ff: int = 0  # of the shared expert

    @property
    def matrices(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Types and shapes by name."""
        h, n, d = self.hidden, self.n_head, self.d
        found: dict[str, tuple[str, tuple[int, ...]]] = {"attn_output": ("Q4_K", (h, n * d))}
        if self.n_kv:
            kv = self.n_kv * d
            found |= {"attn_q": ("Q4_K", (n * d, h)), "attn_k": ("Q4_K", (kv, h)), "attn_v": ("Q6_K", (kv, h))}
        else:
            q = (n * (d + self.n_rot), self.q_lora or h)
            found |= {"attn_q_b": ("Q4_K", q), "attn_q_a": ("Q4_K", (self.q_lora, h))} if self.q_lora else {}
            found |= {} if self.q_lora else {"attn_q": ("Q4_K", q)}
            found |= {
                "attn_kv_a_mqa": ("Q4_K", (self.kv_lora + self.n_rot, h)),
                "attn_k_b": ("Q5_0", (n, self.kv_lora, d)),
                "attn_v_b": ("Q4_K", (n, d, self.kv_lora)),
            }
        if self.n_ff:
            up = ("Q4_K", (self.n_ff, h))
            found |= {"ffn_gate_shexp": up, "ffn_up_shexp": up, "ffn_down_shexp": ("Q6_K", (h, self.n_ff))}
        return found

    def attention_flops(self, n_token: int) -> float:
        """Without what MLA spends on expanding latents."""
        widths = 2 * self.d + (0 if self.n_kv else self.n_rot)
        return n_token * (n_token + 1) * self.n_head * widths

    def product_flops(self, n_token: int, prefix: str) -> float:
        found = (shape for name, (_, shape) in self.matrices.items() if name.startswith(prefix))
        return 2.0 * n_token * sum(torch.Size(shape).numel() for shape in found)


MODELS = (
    Model("Qwen3-30B-A3B", 2048, 32, 4),
    Model("DeepSeek-V2-Lite", 2048, 16, n_ff=2816),
    Model("DeepSeek-V3", 7168, 128, q_lora=1536, n_ff=2048),
)
TINY = (Model("tiny", 256, 4, 2, 64), Model("tiny MLA", 256, 4, d=64, q_lora=256, kv_lora=256, n_rot=32, n_ff=256))


class RandomWeights(Weights):
    """Random matrices of a model's types and shapes; norms that keep their products at size one."""

    def __init__(self, model: Model, backend: AcceleratorBackend) -> None:
        self.backend, self._used = backend, set()
        self.tensors = {f"{name}.weight": random_weight(kind, *shape) for name, (kind, shape) in model.matrices.items()}
        first = "attn_q_a" if model.q_lora else "attn_q"
        after = {"attn_norm": first, "attn_q_a_norm": "attn_q_b", "attn_kv_a_norm": "attn_k_b"}
        self.norms = {
            f"{norm}.weight": half_size([self.tensors[f"{name}.weight"]])
            for norm, name in after.items()
            if f"{name}.weight" in self.tensors
        }

    def has(self, name: str) -> bool:
        return name in self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def quantized(self, name: str, shape: tuple[int, ...]) -> QuantTensor:
        assert self.tensors[name].shape == shape, (name, shape)
        return self.tensors[name]

    def floats(self, name: str, *shape: int) -> Tensor:
        return torch.full(shape, self.norms.get(name, 1.0), device=DEVICE)


class Layer:
    """An attention and, if the model has one, a shared expert, for up to `n_token` tokens."""

    def __init__(self, model: Model, n_token: int, kv_type: str = "f16", exact: bool = False) -> None:
        scratch = min(SCRATCH_ELEMENTS, max(torch.Size(s[-2:]).numel() for _, s in model.matrices.values()))
        backend = AcceleratorBackend(DEVICE, scratch, int8_activations=not exact)
        weights = RandomWeights(model, backend)
        keys = {"attention.layer_norm_rms_epsilon": EPS, "attention.head_count": model.n_head}
        self.attn: GroupedQueryAttention | LatentAttention
        if model.n_kv:
            keys |= {"attention.head_count_kv": model.n_kv, "attention.key_length": model.d}
            meta = Metadata({f"x.{key}": value for key, value in keys.items()} | {"x.embedding_length": 1}, "x", "x")
            self.attn = GroupedQueryAttention(meta, weights, "", model.hidden, bias=False, qk_norm=True)
        else:
            meta = Metadata({f"x.{key}": value for key, value in keys.items()}, "x", "x")
            dimensions = MLADimensions(model.n_head, model.kv_lora, model.n_rot, model.d, model.d)
            self.attn = LatentAttention(meta, weights, "", model.hidden, dimensions)
        self.ffn = SwiGLU(weights, "", model.hidden, "_shexp") if model.n_ff else None
        self.norm = weights.floats("attn_norm.weight", model.hidden)
        self.rope = Rope(RopeConfig(model.d if model.n_kv else model.n_rot, 1e4), n_token, DEVICE)
        self.cache = KVCache([self.attn.kv_shapes], 1, n_token, kv_type, DEVICE).sequence(0)[0]
        self.span = Span(0, torch.zeros(1, dtype=torch.int32, device=DEVICE))

    def attention(self, x: Tensor, residual: Tensor) -> None:
        rounded = torch.empty(x.shape, dtype=torch.bfloat16, device=DEVICE)
        fused_rms_norm(x, self.norm, EPS, out=rounded)
        self.attn.prompt(rounded, residual, self.span, self.cache.tensors, self.rope)

    def feed_forward(self, x: Tensor, residual: Tensor) -> None:
        assert self.ffn is not None
        rounded = torch.empty(x.shape, dtype=torch.bfloat16, device=DEVICE)
        fused_rms_norm(x, self.norm, EPS, out=rounded)
        self.ffn.prompt(rounded, residual)


def launches(call: Call) -> int:
    """Kernels and copies on the GPU."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type.name == "CUDA" for event in profile.events() or ())


def errors(model: Model, n_token: int, kv_type: str) -> dict[str, float]:
    """Of both parts, against plain f32 with the same type of cache."""
    layer, plain = Layer(model, n_token, kv_type), Layer(model, n_token, kv_type, exact=True)
    x, found = randn(n_token, model.hidden), {}
    normed = fused_rms_norm(x, layer.norm, EPS)
    parts: dict[str, tuple[Callable[[Tensor, Tensor], None], Callable[[], Tensor]]] = {
        "attention": (layer.attention, lambda: plain.attn(normed, 0, plain.cache, plain.rope))
    }
    if plain.ffn is not None:
        parts["feed-forward"] = layer.feed_forward, partial(plain.ffn, normed)
    for name, (fused, exact) in parts.items():
        residual = torch.zeros_like(x)
        fused(x, residual)
        found[name] = check(f"{model.name}, {name}, {kv_type}", residual, exact(), LIMIT)
    return found


def time_model(report: Report, model: Model, tokens: tuple[int, ...], kv_types: tuple[str, ...]) -> None:
    few = min(CHECKED_TOKENS, *tokens)
    error = {kind: errors(model, few, kind) for kind in kv_types}
    for n_token in tokens:
        shape = f"{model.name}, {n_token} tokens"
        x, residual = randn(n_token, model.hidden), randn(n_token, model.hidden, seed=1)
        for kind in kv_types:
            layer = Layer(model, n_token, kind)
            add_part(report, f"attention part, {kind}", shape, partial(layer.attention, x, residual),
                     error[kind]["attention"],
                     model.attention_flops(n_token) + model.product_flops(n_token, "attn"))  # fmt: skip
            if model.n_ff and kind == kv_types[0]:
                add_part(report, "shared expert", shape, partial(layer.feed_forward, x, residual),
                         error[kind]["feed-forward"], model.product_flops(n_token, "ffn"))  # fmt: skip


def add_part(report: Report, name: str, shape: str, call: Call, error: float, operations: float) -> None:
    row = report.add(name, "Q4_K_M", shape, [call], error=error, operations=operations)
    if DEVICE.type == "cuda":
        row["launches"] = launches(call)
        print(f"  {row['launches']} launches", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    report = Report("prompt layer")
    with torch.inference_mode():
        for model in TINY if options.tiny else MODELS:
            tokens = (20,) if options.tiny else TOKENS
            time_model(report, model, tokens, ("f16", "q8_0") if model.n_kv else ("f16",))
    if DEVICE.type == "cuda":
        found = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "matmul_tflops": matmul_rate()}
        options.out.write_text(json.dumps(found | {"rows": report.rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
