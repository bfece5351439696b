"""How much RAM routed experts may take: all of them, or a limit below which the rest stays on disk.

Layers that are placed on disk (placement.py) have a window of their own, as large as one step needs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_engine.config import EngineConfig, format_size, parse_size
from moe_engine.errors import CapacityError
from moe_engine.gguf_file import GGUFFile
from moe_engine.kernels.slot_layout import aligned
from moe_engine.metadata import Metadata
from moe_engine.placement import Home, block_of, is_expert

SPARE_RAM_BYTES = 2 << 30  # without a budget, left to everything else on the machine
SPARE_PART = 8  # one part in so many of a budget is left for what the process takes later
_PAGE = 4096


@dataclass(frozen=True)
class RamPlan:
    """Bytes.

    routed: all routed experts. dense: everything else in the file. limit: for experts that are not placed on disk, None
    where those are all to be in RAM. process: what the whole process may have resident, 0 where only `limit` counts;
    `limit` then follows what the process takes. least: what one step's experts need, whatever the process takes.
    disk_layers: that are placed on disk, by block; placed_on_disk: their experts; window: RAM that those pass through.
    """

    routed: int
    dense: int
    limit: int | None
    process: int
    least: int
    disk_layers: frozenset[int] = frozenset()
    placed_on_disk: int = 0
    window: int = 0

    @property
    def holds_all(self) -> bool:
        """Whether all experts are in RAM that are not placed on disk."""
        return self.limit is None

    @property
    def on_disk(self) -> int:
        """Experts that RAM does not hold: placed there, and what the limit leaves out."""
        others = self.routed - self.placed_on_disk
        return self.placed_on_disk + (0 if self.limit is None else max(0, others - self.limit))


def plan_ram(
    file: GGUFFile,
    meta: Metadata,
    n_layer: int,
    config: EngineConfig,
    homes: Mapping[int, Home],
    besides: int,
    *,
    dense_in_ram: bool,
    available: int | None = None,
) -> RamPlan:
    """n_layer: that are used; more may be in the file. homes: of placed layers' experts, by block. besides: bytes that
    the process will take besides weights (budget.host_bytes). dense_in_ram: the other weights stay in RAM too, as on
    the CPU. available: bytes that can be taken, where that is another machine.

    Raises `CapacityError`, with what would do, where not even one step's experts fit, `ConfigError` for a bad budget.
    """
    n_expert = meta.integer("expert_count")
    sizes = _expert_bytes(file, n_layer, n_expert)
    routed, dense = n_expert * sum(sizes.values()), file.nbytes - n_expert * sum(sizes.values())
    held = besides + (dense if dense_in_ram else 0)
    disk_layers = frozenset(layer for layer in sizes if homes.get(layer) == "disk")
    on_disk = [nbytes for layer, nbytes in sizes.items() if layer in disk_layers]
    others = [nbytes for layer, nbytes in sizes.items() if layer not in disk_layers]

    def least_for(sizes: Sequence[int], n_sequence: int) -> int:
        """Twice, because half of the limit may be held by one caller; two experts may be on their way to slots."""
        n_choice = min(n_expert, meta.integer("expert_used_count") * n_sequence)
        return 2 * (n_choice + 2) * (-(-max(sizes) // _PAGE) + 2) * _PAGE if sizes else 0

    least, window = least_for(others, config.n_sequence), least_for(on_disk, config.n_sequence)
    needed = min(least, n_expert * sum(others)) + window
    if config.ram_budget is None:
        available = available_ram_bytes() if available is None else available
        limit, process = max(available - held - SPARE_RAM_BYTES, available // 2 - held), 0
        terms = f"{format_size(available)} of RAM are available"
        terms += f", of which the rest of the model takes {format_size(held)}" if held else ""
        enough = min(needed + held + SPARE_RAM_BYTES, 2 * (needed + held))
        remedy = f"{(enough >> 20) + 1}MiB of available RAM"
    else:
        budget = parse_size(config.ram_budget)
        taken, spare = process_bytes() + held, budget // SPARE_PART
        limit, process = budget - taken - spare, budget - spare
        terms = (
            f"ram_budget is {format_size(budget)}, of which the process takes {format_size(taken)} without routed "
            f"experts, but with all that the context and a micro-batch may need, and {format_size(spare)} are kept for "
            "what it needs later"
        )
        enough = (needed + taken) * SPARE_PART // (SPARE_PART - 1)
        remedy = f"ram_budget {(enough >> 20) + 1}MiB"
    placed = disk_layers, n_expert * sum(on_disk), window
    if n_expert * sum(others) + window <= limit:
        return RamPlan(routed, dense, None, 0, least, *placed)
    if limit < least + window:
        alone = least_for(others, 1) + least_for(on_disk, 1)
        remedies = [remedy, *(["n_sequence 1"] if alone <= limit else [])]
        raise CapacityError(
            f"{file.path}: {terms}; one step's experts need {format_size(needed)}. "
            f"What would do: {', or '.join(remedies)}"
        )
    return RamPlan(routed, dense, limit - window, process, least, *placed)


def check_loaded(ram: RamPlan, config: EngineConfig, on_demand: int) -> None:
    """Checks what `plan_ram` cannot know before loading, such as a GPU driver's memory.

    on_demand: bytes of experts that are in RAM and can leave it.

    Raises `CapacityError`, with a budget that would do, where the process has taken so much that even one step's
    experts exceed `ram_budget`.
    """
    if config.ram_budget is None:
        return
    budget = parse_size(config.ram_budget)
    taken = process_bytes() - on_demand + ram.window + (0 if ram.holds_all else ram.least)
    if taken > budget:
        enough = taken * SPARE_PART // (SPARE_PART - 1)
        raise CapacityError(
            f"ram_budget is {format_size(budget)}, but once the model is loaded the process takes {format_size(taken)} "
            f"with the experts that have to be in RAM. What would do: ram_budget {(enough >> 20) + 1}MiB"
        )


def _expert_bytes(file: GGUFFile, n_layer: int, n_expert: int) -> dict[int, int]:
    """Of one expert, by block."""
    layers: dict[int, int] = {}
    for info in file.tensors.values():
        block = block_of(info.name)
        if is_expert(info.name) and 0 <= block < n_layer:
            layers[block] = layers.get(block, 0) + aligned(info.nbytes // n_expert)
    return layers


def available_ram_bytes() -> int:
    """What can be taken without swapping, by the system's estimate, and by the limit of the control group."""
    found = [
        int(line.split()[1]) << 10
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable:")
    ]
    group = Path("/sys/fs/cgroup")
    try:  # version 2; a container sees its own group here
        limit, used = (group / "memory.max").read_text().strip(), int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        if limit != "max":
            found.append(int(limit) - used + int(stat.get("inactive_file", 0)))
    except (OSError, ValueError):
        pass
    return max(0, min(found, default=0))


def process_bytes() -> int:
    """Resident size of this process, mapped file pages included."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    return 0
