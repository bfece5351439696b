"""Times causal attention of a whole prompt over an f16 cache, beside PyTorch's own.

    python bench/bench_gpu_kernels.py --only prompt-attention    # as all kernels
    python bench/bench_prompt_attention.py                       # sizes of the kernel's tiles; needs a CUDA device

Each is compared with its reference first, with fewer tokens. Operations counted are those below the diagonal. PyTorch's
are cuDNN and FlashAttention-2, where they take the dimensions, the first of them the reference; MLA's shared keys are
copied to all heads for them before. `first_milliseconds` is the first call with a number of tokens, on the clock, for
cuDNN builds a plan for each.
"""

import time
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from gpu_timing import DEVICE, Call, Report, Row, check, microseconds, randn, synchronize
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from moe_engine.kernels.attention import attention
from moe_engine.kernels.prompt_attention import Tuning, prompt_attention

CHECKED_TOKENS = 300  # not one of those whose first call is timed
LIMIT = 6e-3  # relative error against f32: probabilities are f16, the result bf16
TORCH = {"torch, cuDNN": SDPBackend.CUDNN_ATTENTION, "torch, FlashAttention-2": SDPBackend.FLASH_ATTENTION}


class Heads(NamedTuple):
    name: str
    n_head: int
    n_kv: int
    d: int
    n_rot: int = 0  # of keys that all heads share, beside their own

    def operations(self, n_token: int) -> float:
        return n_token * (n_token + 1) * self.n_head * (2 * self.d + self.n_rot)


HEADS = (
    Heads("Qwen3-30B-A3B", 32, 4, 128),
    Heads("DeepSeek-V2-Lite", 16, 16, 128, 64),
    Heads("DeepSeek-V3", 128, 128, 128, 64),
)
TINY_HEADS = (Heads("tiny", 4, 2, 64), Heads("tiny MLA", 4, 4, 64, 32))


class Inputs(NamedTuple):
    """f16, `[n_token, heads, width]`, the shared key without heads."""

    query: Tensor
    key: Tensor
    value: Tensor
    query_shared: Tensor | None
    key_shared: Tensor | None

    @classmethod
    def random(cls, model: Heads, n_token: int) -> "Inputs":
        q, k, v = (
            randn(n_token, n, model.d, seed=i).half() for i, n in enumerate((model.n_head, model.n_kv, model.n_kv))
        )
        if not model.n_rot:
            return cls(q, k, v, None, None)
        shared = randn(n_token, model.n_head, model.n_rot, seed=3).half(), randn(n_token, model.n_rot, seed=4).half()
        return cls(q, k, v, *shared)

    def whole(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, the shared part in its place."""
        if self.query_shared is None or self.key_shared is None:
            return self.query, self.key, self.value
        shared = self.key_shared[:, None].expand(-1, self.key.shape[1], -1)
        return torch.cat([self.query, self.query_shared], -1), torch.cat([self.key, shared], -1), self.value

    def call(self, tuning: Tuning | None = None) -> Call:
        scale, shared = self.query.shape[-1] ** -0.5, {"query_shared": self.query_shared, "key_shared": self.key_shared}
        return partial(prompt_attention, self.query, self.key, self.value, scale, 0, tuning=tuning, **shared)


def torch_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, backend: SDPBackend) -> Tensor:
    """As `prompt_attention`; keys and values are read where they lie."""
    q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
    with sdpa_kernel(backend):
        mixed = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] > k.shape[1]
        )
    return mixed[0].transpose(0, 1)


def ways(inputs: Inputs) -> Iterator[tuple[str, Call]]:
    """Our kernel, and PyTorch's."""
    yield "prompt attention", inputs.call()
    if DEVICE.type == "cuda":
        whole = inputs.whole()
        for name, backend in TORCH.items():
            yield name, partial(torch_attention, *whole, inputs.query.shape[-1] ** -0.5, backend)


def errors(model: Heads, n_token: int) -> dict[str, float]:
    """Of the ways that take these dimensions."""
    inputs, found = Inputs.random(model, n_token), {}
    q, k, v = (part.float() for part in inputs.whole())
    expected = attention(q, k, v, model.d**-0.5, 0)
    for name, call in ways(inputs):
        try:
            actual = call()
        except RuntimeError as error:
            if name not in TORCH:
                raise
            print(f"{model.name}: {name}: {error}")
            continue
        assert isinstance(actual, Tensor)
        found[name] = check(f"{model.name}, {name}", actual, expected, LIMIT)
    return found


def prompts(report: Report, model: Heads, tokens: tuple[int, ...]) -> None:
    error = errors(model, min(CHECKED_TOKENS, *tokens))
    for n_token in tokens:
        calls = {name: call for name, call in ways(Inputs.random(model, n_token)) if name in error}
        for name, call in calls.items():
            first = first_milliseconds(call)
            shape = f"{model.name}, {n_token} tokens"
            reference = None if name in TORCH else next((calls[other] for other in TORCH if other in calls), None)
            row = report.add(
                name, "f16", shape, [call], error=error[name], operations=model.operations(n_token), reference=reference
            )
            if DEVICE.type == "cuda":
                row["first_milliseconds"] = first


def first_milliseconds(call: Call) -> float:
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return 1e3 * (time.perf_counter() - start)


def results(tiny: bool = False) -> list[Row]:
    report = Report("prompt attention")
    for model in TINY_HEADS if tiny else HEADS:
        prompts(report, model, (20,) if tiny else (512, 2048, 8192, 16384))
    return report.rows


def tune() -> None:
    for model in HEADS[:2]:
        for n_token in (2048, 8192):
            inputs = Inputs.random(model, n_token)
            for sizes in (
                (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (128, 64, 4, 3), (128, 128, 8, 2), (128, 128, 8, 3),
                (128, 32, 8, 4), (128, 32, 4, 4), (64, 64, 4, 3), (64, 128, 4, 2), (64, 128, 4, 3),
            ):  # fmt: skip
                try:
                    taken = microseconds([inputs.call(Tuning(*sizes))], least=3, replays=5)
                except Exception as error:  # too much shared memory
                    print(model.name, n_token, sizes, type(error).__name__, flush=True)
                    continue
                rate = model.operations(n_token) / taken / 1e6
                print(model.name, n_token, sizes, f"{taken:.0f} us, {rate:.0f} TFLOP/s", flush=True)


if __name__ == "__main__":
    tune()
