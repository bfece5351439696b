"""Without a GPU the Triton kernels run in Triton's interpreter, which must be known before they are imported."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # tests run side by side, not what numpy does in each

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # how long an example takes depends on what else runs
settings.load_profile("untimed")

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    from quick_interpreter import make_quick

    make_quick()
    torch.set_num_threads(1)

# What the engine keeps between runs is not the user's, and not another test's.
os.environ["XDG_CACHE_HOME"] = f"{tempfile.gettempdir()}/moe-engine-tests-{os.getpid()}"


@pytest.fixture(autouse=True)
def own_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg-cache"))


@pytest.fixture(autouse=True)
def quick_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the RAM's rate."""
    monkeypatch.setattr("moe_engine.hardware.RAM_SAMPLE_BYTES", 1 << 20)


@pytest.fixture(scope="session")
def header(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A file of a real model's shape without its bytes."""
    from header_files import write_header  # imports what must know of the interpreter first

    folder = tmp_path_factory.mktemp("headers")

    def path(model: str, layers: int | None = None) -> Path:
        file = folder / f"{model}.gguf"
        if not file.exists():
            write_header(model, file, layers)
        return file

    return path
