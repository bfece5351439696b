"""Hugging Face transformers with accelerate's CPU offload as a contender.

It reads no quantized experts, so it runs random bf16 weights in the file's dimensions, as many layers on the GPU as fit
what ours has used; the others are copied there whenever they are needed.
"""

import contextlib
import gc
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from moe_engine.benchmark.ours import MODEL_FIELDS, Ours
from moe_engine.benchmark.plan import Test
from moe_engine.benchmark.results import Row, Sample
from moe_engine.budget import CUDA_CONTEXT_BYTES
from moe_engine.config import format_size
from moe_engine.errors import CapacityError, ConfigError, UnsupportedModelError
from moe_engine.gguf_file import GGUFFile
from moe_engine.metadata import Metadata

LARGEST = 1 << 35  # bytes in bf16: what copies all of it for a token is not worth waiting for beyond that
_HELP = "--against accelerate needs transformers and accelerate: pip install transformers accelerate"


class Accelerate:
    """Beside `ours`, which has been run before it."""

    def __init__(self, ours: Ours) -> None:
        """Raises `ConfigError` without the packages, `CapacityError` for a large model, `UnsupportedModelError`."""
        try:
            import accelerate
            import transformers
        except ImportError as e:
            raise ConfigError(_HELP) from e
        if ours.load["n_sequence"] not in (None, 1) or ours.routing is not None:
            raise ConfigError("--against accelerate: it runs one sequence with its own routing here")
        nbytes = 2 * ours.facts.model_n_params
        if nbytes > LARGEST:
            raise CapacityError(
                f"--against accelerate: the model takes {format_size(nbytes)} in bf16, expected at most "
                f"{format_size(LARGEST)}: use a smaller model, or --random SHAPE with few --layers"
            )
        self.ours = ours
        self.name = " ".join(part for part in ("accelerate", ours.load.name) if part)
        self.versions = f"transformers {transformers.__version__}, accelerate {accelerate.__version__}"
        self.config = hf_config(GGUFFile(ours.path))
        self.peak_vram = 0
        self._model: Any = None

    def open(self, tests: Sequence[Test]) -> None:
        from accelerate import dispatch_model, infer_auto_device_map
        from transformers import AutoModelForCausalLM

        device = self.ours.machine.device
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        model = AutoModelForCausalLM.from_config(self.config, dtype=torch.bfloat16).eval()
        if device.type == "cuda":
            room = {device.index or 0: max(0, self.ours.peak_vram - CUDA_CONTEXT_BYTES), "cpu": LARGEST}
            places = infer_auto_device_map(model, room, no_split_module_classes=model._no_split_modules)
            model = dispatch_model(model, places, main_device=device.index or 0, force_hooks=True)
        self._model = model
        for test in tests:
            self.run(Test(min(test.n_prompt, 32), min(test.n_gen, 2)), 0)

    @torch.inference_mode()
    def run(self, test: Test, repetition: int) -> Sample:
        generator = torch.Generator().manual_seed(repetition)
        ids = torch.randint(self.config.vocab_size, (1, test.n_ctx), generator=generator)
        ids = ids.to(self.ours.machine.device)

        def feed(first: int, count: int, kept: Any) -> Any:
            part = ids[:, first : first + count]
            return self._model(part, past_key_values=kept, use_cache=True, logits_to_keep=1).past_key_values

        kept, at = feed(0, test.n_depth, None) if test.n_depth else None, test.n_depth
        started = self._now()
        for n in [test.n_prompt] * bool(test.n_prompt) + [1] * test.n_gen:
            kept = feed(at, n, kept)
            at += n
        return Sample(self._now() - started, test.n_token)

    def _now(self) -> float:
        if self.ours.machine.device.type == "cuda":
            torch.cuda.synchronize(self.ours.machine.device)
        return time.perf_counter()

    def close(self) -> None:
        if self._model is not None:
            self.peak_vram = max(self.peak_vram, self.ours.machine.vram_peak())
            self._model = None
            gc.collect()
            if self.ours.machine.device.type == "cuda":
                torch.cuda.empty_cache()

    def row(self, test: Test, samples: Sequence[Sample]) -> Row:
        facts = {name: getattr(self.ours.facts, name) for name in MODEL_FIELDS}
        return {
            "engine": "accelerate",
            "backends": "CUDA" if self.ours.machine.device.type == "cuda" else "CPU",
            **facts,
            "model_size": 2 * self.ours.facts.model_n_params,
            "n_threads": torch.get_num_threads(),
            "type_k": "bf16",
            "type_v": "bf16",
            "n_sequence": 1,
            "routing": "own",
            "options": dict(self.ours.load.options),
            "varied": list(self.ours.load.varied),
            "knob": ["random bf16 weights", self.versions],
            "peak_vram": self.peak_vram or None,
        }


def hf_config(file: GGUFFile) -> Any:
    """A transformers configuration with the dimensions of a file. Raises `ConfigError`, `UnsupportedModelError`."""
    meta = Metadata(file.metadata, file.architecture, str(file.path))
    shapes = {name: info.shape for name, info in file.tensors.items()}
    common: dict[str, Any] = {
        "vocab_size": shapes["token_embd.weight"][0],
        "hidden_size": meta.integer("embedding_length"),
        "intermediate_size": meta.integer("feed_forward_length", 1),
        "moe_intermediate_size": meta.integer("expert_feed_forward_length", 1),
        "num_hidden_layers": meta.integer("block_count"),
        "num_attention_heads": meta.integer("attention.head_count"),
        "num_experts_per_tok": meta.integer("expert_used_count"),
        "max_position_embeddings": meta.integer("context_length"),
        "tie_word_embeddings": False,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if file.architecture in ("qwen2moe", "qwen3moe"):
        common |= {
            "num_key_value_heads": meta.integer("attention.head_count_kv"),
            "num_experts": meta.integer("expert_count"),
            "norm_topk_prob": file.architecture == "qwen3moe",
        }
    if file.architecture == "qwen3moe":
        common["head_dim"] = meta.integer("attention.key_length", 128)
    elif file.architecture == "qwen2moe":
        shared = [shape[0] for name, shape in shapes.items() if name.endswith("ffn_up_shexp.weight")]
        common["shared_expert_intermediate_size"] = shared[0]
    elif file.architecture == "deepseek2":
        rope, groups = meta.integer("rope.dimension_count"), meta.integer("expert_group_count", 1)
        common |= {
            "num_key_value_heads": common["num_attention_heads"],
            "n_routed_experts": meta.integer("expert_count"),
            "n_shared_experts": meta.integer("expert_shared_count"),
            "first_k_dense_replace": meta.integer("leading_dense_block_count", 0, low=0),
            "q_lora_rank": meta.integer("attention.q_lora_rank") if meta.has("attention.q_lora_rank") else None,
            "kv_lora_rank": meta.integer("attention.kv_lora_rank"),
            "qk_rope_head_dim": rope,
            "qk_nope_head_dim": meta.integer("attention.key_length_mla", meta.integer("attention.key_length")) - rope,
            "v_head_dim": meta.integer("attention.value_length_mla", meta.integer("attention.value_length")),
            "n_group": groups,
            "topk_group": meta.integer("expert_group_used_count", 1),
            "topk_method": "greedy" if groups == 1 else "group_limited_greedy",
            "norm_topk_prob": meta.flag("expert_weights_norm", False),
        }
    else:
        raise UnsupportedModelError(f"{file.path}: --against accelerate does not know '{file.architecture}'")
    kind = {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe"}.get(file.architecture, "deepseek_v2")
    if file.architecture == "deepseek2" and any(name.endswith("exp_probs_b.bias") for name in shapes):
        kind = "deepseek_v3"
        common.pop("topk_method")
    with contextlib.suppress(ImportError), warnings.catch_warnings():
        from transformers import AutoConfig

        warnings.simplefilter("ignore")
        return AutoConfig.for_model(kind, **common)
    raise ConfigError(_HELP)
