"""What is recorded is what the router has chosen, on every path; and what earlier runs leave for the next one."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import tiny_models
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_engine import ConfigError, Engine
from moe_engine.cli import main
from moe_engine.decoder import EagerDecoder, StagedDecoder
from moe_engine.graph_decoder import GraphDecoder
from moe_engine.kernels.router import route
from moe_engine.layers import MixtureOfExperts
from moe_engine.profile import Profile, load_profile, path_of
from moe_engine.traces import Trace

PROMPT = [1, 2, 3]
TOP_K, N_LAYER = 3, 2
SMALL = {"num_hidden_layers": N_LAYER, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make("qwen3moe/plain", tmp_path_factory.mktemp("model"), "F16", **SMALL).path


def load(path: Path, **options: Any) -> Engine:
    common: dict[str, Any] = {"device": "simulated", "ctx": 32, "threads": 2, "vram_budget": "64MiB"}
    return Engine.load(path, **(common | options))


def chosen_by_the_reference(path: Path, tokens: list[int]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Ids and weights [n_token, n_layer, top_k]: every layer's router asked again, from its own input."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    with load(path, device="cpu", activations="float") as engine:
        for block in engine.model.blk:
            ffn = block.ffn
            assert isinstance(ffn, MixtureOfExperts)

            def noted(x: torch.Tensor, ffn: MixtureOfExperts = ffn) -> torch.Tensor:
                found.append(route(x @ ffn.ffn_gate_inp.T, ffn.router, ffn.exp_probs_b))
                return ffn(x)

            block.ffn = noted  # type: ignore[assignment]
        engine.forward(tokens)
    ids, weights = (torch.stack(parts, 1).numpy() for parts in zip(*found, strict=True))
    return ids, weights


PATHS: dict[str, tuple[dict[str, Any], type]] = {
    "cpu": ({"device": "cpu"}, EagerDecoder),
    "staged": ({"eager": True}, StagedDecoder),
    "all in slots": ({}, GraphDecoder),
    "misses": ({"miss": "cpu", "cache_slots": 4}, GraphDecoder),
}


@pytest.mark.parametrize("name", PATHS)
def test_every_path_records_the_routers_choices(model: Path, tmp_path: Path, name: str) -> None:
    options, decoder = PATHS[name]
    file = tmp_path / "t.trace"
    with load(model, trace=str(file), **options) as engine:
        assert isinstance(engine.decoder, decoder)
        tokens = [*PROMPT, *engine.generate(PROMPT, temperature=0, max_tokens=2).tokens]
        after_one = Trace.load(file)
        engine.read([9, 8])
        assert engine.fingerprint == after_one.model.hash
    trace = Trace.load(file)
    assert after_one.sequences == (len(tokens) - 1,)
    assert trace.sequences == (len(tokens) - 1, 2)
    assert (trace.model.architecture, trace.model.n_layer, trace.model.top_k) == ("qwen3moe", N_LAYER, TOP_K)
    ids, weights = chosen_by_the_reference(model, tokens[:-1])
    np.testing.assert_array_equal(after_one.ids, ids)
    assert after_one.weights is not None
    np.testing.assert_allclose(after_one.weights, weights, atol=0.01)
    np.testing.assert_array_equal(trace.ids[: len(ids)], ids)


def test_a_cut_recording_is_readable_up_to_the_cut(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "t.trace"
    sizes = []
    with load(model, device="cpu", trace=str(file)) as engine:
        for prompt in ([1, 2, 3, 4], [5, 6], [7, 8, 9]):
            engine.read(prompt)
            sizes.append(file.stat().st_size)
    whole = Trace.load(file)
    assert whole.sequences == (4, 2, 3)
    file.write_bytes(file.read_bytes()[: sizes[2] - 1])
    assert Trace.load(file).sequences == (4, 2)
    np.testing.assert_array_equal(Trace.load(file).ids, whole.ids[:6])


def test_long_sequences_are_cut_into_frames(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_engine.recording.FRAME_TOKENS", 4)
    tokens = [1 + i % 50 for i in range(11)]
    with load(model, device="cpu", ubatch=6, trace=str(tmp_path / "t")) as engine:
        engine.read(tokens)
    trace = Trace.load(tmp_path / "t")
    assert trace.sequences == (11,)
    np.testing.assert_array_equal(trace.ids, chosen_by_the_reference(model, tokens)[0])


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit:
        main(list(arguments))
    out, err = capsys.readouterr()
    assert not exit.value.code, err
    return out


def test_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text, recorded, live = tmp_path / "text", tmp_path / "a.trace", tmp_path / "b.trace"
    text.write_text("Once upon a time there was a fox.", encoding="utf-8")
    run(capsys, "trace", "record", "-f", str(text), "-o", str(recorded), "--ctx", "4", "--device", "cpu")
    trace = Trace.load(recorded)
    assert trace.sequences[0] == 4
    assert len(trace.sequences) == -(-trace.n_token // 4)
    run(capsys, "generate", "A", "--max-tokens", "3", "--device", "cpu", "--temperature", "0", "--trace", str(live))
    with Engine.load(device="cpu") as engine:
        n_prompt = len(engine.encode("A"))
    assert Trace.load(live).n_token == n_prompt + 2
    assert Trace.load(live).model == trace.model


def test_a_trace_is_of_one_sequence_at_a_time(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="n_sequence is 2, expected 1 with a trace"):
        load(model, n_sequence=2, trace=str(tmp_path / "t"))
    with pytest.raises(ConfigError, match="cannot be written"):
        load(model, device="cpu", trace=str(tmp_path / "none" / "t"))


def test_models_are_told_apart(model: Path, tmp_path: Path) -> None:
    renamed = tmp_path / "other-name.gguf"
    renamed.write_bytes(model.read_bytes())
    changed = tmp_path / "changed.gguf"
    with load(model, device="cpu") as engine, load(renamed, device="cpu") as same:
        info = engine.file.tensors["blk.0.ffn_gate_inp.weight"]
        data = bytearray(model.read_bytes())
        data[info.offset] ^= 1
        changed.write_bytes(data)
        with load(changed, device="cpu") as other:
            assert engine.fingerprint == same.fingerprint != other.fingerprint


# -- what earlier runs leave


def test_slots_begin_with_what_the_last_run_used(model: Path) -> None:
    options = {"miss": "cpu", "cache_slots": 6, "policy": "lfu"}
    with load(model, **options) as engine:
        assert isinstance(engine.decoder, GraphDecoder)
        engine.decoder.worker.settle()
        engine.generate([1, 2], temperature=0, max_tokens=2)
        fingerprint = engine.fingerprint
        engine.decoder.worker.settle()
        counts, table = engine.decoder.worker.use_counts(), engine.decoder.step.experts.slot_table >= 0
    kept = load_profile(fingerprint, *counts.shape)
    assert kept is not None
    np.testing.assert_array_equal(kept.counts, counts)
    np.testing.assert_array_equal(kept.resident, table)
    assert not np.array_equal(table[0, :3], [True] * 3), "or it would be what runs without a profile begin with"
    with load(model, **options) as engine:
        assert isinstance(engine.decoder, GraphDecoder)
        engine.decoder.worker.settle()
        np.testing.assert_array_equal(engine.decoder.step.experts.slot_table >= 0, table)
        np.testing.assert_array_equal(engine.decoder.worker.use_counts(), counts)
        engine.decoder.worker.check_integrity()
    before = path_of(fingerprint).read_bytes()
    with load(model, **options, profile=False) as engine:
        assert isinstance(engine.decoder, GraphDecoder)
        engine.decoder.worker.settle()
        np.testing.assert_array_equal(engine.decoder.step.experts.slot_table[:, :3] >= 0, True)
        engine.generate([1], temperature=0, max_tokens=1)
    assert path_of(fingerprint).read_bytes() == before


def test_nothing_is_kept_where_nothing_is_learnt(model: Path) -> None:
    for options in ({"device": "cpu"}, {}):
        with load(model, **options) as engine:
            engine.generate([1], temperature=0, max_tokens=1)
            assert not path_of(engine.fingerprint).exists()
        assert not path_of(engine.__dict__["fingerprint"]).exists()


PROFILE = Profile("ab" * 16, np.array([[0, 3, 1], [2, 0, 5]], np.float32), np.array([[0, 0, 1], [1, 0, 0]], bool))


def test_the_resident_come_first_then_the_most_used() -> None:
    assert PROFILE.best_first() == [(1, 0), (0, 2), (1, 2), (0, 1), (0, 0), (1, 1)]


def damaged(change: Callable[[dict[str, Any]], object]) -> bytes:
    found = msgpack.unpackb(path_of(PROFILE.model).read_bytes())
    change(found)
    packed: bytes = msgpack.packb(found)
    return packed


def test_a_damaged_or_foreign_profile_is_ignored(caplog: pytest.LogCaptureFixture) -> None:
    assert load_profile(PROFILE.model, 2, 3) is None
    assert not caplog.records
    PROFILE.save()
    path = path_of(PROFILE.model)
    assert list(path.parent.iterdir()) == [path]
    assert load_profile(PROFILE.model, 2, 3) is not None
    wrong = {
        "is damaged": path.read_bytes()[:-3],
        "is no profile": damaged(lambda found: found.update(version=9)),
        "another model": damaged(lambda found: found.update(model="cd" * 16)),
        "'counts' is not": damaged(lambda found: found.update(counts=b"abc")),
        "all finite": damaged(lambda found: found.update(counts=np.full(6, np.nan, "<f4").tobytes())),
        "'resident' is not": damaged(lambda found: found.pop("resident")),
    }
    for message, packed in wrong.items():
        path.write_bytes(packed)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert load_profile(PROFILE.model, 2, 3) is None
        assert message in caplog.text


@given(st.binary(max_size=200))
def test_any_bytes_are_no_profile(packed: bytes) -> None:
    path = path_of("ef" * 16)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(packed)
    assert load_profile("ef" * 16, 2, 3) is None
