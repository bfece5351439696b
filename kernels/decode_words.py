"""Device functions on 32-bit words of quantized codes: wide loads from any alignment, 8-bit dot products, look-up.

On NVIDIA GPUs they are inline PTX, because a lane's unit of work (16 bytes of codes) is wider than an element of a
Triton tensor and dp4a has no name there. Elsewhere, in Triton's interpreter too, plain operations give the same bits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import torch
import triton
import triton.language as tl


@triton.jit
def _probe():
    """Never run: its class says whether kernels are compiled or interpreted."""


INTERPRETED = tl.constexpr(not isinstance(_probe, triton.JITFunction))
ASM = tl.constexpr(isinstance(_probe, triton.JITFunction) and torch.version.hip is None)


@triton.jit
def load16(p, ALIGN: tl.constexpr):
    """The 16 bytes at each (u)int8 pointer of p as four int32 tensors; every p is a multiple of ALIGN."""
    if ASM:
        address = p.to(tl.int64)
        if ALIGN % 16 == 0:
            return tl.inline_asm_elementwise(
                "ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];",
                "=r,=r,=r,=r,l",
                [address],
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
                is_pure=True,
                pack=1,
            )
        elif ALIGN % 8 == 0:
            return tl.inline_asm_elementwise(
                """
                ld.global.nc.v2.b32 {$0, $1}, [$4];
                ld.global.nc.v2.b32 {$2, $3}, [$4 + 8];
                """,
                "=&r,=&r,=&r,=&r,l",
                [address],
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
                is_pure=True,
                pack=1,
            )
        elif ALIGN % 4 == 0:
            return tl.inline_asm_elementwise(
                """
                ld.global.nc.b32 $0, [$4];
                ld.global.nc.b32 $1, [$4 + 4];
                ld.global.nc.b32 $2, [$4 + 8];
                ld.global.nc.b32 $3, [$4 + 12];
                """,
                "=&r,=&r,=&r,=&r,l",
                [address],
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
                is_pure=True,
                pack=1,
            )
        else:
            # The aligned words that hold the 16 bytes, shifted into place. The last one is found from the last
            # byte, so that nothing beyond its word is read.
            return tl.inline_asm_elementwise(
                """
                {
                .reg .b64 first, last;
                .reg .b32 w<5>, bits;
                and.b64 first, $4, -4;
                add.s64 last, $4, 15;
                and.b64 last, last, -4;
                cvt.u32.u64 bits, $4;
                shl.b32 bits, bits, 3;
                ld.global.nc.b32 w0, [first];
                ld.global.nc.b32 w1, [first + 4];
                ld.global.nc.b32 w2, [first + 8];
                ld.global.nc.b32 w3, [first + 12];
                ld.global.nc.b32 w4, [last];
                shf.r.wrap.b32 $0, w0, w1, bits;
                shf.r.wrap.b32 $1, w1, w2, bits;
                shf.r.wrap.b32 $2, w2, w3, bits;
                shf.r.wrap.b32 $3, w3, w4, bits;
                }
                """,
                "=&r,=&r,=&r,=&r,l",
                [address],
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
                is_pure=True,
                pack=1,
            )
    else:
        return _u32(p), _u32(p + 4), _u32(p + 8), _u32(p + 12)


@triton.jit
def _u32(p):
    if INTERPRETED:  # which takes any address
        return tl.load(p.to(tl.pointer_type(tl.int32)))
    else:
        return _four_bytes(p)


@triton.jit
def _four_bytes(p):
    return _byte(p) | (_byte(p + 1) << 8) | (_byte(p + 2) << 16) | (_byte(p + 3) << 24)


@triton.jit
def _byte(p):
    return tl.load(p).to(tl.int32) & 255


@triton.jit
def load_u8(p):
    """The byte at each uint8 pointer of p: int32."""
    if ASM:
        return tl.inline_asm_elementwise(
            "ld.global.nc.u8 $0, [$1];", "=r,l", [p.to(tl.int64)], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return tl.load(p).to(tl.int32)


@triton.jit
def load_i8(p):
    """The signed byte at each uint8 pointer of p: int32."""
    if ASM:
        return tl.inline_asm_elementwise(
            "ld.global.nc.s8 $0, [$1];", "=r,l", [p.to(tl.int64)], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return tl.load(p).to(tl.int8, bitcast=True).to(tl.int32)


@triton.jit
def load_u16(p):
    """The two bytes at each even uint8 pointer of p: int32."""
    if ASM:
        return tl.inline_asm_elementwise(
            "ld.global.nc.u16 $0, [$1];", "=r,l", [p.to(tl.int64)], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return tl.load(p).to(tl.int32) | (tl.load(p + 1).to(tl.int32) << 8)


@triton.jit
def load_pair(p):
    """Two neighbouring f32 at each pointer of p, which is a multiple of 8."""
    if ASM:
        return tl.inline_asm_elementwise(
            "ld.global.nc.v2.f32 {$0, $1}, [$2];",
            "=f,=f,l",
            [p.to(tl.int64)],
            dtype=(tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        return tl.load(p), tl.load(p + 1)


@triton.jit
def prefetch_rows(rows, N_BYTES: tl.constexpr):
    """Asks for N_BYTES at each of the pointers `[n_row]`, to find them in the last-level cache a little later."""
    if ASM:
        for start in tl.static_range(0, N_BYTES, 4096):
            offset = tl.minimum(start + tl.arange(0, 32) * 128, N_BYTES - 1)
            address = (rows[:, None] + offset[None, :]).to(tl.int64)
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
            )


@triton.jit
def half(bits):
    """The value of the f16 in the low 16 bits of int32: f32."""
    return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def dp4a(a, b, c):
    """c plus the sum of the products of four signed bytes of a and b: int32."""
    if ASM:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        c += (a << 24 >> 24) * (b << 24 >> 24) + (a << 16 >> 24) * (b << 16 >> 24)
        return c + (a << 8 >> 24) * (b << 8 >> 24) + (a >> 24) * (b >> 24)


@triton.jit
def scaled_codes(w, OFFSET: tl.constexpr, scale, minimum):
    """`scale * (code - OFFSET) - minimum` of the four signed bytes of w: bf16 in two words of two.

    OFFSET is 0, or the bytes are below 128.
    """
    if ASM:
        # A byte under the exponent 0x43 is 128 plus its low seven bits; its sign alone, or OFFSET, is what to subtract
        if OFFSET > 0:
            less = tl.full(w.shape, OFFSET * 0x01010101, tl.int32)
            more = w
        else:
            less = w & ~0x7F7F7F7F
            more = w & 0x7F7F7F7F
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 a, b, minus;
            mov.b32 minus, 0xBF80BF80;
            prmt.b32 a, $2, 0x43434343, 0x4140;
            prmt.b32 b, $3, 0x43434343, 0x4140;
            fma.rn.bf16x2 a, b, minus, a;
            fma.rn.bf16x2 $0, a, $4, $5;
            prmt.b32 a, $2, 0x43434343, 0x4342;
            prmt.b32 b, $3, 0x43434343, 0x4342;
            fma.rn.bf16x2 a, b, minus, a;
            fma.rn.bf16x2 $1, a, $4, $5;
            }
            """,
            "=&r,=&r,r,r,r,r",
            [more, less, two_bf16(scale, scale), two_bf16(-minimum, -minimum)],
            dtype=(tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        a = scale * ((w << 24 >> 24) - OFFSET).to(tl.float32) - minimum
        b = scale * ((w << 16 >> 24) - OFFSET).to(tl.float32) - minimum
        c = scale * ((w << 8 >> 24) - OFFSET).to(tl.float32) - minimum
        d = scale * ((w >> 24) - OFFSET).to(tl.float32) - minimum
        return two_bf16(a, b), two_bf16(c, d)


@triton.jit
def two_bf16(a, b):
    """A word with a in its low half."""
    low = a.to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.int32)
    return low | (b.to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def _byte_of_table(q, T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr, T3: tl.constexpr):
    """Byte q (0 to 15) of a table of four words, zero-extended."""
    word = tl.where(q < 8, tl.where(q < 4, T0, T1), tl.where(q < 12, T2, T3))
    return (word >> (8 * (q & 3))).to(tl.int32) & 255


@triton.jit
def look_up(w, T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr, T3: tl.constexpr):
    """Table bytes of the eight nibbles of w: int32 words of the four low nibbles' and the four high nibbles'.

    T0 to T3 are the table's 16 bytes as words, lowest entry in the lowest byte.
    """
    if ASM:
        # prmt picks bytes by the low three bits of a nibble, from either half of the table; then by the fourth bit.
        # That gives the nibbles' order, so low and high ones are told apart last.
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 pick, side, a, b, c, d;
            and.b32 pick, $2, 0x77777777;
            shr.u32 side, $2, 1;
            and.b32 side, side, 0x44444444;
            or.b32 side, side, 0x32103210;
            prmt.b32 a, $3, $4, pick;
            prmt.b32 b, $5, $6, pick;
            prmt.b32 a, a, b, side;
            shr.u32 pick, pick, 16;
            shr.u32 side, side, 16;
            prmt.b32 c, $3, $4, pick;
            prmt.b32 d, $5, $6, pick;
            prmt.b32 c, c, d, side;
            prmt.b32 $0, a, c, 0x6420;
            prmt.b32 $1, a, c, 0x7531;
            }
            """,
            "=&r,=&r,r,r,r,r,r",
            [w, _word(T0), _word(T1), _word(T2), _word(T3)],
            dtype=(tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        low = tl.zeros_like(w)
        high = tl.zeros_like(w)
        for i in tl.static_range(4):
            low |= _byte_of_table((w >> (8 * i)) & 15, T0, T1, T2, T3) << (8 * i)
            high |= _byte_of_table((w >> (8 * i + 4)) & 15, T0, T1, T2, T3) << (8 * i)
        return low, high


@triton.jit
def _word(T: tl.constexpr):
    return tl.full([1, 1, 1], T, tl.uint32).to(tl.int32, bitcast=True)
