"""Random but valid quantized rows for tests: any bytes, with sane values in the scale fields."""

import numpy as np
import numpy.typing as npt

from moe_engine.kernels.quant_types import QuantType

# Byte offsets of the half-precision scales of a block. IQ1_M, MXFP4 and NVFP4 are handled apart.
_F16_FIELDS: dict[str, tuple[int, ...]] = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "IQ4_NL": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ2_XXS": (0,),
    "IQ2_XS": (0,),
    "IQ2_S": (0,),
    "IQ3_XXS": (0,),
    "IQ3_S": (0,),
    "IQ1_S": (0,),
    "IQ4_XS": (0,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
}


def _random_scales(rng: np.random.Generator, n: int) -> npt.NDArray[np.float16]:
    return (rng.choice([-1.0, 1.0], n) * rng.uniform(0.005, 0.02, n)).astype(np.float16)


def random_blocks(type: QuantType, n_rows: int, n_in: int, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Uint8 `[n_rows, type.row_bytes(n_in)]` that decodes to finite numbers, mostly of size 0.01 to 30."""
    assert n_in % type.block_size == 0, (type, n_in)
    if type.name == "F32":
        return rng.standard_normal((n_rows, n_in), dtype=np.float32).view(np.uint8)
    if type.name == "F16":
        return rng.standard_normal((n_rows, n_in)).astype(np.float16).view(np.uint8)
    if type.name == "BF16":
        bits = rng.standard_normal((n_rows, n_in), dtype=np.float32).view(np.uint32)
        return (bits >> np.uint32(16)).astype(np.uint16).view(np.uint8)

    n_blocks = n_rows * n_in // type.block_size
    blocks = rng.integers(0, 256, (n_blocks, type.block_bytes), dtype=np.uint8)
    for offset in _F16_FIELDS.get(type.name, ()):
        blocks[:, offset : offset + 2] = _random_scales(rng, n_blocks).view(np.uint8).reshape(-1, 2)
    if type.name == "MXFP4":  # one power of two a block
        blocks[:, 0] = rng.integers(118, 128, n_blocks)
    elif type.name == "NVFP4":  # four unsigned 8-bit floats a block
        blocks[:, :4] = rng.integers(0x18, 0x40, (n_blocks, 4))
    elif type.name == "IQ1_M":  # the scale's four nibbles sit on top of four 16-bit words
        bits = _random_scales(rng, n_blocks).view(np.uint16)
        words = blocks[:, 48:56].copy().view(np.uint16) & np.uint16(0x0FFF)
        for word in range(4):
            words[:, word] |= ((bits >> np.uint16(4 * word)) & np.uint16(15)) << np.uint16(12)
        blocks[:, 48:56] = words.view(np.uint8)
    return blocks.reshape(n_rows, type.row_bytes(n_in))
