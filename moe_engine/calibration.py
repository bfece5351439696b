"""What a machine delivers, as `moe-engine calibrate` has measured it, and the file that keeps it.

One msgpack file per machine (graphics card, processor, threads) in the user's cache folder. It may also be copied, to
plan for a machine from another one.
"""

import hashlib
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self, TypeVar

from moe_engine.cache_files import cache_folder, replace_file
from moe_engine.errors import CalibrationError
from moe_engine.hardware import Hardware
from moe_engine.kernels.quant_types import BY_NAME
from moe_engine.prompt_split import PromptRates

CHOICE_CHUNKS = 4  # that dividing a streamed layer's experts takes the host as long as
MAGIC, VERSION = "moe_engine calibration", 5
_LARGEST_FILE = 1 << 20
_LARGEST_NUMBER = 1e30

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Product:
    """A product with quantized weights takes bytes / `weights` + operations / `operations` seconds."""

    weights: float
    operations: float

    def seconds(self, nbytes: float, operations: float) -> float:
        return nbytes / self.weights + operations / self.operations

    @classmethod
    def through(cls, nbytes: float, few: tuple[float, float], many: tuple[float, float]) -> Self:
        """From two measurements (operations, seconds) with the same weights.

        Where many operations are no slower than few, all of the time is put down to both.
        """
        slope = (many[1] - few[1]) / (many[0] - few[0])
        rest = few[1] - slope * few[0]
        if slope <= 0 or rest <= 0:
            return cls(nbytes / few[1], many[0] / many[1])
        return cls(nbytes / rest, 1 / slope)


@dataclass(frozen=True)
class CpuProduct(Product):
    """On the CPU some threads read weights while others multiply: seconds are the root of the two's sum of squares."""

    def seconds(self, nbytes: float, operations: float) -> float:
        return math.hypot(nbytes / self.weights, operations / self.operations)

    @classmethod
    def through(cls, nbytes: float, few: tuple[float, float], many: tuple[float, float]) -> Self:
        slope = (many[1] ** 2 - few[1] ** 2) / (many[0] ** 2 - few[0] ** 2)
        rest = few[1] ** 2 - slope * few[0] ** 2
        if slope <= 0 or rest <= 0:
            return cls(nbytes / few[1], many[0] / many[1])
        return cls(nbytes / math.sqrt(rest), 1 / math.sqrt(slope))


@dataclass(frozen=True)
class Gpu:
    """Rates in bytes or operations per second; maps by type are of bytes of quantized weights.

    Raises `CalibrationError` for products that are faster than the tensor cores.
    """

    name: str
    vram_bytes: int
    copy: float  # within VRAM, read and written
    pcie: dict[int, float]  # host to device, page-locked, by bytes of one copy
    kernel_seconds: float  # what a kernel of a captured decode step takes besides reading weights
    exchange_seconds: float  # what a layer with misses takes besides computing them: messages
    step_seconds: dict[int, float]  # of a layer of a step with so many prompt tokens, all experts in VRAM
    layer_seconds: float  # of the host, for a prompt's layer of Qwen3-30B-A3B, all experts in VRAM
    chunk_seconds: float  # of the host besides, for each chunk of experts that a layer streams
    decode: dict[str, float]  # read by the decode kernels
    prompt: dict[str, Product]  # experts of many tokens
    dequantize: dict[str, float]
    matmul: float  # operations of bf16 matrix products
    attention: float  # operations of a prompt's attention, each query with the keys that it sees

    def __post_init__(self) -> None:
        rates = {f"prompt.{type}.operations": product.operations for type, product in self.prompt.items()}
        for key, rate in (rates | {"attention": self.attention}).items():
            if rate > self.matmul:
                raise CalibrationError(
                    f"key 'gpu.{key}' is {rate:.3g}, more than the {self.matmul:.3g} of plain bf16 products: "
                    "run moe-engine calibrate again, with no other work on the GPU"
                )


@dataclass(frozen=True)
class Calibration:
    """A machine. Rates as in `Gpu`; `dram` by threads that read; `disk` is that of a model's folder."""

    processor: str
    threads: int
    ram_bytes: int
    dram: dict[int, float]
    cpu_experts: dict[str, CpuProduct]
    cpu_call_seconds: float  # what a call of the CPU's experts takes besides reading weights: threads meet, some idle
    disk: float | None
    gpu: Gpu | None

    @property
    def ram(self) -> float:
        """Bytes per second that all threads read."""
        return max(self.dram.values())

    @property
    def hardware(self) -> Hardware:
        if self.gpu is None:
            return Hardware(vram=self.ram, pcie=self.ram, dram=self.ram)
        return Hardware(self.gpu.copy, max(self.gpu.pcie.values()), self.ram)

    def rates(self, type: str, launches: float = 1.0) -> PromptRates:
        """For the ways of a prompt, with experts of a type. launches: of a layer (`ModelWork.launches`). There
        must be a GPU."""
        assert self.gpu is not None
        return PromptRates(
            pcie=max(self.gpu.pcie.values()),
            dram=self.ram,
            cpu=closest(self.cpu_experts, type).operations,
            gpu=closest(self.gpu.prompt, type).operations,
            hits=closest(self.gpu.decode, type),
            step_layer=max(self.gpu.step_seconds.values()) + self.gpu.exchange_seconds + self.cpu_call_seconds,
            stream_layer=self.gpu.layer_seconds * launches + (CHOICE_CHUNKS + 2) * self.gpu.chunk_seconds,
            cached_layer=self.gpu.layer_seconds * launches,
        )

    def save(self, path: Path) -> None:
        """Replaces the file in one step. Raises `CalibrationError` if it cannot be written."""
        import msgpack

        packed = msgpack.packb({"magic": MAGIC, "version": VERSION, **asdict(self)})
        try:
            replace_file(path, packed)
        except OSError as e:
            raise CalibrationError(f"{path}: cannot be written: {e.strerror}") from e

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises `CalibrationError` if the file is missing, damaged, or none."""
        import msgpack

        try:
            with open(path, "rb") as file:
                packed = file.read(_LARGEST_FILE + 1)
        except OSError as e:
            raise CalibrationError(f"{path}: cannot be read: {e.strerror}") from e
        if len(packed) > _LARGEST_FILE:
            raise CalibrationError(f"{path}: is larger than any calibration: expected a file of moe-engine calibrate")
        try:
            found = msgpack.unpackb(packed, strict_map_key=False)
        except Exception as e:  # msgpack raises many kinds, ValueError and RecursionError among them
            raise CalibrationError(f"{path}: is damaged or no file of moe-engine calibrate") from e
        if not isinstance(found, dict) or found.get("magic") != MAGIC:
            raise CalibrationError(f"{path}: is no file of moe-engine calibrate")
        if found.get("version") != VERSION:
            raise CalibrationError(
                f"{path}: has version {found.get('version')!r:.40}, expected {VERSION}: run moe-engine calibrate again"
            )
        check = _Check(path)
        gpu = found.pop("gpu", None)
        rest = {key: value for key, value in found.items() if key not in ("magic", "version")}
        of_gpu = None if gpu is None else check.fields(Gpu, gpu, "gpu.")
        known = check.fields(cls, rest, "", {"gpu": None})
        try:
            return cls(**known | {"gpu": None if of_gpu is None else Gpu(**of_gpu)})
        except CalibrationError as e:
            raise CalibrationError(f"{path}: {e}") from e


class _Check:
    """Checks what a file says, key by key, and makes the values that the classes expect."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fail(self, key: str, value: object, expected: str) -> CalibrationError:
        return CalibrationError(f"{self.path}: key '{key}' is {value!r:.80}, expected {expected}")

    def fields(
        self, kind: type, values: object, prefix: str, made: Mapping[str, object] | None = None
    ) -> dict[str, Any]:
        """The fields of `kind` from `values`; `made` are there already."""
        if not isinstance(values, dict):
            raise self.fail(prefix.removesuffix("."), values, "a map")
        result = dict(made or {})
        names = [field.name for field in fields(kind) if field.name not in result]
        if set(values) != set(names):
            raise self.fail(prefix + "*", sorted(map(str, values)), f"the keys {', '.join(names)}")
        for name in names:
            result[name] = self._value(prefix + name, name, values[name])
        return result

    def _value(self, key: str, name: str, value: object) -> Any:
        if name in ("processor", "name"):
            if not isinstance(value, str) or len(value) > 256:
                raise self.fail(key, value, "a text of at most 256 characters")
            return value
        if name in ("dram", "pcie", "step_seconds"):
            return {n: self._number(f"{key}.{n}", rate) for n, rate in self._map(key, value, by_type=False).items()}
        if name in ("cpu_experts", "prompt"):
            products = self._map(key, value, by_type=True)
            kind = CpuProduct if name == "cpu_experts" else Product
            return {t: kind(**self.fields(kind, p, f"{key}.{t}.")) for t, p in products.items()}
        if name in ("decode", "dequantize"):
            return {t: self._number(f"{key}.{t}", rate) for t, rate in self._map(key, value, by_type=True).items()}
        if name == "disk" and value is None:
            return None
        if name in ("threads", "ram_bytes", "vram_bytes") and not isinstance(value, int):
            raise self.fail(key, value, "an integer")
        return self._number(key, value)

    def _map(self, key: str, value: object, *, by_type: bool) -> dict[Any, object]:
        """At least one entry; keys are positive integers or types."""
        expected = "type" if by_type else "positive integers"
        if not isinstance(value, dict) or not value:
            raise self.fail(key, value, f"a map by {expected}")
        for name in value:
            if not (name in BY_NAME if by_type else type(name) is int and name > 0):
                raise self.fail(key, name, f"a map by {expected}")
        return value

    def _number(self, key: str, value: object) -> float:
        ok = isinstance(value, int | float) and not isinstance(value, bool)
        if not ok or not 0 < value < _LARGEST_NUMBER:  # type: ignore[operator]
            raise self.fail(key, value, "a number over 0")
        return value  # type: ignore[return-value]


def closest(by_type: Mapping[str, T], type: str) -> T:
    """The entry of the type, or of the one whose weights take the most similar number of bytes."""
    if type in by_type:
        return by_type[type]

    def bits(name: str) -> float:
        return BY_NAME[name].block_bytes / BY_NAME[name].block_size

    return by_type[min(by_type, key=lambda name: abs(math.log(bits(name) / bits(type))))]


def processor_name() -> str:
    """By the system's description of the processor."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip()[:256] if found else "unknown processor"


def cache_path(gpu: str | None, threads: int) -> Path:
    """Where the calibration of this processor with this graphics card is kept."""
    key = hashlib.sha256("\n".join((gpu or "", processor_name(), str(threads))).encode()).hexdigest()[:16]
    return cache_folder() / f"calibration-{key}.msgpack"


def kept(gpu: str | None, threads: int) -> Calibration | None:
    """This machine's calibration, None if there is none; a file that is not in order is reported and ignored."""
    try:
        path = cache_path(gpu, threads)
        found = Calibration.load(path)
    except FileNotFoundError:  # nobody has a home
        return None
    except CalibrationError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            log.warning("ignored: %s", error)
        return None
    name = None if found.gpu is None else found.gpu.name
    if (name, found.processor, found.threads) != (gpu, processor_name(), threads):
        log.warning("ignored: %s is of another machine: run moe-engine calibrate", path)
        return None
    return found


def this_machine(device: str, threads: int) -> Calibration | None:
    """What is kept for a device as in `EngineConfig`; the plain processor's where there is no graphics card."""
    import torch

    if device in ("cpu", "simulated") or not torch.cuda.is_available():
        return kept(None, threads)
    return kept(torch.cuda.get_device_name("cuda" if device == "auto" else device), threads)
