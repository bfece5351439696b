"""Launches of Triton kernels that have been compiled before, without most of what Triton does to find them again."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
import triton
from triton.runtime import driver


def launched(kernel: Any) -> Any:
    """Decorates a kernel, `kernel[grid](*args, **constants)` as before: all plain arguments by place, all constants by
    name. An interpreted kernel stays as it is."""
    return Launched(kernel) if isinstance(kernel, triton.JITFunction) else kernel


def prepared(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> Callable[[], object]:
    """`kernel[grid](*args, **constants)` to be called many times, with the same tensors at the same addresses."""
    if isinstance(kernel, Launched):
        return kernel.prepared(grid, args, constants)
    return partial(kernel[grid], *args, **constants)


class Launched:
    """A kernel with what it was compiled to, by what Triton specializes for.

    A launch is looked up by the types of its arguments, whether addresses and integers are multiples of 16, whether
    integers are one or need 64 bits, and all constants. That is at least as fine as Triton's own distinctions.
    """

    first_seconds: ClassVar[float] = 0.0  # that all first launches have taken, most of it for compiling

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._constants = [param.name for param in kernel.params if param.is_constexpr]
        self._n_plain = len(kernel.params) - len(self._constants)
        self._defaults = {name: param.default for name, param in kernel.signature.parameters.items()}
        self._known: dict[object, tuple[Any, tuple[object, ...]]] = {}  # compiled kernels, and their constants in order

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self._launch, grid)

    def prepared(self, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]) -> Callable[[], object]:
        """Looked up until it is known."""
        known: Callable[[], object] | None = None

        def launch() -> None:
            nonlocal known
            known = known or self._known_launch(grid, args, constants)
            if known is not None:
                known()

        return launch

    def _launch(self, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        if (known := self._known_launch(grid, args, constants)) is not None:
            known()

    def _known_launch(
        self, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]
    ) -> Callable[[], object] | None:
        """The first one of its kind is launched here, and nothing is left to do."""
        device = torch.cuda.current_device()
        key = _key(device, args, constants)
        if (known := self._known.get(key)) is not None:
            compiled, in_order = known
            return partial(_run, compiled, device, (*grid, 1, 1)[:3], (*args, *in_order))
        assert len(args) == self._n_plain, f"{len(args)} plain arguments, expected {self._n_plain}"
        started = time.perf_counter()
        compiled = self._kernel[grid](*args, **constants)
        Launched.first_seconds += time.perf_counter() - started
        self._known[key] = compiled, tuple(constants.get(name, self._defaults[name]) for name in self._constants)
        return None


def _run(compiled: Any, device: int, grid: tuple[int, ...], args: tuple[object, ...]) -> None:
    """As Triton's own launches do, without its hooks."""
    stream = driver.active.get_current_stream(device)
    compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *args)


def _key(device: int, args: tuple[Any, ...], constants: dict[str, Any]) -> tuple[object, ...]:
    """One flat tuple: of each argument as many entries as of others of its type, and their types come first."""
    key: list[object] = [device]
    for value in args:
        if type(value) is int:
            key += int, value % 16 == 0, value == 1, -(1 << 31) <= value < 1 << 31
        elif isinstance(value, torch.Tensor):
            key += value.dtype, value.data_ptr() % 16 == 0
        else:
            key.append(value)
    key += constants
    key += constants.values()
    return tuple(key)
