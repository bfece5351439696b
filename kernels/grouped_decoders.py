"""Device functions that load and decode tiles of weight rows to bf16, for the types with a decoder of their own.

They need 16-bit (Q4_K: 32-bit) alignment of every block. Loads of 16-bit words cannot be pipelined by the compiler, so
the loops that use them load a step ahead.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

from moe_engine.kernels.dequantize_kernel import INTERPRETED, round_to


@triton.jit
def _load16(p):
    """The 16-bit word at p (uint8 pointers of even address)."""
    return tl.load(p.to(tl.pointer_type(tl.uint16))).to(tl.int32)


@triton.jit
def flat(y, N: tl.constexpr):
    return round_to(tl.reshape(y, [N, 64]), tl.bfloat16)  # a reshape last would crash the compiler (Triton 3.6)


# Four bytes of two nibbles ($4) to bf16 q * d - m, by pairs: a byte under the exponent 0x43 is 128 + q, from which
# 128 is taken exactly. $0, $1: low nibbles; $2, $3: high ones; $5 and $9: d; $7 and $11: -m.
_NIBBLES_TO_BF16 = tl.constexpr("""
{
    .reg .b32 low, high, a, b, one, zero;
    mov.b32 one, 0x3F803F80;
    mov.b32 zero, 0xC300C300;
    and.b32 low, $4, 0x0F0F0F0F;
    shr.u32 high, $4, 4;
    and.b32 high, high, 0x0F0F0F0F;
    prmt.b32 a, low, 0x43434343, 0x4140;
    prmt.b32 b, low, 0x43434343, 0x4342;
    fma.rn.bf16x2 a, a, one, zero;
    fma.rn.bf16x2 b, b, one, zero;
    fma.rn.bf16x2 $0, a, $5, $7;
    fma.rn.bf16x2 $1, b, $6, $8;
    prmt.b32 a, high, 0x43434343, 0x4140;
    prmt.b32 b, high, 0x43434343, 0x4342;
    fma.rn.bf16x2 a, a, one, zero;
    fma.rn.bf16x2 b, b, one, zero;
    fma.rn.bf16x2 $2, a, $9, $11;
    fma.rn.bf16x2 $3, b, $10, $12;
}
""")


@triton.jit
def q4_k_load(p, step, words):
    """p: row starts [N, 1, 1]. Step 4 b + i is a pair of sub-blocks of block b: 32 bytes of nibbles."""
    p += (step // 4) * 144
    q = tl.load(p + (16 + 32 * (step % 4)) + tl.arange(0, 32)[None, None, :])
    # The 16 bytes of scales in one access and once a block: requests that touch many rows are what costs most
    fresh = step % 4 == 0
    at = p.to(tl.pointer_type(tl.uint32)) + tl.arange(0, 4)[None, None, :]
    words = tl.where(fresh, tl.load(at, mask=(tl.arange(0, 4) >= 4 * (step % 4))[None, None, :], other=0), words)
    even, odd = tl.split(tl.reshape(words, [p.shape[0], 1, 2, 2]))
    d2, w1 = tl.split(tl.reshape(even, [p.shape[0], 1, 1, 2]))
    w0, w2 = tl.split(tl.reshape(odd, [p.shape[0], 1, 1, 2]))
    return q, words, d2, w0, w1, w2


@triton.jit
def q4_k_decode(q, d2, w0, w1, w2, step, N: tl.constexpr):
    """bf16 [N, 64]: low nibbles 0 to 15, high ones 0 to 15, low ones 16 to 31, high ones 16 to 31.

    In that order a thread writes 64 bytes of a row of shared memory, without bank conflicts.
    """
    first = step % 4 < 2
    shift = 16 * (step % 2)
    scales = tl.where(first, w0 & 0x3F3F3F3F, (w2 & 0x0F0F0F0F) | ((w0 >> 2) & 0x30303030)) >> shift
    mins = tl.where(first, w1 & 0x3F3F3F3F, ((w2 >> 4) & 0x0F0F0F0F) | ((w1 >> 2) & 0x30303030)) >> shift
    d = (d2 & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    m = (d2 >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    d_low = d * (scales & 255).to(tl.float32)
    m_low = m * (mins & 255).to(tl.float32)
    d_high = d * ((scales >> 8) & 255).to(tl.float32)
    m_high = m * ((mins >> 8) & 255).to(tl.float32)
    if INTERPRETED:
        low = d_low * (q & 15).to(tl.float32) - m_low
        high = d_high * (q >> 4).to(tl.float32) - m_high
    else:
        low, high = tl.inline_asm_elementwise(
            _NIBBLES_TO_BF16,
            "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r",
            [q, d_low.to(tl.bfloat16), (-m_low).to(tl.bfloat16), d_high.to(tl.bfloat16), (-m_high).to(tl.bfloat16)],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    both = tl.reshape(tl.join(low.to(tl.float32), high.to(tl.float32)), [N, 2, 16, 2])
    return flat(tl.trans(both, 0, 1, 3, 2), N)


@triton.jit
def q6_k_load(p, step):
    """Step 2 b + i is half i of block b: 64 bytes of low bits, 32 of high ones, 8 scales."""
    g = tl.arange(0, 4)[None, :, None]  # 16 elements that share a scale
    w = tl.arange(0, 8)[None, None, :]  # pairs
    p += (step // 2) * 210
    half = step % 2
    q = _load16(p + 64 * half + 16 * g + 2 * w)
    h = _load16(p + 128 + 32 * half + 16 * (g % 2) + 2 * w)
    s = p + 192 + 8 * half + g
    return q, h, tl.load(s), tl.load(s + 4), _load16(p + 208)


@triton.jit
def q6_k_decode(q, h, s_low, s_high, d, N: tl.constexpr):
    h >>= 2 * (tl.arange(0, 4)[None, :, None] // 2)
    low = (q & 0x0F0F) | ((h & 0x0303) << 4)
    high = ((q >> 4) & 0x0F0F) | (h & 0x3030)
    d = d.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    d_low = d * s_low.to(tl.int8, bitcast=True).to(tl.float32)
    d_high = d * s_high.to(tl.int8, bitcast=True).to(tl.float32)
    return _scaled_pairs(low, d_low, 32, N), _scaled_pairs(high, d_high, 32, N)


@triton.jit
def _scaled_pairs(words, d, zero: tl.constexpr, N: tl.constexpr):
    """d * (byte - zero) for both bytes of each word: bf16 `[N, 64]`."""
    even = d * ((words & 255) - zero).to(tl.float32)
    odd = d * ((words >> 8) - zero).to(tl.float32)
    return flat(tl.join(even, odd), N)


@triton.jit
def q8_0_load(p, step):
    """Two blocks of 32."""
    w = tl.arange(0, 16)[None, None, :]  # pairs
    p += step * 68 + 34 * tl.arange(0, 2)[None, :, None]
    return _load16(p + 2 + 2 * w), _load16(p)


@triton.jit
def q8_0_decode(words, d, N: tl.constexpr):
    d = d.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    return _scaled_pairs(words ^ 0x8080, d, 128, N)  # the sign bit becomes an offset of 128
