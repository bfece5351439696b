"""The attention part of a layer for one token: from the residual stream back to it, as one CUDA graph.

The layers are those of Q4_K_M files: norm, projections, q/k norm or latent norm, rotation, append, attention, output
with the residual. `results` times the whole and, for the breakdown, the chain up to each kernel; the graph's calls take
turns with copies of all weights and caches. Reference: norm, projections and attention with torch in bf16, cached.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from gpu_timing import DEVICE, Call, Report, Row, check, copies, exact_values, int32, randn, random_weight
from torch import Tensor

from moe_engine.kernels.decode_attention import decode_attention
from moe_engine.kernels.decode_product import Activations, matvec, matvecs
from moe_engine.kernels.norm_rope import (
    fused_rms_norm,
    latent_norm_rope_append,
    qk_norm_rope_append,
    rms_norm_reference,
    rope_reference,
)
from moe_engine.kernels.quant_tensor import QuantTensor

EPS = 1e-6
Step = tuple[str, Callable[[], object]]


@dataclass(frozen=True)
class Grouped:
    name: str
    hidden: int
    n_head: int
    n_kv: int
    d: int


@dataclass(frozen=True)
class Latent:
    name: str
    hidden: int
    n_head: int
    q_lora: int = 0
    kv_lora: int = 512
    n_nope: int = 128
    n_rot: int = 64


MODELS = (
    Grouped("Qwen3-30B-A3B", 2048, 32, 4, 128),
    Latent("DeepSeek-V2-Lite", 2048, 16),
    Latent("DeepSeek-V3", 7168, 128, 1536),
)
TINY = (
    Grouped("tiny", 256, 4, 2, 64),
    Latent("tiny MLA", 256, 8, 0, 256, 32, 32),
    Latent("tiny MLA 2", 256, 8, 256, 256, 32, 32),
)


def half_size(weights: list[QuantTensor]) -> float:
    """What to multiply inputs of size one with, for results of about that size."""
    sizes = [exact_values(w.rows(0, 16) if w.data.dim() == 2 else w[0].rows(0, 16)) for w in weights]
    return 1 / max(float(size.square().sum(dim=-1).mean().sqrt()) for size in sizes)


def grouped(model: Grouped, context: int) -> tuple[list[Step], Callable[[], Tensor], Tensor, int]:
    """The kernels in order, the exact result, where the last kernel puts its own, and the bytes of all weights."""
    n, heads = model.hidden, model.n_head * model.d
    w_q, w_k = random_weight("Q4_K", heads, n), random_weight("Q4_K", model.n_kv * model.d, n)
    w_v, w_o = random_weight("Q6_K", model.n_kv * model.d, n), random_weight("Q4_K", n, heads)
    x, norm = randn(1, n), torch.full((n,), half_size([w_q, w_v]), device=DEVICE)
    qk = randn(model.d, seed=1), randn(model.d, seed=2)
    cos, sin = randn(context, model.d // 2, seed=3), randn(context, model.d // 2, seed=4)
    k_cache, v_cache = (randn(context, model.n_kv, model.d, seed=s).half() for s in (5, 6))
    position, scale = int32(context - 1), model.d**-0.5
    normed, a, b = torch.empty_like(x), Activations.empty(1, n, DEVICE), Activations.empty(1, heads, DEVICE)
    qkv = torch.empty(1, heads + 2 * model.n_kv * model.d, device=DEVICE)
    q, k, v = (part.view(1, -1, model.d) for part in qkv.split([heads, *[model.n_kv * model.d] * 2], dim=1))
    query, attended, out = torch.empty_like(q), torch.empty_like(q), torch.empty_like(x)
    steps: list[Step] = [
        ("norm", partial(fused_rms_norm, x, norm, EPS, out=normed, activations=a)),
        ("q, k, v", partial(matvecs, normed, (w_q, w_k, w_v), qkv, a)),
        ("q/k norm, rope, append", partial(qk_norm_rope_append, q, k, v, cos, sin, position, k_cache, v_cache, norms=qk,
                                           eps=EPS, out=query)),
        ("attention", partial(decode_attention, query, k_cache, v_cache, position, scale, out=attended,
                              activations=b)),
        ("output", partial(matvec, attended.view(1, -1), w_o, out, b, residual=x)),
    ]  # fmt: skip

    def exact() -> Tensor:
        y = rms_norm_reference(x, norm, EPS).double()
        q, k, v = ((y @ exact_values(w).T).view(1, -1, model.d).float() for w in (w_q, w_k, w_v))
        q, k = (rms_norm_reference(part, w, EPS) for part, w in zip((q, k), qk, strict=True))
        q, k = (rope_reference(part, cos, sin, position[None], False) for part in (q, k))
        keys, values = (torch.cat([c[:-1].float(), new]) for c, new in ((k_cache, k), (v_cache, v)))
        group = model.n_head // model.n_kv
        keys, values = (part.repeat_interleave(group, dim=1) for part in (keys, values))
        p = (torch.einsum("hd,khd->hk", q[0], keys) * scale).softmax(dim=-1)
        return x + torch.einsum("hk,khd->hd", p, values).reshape(1, -1).double() @ exact_values(w_o).T

    return steps, exact, out, sum(w.nbytes for w in (w_q, w_k, w_v, w_o))


def latent(model: Latent, context: int) -> tuple[list[Step], Callable[[], Tensor], Tensor, int]:
    n, h, lora, rot = model.hidden, model.n_head, model.kv_lora, model.n_rot
    n_q = h * (model.n_nope + rot)
    w_q = random_weight("Q4_K", n_q, model.q_lora or n)
    w_kv = random_weight("Q4_K", lora + rot, n)
    first = random_weight("Q4_K", model.q_lora, n) if model.q_lora else w_q
    w_kb, w_vb = random_weight("Q5_0", h, lora, model.n_nope), random_weight("Q4_K", h, model.n_nope, lora)
    w_o = random_weight("Q4_K", n, h * model.n_nope)
    x, norm = randn(1, n), torch.full((n,), half_size([first, w_kv]), device=DEVICE)
    q_norm = torch.full((max(1, model.q_lora),), half_size([w_q]), device=DEVICE)
    kv_norm = torch.ones(lora, device=DEVICE)
    cos, sin = randn(context, rot // 2, seed=3), randn(context, rot // 2, seed=4)
    cache = randn(context, lora + rot, seed=5).half()
    position, scale = int32(context - 1), half_size([w_kb]) / model.n_nope**0.5
    normed, a, b = torch.empty_like(x), Activations.empty(1, n, DEVICE), Activations.empty(h, lora, DEVICE)
    q_low, a_low = torch.empty(1, model.q_lora, device=DEVICE), Activations.empty(1, model.q_lora, DEVICE)
    a_nope, a_out = Activations.empty(h, model.n_nope, DEVICE), Activations.empty(1, h * model.n_nope, DEVICE)
    both = torch.empty(1, first.n_out + lora + rot, device=DEVICE)
    kv = both[:, first.n_out :]
    q = (torch.empty(1, n_q, device=DEVICE) if model.q_lora else both[:, :n_q]).view(1, h, -1)
    q_nope, q_pe = q.split([model.n_nope, rot], dim=2)
    query = torch.empty(1, h, lora + rot, device=DEVICE)
    absorbed = query[..., :lora].transpose(0, 1)
    attended, mixed = torch.empty(1, h, lora, device=DEVICE), torch.empty(1, h, model.n_nope, device=DEVICE)
    out = torch.empty_like(x)
    steps: list[Step] = [
        ("norm", partial(fused_rms_norm, x, norm, EPS, out=normed, activations=a)),
        ("q, kv", partial(matvecs, normed, (first, w_kv), both, a)),
    ]
    if model.q_lora:
        low = both[:, : first.n_out]
        steps += [
            ("q norm", partial(fused_rms_norm, low, q_norm, EPS, out=q_low, activations=a_low)),
            ("q of the heads", partial(matvec, q_low, w_q, q.view(1, -1), a_low)),
        ]
    steps += [
        ("latent norm, rope, append", partial(latent_norm_rope_append, q_pe, kv, kv_norm, cos, sin, position, cache,
                                              eps=EPS, out=query[..., lora:], q_nope=q_nope, activations=a_nope)),
        ("queries to latents", partial(matvec, q_nope.transpose(0, 1), w_kb, absorbed, a_nope)),
        ("attention", partial(decode_attention, query, cache, None, position, scale, d_value=lora, out=attended,
                              activations=b)),
        ("latents to values", partial(matvec, attended.transpose(0, 1), w_vb, mixed.transpose(0, 1), b,
                                      out_activations=a_out)),
        ("output", partial(matvec, mixed.view(1, -1), w_o, out, a_out, residual=x)),
    ]  # fmt: skip

    def exact() -> Tensor:
        y = rms_norm_reference(x, norm, EPS).double()
        q = y @ exact_values(first).T
        if model.q_lora:
            q = rms_norm_reference(q.float(), q_norm, EPS).double() @ exact_values(w_q).T
        nope, pe = q.view(1, h, -1).split([model.n_nope, rot], dim=2)
        low, key = (y @ exact_values(w_kv).T).float().split([lora, rot], dim=1)
        key = rope_reference(key[:, None], cos, sin, position[None], True)[:, 0]
        keys = torch.cat([cache[:-1].double(), torch.cat([rms_norm_reference(low, kv_norm, EPS), key], dim=1).double()])
        pe = rope_reference(pe.float(), cos, sin, position[None], True).double()
        in_latents = torch.einsum("hn,hln->hl", nope[0], exact_values(w_kb))
        p = (torch.cat([in_latents, pe[0]], dim=1) @ keys.T * scale).softmax(dim=-1)
        values = torch.einsum("hl,hvl->hv", p @ keys[:, :lora], exact_values(w_vb))
        return x + values.reshape(1, -1) @ exact_values(w_o).T

    weights = {id(w): w.nbytes for w in (first, w_q, w_kv, w_kb, w_vb, w_o)}
    return steps, exact, out, sum(weights.values())


def plain_torch(model: Grouped | Latent, context: int) -> Call:
    """Norm, projections and attention alone, in bf16; latent attention over the latents."""
    x = randn(1, model.hidden).bfloat16()
    attention = torch.nn.functional.scaled_dot_product_attention
    if isinstance(model, Grouped):
        heads, kv = model.n_head * model.d, model.n_kv * model.d
        w_qkv, w_o = randn(heads + 2 * kv, model.hidden).bfloat16(), randn(model.hidden, heads).bfloat16()
        k, v = (randn(1, model.n_kv, context, model.d).bfloat16() for _ in range(2))

        def run() -> None:
            y = torch.nn.functional.rms_norm(x, (model.hidden,))
            q = (y @ w_qkv.T)[:, :heads].view(1, model.n_head, 1, model.d)
            torch.addmm(x, attention(q, k, v, enable_gqa=True).view(1, -1), w_o.T)

        return run
    h, lora, rot, nope = model.n_head, model.kv_lora, model.n_rot, model.n_nope
    n_q, n_first = h * (nope + rot), model.q_lora or h * (nope + rot)
    w_first, w_o = randn(n_first + lora + rot, model.hidden).bfloat16(), randn(model.hidden, h * nope).bfloat16()
    w_q = randn(n_q, model.q_lora).bfloat16() if model.q_lora else None
    w_kb, w_vb = randn(h, nope, lora).bfloat16(), randn(h, lora, nope).bfloat16()
    keys = randn(1, 1, context, lora + rot).bfloat16()

    def run_latent() -> None:
        q = (torch.nn.functional.rms_norm(x, (model.hidden,)) @ w_first.T)[:, :n_first]
        if w_q is not None:
            q = torch.nn.functional.rms_norm(q, (model.q_lora,)) @ w_q.T
        q_nope, q_pe = q.view(h, 1, -1).split([nope, rot], dim=2)
        query = torch.cat([q_nope @ w_kb, q_pe], dim=2).transpose(0, 1)[None].transpose(1, 2)
        y = attention(query, keys, keys[..., :lora], enable_gqa=True)
        torch.addmm(x, (y.view(h, 1, lora) @ w_vb).view(1, -1), w_o.T)

    return run_latent


def results(tiny: bool = False, contexts: tuple[int, ...] = (512, 4096)) -> list[Row]:
    report = Report("attention part")
    for model in TINY if tiny else MODELS:
        for context in (70,) if tiny else contexts:
            build = partial(grouped, model) if isinstance(model, Grouped) else partial(latent, model)
            steps, exact, out, n_bytes = build(context)
            for _, step in steps:
                step()
            error = check(model.name, out, exact(), 3e-2)
            layers = [steps] + [build(context)[0] for _ in range(copies(n_bytes) - 1)]

            def chains(n_step: int, layers: list[list[Step]] = layers) -> list[Call]:
                return [partial(run_all, layer[:n_step]) for layer in layers]

            shape = f"{model.name}, context {context}"
            reference = plain_torch(model, context)
            reference()
            whole = report.add("whole", "Q4_K_M", shape, chains(len(steps)), error=error, n_bytes=n_bytes,
                               reference=reference)  # fmt: skip
            before = 0.0
            for i, (name, _) in enumerate(steps if "microseconds" in whole and context == contexts[0] else ()):
                row = report.add(f"up to {name}", "Q4_K_M", shape, chains(i + 1), error=error)
                row["added_microseconds"] = row["microseconds"] - before
                before = row["microseconds"]
    return report.rows


def run_all(steps: list[Step]) -> None:
    for _, step in steps:
        step()
