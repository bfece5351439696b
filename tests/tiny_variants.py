"""What `tiny_models` builds: configurations of the families that matter, and the ways in which files differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

MERGES = ("t h", "Ġ t", "h e", "i n", "th e", "Ġt h", "Ġth e", "o n")
EOS = 256 + len(MERGES)
N_VOCAB = EOS + 3  # odd on purpose; two padding tokens, as converters add when the embedding has more rows


@dataclass(frozen=True)
class FileOptions:
    """How a file differs from what today's converter would write."""

    legacy_mla: bool = False  # one attn_kv_b and the keys of files from before absorbed attention
    flat_mla: bool = False  # attn_k_b and attn_v_b without their third dimension
    fused: bool = False  # ffn_gate_up_exps, attn_qkv
    flat_shared_gate: bool = False  # ffn_gate_inp_shexp {n_embd} instead of {n_embd, 1}
    bare_bias_name: bool = False  # exp_probs_b instead of exp_probs_b.bias
    array_keys: bool = False  # per-layer arrays where a number would do
    next_token_block: bool = False  # one more block, for multi-token prediction, which inference skips
    drop_keys: frozenset[str] = frozenset()
    tensors_per_part: int = 0  # 0: one file
    empty_first_part: bool = False  # the first part holds metadata only


@dataclass(frozen=True)
class Variant:
    """A transformers configuration and the file that is made of it."""

    arch: str  # of the GGUF file
    model_type: str  # of transformers
    hf: Mapping[str, Any] = field(default_factory=dict)
    file: FileOptions = FileOptions()
    keys: Mapping[str, Any] = field(default_factory=dict)  # metadata beyond what the configuration implies


_COMMON: dict[str, Any] = {
    "vocab_size": N_VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 3,
}
# The large epsilon makes it matter; no published model has one like it.
_QWEN = {"num_key_value_heads": 2, "num_experts": 8, "rms_norm_eps": 1e-2, "rope_theta": 10000.0}
FAMILY: dict[str, dict[str, Any]] = {
    "qwen2_moe": _COMMON | _QWEN | {"shared_expert_intermediate_size": 96, "norm_topk_prob": False},
    "qwen3_moe": _COMMON | _QWEN | {"head_dim": 32, "norm_topk_prob": True, "rope_theta": 1000000.0},
    "deepseek_v2": _COMMON
    | {
        "rms_norm_eps": 1e-6,  # transformers norms the latents with 1e-6 whatever this says
        "rope_theta": 10000.0,
        "num_key_value_heads": None,  # as many as heads
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "q_lora_rank": None,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 24,
        "topk_method": "greedy",
        "routed_scaling_factor": 1.0,
    },
}
FAMILY["deepseek_v3"] = FAMILY["deepseek_v2"] | {
    "q_lora_rank": 40,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 0,
}

_YARN = {"rope_type": "yarn", "factor": 40.0, "beta_fast": 32.0, "beta_slow": 1.0}
_YARN_V2 = _YARN | {"mscale": 0.707, "mscale_all_dim": 0.707, "original_max_position_embeddings": 64}
# A small base spreads the correction range (1 to 8 of 8 frequencies here): the ramp itself is tested.
_YARN_V3 = _YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 512}
_V2: dict[str, Any] = {
    "q_lora_rank": 40,
    "topk_method": "group_limited_greedy",
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 6.0,
    "n_shared_experts": 1,
}
_KIMI: dict[str, Any] = {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827}


def _variants() -> Iterator[tuple[str, Variant]]:
    def qwen2(file: FileOptions | None = None, **hf: Any) -> Variant:
        return Variant("qwen2moe", "qwen2_moe", hf, file or FileOptions())

    def qwen3(file: FileOptions | None = None, keys: Mapping[str, Any] | None = None, **hf: Any) -> Variant:
        return Variant("qwen3moe", "qwen3_moe", hf, file or FileOptions(), keys or {})

    def v2(file: FileOptions | None = None, keys: Mapping[str, Any] | None = None, **hf: Any) -> Variant:
        return Variant("deepseek2", "deepseek_v2", hf, file or FileOptions(), keys or {})

    def v3(file: FileOptions | None = None, **hf: Any) -> Variant:
        return Variant("deepseek2", "deepseek_v3", hf, file or FileOptions())

    yield "qwen2moe/plain", qwen2()
    yield "qwen2moe/mha", qwen2(num_key_value_heads=4)
    yield "qwen2moe/mqa", qwen2(num_key_value_heads=1, num_experts_per_tok=2)
    yield "qwen2moe/flat-gate", qwen2(FileOptions(flat_shared_gate=True))
    yield "qwen2moe/fused", qwen2(FileOptions(fused=True))
    yield "qwen2moe/tied", qwen2(tie_word_embeddings=True)
    yield "qwen2moe/all-experts", qwen2(num_experts_per_tok=8)
    yield (
        "qwen2moe/few-keys",  # the sizes stand in the tensors, too
        qwen2(
            FileOptions(drop_keys=frozenset({"expert_shared_feed_forward_length", "vocab_size"})),
            shared_expert_intermediate_size=40,
        ),
    )
    yield (
        "qwen2moe/linear-rope",
        qwen2(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}),
    )

    yield "qwen3moe/plain", qwen3()
    yield "qwen3moe/tied", qwen3(tie_word_embeddings=True)
    yield "qwen3moe/fused", qwen3(FileOptions(fused=True))
    yield "qwen3moe/gqa-3", qwen3(num_attention_heads=6, num_key_value_heads=2, hidden_size=96, head_dim=16)
    yield "qwen3moe/gqa-8", qwen3(num_attention_heads=8, num_key_value_heads=1, head_dim=16)
    yield "qwen3moe/arrays", qwen3(FileOptions(array_keys=True))
    yield "qwen3moe/one-expert", qwen3(num_experts_per_tok=1)
    yield "qwen3moe/16-of-24", qwen3(num_experts=24, num_experts_per_tok=16, moe_intermediate_size=24)
    yield "qwen3moe/norm-key", qwen3(keys={"expert_weights_norm": True, "expert_gating_func": 1})
    yield (
        "qwen3moe/yarn",
        qwen3(rope_parameters=_YARN | {"factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}),
    )
    yield "qwen3moe/split", qwen3(FileOptions(tensors_per_part=14))
    yield "qwen3moe/split-empty-first", qwen3(FileOptions(tensors_per_part=20, empty_first_part=True))

    yield "deepseek2/v2-lite", v2()
    yield "deepseek2/v2-lite-softmax-key", v2(keys={"expert_gating_func": 1})
    yield "deepseek2/v2-lite-yarn", v2(rope_parameters=_YARN_V2 | {"rope_theta": 10000.0})
    yield "deepseek2/v2-lite-legacy", v2(FileOptions(legacy_mla=True))
    yield (
        "deepseek2/v2-lite-legacy-yarn",
        v2(FileOptions(legacy_mla=True), rope_parameters=_YARN_V2 | {"rope_theta": 1e4}),
    )
    yield "deepseek2/v2-lite-no-shared", v2(n_shared_experts=0)
    yield "deepseek2/v2-lite-two-dense", v2(first_k_dense_replace=2)
    yield "deepseek2/v2-lite-tied", v2(tie_word_embeddings=True)
    yield "deepseek2/v2", v2(**_V2)
    yield "deepseek2/v2-legacy", v2(FileOptions(legacy_mla=True), **_V2)
    yield "deepseek2/v3", v3()
    yield "deepseek2/v3-yarn", v3(rope_parameters=_YARN_V3 | {"rope_theta": 100.0})
    yield "deepseek2/v3-legacy-yarn", v3(FileOptions(legacy_mla=True), rope_parameters=_YARN_V3 | {"rope_theta": 100.0})
    yield "deepseek2/v3-no-dense", v3(first_k_dense_replace=0)
    yield "deepseek2/v3-two-shared", v3(n_shared_experts=2)
    yield "deepseek2/v3-bare-bias", v3(FileOptions(bare_bias_name=True))
    yield "deepseek2/v3-flat-mla", v3(FileOptions(flat_mla=True))
    yield "deepseek2/v3-fused", v3(FileOptions(fused=True))
    yield "deepseek2/v3-next-token-block", v3(FileOptions(next_token_block=True))
    yield "deepseek2/v3-two-layers", v3(num_hidden_layers=2)
    yield "deepseek2/v3-split", v3(FileOptions(tensors_per_part=20))
    yield "deepseek2/kimi", v3(**_KIMI)
    yield "deepseek2/kimi-no-groups", v3(FileOptions(drop_keys=frozenset({"expert_group_count"})), **_KIMI)
    yield "deepseek2/moonlight", v3(q_lora_rank=None, n_shared_experts=2, **_KIMI)


VARIANTS: dict[str, Variant] = dict(_variants())

# Rows of 256 elements wherever the shapes allow it, for the types that come in blocks of 256.
WIDE: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"hidden_size": 256, "moe_intermediate_size": 256, "shared_expert_intermediate_size": 256},
    "qwen3_moe": {"hidden_size": 256, "moe_intermediate_size": 256, "head_dim": 64},
    "deepseek_v2": {"hidden_size": 256, "moe_intermediate_size": 256, "intermediate_size": 256, "kv_lora_rank": 256}
    | {"v_head_dim": 64, "n_shared_experts": 1},
}
WIDE["deepseek_v3"] = WIDE["deepseek_v2"] | {"q_lora_rank": 256}
