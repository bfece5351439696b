"""Random full-size models and recorded routing for benchmarks, at small sizes."""

from pathlib import Path

import numpy as np
import pytest

from moe_engine.benchmark import random_model, random_writer
from moe_engine.benchmark.routing import RecordedRouting
from moe_engine.errors import CapacityError, ConfigError, TraceFormatError
from moe_engine.gguf_file import GGUFFile
from moe_engine.traces import Trace, TraceModel


@pytest.fixture
def small_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    qwen = random_writer.Shape("qwen3moe", 3, 256, 2, 256, 256, 8, 2, 512, n_kv_head=1)
    deepseek = random_writer.Shape("deepseek2", 3, 256, 2, 256, 256, 8, 2, 512, n_dense=1, n_shared=1)
    monkeypatch.setattr(random_model, "MODELS", {"qwen": qwen, "deepseek": deepseek})
    monkeypatch.setattr(random_writer, "POOL_BYTES", 1 << 16)


@pytest.mark.parametrize("name", ["qwen", "deepseek"])
@pytest.mark.parametrize("mix", random_writer.MIXES)
def test_random_models_are_repeatable(small_shapes: None, tmp_path: Path, name: str, mix: str) -> None:
    first, second, other = (
        random_model.random_model(name, tmp_path / str(i), skew=0.35, mix=mix, seed=seed)
        for i, seed in enumerate((0, 0, 1))
    )
    assert first.read_bytes() == second.read_bytes()
    assert first.name == second.name != other.name
    file = GGUFFile(first)
    assert file.fingerprint() == GGUFFile(second).fingerprint() != GGUFFile(other).fingerprint()
    assert len({key.split(".")[1] for key in file.tensors if key.startswith("blk.")}) == 3
    assert str(file.tensors["blk.1.ffn_gate_exps.weight"].type) == mix.upper().removesuffix("_M")


def test_random_model_is_written_once_and_whole(small_shapes: None, tmp_path: Path) -> None:
    path = random_model.random_model("qwen", tmp_path, layers=2)
    before = path.stat().st_mtime_ns
    assert random_model.random_model("qwen", tmp_path, layers=2) == path
    assert path.stat().st_mtime_ns == before

    def interrupt(done: int, total: int) -> None:
        assert 0 < done <= total
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        random_model.random_model("qwen", tmp_path, skew=0.5, progress=interrupt)
    assert list(tmp_path.iterdir()) == [path]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="damaged"):
        random_model.random_model("qwen", tmp_path, layers=2)


def test_impossible_random_models(small_shapes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, options, message in (
        ("llama", {}, "expected one of: qwen, deepseek"),
        ("deepseek", {"layers": 1}, "layers is 1"),
        ("qwen", {"layers": 4}, "layers is 4"),
        ("qwen", {"mix": "q1"}, "mix is 'q1'"),
        ("qwen", {"skew": -1.0}, "skew is -1"),
    ):
        with pytest.raises(ConfigError, match=message):
            random_model.random_model(name, tmp_path, **options)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(CapacityError, match="are free"):
        random_model.random_model("qwen", tmp_path)
    assert list(tmp_path.iterdir()) == []


def trace(n_layer: int, n_expert: int, top_k: int, n_token: int = 2000) -> Trace:
    rng = np.random.default_rng(0)
    ids = rng.permuted(np.broadcast_to(np.arange(n_expert), (n_token, n_layer, n_expert)), axis=2)[..., :top_k]
    return Trace(TraceModel("x", n_layer, n_expert, top_k), ids.astype(np.uint16), None, (n_token,))


def test_routing_of_the_same_shape_is_followed_exactly(tmp_path: Path) -> None:
    recorded = trace(5, 8, 2)
    ahead = np.random.default_rng(1).integers(8, size=(2, *recorded.ids.shape), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", ids=recorded.ids, ahead=ahead)
    choices, predicted = RecordedRouting.load(tmp_path / "a.npz").mapped(5, 8, 2)
    assert np.array_equal(choices.numpy(), recorded.ids)
    assert predicted is not None
    for distance in (1, 2):
        assert np.array_equal(predicted[distance - 1, :, distance:].numpy(), ahead[distance - 1, :, distance:])
    assert RecordedRouting(recorded).mapped(5, 8, 2)[1] is None


@pytest.mark.parametrize(("n_layer", "n_expert", "top_k"), [(5, 16, 4), (3, 32, 4), (4, 8, 3)])
def test_routing_for_another_shape(n_layer: int, n_expert: int, top_k: int) -> None:
    found = RecordedRouting(trace(3, 8, 4)).mapped(n_layer, n_expert, top_k)[0].numpy()
    assert found.shape == (2000, n_layer, top_k)
    ordered = np.sort(found, axis=2)
    assert (ordered[..., 1:] > ordered[..., :-1]).all()  # no expert twice
    assert found.min() >= 0
    assert found.max() < n_expert
    used = np.bincount(found.ravel(), minlength=n_expert)
    assert used.max() < 1.2 * used.min()  # as evenly as recorded


def test_predictions_for_another_shape_are_as_good_as_recorded() -> None:
    recorded = trace(5, 16, 4)
    ids = recorded.ids.astype(np.int32)
    ahead = np.stack([ids, ids])  # the best two of four are right, in layers that are not predicted from the first
    ahead[..., 2:] = (ahead[..., 2:] + 1) % 16
    ahead[0, :, :2] = ahead[1, :, :3] = 255
    routing = RecordedRouting(recorded, ahead)
    choices, predicted = (part.numpy() for part in routing.mapped(12, 32, 4) if part is not None)
    assert predicted.shape == (2, 2000, 12, 4)
    for distance in (1, 2):
        found = (choices[:, :, :, None] == predicted[distance - 1][:, :, None]).any(3).mean((0, 2))
        as_recorded = (ids[:, 4, :, None] == ahead[0, :, 4, None]).any(2).mean()
        assert np.allclose(found[5:], as_recorded, atol=0.05), found


def test_routing_that_does_not_fit(tmp_path: Path) -> None:
    recorded = trace(3, 8, 4)
    for shape in ((3, 4, 2), (3, 12, 2), (3, 8, 5)):
        with pytest.raises(ConfigError, match="cannot stand for"):
            RecordedRouting(recorded).mapped(*shape)
    for ahead, message in (((2, 3), "array 'ahead' is int64"), ((2, 2000, 3, 4), "3 layers are too few")):
        np.savez(tmp_path / "a.npz", ids=recorded.ids, ahead=np.zeros(ahead, np.int64))
        with pytest.raises(TraceFormatError, match=message):
            RecordedRouting.load(tmp_path / "a.npz")
    five = trace(5, 8, 4)
    guesses = np.zeros((2, 2000, 5, 4), np.uint8)
    guesses[0, :, 0] = guesses[1, :, :2] = 255  # what nothing predicts
    np.savez(tmp_path / "a.npz", ids=five.ids, n_expert=np.int64(8), ahead=guesses)
    RecordedRouting.load(tmp_path / "a.npz")
    guesses[1, 7, 3] = 8
    np.savez(tmp_path / "a.npz", ids=five.ids, n_expert=np.int64(8), ahead=guesses)
    with pytest.raises(
        TraceFormatError, match="array 'ahead' has ids from 0 to 8 for layers 2 and on, expected 0 to 7"
    ):
        RecordedRouting.load(tmp_path / "a.npz")
