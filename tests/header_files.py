"""Files of real models' shapes without their bytes: sparse, all weights zero."""

from pathlib import Path
from unittest.mock import patch

import numpy as np

from moe_engine.benchmark import random_model, random_writer
from moe_engine.benchmark.random_writer import MIXES, Array, Writer


def write_header(name: str, path: Path, layers: int | None = None) -> None:
    """Of `MODELS[name]` as Q4_K_M, or of its first `layers` layers."""
    shape, mix = random_model._shape(name, layers), MIXES["q4_k_m"]
    with patch.object(random_writer, "random_blocks", lambda *arguments: np.empty(0, np.uint8)):
        out = Writer(shape, mix, 0.0, 0)
    random_writer.write_common(out.gguf, name, shape, mix)
    out.quant("token_embd.weight", mix.usual, shape.n_vocab, shape.hidden)
    (random_writer.write_qwen3 if shape.architecture == "qwen3moe" else random_writer.write_deepseek)(out, shape)
    out.ones("output_norm.weight", shape.hidden)
    out.quant("output.weight", mix.finer, shape.n_vocab, shape.hidden)
    out.gguf.write_header_to_file(path)
    out.gguf.write_kv_data_to_file()
    out.gguf.write_ti_data_to_file()
    file, alignment = out.gguf.fout[0], out.gguf.data_alignment
    end = out.gguf.ggml_pad(file.tell(), alignment)
    file.truncate(end + sum(out.gguf.ggml_pad(_nbytes(item), alignment) for item in out.todo))
    out.gguf.close()


def _nbytes(item: tuple[object, tuple[int, ...]] | Array) -> int:
    return item.nbytes if isinstance(item, np.ndarray) else int(np.prod(item[1]))
