"""The compiled kernels. Addresses are integers, nothing is checked: use `cpu.CpuKernels`."""

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

def cpu_order(allowed: list[int], system: str = "/sys/devices/system") -> list[int]: ...
def read_memory(pool: ThreadPool, address: int, n_bytes: int, prefetch_distance: int) -> int: ...
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
