"""Without a GPU the Triton kernels run in Triton's interpreter, which must be known before they are imported."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # tests run side by side, not what numpy does in each

import tempfile
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
