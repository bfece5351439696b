"""Trace files: what is written is read, what is cut is read to the cut, what is damaged is our error."""

import errno
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_engine.errors import ConfigError, TraceFormatError
from moe_engine.trace_npz import export_npz, import_npz
from moe_engine.traces import Trace, TraceModel, TraceWriter


def trace_of(sequences: tuple[int, ...] = (300, 5), n_expert: int = 40, weights: bool = True) -> Trace:
    rng = np.random.default_rng(n_expert)
    model = TraceModel("qwen3moe", 3, n_expert, 4, "0123456789abcdef")
    ids = rng.random((sum(sequences), 3, n_expert)).argsort(axis=2)[..., :4].astype(np.uint16)
    return Trace(model, ids, rng.random(ids.shape).astype(np.float16) if weights else None, sequences)


def assert_same(a: Trace, b: Trace) -> None:
    assert (a.model, a.sequences) == (b.model, b.sequences)
    np.testing.assert_array_equal(a.ids, b.ids)
    assert (a.weights is None) == (b.weights is None)
    if a.weights is not None and b.weights is not None:
        np.testing.assert_array_equal(a.weights, b.weights)


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("n_expert", [4, 256, 257, 512, 1000])
def test_written_is_read(tmp_path: Path, n_expert: int, weights: bool) -> None:
    trace = trace_of(n_expert=n_expert, weights=weights)
    for write, read in ((trace.save, Trace.load), (lambda p: export_npz(trace, p), import_npz)):
        write(tmp_path / "file")
        assert_same(read(tmp_path / "file"), trace)


@pytest.mark.parametrize("n_expert", [64, 384])
def test_an_id_takes_less_than_1_2_bytes(tmp_path: Path, n_expert: int) -> None:
    trace = trace_of((1000,), n_expert, weights=False)
    trace.save(tmp_path / "t")
    assert (tmp_path / "t").stat().st_size < 1.2 * trace.ids.size


def test_a_trace_without_tokens(tmp_path: Path) -> None:
    Trace(TraceModel("x", 2, 4, 2), np.zeros((0, 2, 2), np.uint16), None, ()).save(tmp_path / "t")
    assert Trace.load(tmp_path / "t").ids.shape == (0, 2, 2)


def test_an_older_file_stays_until_there_is_something_to_write(tmp_path: Path) -> None:
    trace_of((3, 2), 300).save(tmp_path / "t")
    before = (tmp_path / "t").read_bytes()
    TraceWriter(tmp_path / "t", TraceModel("x", 2, 4, 2)).close()
    assert (tmp_path / "t").read_bytes() == before
    TraceWriter(tmp_path / "new", TraceModel("x", 2, 4, 2)).close()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("path", ["no/such/folder/t", "."])
def test_what_cannot_be_written_is_known_at_once(tmp_path: Path, path: str) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        TraceWriter(tmp_path / path, TraceModel("x", 2, 4, 2))


def test_a_full_disk_is_an_error_that_names_the_file() -> None:
    with pytest.raises(ConfigError, match="/dev/full: cannot be written: No space left"):
        trace_of((3, 2), 300).save("/dev/full")


@pytest.mark.parametrize("suffix", [".trace", ".npz"])
def test_a_file_that_cannot_be_finished_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    def failing(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / f"t{suffix}"
    path.write_bytes(b"old")
    monkeypatch.setattr("moe_engine.traces._packed", failing)
    monkeypatch.setattr(np, "savez_compressed", failing)
    trace = trace_of((3, 2), 300)
    with pytest.raises(ConfigError, match=f"{path}: cannot be written: No space left"):
        trace.save(path) if suffix == ".trace" else export_npz(trace, path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == b"old"


def test_a_cut_file_is_readable_up_to_the_cut(tmp_path: Path) -> None:
    model = TraceModel("x", 2, 4, 2)
    Trace(model, np.zeros((0, 2, 2), np.uint16), None, ()).save(tmp_path / "header")
    ends = [(tmp_path / "header").stat().st_size]
    ids = np.tile(np.array([[[0, 1], [3, 2]]]), (5, 1, 1))
    with TraceWriter(tmp_path / "t", model) as writer:
        for frame in range(3):
            writer.append(ids, begins=frame != 1)
            ends.append((tmp_path / "t").stat().st_size)
    data = (tmp_path / "t").read_bytes()
    for size in range(len(data) + 1):
        (tmp_path / "cut").write_bytes(data[:size])
        if size < ends[0]:
            with pytest.raises(TraceFormatError, match="is no trace file"):
                Trace.load(tmp_path / "cut")
        else:
            whole = sum(size >= end for end in ends[1:])
            assert Trace.load(tmp_path / "cut").sequences == ((), (5,), (10,), (10, 5))[whole]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(position=st.integers(0, 700), value=st.integers(0, 255))
def test_damaged_files_are_read_or_refused(tmp_path: Path, position: int, value: int) -> None:
    trace_of((3, 2), 300).save(tmp_path / "t")
    data = bytearray((tmp_path / "t").read_bytes())
    data[position % len(data)] = value
    (tmp_path / "t").write_bytes(data)
    try:
        Trace.load(tmp_path / "t")
    except TraceFormatError as error:
        refused = str(error)
        assert str(tmp_path / "t") in refused


HEADER = {
    "magic": "moe_engine trace",
    "version": 1,
    "model": {"architecture": "x", "n_layer": 1, "n_expert": 4, "top_k": 2, "hash": ""},
}
FRAME = {"tokens": 1, "begins": True, "ids": b"\0\3"}


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ([7], "is no trace file"),
        ([HEADER | {"version": 2}], "has trace version 2, expected 1"),
        ([HEADER | {"model": 3}], "'model' is 3, expected a map of architecture, hash"),
        ([HEADER | {"model": HEADER["model"] | {"n_expert": 1}}], "top_k is 2, more than n_expert 1"),  # type: ignore[operator]
        ([HEADER | {"model": HEADER["model"] | {"n_layer": 1 << 40}}], "n_layer is"),  # type: ignore[operator]
        ([HEADER, 5], "frame 0: is 5, expected a map"),
        ([HEADER, None, FRAME], "frame 0: is None, expected a map"),
        ([HEADER, FRAME, FRAME | {"more": 1}], "frame 1: is "),
        ([HEADER, FRAME | {"tokens": True}], "'tokens' is True, expected int"),
        ([HEADER, FRAME | {"tokens": 0}], "has 0 tokens"),
        ([HEADER, FRAME | {"tokens": 2}], "2 bytes of ids, expected 4"),
        ([HEADER, FRAME | {"ids": b"\0\4"}], "expert 4, expected less than 4"),
        ([HEADER, FRAME | {"ids": b"\1\1"}], "the same expert twice"),
        ([HEADER, FRAME | {"weights": b"123"}], "3 bytes of weights, expected 4"),
        ([HEADER, FRAME | {"weights": b"\0\x7c\0\0"}], "not all finite"),
        ([HEADER, FRAME | {"weights": bytes(4)}, FRAME], "1 of 2 frames have weights"),
    ],
)
def test_errors_name_what_was_found(tmp_path: Path, objects: list[Any], message: str) -> None:
    (tmp_path / "t").write_bytes(b"".join(map(msgpack.packb, objects)))
    with pytest.raises(TraceFormatError) as error:
        Trace.load(tmp_path / "t")
    assert message in str(error.value)
    assert str(error.value).startswith(str(tmp_path / "t"))


def test_contradictions_are_refused() -> None:
    trace = trace_of()
    for change, message in (
        ({"sequences": (3,)}, "3 tokens in all"),
        ({"ids": trace.ids[:, :2]}, "ids have shape"),
        ({"weights": trace.weights[1:]}, "weights have shape"),  # type: ignore[index]
        ({"ids": np.zeros_like(trace.ids)}, "same expert twice"),
    ):
        with pytest.raises(ConfigError, match=message):
            replace(trace, **change)


def test_archives_of_others(tmp_path: Path) -> None:
    trace, file = trace_of((6, 6)), tmp_path / "t.npz"
    np.savez(file, ids=trace.ids.astype(np.uint8), w=trace.weights, seqlen=np.array([6, 2]), other=np.zeros(3))  # type: ignore[arg-type]
    found = import_npz(file, n_expert=40)
    assert_same(found, replace(trace, model=TraceModel("unknown", 3, 40, 4)))
    assert import_npz(file).model.n_expert == trace.ids.max() + 1


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros(3)}, "has no array 'ids'"),
        ({"ids": np.zeros((2, 3))}, "array 'ids' is float64 [2, 3], expected integers"),
        ({"ids": np.array([[[-1, 2]]])}, "ids from -1 to 2"),
        ({"ids": np.array([[[1, 2]]]), "weights": np.zeros(2)}, "array 'weights' is float64 [2]"),
        ({"ids": np.array([[[1, 2]]]), "weights": np.full((1, 1, 2), 1e9)}, "not all finite"),
        ({"ids": np.array([[[1, 2]]]), "seqlen": np.array([3, 0])}, "3 tokens a sequence"),
        ({"ids": np.array([[[1, 2]]]), "seqlen": np.array(3)}, "expected two integers"),
        ({"ids": np.array([[[1, 2]]]), "sequences": np.array([3])}, "3 tokens in all"),
        ({"ids": np.array([[[1, 2]]]), "n_expert": np.array(2)}, "expert 2, expected less than 2"),
        ({"ids": np.array([[["x"]]], dtype=object)}, "is no readable .npz archive"),
    ],
)
def test_wrong_archives(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "t.npz", **arrays)
    with pytest.raises(TraceFormatError) as error:
        import_npz(tmp_path / "t.npz")
    assert message in str(error.value)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "t.npz").write_bytes(b"PK\3\4nothing")
    for read in (Trace.load, import_npz):
        with pytest.raises(TraceFormatError, match="no such file"):
            read(tmp_path / "none")
    with pytest.raises(TraceFormatError, match="is no readable"):
        import_npz(tmp_path / "t.npz")
    with pytest.raises(ConfigError, match="cannot be written"):
        trace_of().save(tmp_path / "none" / "t")
