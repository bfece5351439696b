"""Files that are kept between runs, in the user's cache folder."""

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO


def cache_folder() -> Path:
    """By the XDG base directory specification; it may not exist yet. Raises `OSError` where nobody has a home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "moe-engine"
    except RuntimeError as e:
        raise FileNotFoundError(errno.ENOENT, "no home folder is known: set HOME or XDG_CACHE_HOME") from e


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to be written that takes the place of another in one step, if all goes well. Raises `OSError`."""
    if path.exists() and not path.is_file():  # a device or a pipe is written as it is
        with open(path, "wb") as file:
            yield file
        return
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            yield file
            file.flush()
            os.fchmod(file.fileno(), mode_of_new_files())
            os.replace(file.name, path)
        except BaseException:  # an interruption too leaves nothing behind
            with contextlib.suppress(OSError):
                os.unlink(file.name)
            raise


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file, and its folder, in one step: there is the old one or the new one. Raises `OSError`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(content)


def mode_of_new_files() -> int:
    """Temporary files are their owner's alone; what they become is as readable as any file."""
    os.umask(mask := os.umask(0o077))
    return 0o666 & ~mask
