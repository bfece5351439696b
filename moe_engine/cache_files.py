"""Files that are kept between runs, in the user's cache folder."""

import contextlib
import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """By the XDG base directory specification; it may not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "moe-engine"


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file, and its folder, in one step: there is the old one or the new one. Raises `OSError`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.replace(file.name, path)
        except BaseException:  # an interruption too leaves nothing behind
            with contextlib.suppress(OSError):
                os.unlink(file.name)
            raise
