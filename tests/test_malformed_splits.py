"""Models in several files of which one is missing, mixed up or damaged."""

import shutil
from pathlib import Path

import pytest
from gguf_images import SMALL, U32, Image, caught_from, error_of, run
from tiny_models import make
from tiny_variants import FileOptions


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make("deepseek2/v3", path, file=FileOptions(tensors_per_part=16), **SMALL)
    return path


@pytest.fixture
def parts(model: Path, tmp_path: Path) -> list[Path]:
    found = sorted(shutil.copytree(model, tmp_path / "split").iterdir())
    assert len(found) == 3
    return found


def test_split_runs(parts: list[Path]) -> None:
    run(parts[0])


@pytest.mark.parametrize("missing", [1, 2])
def test_missing_part_is_named(parts: list[Path], missing: int) -> None:
    parts[missing].unlink()
    assert parts[missing].name in error_of(parts[0])


def test_missing_first_part_is_named(parts: list[Path]) -> None:
    parts[0].unlink()
    assert parts[0].name in error_of(parts[1])


def test_swapped_parts(parts: list[Path]) -> None:
    other = parts[1].with_name("other")
    parts[1].rename(other)
    parts[2].rename(parts[1])
    other.rename(parts[2])
    assert "split.no" in error_of(parts[1])


def test_the_same_part_twice(parts: list[Path]) -> None:
    parts[2].write_bytes(parts[1].read_bytes())
    error_of(parts[2])


def test_renamed_part(parts: list[Path]) -> None:
    """A part under a name of its own is not the whole model."""
    assert "split.count" in error_of(parts[0].rename(parts[0].with_name("whole.gguf")))


def test_part_of_another_split(parts: list[Path]) -> None:
    for number, part in enumerate(parts[:2]):
        part.rename(part.with_name(f"tiny-{number + 1:05d}-of-00002.gguf"))
    assert "split.count" in error_of(parts[0].with_name("tiny-00001-of-00002.gguf"))


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        (0, "split.count", 2),
        (2, "split.count", 2),
        (0, "split.no", 7),
        (2, "split.no", 7),
        (0, "split.tensors.count", 5),
    ],
)
def test_wrong_split_key(parts: list[Path], part: int, key: str, value: int) -> None:
    image = Image.parse(parts[part].read_bytes())
    image.key(key).set(U32, value)
    parts[part].write_bytes(image.pack())
    message = str(caught_from(parts[0]))
    assert key in message
    assert str(value) in message


def test_truncated_part_is_named(parts: list[Path]) -> None:
    parts[1].write_bytes(parts[1].read_bytes()[:-1000])
    message = str(caught_from(parts[0]))
    assert parts[1].name in message
    assert "truncated" in message


def test_tensor_in_two_parts(parts: list[Path]) -> None:
    first, second = (Image.parse(part.read_bytes()) for part in parts[:2])
    second.tensors[0].name = first.tensors[0].name
    parts[1].write_bytes(second.pack())
    assert first.tensors[0].name.decode() in str(caught_from(parts[0]))
