"""Kernels are launched again as Triton has specialized them. The Triton kernel is a stand-in that counts."""

import time
from inspect import signature
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_engine.kernels import launch
from moe_engine.kernels.launch import Launched, prepared


class Kernel:
    """x, n and eps are plain, A and B constants."""

    def __init__(self) -> None:
        def kernel(x: Any, n: Any, eps: Any, A: Any, B: Any = 5) -> None: ...

        self.signature = signature(kernel)
        self.params = [SimpleNamespace(name=name, is_constexpr=name in "AB") for name in self.signature.parameters]
        self.compiled: list[tuple[Any, ...]] = []
        self.launches: list[tuple[int, tuple[Any, ...]]] = []

    def get_current_stream(self, device: int) -> str:
        return f"of {device}"

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, **constants: Any) -> Any:
            number = len(self.compiled)
            self.compiled.append((grid, args, constants))

            def launch(x: int, y: int, z: int, stream: str, *others: Any) -> None:
                assert others[:5] == ("function", "metadata", None, None, None)
                self.launches.append((number, (stream, (x, y, z), *others[5:])))

            return SimpleNamespace(run=launch, function="function", packed_metadata="metadata")

        return run


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    kernel = Kernel()
    monkeypatch.setattr(launch, "driver", SimpleNamespace(active=kernel))
    return kernel


def test_a_launch_like_another_goes_to_what_was_compiled(kernel: Kernel) -> None:
    launched, x, y = Launched(kernel), torch.zeros(64), torch.ones(64)
    launched[3, 4](x, 32, 0.5, A=7, num_warps=8)
    assert kernel.compiled == [((3, 4), (x, 32, 0.5), {"A": 7, "num_warps": 8})]
    assert kernel.launches == []
    launched[9,](y, 48, 0.5, A=7, num_warps=8)
    assert len(kernel.compiled) == 1
    ((number, (stream, grid, *args)),) = kernel.launches
    assert (number, stream, grid, args[1:]) == (0, "of 0", (9, 1, 1), [48, 0.5, 7, 5])
    assert args[0] is y


@pytest.mark.parametrize(
    ("x", "n", "eps", "constants"),
    [
        (torch.zeros(64, dtype=torch.float16), 32, 0.5, {"A": 7}),  # another type
        (torch.zeros(65)[1:], 32, 0.5, {"A": 7}),  # an address that is no multiple of 16
        (torch.zeros(64), 33, 0.5, {"A": 7}),
        (torch.zeros(64), 1, 0.5, {"A": 7}),
        (torch.zeros(64), 1 << 40, 0.5, {"A": 7}),
        (torch.zeros(64), 32, None, {"A": 7}),
        (torch.zeros(64), 32, 0.5, {"A": 8}),
        (torch.zeros(64), 32, 0.5, {"A": 7, "B": 6}),
        (torch.zeros(64), 32, 0.5, {"A": 7, "num_warps": 4}),
    ],
)
def test_what_triton_specializes_for_is_compiled_anew(
    kernel: Kernel, x: torch.Tensor, n: int, eps: float | None, constants: dict[str, int]
) -> None:
    launched = Launched(kernel)
    for _ in range(2):
        launched[1,](torch.zeros(64), 32, 0.5, A=7)
        launched[1,](x, n, eps, **constants)
    assert len(kernel.compiled) == 2
    assert [number for number, _ in kernel.launches] == [0, 1]


def test_each_device_has_its_own(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    launched, x = Launched(kernel), torch.zeros(64)
    for device in (0, 1, 0, 1):
        monkeypatch.setattr(torch.cuda, "current_device", lambda device=device: device)
        launched[1,](x, 32, 0.5, A=7)
    assert len(kernel.compiled) == 2
    assert [(number, stream) for number, (stream, *_) in kernel.launches] == [(0, "of 0"), (1, "of 1")]


def test_constants_by_place_are_an_error(kernel: Kernel) -> None:
    with pytest.raises(AssertionError, match="4 plain arguments, expected 3"):
        Launched(kernel)[1,](torch.zeros(64), 32, 0.5, 7)


def test_prepared_launches_are_looked_up_once(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    launched, x = Launched(kernel), torch.zeros(64)
    again = prepared(launched, (3,), x, 32, 0.5, A=7)
    for _ in range(3):
        again()
    monkeypatch.setattr(launched, "_known_launch", None)  # not needed any more
    monkeypatch.setattr(kernel, "get_current_stream", lambda device: "a graph's")
    again()
    assert len(kernel.compiled) == 1
    assert [(number, stream) for number, (stream, *_) in kernel.launches] == [
        (0, "of 0"),
        (0, "of 0"),
        (0, "a graph's"),
    ]
    for _, (_, grid, *args) in kernel.launches:
        assert (grid, args[1:]) == ((3, 1, 1), [32, 0.5, 7, 5])
        assert args[0] is x


def test_interpreted_kernels_are_prepared_too(kernel: Kernel) -> None:
    x = torch.zeros(64)
    prepared(kernel, (2,), x, 1, 0.5, A=1)()
    assert kernel.compiled == [((2,), (x, 1, 0.5), {"A": 1})]


def test_what_first_launches_take_is_counted(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 100, 7))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    launched, before = Launched(kernel), Launched.first_seconds
    for n in (32, 48, 33):  # the second one is like the first
        launched[1,](torch.zeros(64), n, 0.5, A=7)
    assert Launched.first_seconds - before == 2 * 7
