"""How much RAM routed experts may take: all of them, or a limit below which the rest stays on disk."""

from dataclasses import dataclass
from pathlib import Path

from moe_engine.config import EngineConfig, format_size, parse_size
from moe_engine.errors import CapacityError
from moe_engine.gguf_file import GGUFFile
from moe_engine.kernels.slot_layout import aligned
from moe_engine.metadata import Metadata

SPARE_RAM_BYTES = 2 << 30  # without a budget, left to everything else on the machine
SPARE_PART = 8  # one part in so many of a budget is left for what the process takes later
_PAGE = 4096


@dataclass(frozen=True)
class RamPlan:
    """Bytes.

    routed: all routed experts. dense: everything else in the file. limit: for experts, None where they are all to be in
    RAM. process: what the whole process may have resident, 0 where only `limit` counts; `limit` then follows what the
    process takes. least: what one step's experts need, whatever the process takes.
    """

    routed: int
    dense: int
    limit: int | None
    process: int
    least: int

    @property
    def holds_all(self) -> bool:
        return self.limit is None


def plan_ram(
    file: GGUFFile, meta: Metadata, n_layer: int, config: EngineConfig, dense_in_ram: bool, available: int | None = None
) -> RamPlan:
    """n_layer: that are used; more may be in the file. dense_in_ram: the other weights stay in RAM too, as on the CPU.
    available: bytes that can be taken, where that is another machine.

    Raises `CapacityError`, with what would do, where not even one step's experts fit, `ConfigError` for a bad budget.
    """
    n_expert = meta.integer("expert_count")
    sizes = _expert_bytes(file, n_layer, n_expert)
    routed, dense = n_expert * sum(sizes), file.nbytes - n_expert * sum(sizes)
    held = dense if dense_in_ram else 0

    def least_for(n_sequence: int) -> int:
        """Twice, because half of the limit may be held by one caller; one expert on its way to a slot and one spare."""
        n_choice = min(n_expert, meta.integer("expert_used_count") * n_sequence)
        return 2 * (n_choice + 2) * (-(-max(sizes, default=0) // _PAGE) + 2) * _PAGE

    least = least_for(config.n_sequence)
    needed = min(least, routed)
    if config.ram_budget is None:
        available = available_ram_bytes() if available is None else available
        limit, process = max(available - held - SPARE_RAM_BYTES, available // 2 - held), 0
        terms = f"{format_size(available)} of RAM are available"
        terms += f", of which dense weights take {format_size(held)}" if held else ""
        enough = min(needed + held + SPARE_RAM_BYTES, 2 * (needed + held))
        remedy = f"{(enough >> 20) + 1}MiB of available RAM"
    else:
        budget = parse_size(config.ram_budget)
        taken, spare = process_bytes() + held, budget // SPARE_PART
        limit, process = budget - taken - spare, budget - spare
        terms = (
            f"ram_budget is {format_size(budget)}, of which the process takes {format_size(taken)} without routed "
            f"experts and {format_size(spare)} are kept for what it needs later"
        )
        enough = (needed + taken) * SPARE_PART // (SPARE_PART - 1)
        remedy = f"ram_budget {(enough >> 20) + 1}MiB"
    if routed <= limit:
        return RamPlan(routed, dense, None, 0, least)
    if limit < least:
        remedies = [remedy, *(["n_sequence 1"] if least_for(1) <= limit else [])]
        raise CapacityError(
            f"{file.path}: {terms}; one step's experts need {format_size(needed)}. "
            f"What would do: {', or '.join(remedies)}"
        )
    return RamPlan(routed, dense, limit, process, least)


def _expert_bytes(file: GGUFFile, n_layer: int, n_expert: int) -> list[int]:
    """Of one expert, by layer."""
    layers: dict[int, int] = {}
    for info in file.tensors.values():
        name = info.name.split(".")
        if name[0] == "blk" and len(name) > 2 and name[2].endswith("_exps") and name[1].isdecimal():
            layers[int(name[1])] = layers.get(int(name[1]), 0) + aligned(info.nbytes // n_expert)
    return [nbytes for layer, nbytes in layers.items() if layer < n_layer]


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
