"""The engines that copy into slots: on a thread of the host, through the CUDA driver, and as over a slower link."""

import time

import pytest
import torch

from moe_engine.kernels import _cpu


def test_host_copies() -> None:
    engine = _cpu.HostCopyEngine(held=True)
    source, target = torch.arange(100, dtype=torch.uint8), torch.zeros(100, dtype=torch.uint8)
    halves = [(target[i:].data_ptr(), source[i:].data_ptr(), 50) for i in (0, 50)]
    assert [engine.submit(halves[:1]), engine.submit(halves[1:])] == [1, 2]
    time.sleep(0.02)
    assert engine.poll() is None
    engine.release(1)
    assert wait(engine) >= 0
    assert torch.equal(target[:50], source[:50])
    assert not target[50:].any()
    assert engine.poll() is None
    engine.stop()
    assert not target[50:].any()


def wait(engine: _cpu.CopyEngine) -> float:
    deadline = time.monotonic() + 10
    while (seconds := engine.poll()) is None:
        assert time.monotonic() < deadline
    return seconds


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_cuda_the_error_names_the_call() -> None:
    with pytest.raises(RuntimeError, match=r"libcuda|cu[A-Z]\w+: "):
        _cpu.CudaCopyEngine(0)


@pytest.mark.gpu
def test_cuda_copies() -> None:
    torch.zeros(1, device="cuda")
    engine = _cpu.CudaCopyEngine(0)
    source = torch.randint(0, 256, (1 << 24,), dtype=torch.uint8, pin_memory=True)
    target = torch.zeros(1 << 24, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    for first in range(0, 1 << 24, 1 << 22):
        engine.submit([(target[first:].data_ptr(), source[first:].data_ptr(), 1 << 22)])
    assert all(wait(engine) > 0 for _ in range(4))
    assert engine.poll() is None
    assert torch.equal(target.cpu(), source)
    with pytest.raises(RuntimeError, match="cuMemcpyHtoDAsync: "):
        engine.submit([(0, source.data_ptr(), 64)])
    with pytest.raises(RuntimeError, match="cuDeviceGet: "):
        _cpu.CudaCopyEngine(1000)


def test_a_throttled_engine_tells_of_a_copy_only_when_a_slow_link_would_be_done() -> None:
    source, target = torch.arange(100, dtype=torch.uint8), torch.zeros(100, dtype=torch.uint8)

    def parts(first: int) -> list[tuple[int, int, int]]:
        return [(target[i:].data_ptr(), source[i:].data_ptr(), n) for i, n in ((first, 30), (first + 30, 20))]

    never = _cpu.ThrottledCopyEngine(_cpu.HostCopyEngine(), 1e-3)
    never.submit(parts(0))
    for _ in range(20):
        assert never.poll() is None
        time.sleep(0.001)
    assert not target[30:].any()
    never.stop()

    engine = _cpu.ThrottledCopyEngine(_cpu.HostCopyEngine(), 5000.0)
    assert [engine.submit(parts(0)), engine.submit(parts(50))] == [1, 2]
    begun = time.monotonic()
    assert [wait(engine), wait(engine)] == pytest.approx([0.01, 0.01])
    assert time.monotonic() - begun >= 0.018
    assert torch.equal(target, source)
    assert engine.poll() is None
    with pytest.raises(ValueError, match="more than 0"):
        _cpu.ThrottledCopyEngine(_cpu.HostCopyEngine(), 0.0)
