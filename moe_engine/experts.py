"""Where routed experts are computed. The model calls `experts(layer, x, ids, weights)` and knows no more.

`CpuExperts` multiplies from the file's blobs in RAM; `CachedExperts` (expert_cache.py) fetches them into VRAM.
"""

from typing import Protocol

from torch import Tensor

from moe_engine.expert_store import ExpertStore
from moe_engine.kernels.cpu import CpuKernels, ExpertHandle
from moe_engine.kernels.quant_tensor import QuantTensor
from moe_engine.prompt_experts import PromptExperts


class Experts(Protocol):
    """The routed experts of all layers. While the model is built, each MoE layer registers its own; then come calls."""

    hits: int  # experts found in VRAM, each counted once per call
    misses: int
    cpu: CpuKernels  # for what the CPU computes
    prompt: PromptExperts | None  # computes those of prompts on a GPU; None: calls do, as for any tokens

    def register(self, layer: int, gate: QuantTensor, up: QuantTensor, down: QuantTensor) -> None:
        """Announces a layer's experts: gate, up `[n_expert, n_ff, hidden]`, down `[n_expert, hidden, n_ff]`."""
        ...

    def __call__(self, layer: int, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of the chosen experts' outputs.

        x: f32 `[n_token, hidden]`. expert_ids: int32 or int64, weights: f32, both `[n_token, top_k]`. Returns f32
        `[n_token, hidden]` on x's device.
        """
        ...

    def fill(self) -> None:
        """Loads experts into the VRAM that is kept for them, in the order of the current stream."""
        ...

    def close(self) -> None:
        """Gives back what is not PyTorch's memory."""
        ...


class CpuExperts:
    """All experts on the CPU, wherever the rest of the model is."""

    def __init__(self, cpu: CpuKernels, store: ExpertStore) -> None:
        self.cpu, self.store = cpu, store
        self.hits = self.misses = 0
        self.prompt: PromptExperts | None = None
        self._layers: dict[int, ExpertHandle] = {}

    def register(self, layer: int, gate: QuantTensor, up: QuantTensor, down: QuantTensor) -> None:
        self._layers[layer] = self.store.register(layer, gate, up, down)

    def __call__(self, layer: int, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        expert_ids = expert_ids.cpu()
        self.misses += len(set(expert_ids.flatten().tolist()))
        return self.cpu.expert_ffn(self._layers[layer], x.cpu(), expert_ids, weights.cpu()).to(x.device)

    def fill(self) -> None:
        pass

    def close(self) -> None:
        self._layers.clear()
        self.store.close()
