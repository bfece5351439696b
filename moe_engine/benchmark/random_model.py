"""Full-size MoE models with random quantized weights, to measure speed and memory without a download.

Names, shapes, quant types and metadata are those of the real model; only the values are random. Routers can be skewed
so that some experts are picked more often: row e is scaled by (rank + 1) ** -skew.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from moe_engine.benchmark.random_writer import MIXES, MODELS, Shape, Writer, write_common, write_deepseek, write_qwen3
from moe_engine.cache_files import mode_of_new_files
from moe_engine.config import format_size
from moe_engine.errors import CapacityError, ConfigError, ModelFormatError
from moe_engine.gguf_file import GGUFFile


def write_model(
    name: str,
    path: Path,
    *,
    layers: int | None = None,
    skew: float = 0.35,
    mix: str = "q4_k_m",
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes `MODELS[name]`, or its first `layers` layers, to `path`; what was there is replaced at the very end.

    progress: called with (bytes written, bytes in all). Raises `ConfigError` for an impossible choice, `CapacityError`
    if the disk is too full.
    """
    s = _shape(name, layers)
    if mix not in MIXES:
        raise ConfigError(f"mix is {mix!r}, expected one of: {', '.join(MIXES)}")
    if not 0 <= skew <= 4:
        raise ConfigError(f"skew is {skew}, expected a number from 0 (none) to 4")
    out = Writer(s, MIXES[mix], skew, seed)
    write_common(out.gguf, _title(name, s.n_layer, skew, mix, seed), s, MIXES[mix])
    out.quant("token_embd.weight", out.mix.usual, s.n_vocab, s.hidden)
    (write_qwen3 if s.architecture == "qwen3moe" else write_deepseek)(out, s)
    out.ones("output_norm.weight", s.hidden)
    out.quant("output.weight", out.mix.finer, s.n_vocab, s.hidden)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if free < out.nbytes * 1.01:
            raise CapacityError(
                f"{path.parent}: the random model takes {format_size(out.nbytes)}, but {format_size(free)} are free: "
                "choose another folder, or fewer layers"
            )
        number, unfinished = tempfile.mkstemp(prefix=path.name, suffix=".part", dir=path.parent)
        os.close(number)
        try:
            out.finish(Path(unfinished), progress)
            os.chmod(unfinished, mode_of_new_files())
            os.replace(unfinished, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(unfinished)
    except OSError as e:
        raise ConfigError(f"{path}: cannot be written: {e.strerror}") from e


def random_model(
    name: str,
    folder: Path,
    *,
    layers: int | None = None,
    skew: float = 0.35,
    mix: str = "q4_k_m",
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """The file of such a model in `folder`: the one that is there if it is whole, otherwise as `write_model`.

    Raises as `write_model`; `ConfigError` if a file of that name is something else.
    """
    n_layer = _shape(name, layers).n_layer
    title = _title(name, n_layer, skew, mix, seed)
    path = folder / f"{title.replace(' ', '-')}.gguf"
    if path.exists():
        try:
            found = GGUFFile(path).metadata.get("general.name")  # which checks that all tensors are there
        except ModelFormatError as e:
            raise ConfigError(f"{path}: is damaged: remove it, and it is written anew ({e})") from e
        if found != title:
            raise ConfigError(f"{path}: is {found!r}, expected {title!r}: remove it or choose another folder")
        return path
    write_model(name, path, layers=layers, skew=skew, mix=mix, seed=seed, progress=progress)
    return path


def _shape(name: str, layers: int | None) -> Shape:
    if name not in MODELS:
        raise ConfigError(f"random model {name!r}: expected one of: {', '.join(MODELS)}")
    shape = MODELS[name]
    if layers is not None and not shape.n_dense < layers <= shape.n_layer:
        raise ConfigError(
            f"layers is {layers}, but {name} has {shape.n_layer}, the first {shape.n_dense} of them without experts"
        )
    return replace(shape, n_layer=layers or shape.n_layer)


def _title(name: str, n_layer: int, skew: float, mix: str, seed: int) -> str:
    parts = [f"random {name} {mix} skew {skew:g}"]
    parts += [f"layers {n_layer}"] if n_layer < MODELS[name].n_layer else []
    parts += [f"seed {seed}"] if seed else []
    return " ".join(parts)
