"""The thread pool through its Python face: same results, many callers, short lives, signals, placement."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from random_blocks import random_blocks

from moe_engine.errors import ConfigError
from moe_engine.kernels import _cpu
from moe_engine.kernels.cpu import CpuKernels, ExpertHandle
from moe_engine.kernels.quant_tensor import QuantTensor
from moe_engine.kernels.quant_types import BY_NAME

N_EXPERT, HIDDEN, N_FF, TOP_K = 12, 512, 512, 3


def stack(name: str, n_out: int, n_in: int) -> QuantTensor:
    rows = random_blocks(BY_NAME[name], N_EXPERT * n_out, n_in, np.random.default_rng(n_out))
    return QuantTensor(torch.from_numpy(rows).view(N_EXPERT, n_out, -1), BY_NAME[name], n_in)


GATE, UP, DOWN = stack("Q4_K", N_FF, HIDDEN), stack("IQ3_S", N_FF, HIDDEN), stack("Q6_K", HIDDEN, N_FF)


def layer(kernels: CpuKernels) -> ExpertHandle:
    return kernels.register_experts(GATE, UP, DOWN)


def job(n_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(n_tokens)
    ids = np.stack([rng.choice(N_EXPERT, TOP_K, replace=False) for _ in range(n_tokens)])
    x = torch.from_numpy(rng.standard_normal((n_tokens, HIDDEN), dtype=np.float32))
    return x, torch.from_numpy(ids), torch.full((n_tokens, TOP_K), 0.25)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


EXPECTED = {n: CpuKernels(1).expert_ffn(layer(CpuKernels(1)), *job(n)) for n in (1, 2, 7, 40)}


@pytest.mark.parametrize(("spin", "pin"), [(0, False), (100, True), (3000, True)])
@pytest.mark.parametrize("threads", range(1, 9))
def test_results_do_not_depend_on_threads(threads: int, spin: int, pin: bool) -> None:
    kernels = CpuKernels(threads, spin_microseconds=spin, pin=pin)
    handle = layer(kernels)
    for pause in (0.0, 0.0, 0.002):  # the threads spin, or sleep
        for n_tokens, expected in EXPECTED.items():
            time.sleep(pause)
            assert same_bits(kernels.expert_ffn(handle, *job(n_tokens)), expected)


@pytest.mark.parametrize("shared", [True, False], ids=["one pool", "a pool each"])
def test_callers_at_once(shared: bool) -> None:
    pools = [CpuKernels(4)] * 3 if shared else [CpuKernels(4) for _ in range(3)]

    def work(kernels: CpuKernels) -> bool:
        handle = layer(kernels)
        turns = list(EXPECTED.items()) * 20
        return all(same_bits(kernels.expert_ffn(handle, *job(n)), expected) for n, expected in turns)

    with ThreadPoolExecutor(3) as callers:
        assert all(callers.map(work, pools))


def test_pools_come_and_go() -> None:
    before = threads_of_this_process()
    for turn in range(60):
        pool = CpuKernels(1 + turn % 8, spin_microseconds=100 * (turn % 3))
        if turn % 2:
            assert same_bits(pool.expert_ffn(layer(pool), *job(2)), EXPECTED[2])
        if turn % 5 == 0:
            time.sleep(0.002)  # by now its threads sleep
        del pool
    assert threads_of_this_process() == before


def threads_of_this_process() -> int:
    time.sleep(0.05)  # joined threads of Python and of the system are listed for a moment longer
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.mark.parametrize("threads", [2, 5])
def test_idle_threads_sleep(threads: int) -> None:
    pool = CpuKernels(threads, spin_microseconds=100)
    pool.expert_ffn(layer(pool), *job(2))
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1


def test_other_python_threads_run_meanwhile() -> None:
    kernels = CpuKernels(2)
    handle = layer(kernels)
    ticks, stop = 0, threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not stop.is_set():
            ticks += 1
            time.sleep(0.0005)

    other = threading.Thread(target=tick)
    other.start()
    inputs = job(40)
    deadline = time.monotonic() + 0.2
    while time.monotonic() < deadline:
        kernels.expert_ffn(handle, *inputs)
    stop.set()
    other.join()
    assert ticks > 5


def test_an_interrupt_ends_the_program_between_calls() -> None:
    program = (
        "import signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        "from test_thread_pool import CpuKernels, EXPECTED, job, layer, same_bits\n"
        "kernels = CpuKernels(4)\n"
        "handle = layer(kernels)\n"
        "print('ready', flush=True)\n"
        "try:\n"
        "    while True: kernels.expert_ffn(handle, *job(40))\n"
        "except KeyboardInterrupt:\n"
        "    print('right' if same_bits(kernels.expert_ffn(handle, *job(2)), EXPECTED[2]) else 'wrong')\n"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent) as run:
        try:
            assert run.stdout is not None
            assert run.stdout.readline() == "ready\n"
            time.sleep(0.1)
            run.send_signal(signal.SIGINT)
            assert run.communicate(timeout=60)[0] == "right\n"
            assert run.returncode == 0
        finally:
            run.kill()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_the_callers_thread_is_not_pinned() -> None:
    before = os.sched_getaffinity(0)
    CpuKernels(len(before))
    assert os.sched_getaffinity(0) == before


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two processors")
def test_threads_are_pinned_where_asked() -> None:
    for pin in (True, False):
        before = set(os.listdir("/proc/self/task"))
        kernels = CpuKernels(2, pin=pin, spin_microseconds=0)
        kernels.expert_ffn(layer(kernels), *job(40))
        time.sleep(0.05)
        (worker,) = set(os.listdir("/proc/self/task")) - before
        assert (len(os.sched_getaffinity(int(worker))) == 1) == pin
        del kernels


def test_impossible_pools() -> None:
    for threads, spin in ((0, 0), (2, -1), (2, 10**9)):
        with pytest.raises(ConfigError):
            CpuKernels(threads, spin_microseconds=spin)
    with pytest.raises(ValueError, match="thread"):
        _cpu.ThreadPool(0)
    with pytest.raises(ValueError, match="spin"):
        _cpu.ThreadPool(1, -1)


def machine(root: Path, nodes: list[str], siblings: dict[int, str]) -> str:
    """A copy of the part of /sys that describes processors."""
    (root / "node").mkdir()
    (root / "node" / "online").write_text(f"0-{len(nodes) - 1}\n")
    for number, cpus in enumerate(nodes):
        (root / "node" / f"node{number}").mkdir()
        (root / "node" / f"node{number}" / "cpulist").write_text(cpus + "\n")
    for cpu, of_core in siblings.items():
        folder = root / "cpu" / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(of_core + "\n")
    return str(root)


def test_order_of_processors(tmp_path: Path) -> None:
    # Two nodes of two cores with two threads each: 0,4 | 1,5 on node 0, 2,6 | 3,7 on node 1.
    system = machine(tmp_path, ["0-1,4-5", "2-3,6-7"], {cpu: f"{cpu % 4},{cpu % 4 + 4}" for cpu in range(8)})
    assert _cpu.cpu_order(list(range(8)), system) == [0, 2, 1, 3, 4, 6, 5, 7]
    assert _cpu.cpu_order([1, 3, 5, 6, 7], system) == [1, 3, 6, 5, 7]  # what the process may not use counts for nothing
    assert _cpu.cpu_order([], system) == []


def test_memory_nodes(tmp_path: Path) -> None:
    system = machine(tmp_path, ["0-1", "2-3"], {})
    assert _cpu.memory_nodes(system) == [0, 1]
    assert _cpu.memory_nodes(str(tmp_path / "nothing")) == []
    # Nodes that are not there: the wish is not granted, the memory is.
    assert not _cpu.host_buffer(1 << 20, system).any()


def test_order_without_a_description(tmp_path: Path) -> None:
    assert _cpu.cpu_order([3, 5, 9], str(tmp_path)) == [3, 5, 9]
    (tmp_path / "node").mkdir()
    (tmp_path / "node" / "online").write_text("what?\n")
    assert _cpu.cpu_order([3, 5, 9], str(tmp_path)) == [3, 5, 9]
