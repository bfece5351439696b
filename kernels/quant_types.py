"""The tensor types of GGUF files: ids, names and block sizes.

Source: the GGML type enumeration; the test compares this table with the ``gguf`` package's.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class QuantType:
    """One way of storing a row of numbers: consecutive blocks of `block_size` elements, `block_bytes` each."""

    id: int
    name: str
    block_size: int
    block_bytes: int

    def row_bytes(self, n_in: int) -> int:
        """Bytes of a row of `n_in` elements (a multiple of `block_size`)."""
        return n_in // self.block_size * self.block_bytes

    def __str__(self) -> str:
        return self.name


_SUPPORTED = (
    (0, "F32", 1, 4),
    (1, "F16", 1, 2),
    (2, "Q4_0", 32, 18),
    (3, "Q4_1", 32, 20),
    (6, "Q5_0", 32, 22),
    (7, "Q5_1", 32, 24),
    (8, "Q8_0", 32, 34),
    (10, "Q2_K", 256, 84),
    (11, "Q3_K", 256, 110),
    (12, "Q4_K", 256, 144),
    (13, "Q5_K", 256, 176),
    (14, "Q6_K", 256, 210),
    (16, "IQ2_XXS", 256, 66),
    (17, "IQ2_XS", 256, 74),
    (18, "IQ3_XXS", 256, 98),
    (19, "IQ1_S", 256, 50),
    (20, "IQ4_NL", 32, 18),
    (21, "IQ3_S", 256, 110),
    (22, "IQ2_S", 256, 82),
    (23, "IQ4_XS", 256, 136),
    (29, "IQ1_M", 256, 56),
    (30, "BF16", 1, 2),
    (34, "TQ1_0", 256, 54),
    (35, "TQ2_0", 256, 66),
    (39, "MXFP4", 32, 17),
    (40, "NVFP4", 64, 36),
)

QUANT_TYPES: dict[int, QuantType] = {row[0]: QuantType(*row) for row in _SUPPORTED}
BY_NAME: dict[str, QuantType] = {t.name: t for t in QUANT_TYPES.values()}

# Types that may stand in a file (a table of token ids, say) but that no matrix product takes.
PLAIN_TYPES: dict[int, QuantType] = {
    24: QuantType(24, "I8", 1, 1),
    25: QuantType(25, "I16", 1, 2),
    26: QuantType(26, "I32", 1, 4),
    27: QuantType(27, "I64", 1, 8),
    28: QuantType(28, "F64", 1, 8),
}

_RETIRED = {4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 36: "IQ4_NL_4_4"}
_RETIRED |= {37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8"}
_ACTIVATIONS = {9: "Q8_1", 15: "Q8_K"}
_UNSUPPORTED = {41: "Q1_0", 42: "Q2_0"}
_FORK = {133: "Q6_0", 134: "IQ1_BN", 135: "IQ2_BN", 137: "IQ2_K", 138: "IQ3_K", 139: "IQ4_K", 140: "IQ5_K"}
_FORK |= {141: "IQ6_K", 144: "IQ4_KS", 145: "IQ2_KS", 146: "IQ4_KSS", 152: "IQ5_KS", 153: "IQ2_KT"}
_FORK |= {154: "IQ3_KT", 155: "IQ4_KT", 156: "IQ3_KS", 157: "IQ2_KL", 158: "IQ1_KT"}


def why_unsupported(type_id: int) -> str:
    """What to tell a user whose file holds `type_id`, which no matrix product takes."""
    if type_id in PLAIN_TYPES:
        return f"type {PLAIN_TYPES[type_id]} (id {type_id}) cannot be multiplied: expected a float or quantized type"
    if type_id in _RETIRED:
        return f"type {_RETIRED[type_id]} (id {type_id}) was retired from the format: convert the model again"
    if type_id in _ACTIVATIONS:
        return f"type {_ACTIVATIONS[type_id]} (id {type_id}) holds activations, never weights: the file is damaged"
    if type_id in _UNSUPPORTED:
        return f"type {_UNSUPPORTED[type_id]} (id {type_id}) is not supported yet: use another quantization"
    if type_id in _FORK:
        return f"type {_FORK[type_id]} (id {type_id}) exists only in ik_llama.cpp: use a file made for llama.cpp"
    if 200 <= type_id <= 399:
        return f"type id {type_id} is a row-interleaved type of ik_llama.cpp: use a file made for llama.cpp"
    return f"type id {type_id} is unknown: the file is damaged or newer than this version"
