"""A model's GGUF file, or all parts of a split one: metadata, and tensors as views of the mapping."""

import hashlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_engine.errors import ModelFormatError, UnsupportedModelError
from moe_engine.gguf_part import GGUFPart, TensorInfo
from moe_engine.kernels.quant_types import QUANT_TYPES, why_unsupported

if TYPE_CHECKING:
    from torch import Tensor

    from moe_engine.kernels.quant_tensor import QuantTensor

_SPLIT_NAME = re.compile(r"(?P<stem>.*)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf")


class GGUFFile:
    """One model: a single file, or all parts of a split one (open any of them).

    Raises `ModelFormatError` for damaged files. Tensors of unknown types are listed (`inspect` shows them) and
    raise `UnsupportedModelError` only when their data is asked for.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._parts: list[GGUFPart] = []
        for part_path in _part_paths(self.path):
            self._add_part(part_path)
        self._check_split()

    def _add_part(self, path: Path) -> None:
        part = GGUFPart(path, len(self._parts))
        self._parts.append(part)
        if part.index == 0:
            self.metadata = part.metadata
        for info in part.tensors:
            if info.name in self.tensors:
                raise ModelFormatError(f"{path}: tensor '{info.name}' appears twice")
            self.tensors[info.name] = info

    def _check_split(self) -> None:
        for part in self._parts:
            count = part.metadata.get("split.count", 1) or 1
            if count != len(self._parts):
                raise ModelFormatError(
                    f"{part.path}: 'split.count' is {count}, but its name stands for {len(self._parts)} part(s); "
                    "split files must keep their names NAME-00001-of-000NN.gguf and lie in one folder"
                )
            number = part.metadata.get("split.no", 0)
            if number != part.index:
                raise ModelFormatError(
                    f"{part.path}: 'split.no' is {number}, expected {part.index}: parts are swapped or renamed"
                )
        expected = self.metadata.get("split.tensors.count", len(self.tensors))
        if expected != len(self.tensors):
            raise ModelFormatError(
                f"{self.path}: 'split.tensors.count' is {expected}, but the parts hold {len(self.tensors)} tensors"
            )

    @property
    def architecture(self) -> str:
        """The value of `general.architecture`."""
        value = self.metadata.get("general.architecture")
        if not isinstance(value, str):
            raise ModelFormatError(f"{self.path}: key 'general.architecture' is missing or not a string")
        return value

    @property
    def nbytes(self) -> int:
        """Size of all parts in bytes."""
        return sum(part.size for part in self._parts)

    @property
    def paths(self) -> list[Path]:
        """Of all parts, as `TensorInfo.part` counts them."""
        return [part.path for part in self._parts]

    def place_of(self, data: "Tensor") -> tuple[int, int]:
        """Part and offset in its file where a view of the mapping (`tensor`) begins."""
        for part in self._parts:
            offset = data.data_ptr() - part.address
            if 0 <= offset < part.size:
                return part.index, offset
        raise AssertionError("not a view of this file")

    def drop_pages(self) -> None:
        """Takes the mapped pages out of the process; they come back, from the system's cache or the disk, when used."""
        for part in self._parts:
            part.drop_pages()

    def fingerprint(self) -> str:
        """32 hexadecimal digits that tell models apart: of names, types, shapes and the first bytes of all tensors."""
        digest = hashlib.sha256()
        for name, info in sorted(self.tensors.items()):
            digest.update(f"{name} {info.type_id} {tuple(info.shape)};".encode())
            digest.update(bytes(self._parts[info.part].view(info.offset, min(info.nbytes, 4096))))
        return digest.hexdigest()[:32]

    def tensor(self, name: str) -> "QuantTensor":
        """A read-only view of a tensor's bytes in the mapped file, uint8 `[..., row_bytes]`."""
        import torch

        from moe_engine.kernels.quant_tensor import QuantTensor

        info = self.tensors[name]
        if info.type is None or info.type_id not in QUANT_TYPES:
            raise UnsupportedModelError(
                f"{self._parts[info.part].path}: tensor '{name}': {why_unsupported(info.type_id)}"
            )
        buffer = self._parts[info.part].view(info.offset, info.nbytes)
        rows = torch.frombuffer(buffer, dtype=torch.uint8)
        data = rows.view(*info.shape[:-1], info.type.row_bytes(info.shape[-1]))
        return QuantTensor(data, info.type, info.shape[-1])


def _part_paths(path: Path) -> list[Path]:
    match = _SPLIT_NAME.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    paths = [path.with_name(f"{match['stem']}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    missing = [p.name for p in paths if not os.path.exists(p)]
    if missing and len(missing) < count:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelFormatError(f"{path}: part {missing[0]}{more} of the split model is missing from {path.parent}")
    return paths or [path]
