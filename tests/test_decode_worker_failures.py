"""The decode worker when something goes wrong, and how it ends: errors in time, no thread left."""

import gc
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fake_gpu import MAX_BATCH, N_EXPERT, N_LAYER, TOP_K, FakeGpu, random_ids

from moe_engine.kernels import _cpu
from moe_engine.kernels.worker import RING

IDS = random_ids(np.random.default_rng(0), 2)


def n_thread() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def test_order_of_steps() -> None:
    worker = FakeGpu().worker
    for step, n_token, message in ((2, 1, "after step 0"), (1, 0, "0 tokens"), (1, MAX_BATCH + 1, "tokens")):
        with pytest.raises(RuntimeError, match=message):
            worker.expect(step, n_token, True)
    for step in (-1, 0, 1):
        with pytest.raises(RuntimeError, match=f"step {step} is not among"):
            worker.wait_tokens(step)
    worker.expect(1, 1, True)
    worker.expect(2, 1, True)
    with pytest.raises(RuntimeError, match="before step 1 is complete"):
        worker.expect(3, 1, True)


def test_tokens_not_yet() -> None:
    gpu = FakeGpu()
    gpu.worker.expect(1, 2, True)
    assert gpu.worker.wait_tokens(1, 0) is None
    assert gpu.worker.wait_tokens(1, 0.12) is None
    gpu.layers(1, IDS)
    assert gpu.worker.wait_tokens(1) is not None


def post(
    gpu: FakeGpu,
    step: int = 1,
    ids: int = 0,
    slot: int = -1,
    n_missed: int = 2,
    n_token: int = 1,
    ahead: int = 0,
    n_ahead: int = 1,
) -> None:
    shape = (n_token, TOP_K)
    gpu.ahead = [np.full((N_LAYER, *shape), ahead)]
    gpu.post(
        step, 0, np.full(shape, ids), np.ones(shape, np.float32), np.full(shape, slot, np.int32), n_missed, n_ahead
    )


def announce_another_step(gpu: FakeGpu) -> None:
    gpu.mailbox.messages[N_LAYER].numpy()[:64].view(np.int64)[0] = gpu.seq(1 + RING, 0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda gpu: post(gpu, n_missed=1), "2 missed pairs says 1"),
        (lambda gpu: post(gpu, ids=N_EXPERT), f"no expert {N_EXPERT} of layer 0"),
        (lambda gpu: post(gpu, slot=1, n_missed=0), "in slot 1, but its slot is -1"),
        (lambda gpu: post(gpu, n_token=2, n_missed=4), "2 tokens in a step of 1"),
        (lambda gpu: post(gpu, ahead=N_EXPERT), f"no expert {N_EXPERT} of layer 1"),
        (lambda gpu: post(gpu, n_ahead=3), "layer 0 predicts 3 layers"),
        (announce_another_step, "the GPU posted number"),
        (lambda gpu: gpu.mailbox.control.fill_(1), "aborted|in time"),
    ],
)
def test_a_failure_ends_worker_and_step(wrong: Callable[[FakeGpu], None], message: str) -> None:
    gpu = FakeGpu()
    gpu.worker.expect(1, 1, True)
    wrong(gpu)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            gpu.worker.wait_tokens(1, 5)
    assert gpu.mailbox.control[0] == 1
    for call in (gpu.worker.settle, gpu.worker.check_integrity, lambda: gpu.worker.expect(2, 1, True)):
        with pytest.raises(RuntimeError, match=message):
            call()
    gpu.worker.stop()


def test_exact_needs_room_and_late_experts() -> None:
    gpu = FakeGpu("exact", (1, 6))
    gpu.worker.expect(1, 2, True)
    with pytest.raises(AssertionError, match="aborted"):
        gpu.layers(1, IDS)
    with pytest.raises(RuntimeError, match="no slot"):
        gpu.worker.wait_tokens(1)
    gpu = FakeGpu("exact", (6, 6))
    gpu.worker.expect(1, 2, allow_late=False)
    with pytest.raises(AssertionError, match="aborted"):
        gpu.layers(1, IDS, allow_late=False)
    with pytest.raises(RuntimeError, match="late"):
        gpu.worker.wait_tokens(1)


@pytest.mark.parametrize("where", ["message", "copies", "tokens"])
def test_a_standstill_is_an_error_in_time(where: str) -> None:
    gpu = FakeGpu("fetch", (3, 3), copies=_cpu.HostCopyEngine(held=where == "copies"), stall_seconds=0.3)
    gpu.worker.expect(1, 2, True)
    if where == "copies":
        post(gpu, n_token=2, n_missed=4)
    if where == "tokens":
        for layer in range(N_LAYER):
            gpu.layer(1, layer, IDS[layer], True, np.random.default_rng(0))
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=f"nothing has moved.*{where}"):
        gpu.worker.wait_tokens(1)
    assert 0.25 < time.monotonic() - start < 2
    assert gpu.mailbox.control[0] == 1
    gpu.worker.stop()


def test_a_slow_gpu_is_no_standstill() -> None:
    gpu = FakeGpu(stall_seconds=0.4)
    gpu.worker.expect(1, 2, True)

    def device() -> None:
        for layer in range(N_LAYER):
            time.sleep(0.2)
            gpu.layer(1, layer, IDS[layer], True, np.random.default_rng(0))
        time.sleep(0.2)
        gpu.finish(1, [1, 1])

    thread = threading.Thread(target=device)
    thread.start()
    assert gpu.worker.wait_tokens(1) is not None
    thread.join()


def test_the_gpu_gives_up() -> None:
    gpu = FakeGpu()
    gpu.worker.expect(1, 1, True)
    gpu.mailbox.control[1] = 1
    with pytest.raises(RuntimeError, match="no answer in time"):
        gpu.worker.wait_tokens(1)


@pytest.mark.parametrize("where", ["idle", "message", "copies"])
def test_stop_at_any_time(where: str) -> None:
    gpu = FakeGpu("exact", (6, 6), copies=_cpu.HostCopyEngine(held=True))
    if where != "idle":
        gpu.worker.expect(1, 2, True)
    if where == "copies":
        post(gpu, n_token=2, n_missed=4)
        time.sleep(0.05)
    start = time.monotonic()
    gpu.worker.stop()
    gpu.worker.stop()
    assert time.monotonic() - start < 1
    assert gpu.mailbox.control[0] == (where != "idle")
    with pytest.raises(RuntimeError, match="stopped"):
        gpu.worker.expect(2, 1, True)


def test_stop_wakes_those_who_wait() -> None:
    gpu = FakeGpu()
    gpu.worker.expect(1, 1, True)
    timer = threading.Timer(0.1, gpu.worker.stop)
    timer.start()
    with pytest.raises(RuntimeError, match="stopped"):
        gpu.worker.wait_tokens(1)
    timer.join()


def test_waiting_can_be_interrupted() -> None:
    gpu = FakeGpu()
    gpu.worker.expect(1, 1, True)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            gpu.worker.wait_tokens(1)
    finally:
        signal.signal(signal.SIGINT, handler)
        timer.join()


def test_no_thread_is_left() -> None:
    gc.collect()
    before = n_thread()
    for turn in range(6):
        gpu = FakeGpu("fetch")
        gpu.worker.expect(1, 2, True)
        if turn % 2:
            gpu.layers(1, IDS)
            gpu.worker.wait_tokens(1)
        if turn % 3 == 0:
            gpu.worker.stop()
        del gpu
    gc.collect()
    assert n_thread() == before


def test_an_idle_worker_sleeps() -> None:
    gpu = FakeGpu()
    gpu.step(1, IDS)
    gpu.worker.settle()
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1
