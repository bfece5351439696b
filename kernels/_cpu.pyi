"""The compiled kernels. Addresses are integers, nothing is checked: use `cpu.CpuKernels`."""

from collections.abc import Mapping, Sequence

import torch

class ThreadPool:
    def __init__(self, n_threads: int, spin_microseconds: int = 100, pin: bool = True) -> None: ...
    @property
    def n_threads(self) -> int: ...

class ExpertLayer:
    def __init__(
        self,
        gate_ptr: int,
        gate_type: int,
        gate_expert_stride: int,
        up_ptr: int,
        up_type: int,
        up_expert_stride: int,
        down_ptr: int,
        down_type: int,
        down_expert_stride: int,
        n_expert: int,
        hidden: int,
        n_ff: int,
    ) -> None: ...
    def read_from(self, memory: ExpertMemory, layer: int) -> None: ...

class MemoryCounts:
    limit: int
    resident_bytes: int
    most_resident_bytes: int
    n_resident: int
    n_reading: int
    n_held: int
    n_read: int
    n_dropped: int

class ExpertMemory:
    def __init__(
        self,
        n_expert: int,
        limit: int,
        process: int,
        least: int,
        n_thread: int,
        chunk_bytes: int = 4 << 20,
        direct: bool = True,
    ) -> None: ...
    def add_file(self, path: str) -> int: ...
    def add_layer(self, slot_bytes: int, parts: list[tuple[int, int, int, int, int]]) -> int: ...
    def add_cached(self, file: int, offset: int, n_bytes: int) -> None: ...
    def preload(self) -> None: ...
    def wait(self, seconds: float) -> bool: ...
    def region(self, layer: int, n_bytes: int) -> torch.Tensor: ...
    def is_read(self, layer: int) -> bool: ...
    def bytes_done(self) -> int: ...
    def bytes_total(self) -> int: ...
    def hold(self, layer: int, experts: list[int]) -> None: ...
    def release(self, layer: int, experts: list[int]) -> None: ...
    def prefetch(self, layer: int, experts: list[int]) -> None: ...
    def at_once(self, layer: int) -> int: ...
    def counts(self) -> MemoryCounts: ...
    def check_integrity(self) -> None: ...
    def stop(self) -> None: ...

def cpu_order(allowed: list[int], system: str = "/sys/devices/system") -> list[int]: ...
def memory_nodes(system: str = "/sys/devices/system") -> list[int]: ...
def host_buffer(n_bytes: int, system: str = "/sys/devices/system") -> torch.Tensor: ...
def read_memory(pool: ThreadPool, address: int, n_bytes: int, prefetch_distance: int) -> int: ...
def copy_rows(
    to: int, from_: int, row_bytes: int, rows: Sequence[int], rows_at_once: int, stream: int | None
) -> int: ...
def copy_memory(pool: ThreadPool, to: int, source: int, n_bytes: int) -> None: ...
def available_tiers() -> list[str]: ...
def tier() -> str: ...
def set_tier(name: str) -> None: ...
def set_codebook(type_id: int, address: int, n_bytes: int) -> None: ...
def dequantize(
    pool: ThreadPool, type_id: int, src: int, n_rows: int, n_in: int, row_stride_bytes: int, dst: int
) -> None: ...
def matmul(
    pool: ThreadPool,
    type_id: int,
    weight: int,
    batch_stride_bytes: int,
    row_stride_bytes: int,
    n_batch: int,
    n_out: int,
    n_in: int,
    x: int,
    n_tokens: int,
    y: int,
    float_activations: bool,
) -> None: ...
def expert_ffn(
    pool: ThreadPool,
    layer: ExpertLayer,
    x: int,
    n_tokens: int,
    expert_ids: int,
    top_k: int,
    weights: int,
    out: int,
    float_activations: bool,
) -> bool: ...

class BackgroundFfn:
    def __init__(self, pool: ThreadPool) -> None: ...
    def begin(
        self,
        layer: ExpertLayer,
        x: int,
        n_tokens: int,
        expert_ids: int,
        top_k: int,
        weights: int,
        only: Sequence[int],
        out: int,
        float_activations: bool,
    ) -> None: ...
    def finish(self) -> float: ...

# The decode worker: use `worker.DecodeWorker`. An expert's key is layer * n_expert + expert.

class PolicySettings:
    def __init__(self, name: str, admit: str, values: Mapping[str, float]) -> None: ...

def replay(
    policy: PolicySettings,
    ids: int,
    n_token: int,
    n_layer: int,
    top_k: int,
    first_layer: int,
    n_model_layer: int,
    n_expert: int,
    n_slot: int,
    residents: list[int],
    unbound: bool,
    hits: int,
    fetched: int,
) -> None: ...

class SlotCache:
    def __init__(self, n_expert: int, slot_class: list[int], n_slot: list[int], policy: PolicySettings) -> None: ...
    def key(self, layer: int, expert: int) -> int: ...
    def resident(self, key: int) -> bool: ...
    def slot(self, key: int) -> int: ...
    def begin_layer_step(self, layer: int, experts: list[int], step: int) -> None: ...
    def end_layer_step(self) -> None: ...
    def seed(self, key: int, uses: float) -> None: ...
    def keep(self, key: int) -> None:
        """Until the end of the layer step this expert is not evicted."""
    def reserve(self, key: int, evict: str = "any", least_more_uses: float = ...) -> tuple[int, int]:
        """least_more_uses: how many more than its victim the expert must have had lately, if evict is "worse"."""
    def complete(self, key: int, filled: bool = False) -> None: ...
    def cancel(self, key: int) -> None: ...
    def release(self, key: int) -> None: ...
    def residents(self, layer: int) -> list[tuple[int, int]]: ...
    def counts(self, slot_class: int) -> tuple[int, int, int]: ...
    def check_integrity(self) -> None: ...

class CopyEngine:
    def submit(self, copies: list[tuple[int, int, int]]) -> int: ...
    def poll(self) -> float | None: ...
    def stop(self) -> None: ...

class HostCopyEngine(CopyEngine):
    def __init__(self, held: bool = False) -> None: ...
    def release(self, n_batch: int) -> None: ...

class ThrottledCopyEngine(CopyEngine):
    def __init__(self, engine: CopyEngine, bytes_per_second: float) -> None: ...

class CudaCopyEngine(CopyEngine):
    def __init__(self, device: int) -> None: ...

class Rates:
    def __init__(
        self,
        cpu: float,
        cpu_beside_copies: float,
        copy: float,
        copy_beside_cpu: float,
        cpu_fixed: float,
        copy_fixed: float,
    ) -> None: ...
    @property
    def cpu(self) -> float: ...
    @property
    def cpu_beside_copies(self) -> float: ...
    @property
    def copy(self) -> float: ...
    @property
    def price_of_copy(self) -> float:
        """Misses that the CPU could compute in the time that it loses to one copy beside it."""
    @property
    def copy_beside_cpu(self) -> float: ...

class Mailbox:
    x_block: int
    y_block: int
    def __init__(
        self,
        n_layer: int,
        top_k: int,
        hidden: int,
        max_batch: int,
        messages: int,
        tokens: int,
        x: int,
        x_checks: int,
        answer_numbers: int,
        answer: int,
        y: int,
        control: int,
    ) -> None: ...
    @property
    def message_bytes(self) -> int: ...
    @property
    def token_bytes(self) -> int: ...
    @property
    def answer_bytes(self) -> int: ...

class WorkerLayer:
    def __init__(
        self,
        experts: ExpertLayer,
        parts: list[tuple[int, int, int, int]],
        slot_class: int,
        slots: int,
        slot_bytes: int,
        table: int,
    ) -> None: ...

class StepTokens:
    @property
    def tokens(self) -> list[int]: ...
    @property
    def bad(self) -> bool:
        """The logits were not finite."""

class WorkerStats:
    @property
    def steps(self) -> int: ...
    @property
    def hits(self) -> list[int]:
        """Pairs by layer, as the GPU reported them."""
    @property
    def misses(self) -> list[int]: ...
    @property
    def cpu_experts(self) -> int: ...
    @property
    def cpu_bytes(self) -> int: ...
    @property
    def fetched_now(self) -> int: ...
    @property
    def fetched_background(self) -> int: ...
    @property
    def copied_bytes(self) -> int: ...
    @property
    def fetched_used(self) -> int:
        """Fetched experts that were used at least once."""
    @property
    def fetched_unused(self) -> int:
        """Fetched experts that were evicted before any use."""
    @property
    def cpu_ns(self) -> int: ...
    @property
    def copy_wait_ns(self) -> int:
        """How long answers waited for copies after the CPU was done."""
    @property
    def expected(self) -> list[int]:
        """Experts by layer that were expected to be missed. This and the next two: where there was a prediction."""
    @property
    def missed_experts(self) -> list[int]: ...
    @property
    def foreseen(self) -> list[int]:
        """Experts that were expected to be missed, and were."""
    @property
    def pulled_bytes(self) -> int:
        """Into the CPU's caches, ahead of use."""
    @property
    def prefetched(self) -> list[int]:
        """Predicted experts fetched into slots, by layer."""
    @property
    def prefetched_in_time(self) -> list[int]: ...
    @property
    def prefetched_late(self) -> list[int]:
        """Chosen as predicted, but not there yet."""
    @property
    def timed(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Steps that followed another without delay, and their nanoseconds: without and with prefetch."""
    @property
    def timed_late(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The same steps: without and with misses that the GPU may compute late."""
    @property
    def timed_pulled(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The same steps: without and with pulling into the CPU's caches."""
    @property
    def rates(self) -> Rates: ...

class DecodeWorker:
    def __init__(
        self,
        pool: ThreadPool,
        copies: CopyEngine,
        mailbox: Mailbox,
        n_expert: int,
        layers: list[WorkerLayer],
        n_slot: list[int],
        slot_numbers: int,
        policy: PolicySettings,
        mode: str,
        max_background: int,
        float_activations: bool,
        rates: Rates,
        stall_seconds: float,
        lookahead_bytes: int,
        fill_bytes: int,
    ) -> None: ...
    def stop(self) -> None: ...
    def expect(self, step: int, n_token: int, allow_late: bool, posted: bool, pull: bool, idle: bool) -> None: ...
    def wait_tokens(self, step: int, seconds: float) -> StepTokens | None: ...
    def settle(self, seconds: float) -> int: ...
    def fill(self, best_first: Sequence[tuple[int, int]]) -> None: ...
    def reserve(self, layer: int, expert: int, evict: str) -> tuple[int, int]: ...
    def complete(self, layer: int, expert: int) -> None: ...
    def cancel(self, layer: int, expert: int) -> None: ...
    def release(self, layer: int, expert: int) -> None: ...
    def use_counts(self) -> list[float]: ...
    def seed(self, counts: Sequence[float]) -> None: ...
    def residents(self, layer: int) -> list[tuple[int, int]]: ...
    def check_integrity(self) -> None: ...
    def stats(self) -> WorkerStats: ...
    def reset_stats(self) -> None: ...
    def timeline(self) -> bytes: ...
    def copies(self) -> bytes: ...
