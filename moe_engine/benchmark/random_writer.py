"""Shapes and types of real models, and the writer of their tensors with random values."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T

Array = np.ndarray[Any, Any]
POOL_BYTES = 64 << 20  # one pool of random blocks per type; tensors are cut from it


@dataclass(frozen=True)
class Shape:
    """A model's dimensions."""

    architecture: str
    n_layer: int
    hidden: int
    n_head: int
    n_ff: int
    n_ff_expert: int
    n_expert: int
    top_k: int
    n_vocab: int
    n_kv_head: int = 1
    n_dense: int = 0
    q_lora: int = 0
    n_shared: int = 0
    scale: float = 1.0
    sigmoid: bool = False


MODELS = {
    "qwen3-30b-a3b": Shape("qwen3moe", 48, 2048, 32, 6144, 768, 128, 8, 151936, n_kv_head=4),
    "qwen3-235b-a22b": Shape("qwen3moe", 94, 4096, 64, 12288, 1536, 128, 8, 151936, n_kv_head=4),
    "deepseek-v2-lite": Shape("deepseek2", 27, 2048, 16, 10944, 1408, 64, 6, 102400, n_dense=1, n_shared=2),
    "deepseek-v3": Shape(
        *("deepseek2", 61, 7168, 128, 18432, 2048, 256, 8, 129280),
        n_dense=3,
        q_lora=1536,
        n_shared=1,
        scale=2.5,
        sigmoid=True,
    ),
}


@dataclass(frozen=True)
class Mix:
    """Types of tensors, much as llama.cpp chooses them; `finer`: every second down, v and output."""

    usual: T
    finer: T
    file_type: int


MIXES = {
    "q4_k_m": Mix(T.Q4_K, T.Q6_K, 15),
    "q5_k_m": Mix(T.Q5_K, T.Q6_K, 17),
    "q6_k": Mix(T.Q6_K, T.Q6_K, 18),
    "q8_0": Mix(T.Q8_0, T.Q8_0, 7),
}
HEAD_DIM = 128  # of the Qwen3 models
QK_NOPE, N_ROT, V_DIM, KV_LORA = 128, 64, 128, 512  # of the DeepSeek models


def random_blocks(qtype: T, rng: np.random.Generator, std: float = 0.02) -> Array:
    """A pool of valid random blocks, uint8, whose values have mean zero and about the deviation `std`."""
    block_bytes = gguf.GGML_QUANT_SIZES[qtype][1]
    blocks = rng.integers(0, 256, size=(POOL_BYTES // block_bytes, block_bytes), dtype=np.uint8)

    def put(offset: int, value: float) -> None:
        blocks[:, offset : offset + 2] = np.frombuffer(np.float16(value).tobytes(), np.uint8)

    if qtype in (T.Q4_K, T.Q5_K):
        middle = 7.5 if qtype == T.Q4_K else 15.5
        d = std / (36.0 * middle * 0.75)
        put(0, d)
        put(2, d * middle)
    elif qtype == T.Q6_K:
        put(208, std / (74.0 * 18.5))
    else:
        put(0, std / 74.0)
    return blocks.reshape(-1)


class Writer:
    """Collects tensor headers, then writes the data in one pass."""

    def __init__(self, shape: Shape, mix: Mix, skew: float, seed: int) -> None:
        self.gguf = gguf.GGUFWriter(None, shape.architecture)
        self.mix, self.skew = mix, skew
        self.rng = np.random.default_rng(seed)
        types = sorted({mix.usual, mix.finer, T.Q8_0})
        self.pools = {t: random_blocks(t, self.rng) for t in types}
        self.todo: list[tuple[T, tuple[int, ...]] | Array] = []

    def quant(self, name: str, qtype: T, *shape: int) -> None:
        """Random blocks; a row length that does not fit the type falls back to Q8_0, as in real files."""
        if shape[-1] % gguf.GGML_QUANT_SIZES[qtype][0]:
            qtype = T.Q8_0
        block, block_bytes = gguf.GGML_QUANT_SIZES[qtype]
        byte_shape = (*shape[:-1], shape[-1] // block * block_bytes)
        nbytes = int(np.prod(byte_shape))
        self.gguf.add_tensor_info(name, byte_shape, np.dtype(np.uint8), nbytes, raw_dtype=qtype)
        self.todo.append((qtype, byte_shape))

    def floats(self, name: str, values: Array) -> None:
        values = np.ascontiguousarray(values, np.float32)
        self.gguf.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
        self.todo.append(values)

    def ones(self, name: str, n: int) -> None:
        self.floats(name, np.ones(n))

    def router(self, name: str, n_expert: int, hidden: int) -> None:
        rows = self.rng.standard_normal((n_expert, hidden)) * 0.05
        if self.skew:
            rank = self.rng.permutation(n_expert) + 1.0
            rows *= (rank**-self.skew)[:, None] * (n_expert**self.skew / 2)
        self.floats(name, rows)

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(item.nbytes if isinstance(item, np.ndarray) else int(np.prod(item[1])) for item in self.todo)

    def finish(self, path: Path, progress: Callable[[int, int], None]) -> None:
        done, total = 0, self.nbytes
        try:
            self.gguf.write_header_to_file(path)
            self.gguf.write_kv_data_to_file()
            self.gguf.write_ti_data_to_file()
            for item in self.todo:
                data = item if isinstance(item, np.ndarray) else self._cut(*item)
                self.gguf.write_tensor_data(data)
                done += data.nbytes
                progress(done, total)
        finally:
            self.gguf.close()

    def _cut(self, qtype: T, byte_shape: tuple[int, ...]) -> Array:
        pool, nbytes = self.pools[qtype], int(np.prod(byte_shape))
        block_bytes = gguf.GGML_QUANT_SIZES[qtype][1]
        start = int(self.rng.integers(0, pool.size // block_bytes)) * block_bytes if nbytes < pool.size else 0
        repeats = -(-(nbytes + start) // pool.size)
        return np.tile(pool, repeats)[start : start + nbytes].reshape(byte_shape)


def write_tokenizer(w: gguf.GGUFWriter, n_vocab: int) -> None:
    """A byte-level vocabulary with a few merges, padded with unused tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    characters = {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(others)}}
    tokens = [characters[b] for b in range(256)]
    letters = "etaoinsrhldc"
    merges = [f"{a} {b}" for a in letters for b in letters]
    tokens += [merge.replace(" ", "") for merge in merges]
    types = [1] * len(tokens) + [5] * (n_vocab - len(tokens))
    tokens += [f"<|unused_{i}|>" for i in range(n_vocab - len(tokens))]
    tokens[-1], types[-1] = "<|endoftext|>", 3
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("qwen2")
    w.add_token_list(tokens)
    w.add_token_types(types)
    w.add_token_merges(merges)
    w.add_eos_token_id(n_vocab - 1)
    w.add_add_bos_token(False)


def write_common(w: gguf.GGUFWriter, name: str, s: Shape, mix: Mix) -> None:
    w.add_name(name)
    w.add_block_count(s.n_layer)
    w.add_embedding_length(s.hidden)
    w.add_feed_forward_length(s.n_ff)
    w.add_head_count(s.n_head)
    w.add_head_count_kv(s.n_kv_head)
    w.add_layer_norm_rms_eps(1e-6)
    w.add_expert_count(s.n_expert)
    w.add_expert_used_count(s.top_k)
    w.add_expert_feed_forward_length(s.n_ff_expert)
    w.add_file_type(mix.file_type)
    write_tokenizer(w, s.n_vocab)


def write_experts(out: Writer, prefix: str, s: Shape, layer: int) -> None:
    usual, down = out.mix.usual, out.mix.finer if layer % 2 else out.mix.usual
    out.router(prefix + "ffn_gate_inp.weight", s.n_expert, s.hidden)
    out.quant(prefix + "ffn_gate_exps.weight", usual, s.n_expert, s.n_ff_expert, s.hidden)
    out.quant(prefix + "ffn_up_exps.weight", usual, s.n_expert, s.n_ff_expert, s.hidden)
    out.quant(prefix + "ffn_down_exps.weight", down, s.n_expert, s.hidden, s.n_ff_expert)


def write_dense(out: Writer, prefix: str, s: Shape, n_ff: int, suffix: str = "") -> None:
    out.quant(f"{prefix}ffn_gate{suffix}.weight", out.mix.usual, n_ff, s.hidden)
    out.quant(f"{prefix}ffn_up{suffix}.weight", out.mix.usual, n_ff, s.hidden)
    out.quant(f"{prefix}ffn_down{suffix}.weight", out.mix.usual, s.hidden, n_ff)


def write_qwen3(out: Writer, s: Shape) -> None:
    w, query, key = out.gguf, s.n_head * HEAD_DIM, s.n_kv_head * HEAD_DIM
    w.add_context_length(40960)
    w.add_key_length(HEAD_DIM)
    w.add_value_length(HEAD_DIM)
    w.add_rope_freq_base(1e6)
    for layer in range(s.n_layer):
        p = f"blk.{layer}."
        for name, n in (("attn", s.hidden), ("ffn", s.hidden), ("attn_q", HEAD_DIM), ("attn_k", HEAD_DIM)):
            out.ones(f"{p}{name}_norm.weight", n)
        out.quant(p + "attn_q.weight", out.mix.usual, query, s.hidden)
        out.quant(p + "attn_k.weight", out.mix.usual, key, s.hidden)
        out.quant(p + "attn_v.weight", out.mix.finer, key, s.hidden)
        out.quant(p + "attn_output.weight", out.mix.usual, s.hidden, query)
        write_experts(out, p, s, layer)


def write_deepseek(out: Writer, s: Shape) -> None:
    w, query = out.gguf, s.n_head * (QK_NOPE + N_ROT)
    w.add_context_length(163840)
    w.add_vocab_size(s.n_vocab)
    w.add_rope_freq_base(10000.0)
    w.add_leading_dense_block_count(s.n_dense)
    if s.q_lora:
        w.add_q_lora_rank(s.q_lora)
    w.add_kv_lora_rank(KV_LORA)
    w.add_key_length(KV_LORA + N_ROT)
    w.add_value_length(KV_LORA)
    w.add_key_length_mla(QK_NOPE + N_ROT)
    w.add_value_length_mla(V_DIM)
    w.add_rope_dimension_count(N_ROT)
    w.add_expert_shared_count(s.n_shared)
    w.add_expert_weights_scale(s.scale)
    w.add_expert_weights_norm(s.sigmoid)
    w.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID if s.sigmoid else gguf.ExpertGatingFuncType.SOFTMAX)
    if s.sigmoid:
        w.add_expert_group_count(8)
        w.add_expert_group_used_count(4)
    w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    w.add_rope_scaling_factor(40.0)
    w.add_rope_scaling_orig_ctx_len(4096)
    w.add_rope_scaling_yarn_log_mul(0.1 if s.sigmoid else 0.0707)
    for layer in range(s.n_layer):
        p = f"blk.{layer}."
        out.ones(p + "attn_norm.weight", s.hidden)
        out.ones(p + "ffn_norm.weight", s.hidden)
        if s.q_lora:
            out.quant(p + "attn_q_a.weight", out.mix.usual, s.q_lora, s.hidden)
            out.ones(p + "attn_q_a_norm.weight", s.q_lora)
            out.quant(p + "attn_q_b.weight", out.mix.usual, query, s.q_lora)
        else:
            out.quant(p + "attn_q.weight", out.mix.usual, query, s.hidden)
        out.quant(p + "attn_kv_a_mqa.weight", T.Q8_0, KV_LORA + N_ROT, s.hidden)
        out.ones(p + "attn_kv_a_norm.weight", KV_LORA)
        out.quant(p + "attn_k_b.weight", T.Q8_0, s.n_head, KV_LORA, QK_NOPE)
        out.quant(p + "attn_v_b.weight", T.Q8_0, s.n_head, V_DIM, KV_LORA)
        out.quant(p + "attn_output.weight", out.mix.usual, s.hidden, s.n_head * V_DIM)
        if layer < s.n_dense:
            write_dense(out, p, s, s.n_ff)
            continue
        if s.sigmoid:
            out.floats(p + "exp_probs_b.bias", np.zeros(s.n_expert))
        write_experts(out, p, s, layer)
        write_dense(out, p, s, s.n_shared * s.n_ff_expert, "_shexp")
