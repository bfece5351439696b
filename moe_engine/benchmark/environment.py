"""Where and with what a result was measured. No names of hosts or users, and of files only the last part."""

import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moe_engine import __version__
from moe_engine.gguf_file import GGUFFile
from moe_engine.hardware import Hardware
from moe_engine.inspection import inspect_file
from moe_engine.metadata import Metadata
from moe_engine.placement import is_expert


@dataclass(frozen=True)
class Environment:
    """Sizes in bytes, rates in bytes per second. Empty or 0: not known, or there is none."""

    gpu: str
    gpu_memory: int
    driver: str
    cuda: str
    cpu: str
    cores: int  # that this process may use
    ram: int
    os: str
    versions: dict[str, str]
    commit: str  # of the checkout that the package runs from; "+" behind it: with changes
    command: str
    pcie_rate: float = 0.0  # host to device, page-locked
    dram_rate: float = 0.0  # read by all cores
    vram_rate: float = 0.0

    @classmethod
    def find(cls, arguments: Sequence[str], device: torch.device, gpu: str, hardware: Hardware) -> "Environment":
        """arguments: the command line. device: where it runs; gpu: the same for nvidia-smi, see `gpu_id`."""
        on_gpu = device.type == "cuda"
        return cls(
            gpu=torch.cuda.get_device_name(device) if on_gpu else "",
            gpu_memory=torch.cuda.get_device_properties(device).total_memory if on_gpu else 0,
            driver=nvidia_smi("driver_version", gpu) if on_gpu else "",
            cuda=torch.version.cuda or "",
            cpu=_cpu_name(),
            cores=len(os.sched_getaffinity(0)),
            ram=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            os=platform.system(),
            versions={
                "moe_engine": __version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "triton": _version("triton"),
            },
            commit=commit(),
            command=public_command(arguments),
            pcie_rate=hardware.pcie if on_gpu else 0.0,
            dram_rate=hardware.dram,
            vram_rate=hardware.vram if on_gpu else 0.0,
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class ModelFacts:
    """What a result says about its model, with the names of llama-bench where it has them."""

    model_filename: str
    model_type: str
    model_size: int  # bytes of tensors
    model_n_params: int
    model_fingerprint: str  # `GGUFFile.fingerprint`
    routed_bytes: int  # of routed experts
    active_bytes: int  # of these, that one token reads
    active_params: int  # weights that a token is multiplied with, without embedding and output
    expert_bytes: tuple[int, ...]  # distinct sizes
    n_layer: int
    n_expert: int
    top_k: int

    @classmethod
    def of(cls, path: Path) -> "ModelFacts":
        """Raises `ModelFormatError`."""
        file, found = GGUFFile(path), inspect_file(path)
        values = sum(torch.Size(info.shape).numel() for info in file.tensors.values())
        meta = Metadata(file.metadata, file.architecture, str(path))
        dimensions = {name: meta.integer(f"expert_{name}", 0, low=0) for name in ("count", "used_count")}
        return cls(
            model_filename=path.name,
            model_type=f"{found.architecture} {found.name}".strip(),
            model_size=sum(info.nbytes for info in file.tensors.values()),
            model_n_params=values,
            model_fingerprint=file.fingerprint(),
            routed_bytes=found.routed_bytes,
            active_bytes=found.active_bytes,
            active_params=_active_params(file, dimensions["used_count"] / max(1, dimensions["count"])),
            expert_bytes=tuple(found.expert_bytes),
            n_layer=meta.integer("block_count", 0, low=0),
            n_expert=dimensions["count"],
            top_k=dimensions["used_count"],
        )


def _active_params(file: GGUFFile, share: float) -> int:
    """share: of the routed experts, that a token uses."""
    read = (info for info in file.tensors.values() if info.name.startswith("blk."))
    return round(sum(torch.Size(t.shape).numel() * (share if is_expert(t.name) else 1) for t in read))


def public_command(arguments: Sequence[str]) -> str:
    """The command line, with paths cut to their last part: folders tell names."""

    def public(text: str) -> str:
        name, equals, value = text.rpartition("=")
        return name + equals + (Path(value).name if "/" in value else value)

    return shlex.join(public(text) for text in ("moe-engine", *arguments))


def commit() -> str:
    """Of the git checkout that holds this file; empty if there is none."""
    folder = Path(__file__).parent
    found = _output("git", "-C", str(folder), "rev-parse", "--short=12", "HEAD")
    if not found or _output("git", "-C", str(folder), "ls-files", Path(__file__).name) == "":
        return ""  # installed into some other project's folder
    return found + ("+" if _output("git", "-C", str(folder), "status", "--porcelain", "-uno") else "")


def gpu_id(device: str) -> str:
    """Which GPU nvidia-smi is to be asked about for "cuda:1" and the like: it does not look at CUDA_VISIBLE_DEVICES."""
    index = int(device.rpartition(":")[2]) if ":" in device else 0
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return visible[index] if index < len(visible) else str(index)


def nvidia_smi(field: str, gpu: str) -> str:
    """Empty if it cannot be found."""
    found = _output("nvidia-smi", f"--id={gpu}", f"--query-gpu={field}", "--format=csv,noheader,nounits")
    return found.splitlines()[0].strip() if found else ""


def vram_in_use(gpu: str) -> int:
    """Bytes of a GPU's memory that anyone uses; 0 if it cannot be found."""
    found = nvidia_smi("memory.used", gpu)
    return int(found) << 20 if found.isdigit() else 0


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return ""
