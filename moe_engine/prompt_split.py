"""Which experts of a prompt's layer the CPU computes while the others travel to the GPU: a cost model, no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Rates:
    """Bytes and operations per second. The defaults are of a PCIe 5 machine with 16 cores; measured ones replace them.

    Copies to the GPU read the same memory as the CPU: together they get `dram` at most.
    """

    pcie: float = 50e9
    dram: float = 110e9
    cpu: float = 1.5e12  # operations of the CPU's kernels for many tokens
    gpu: float = 250e12  # of the grouped product
    cpu_factor: float = 1.0  # what the CPU's work takes, by the seconds that follow from the above
    hand_over: float = 150e-6  # seconds: tokens to the CPU and its sums back


def cpu_seconds(n_token: int, nbytes: int, operations: int, rates: Rates) -> float:
    """For one expert; operations: of one token. Its weights are read beside the copies to the GPU."""
    reading = nbytes / max(rates.dram - rates.pcie, rates.dram / 4)
    return rates.cpu_factor * max(reading, n_token * operations / rates.cpu)


def choose_for_cpu(counts: Sequence[int], n_elsewhere: int, nbytes: int, operations: int, rates: Rates) -> int:
    """How many of the experts that would have to be copied, those with the fewest tokens, the CPU should compute.

    counts: tokens of each, ascending. n_elsewhere: (token, expert) pairs of other experts. operations: of one pair,
    nbytes: of one expert. The layer takes as long as the slowest of bus, GPU and CPU; the least of that over all cuts,
    and with equal times the fewest experts on the CPU.
    """
    gpu = (n_elsewhere + sum(counts)) * operations / rates.gpu
    link = [(len(counts) - n) * nbytes / rates.pcie for n in range(len(counts) + 1)]
    each = (cpu_seconds(count, nbytes, operations, rates) for count in counts)
    cpu = [0.0, *(seconds + rates.hand_over for seconds in accumulate(each))]
    times = [max(gpu, *pair) for pair in zip(link, cpu, strict=True)]
    return times.index(min(times))
