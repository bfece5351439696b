"""Files that are kept between runs."""

import os
from pathlib import Path

import pytest

from moe_engine.cache_files import cache_folder, replace_file, replacing
from moe_engine.calibration import kept
from moe_engine.profile import load_profile


def test_an_interrupted_write_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new folder" / "kept"
    replace_file(path, b"old")

    def interrupted(source: str, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(path.parent) == ["kept"]


@pytest.mark.parametrize("base", ["", "relative/folder"])
def test_only_absolute_folders_count(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", base)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert cache_folder() == tmp_path / ".cache" / "moe-engine"


def test_new_files_are_as_readable_as_others(tmp_path: Path) -> None:
    replace_file(tmp_path / "kept", b"")
    (tmp_path / "plain").touch()
    assert (tmp_path / "kept").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_what_is_no_file_is_written_as_it_is() -> None:
    with replacing(Path("/dev/null")) as file:
        file.write(b"x")
    assert Path("/dev/null").is_char_device()


def test_nobody_s_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", unknown)
    with pytest.raises(FileNotFoundError, match="set HOME"):
        cache_folder()
    assert load_profile("model", 2, 4) is None
    assert kept(None, 2) is None
