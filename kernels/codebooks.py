"""The constant tables that quantized types index into, as int8 arrays for the native library and for Triton.

Source: the ``gguf`` package, whose tables are checked against the format's reference implementation.
"""

from functools import cache

import numpy as np
import numpy.typing as npt
from gguf import quants

from moe_engine.kernels.quant_types import BY_NAME

_GRIDS = {
    BY_NAME["IQ2_XXS"].id: quants.IQ2_XXS,
    BY_NAME["IQ2_XS"].id: quants.IQ2_XS,
    BY_NAME["IQ2_S"].id: quants.IQ2_S,
    BY_NAME["IQ3_XXS"].id: quants.IQ3_XXS,
    BY_NAME["IQ3_S"].id: quants.IQ3_S,
    BY_NAME["IQ1_S"].id: quants.IQ1_S,
    BY_NAME["IQ1_M"].id: quants.IQ1_S,  # shares the grid
}
_VALUES = {
    BY_NAME["IQ4_NL"].id: quants.IQ4_NL,
    BY_NAME["IQ4_XS"].id: quants.IQ4_NL,  # shares the values
    BY_NAME["MXFP4"].id: quants.MXFP4,
    BY_NAME["NVFP4"].id: quants.MXFP4,  # shares the values
}


def has_codebook(type_id: int) -> bool:
    """Whether elements of this type are looked up rather than computed."""
    return type_id in _GRIDS or type_id in _VALUES


@cache
def codebook(type_id: int) -> npt.NDArray[np.int8]:
    """The table of a type that `has_codebook`: int8 `[n_entries, width]`, C-contiguous, read-only.

    A grid's entry holds the `width` (8 or 4) neighbouring elements that one index stands for. The 4-bit types
    have 16 entries of width 1; those of MXFP4 and NVFP4 are twice the E2M1 values.
    """
    if type_id in _VALUES:
        table = np.array(_VALUES[type_id].kvalues, dtype=np.int8).reshape(16, 1)
    else:
        source = _GRIDS[type_id]
        source.init_grid()
        table = np.ascontiguousarray(source.grid.reshape(source.grid_shape), dtype=np.int8)
    table.flags.writeable = False
    return table
