"""What is in a GGUF file, by role and by type, without touching the weights."""

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moe_engine.gguf_file import GGUFFile
from moe_engine.gguf_part import TensorInfo
from moe_engine.models import supported_architectures
from moe_engine.placement import is_expert


@dataclass(frozen=True)
class TypeUse:
    """Tensors of one type."""

    type: str
    tensors: int
    nbytes: int


@dataclass(frozen=True)
class Inspection:
    """A file's summary. Bytes of tensors whose type is unknown are not counted."""

    path: str
    name: str
    architecture: str
    supported: bool
    file_bytes: int
    dimensions: dict[str, int | float | str | bool]  # the architecture's scalar keys, without prefix
    dense_bytes: int  # attention, norms, embeddings, dense feed-forward
    shared_bytes: int  # shared experts
    routed_bytes: int  # routed experts
    expert_bytes: list[int]  # distinct sizes of one routed expert (gate, up and down), ascending
    active_bytes: int  # routed bytes that one token reads
    types: list[TypeUse]
    unknown_types: list[str]  # tensors this version cannot read

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def inspect_file(path: str | Path) -> Inspection:
    """Reads the header of any GGUF file. Raises `ModelFormatError` for damaged ones."""
    file = GGUFFile(path)
    architecture = file.architecture
    by_role: Counter[str] = Counter()
    by_type: dict[str, tuple[int, int]] = {}
    for info in file.tensors.values():
        by_role[_role(info.name)] += info.nbytes
        name = str(info.type) if info.type else f"id {info.type_id}"
        count, nbytes = by_type.get(name, (0, 0))
        by_type[name] = (count + 1, nbytes + info.nbytes)
    dimensions = {
        key.removeprefix(architecture + "."): value
        for key, value in file.metadata.items()
        if key.startswith(architecture + ".") and not isinstance(value, list)
    }
    per_layer = _expert_bytes(file)
    top_k = dimensions.get("expert_used_count", 0)
    return Inspection(
        path=str(path),
        name=str(file.metadata.get("general.name", "")),
        architecture=architecture,
        supported=architecture in supported_architectures(),
        file_bytes=file.nbytes,
        dimensions=dimensions,
        dense_bytes=by_role["dense"],
        shared_bytes=by_role["shared"],
        routed_bytes=by_role["routed"],
        expert_bytes=sorted(set(per_layer.values())),
        active_bytes=sum(per_layer.values()) * top_k if isinstance(top_k, int) else 0,
        types=sorted((TypeUse(t, n, b) for t, (n, b) in by_type.items()), key=lambda use: -use.nbytes),
        unknown_types=[info.name for info in file.tensors.values() if info.type is None],
    )


def _role(tensor_name: str) -> str:
    if is_expert(tensor_name):
        return "routed"
    return "shared" if "_shexp." in tensor_name else "dense"


def _expert_bytes(file: GGUFFile) -> dict[str, int]:
    """Bytes of one routed expert of each layer that has them."""
    layers: Counter[str] = Counter()

    def one_expert(info: TensorInfo) -> int:
        return info.nbytes // info.shape[0]

    for info in file.tensors.values():
        if _role(info.name) == "routed" and len(info.shape) == 3:
            layers[info.name.split(".ffn_")[0]] += one_expert(info)
    return dict(layers)
