"""Tiny random models: transformers computes the reference, a GGUF file holds the same weights for the engine.

The files are laid out as llama.cpp's converter lays them out (names, shapes, metadata keys), so what reads them
reads published files too. Weights are drawn so that every part of the network matters: logits have a standard
deviation near 1, routers are far from ties, norms and biases are not trivial. After quantizing, the dequantized
values are written back into the transformers model, which therefore stays the exact reference.
"""

from __future__ import annotations

import itertools
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from random_blocks import random_blocks
from tiny_variants import EOS, FAMILY, MERGES, N_VOCAB, VARIANTS, WIDE, FileOptions, Variant
from transformers import AutoConfig, AutoModelForCausalLM

from moe_engine.kernels.quant_types import BY_NAME, QuantType

# Every type that the `gguf` package can quantize to.
WRITABLE = ("Q8_0", "Q4_0", "Q5_1", "BF16", "Q4_1", "F16", "Q5_0")

TypeOf = Callable[[str], str]
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class TinyModel:
    """A GGUF file (its first part, if it is split) and the transformers model with the same weights."""

    path: Path
    hf_model: Any
    config: Any

    def reference(self, ids: Sequence[int], dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """Logits `[len(ids), n_vocab]`."""
        with torch.no_grad():
            logits: torch.Tensor = self.hf_model.to(dtype)(torch.tensor([list(ids)]), use_cache=False).logits[0]
        return logits

    def greedy(self, ids: Sequence[int], n: int, lead: float) -> list[int] | None:
        """The `n` most likely next tokens one after the other; None if one had less than this `lead`."""
        tokens = list(ids)
        for _ in range(n):
            best = self.reference(tokens)[-1].topk(2)
            if best.values[0] - best.values[1] < lead:
                return None
            tokens.append(int(best.indices[0]))
        return tokens[len(ids) :]


# --- building ---------------------------------------------------------------------------------------------------


def make(name: str, directory: Path, types: str | TypeOf = "F32", *, seed: int = 0, **overrides: Any) -> TinyModel:
    """Write variant `name` (see VARIANTS) into `directory`.

    `types`: name of the tensor type of all matrices, or a function from tensor name to type name. `overrides`
    change the transformers configuration; `file=` replaces the variant's FileOptions.
    """
    variant = VARIANTS[name]
    if (file := overrides.pop("file", None)) is not None:
        variant = replace(variant, file=file)
    config = _config(variant, overrides)
    model = _random_model(config, zlib.crc32(name.encode()) + seed)
    directory.mkdir(parents=True, exist_ok=True)
    path = _write(variant, model, config, directory / "tiny.gguf", types, np.random.default_rng(seed))
    return TinyModel(path, model, config)


def wide(name: str) -> dict[str, Any]:
    """Overrides that make variant `name` fit for blocks of 256."""
    return dict(WIDE[VARIANTS[name].model_type])


def in_turn(*names: str) -> TypeOf:
    """Tensor types dealt round: neighbours, and the same tensor of the next layer, get different ones.

    The number of types should have no common divisor with the number of matrices in a layer.
    """
    deal = itertools.cycle(names)
    return lambda _: next(deal)


def _config(variant: Variant, overrides: Mapping[str, Any]) -> Any:
    settings = FAMILY[variant.model_type] | dict(variant.hf) | dict(overrides)
    theta = settings.pop("rope_theta")
    settings.setdefault("rope_parameters", {"rope_type": "default", "rope_theta": theta})
    return AutoConfig.for_model(variant.model_type, **settings)


def _random_model(config: Any, seed: int) -> Any:
    """A transformers model in float32 with the weights described at the top."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about empty matrices, when there are no shared experts
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
    rng = torch.Generator().manual_seed(seed)

    def normal(tensor: torch.Tensor, std: float, mean: float = 0.0) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=rng) * std + mean)

    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            fan_in = max(1, tensor.shape[-1])
            if "inv_freq" in name:
                continue
            if name.endswith("e_score_correction_bias"):
                normal(tensor, 0.2)
            elif name.endswith("bias"):
                normal(tensor, 0.3)
            elif tensor.ndim == 1:
                normal(tensor, 0.2, mean=1.0)
            elif name.endswith("mlp.gate.weight"):
                normal(tensor, 2.5 * fan_in**-0.5)
            elif "embed_tokens" in name and not config.tie_word_embeddings:
                normal(tensor, 1.0)
            elif "embed_tokens" in name or "lm_head" in name:
                normal(tensor, fan_in**-0.5)
            elif "q_proj" in name or "k_proj" in name or "q_b_proj" in name:
                normal(tensor, 1.4 * fan_in**-0.5)
            else:
                normal(tensor, 1.2 * fan_in**-0.5)
    return model.eval()


# --- tensors ----------------------------------------------------------------------------------------------------

# A tensor of the file: views of the model's parameters that stand below each other along the rows. Being views,
# they take the dequantized values back.
Entry = tuple[str, list[torch.Tensor]]

_RENAME = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
    "mlp.shared_expert_gate.weight": "ffn_gate_inp_shexp.weight",
}
_RENAME |= {f"mlp.{part}_proj.weight": f"ffn_{part}.weight" for part in ("gate", "up", "down")}
_RENAME |= {
    f"mlp.{shared}.{part}_proj.weight": f"ffn_{part}_shexp.weight"
    for part in ("gate", "up", "down")
    for shared in ("shared_expert", "shared_experts")
}


def _layer_entries(layer: torch.nn.Module, config: Any, file: FileOptions) -> Iterator[Entry]:
    own = {name: tensor.data for name, tensor in (*layer.named_parameters(), *layer.named_buffers())}
    qkv = [f"self_attn.{part}_proj" for part in "qkv"]
    for kind in ("weight", "bias"):
        parts = [(name[-6], own.pop(f"{name}.{kind}")) for name in qkv if f"{name}.{kind}" in own]
        if file.fused and len(parts) == 3:
            yield f"attn_qkv.{kind}", [tensor for _, tensor in parts]
        else:
            yield from ((f"attn_{part}.{kind}", [tensor]) for part, tensor in parts)
    if (kv_b := own.pop("self_attn.kv_b_proj.weight", None)) is not None:
        yield from _latent_entries(kv_b, config, file)
    if (gate_up := own.pop("mlp.experts.gate_up_proj", None)) is not None:
        if file.fused:
            yield "ffn_gate_up_exps.weight", [gate_up]
        else:
            width = gate_up.shape[1] // 2
            yield "ffn_gate_exps.weight", [gate_up[:, :width]]
            yield "ffn_up_exps.weight", [gate_up[:, width:]]
    if (bias := own.pop("mlp.gate.e_score_correction_bias", None)) is not None:
        yield ("exp_probs_b" if file.bare_bias_name else "exp_probs_b.bias"), [bias]
    if file.flat_shared_gate:
        yield "ffn_gate_inp_shexp.weight", [own.pop("mlp.shared_expert_gate.weight")[0]]
    for name, tensor in own.items():
        if tensor.numel():  # no shared experts: transformers has empty matrices, the file has none
            yield _RENAME[name], [tensor]


def _latent_entries(kv_b: torch.Tensor, config: Any, file: FileOptions) -> Iterator[Entry]:
    """`kv_b`: [n_head * (nope + v), kv_lora]; per head first the key rows, then the value rows."""
    if file.legacy_mla:
        yield "attn_kv_b.weight", [kv_b]
        return
    by_head = kv_b.view(config.num_attention_heads, -1, config.kv_lora_rank)
    keys = by_head[:, : config.qk_nope_head_dim].transpose(1, 2)
    values = by_head[:, config.qk_nope_head_dim :]
    if file.flat_mla:
        yield "attn_k_b.weight", list(keys)
        yield "attn_v_b.weight", list(values)
    else:
        yield "attn_k_b.weight", [keys]
        yield "attn_v_b.weight", [values]


def _entries(model: Any, config: Any, file: FileOptions) -> Iterator[Entry]:
    if not config.tie_word_embeddings:
        yield "output.weight", [model.lm_head.weight.data]
    yield "token_embd.weight", [model.model.embed_tokens.weight.data]
    for index, layer in enumerate(model.model.layers):
        for name, views in _layer_entries(layer, config, file):
            yield f"blk.{index}.{name}", views
    if file.next_token_block:
        extra, width = config.num_hidden_layers, config.hidden_size
        for name, views in _layer_entries(model.model.layers[-1], config, file):
            yield f"blk.{extra}.{name}", [torch.ones_like(view) for view in views]
        yield f"blk.{extra}.nextn.eh_proj.weight", [torch.ones(width, 2 * width)]
        for name in ("enorm", "hnorm", "shared_head_norm"):
            yield f"blk.{extra}.nextn.{name}.weight", [torch.ones(width)]
    yield "output_norm.weight", [model.model.norm.weight.data]


def _encode(array: Array, type_name: str, rng: np.random.Generator) -> Array:
    """`array` (float32) as data of a type; for types that cannot be quantized to, random data of the same scale."""
    qtype = GGMLQuantizationType[type_name]
    if type_name in WRITABLE or type_name == "F32":
        encoded: Array = quantize(array, qtype)
        return encoded
    n_in = array.shape[-1]
    rows = random_blocks(BY_NAME[type_name], array.size // n_in, n_in, rng)
    rows = _scaled(rows, BY_NAME[type_name], float(array.std() / dequantize(rows, qtype).std()))
    return rows.reshape(*array.shape[:-1], -1)


# Byte offsets of a block's half-precision factors; 0 for the types not named.
_FACTORS = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
_FACTORS |= {"TQ1_0": (52,), "TQ2_0": (64,)}


def _scaled(rows: Array, type: QuantType, factor: float) -> Array:
    """Rows of blocks whose values are `factor` times as large."""
    blocks = rows.reshape(-1, type.block_bytes).copy()
    if type.name == "MXFP4":  # a power of two
        blocks[:, 0] = (blocks[:, 0].astype(np.int32) + round(np.log2(factor))).astype(np.uint8)
    elif type.name == "IQ1_M":  # the factor's four digits are spread over four words
        words = np.ascontiguousarray(blocks[:, 48:56]).view(np.uint16)
        shifts = np.arange(0, 16, 4, dtype=np.uint16)
        old = ((words >> np.uint16(12)) << shifts).sum(1, dtype=np.uint16).view(np.float16)
        new = (old.astype(np.float32) * factor).astype(np.float16).view(np.uint16)
        words = (words & np.uint16(0x0FFF)) | ((new[:, None] >> shifts & np.uint16(15)) << np.uint16(12))
        blocks[:, 48:56] = words.view(np.uint8)
    else:
        for offset in _FACTORS.get(type.name, (0,)):
            old = np.ascontiguousarray(blocks[:, offset : offset + 2]).view(np.float16)
            blocks[:, offset : offset + 2] = (old.astype(np.float32) * factor).astype(np.float16).view(np.uint8)
    return blocks.reshape(rows.shape)


def _write(
    variant: Variant, model: Any, config: Any, path: Path, types: str | TypeOf, rng: np.random.Generator
) -> Path:
    file = variant.file
    type_of = types if callable(types) else lambda _: str(types)
    writer = gguf.GGUFWriter(
        path, variant.arch, split_max_tensors=file.tensors_per_part, small_first_shard=file.empty_first_part
    )
    for key, value in _metadata(variant, config).items():
        if key not in file.drop_keys:
            _add_key(writer, f"{variant.arch}.{key}", value)
    _add_tokenizer(writer)
    for name, views in _entries(model, config, file):
        array = np.ascontiguousarray(torch.cat(views).numpy(), np.float32)
        if array.ndim == 1 or "norm" in name or "ffn_gate_inp" in name:
            writer.add_tensor(name, array)
            continue
        type_name = type_of(name)
        if type_name != "F32" and array.shape[-1] % BY_NAME[type_name].block_size:
            type_name = "F16"  # what llama.cpp's quantizer falls back to in the end
        data = _encode(array, type_name, rng)
        qtype = GGMLQuantizationType[type_name]
        values = torch.from_numpy(np.ascontiguousarray(dequantize(data, qtype), np.float32))
        for view, part in zip(views, values.split([len(view) for view in views]), strict=True):
            view.copy_(part)
        writer.add_tensor(name, data, raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    paths = writer.format_shard_names(path)
    writer.close()
    return Path(paths[0])


# --- metadata ---------------------------------------------------------------------------------------------------


def _metadata(variant: Variant, config: Any) -> dict[str, Any]:
    """Metadata keys without the architecture's prefix."""
    file = variant.file
    n_layer = config.num_hidden_layers
    keys: dict[str, Any] = {
        "block_count": n_layer + file.next_token_block,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "vocab_size": config.vocab_size,
    }
    keys |= _rope_keys(variant, config)
    if variant.arch == "deepseek2":
        keys |= _deepseek_keys(variant, config)
    else:
        keys["expert_count"] = config.num_experts
    if variant.arch == "qwen2moe":
        keys["expert_shared_feed_forward_length"] = config.shared_expert_intermediate_size
    if variant.arch == "qwen3moe":
        keys |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    if file.array_keys:
        for key in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"):
            keys[key] = [keys[key]] * n_layer
    if file.next_token_block:
        keys["nextn_predict_layers"] = 1
    return keys | dict(variant.keys)


def _rope_keys(variant: Variant, config: Any) -> dict[str, Any]:
    rope = config.rope_parameters
    keys: dict[str, Any] = {}
    if rope["rope_type"] != "default":
        keys |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": rope["factor"]}
    if rope["rope_type"] == "yarn":
        keys["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        keys["rope.scaling.yarn_beta_fast"] = rope["beta_fast"]
        keys["rope.scaling.yarn_beta_slow"] = rope["beta_slow"]
        if variant.arch == "deepseek2":
            keys["rope.scaling.yarn_log_multiplier"] = 0.1 * rope["mscale_all_dim"]
    return keys


def _deepseek_keys(variant: Variant, config: Any) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "expert_count": config.n_routed_experts,
        "leading_dense_block_count": config.first_k_dense_replace,
        "expert_shared_count": config.n_shared_experts,
        "expert_weights_scale": config.routed_scaling_factor,
        "rope.dimension_count": config.qk_rope_head_dim,
        "attention.kv_lora_rank": config.kv_lora_rank,
    }
    if config.q_lora_rank:
        keys["attention.q_lora_rank"] = config.q_lora_rank
    key_length = config.qk_nope_head_dim + config.qk_rope_head_dim
    if variant.file.legacy_mla:
        keys |= {"attention.key_length": key_length, "attention.value_length": config.v_head_dim}
    else:
        keys |= {
            "attention.head_count_kv": 1,
            "attention.key_length": config.kv_lora_rank + config.qk_rope_head_dim,
            "attention.value_length": config.kv_lora_rank,
            "attention.key_length_mla": key_length,
            "attention.value_length_mla": config.v_head_dim,
        }
    if config.n_group:
        keys |= {"expert_group_count": config.n_group, "expert_group_used_count": config.topk_group}
    if variant.model_type == "deepseek_v3":
        keys |= {"expert_gating_func": 2, "expert_weights_norm": config.norm_topk_prob}
    return keys


def _add_key(writer: Any, key: str, value: Any) -> None:
    """Adds a key with the type that converters use for such a value."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _byte_alphabet() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = itertools.count(256)
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _add_tokenizer(writer: Any) -> None:
    tokens = [*_byte_alphabet(), *(merge.replace(" ", "") for merge in MERGES), "<|endoftext|>"]
    types = [1] * EOS + [3]
    padding = [f"[PAD{index}]" for index in range(len(tokens), N_VOCAB)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens + padding)
    writer.add_token_types(types + [5] * len(padding))
    writer.add_token_merges(list(MERGES))
    writer.add_eos_token_id(EOS)
    writer.add_pad_token_id(EOS)
    writer.add_add_bos_token(False)
