"""Ctrl-C leaves an engine usable, wherever it comes."""

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models

from moe_engine import ConfigError, Engine, ModelFormatError
from moe_engine.expert_cache import CachedExperts
from moe_engine.graph_decoder import GraphDecoder
from moe_engine.interrupts import deferred_interrupt
from moe_engine.kernels.mailbox import post
from moe_engine.kernels.plain_product import PlainProduct
from moe_engine.kernels.worker import DecodeWorker
from moe_engine.layers import MixtureOfExperts
from moe_engine.traces import Trace

SMALL = {"num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1}
PROMPT = [1, 2, 3]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make("qwen3moe/plain", tmp_path_factory.mktemp("model"), "F16", **SMALL).path


def load(path: Path, **options: Any) -> Engine:
    common: dict[str, Any] = {"device": "simulated", "ctx": 32, "threads": 2, "vram_budget": "64MiB", "profile": False}
    return Engine.load(path, **(common | options))


def greedy(engine: Engine, prompt: list[int], max_tokens: int = 2) -> list[int]:
    return engine.generate(prompt, temperature=0, max_tokens=max_tokens).tokens


def interrupt(done: list[str], times: int) -> None:
    with deferred_interrupt():
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)
        done.append("within")
    done.append("behind")


def test_the_first_waits_and_the_second_does_not() -> None:
    done: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        interrupt(done, 1)
    assert done == ["within"]
    with pytest.raises(KeyboardInterrupt):
        interrupt(done, 2)
    assert done == ["within"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_within_is_not_hidden() -> None:
    with pytest.raises(ValueError, match="what is wrong"), deferred_interrupt():
        raise ValueError("what is wrong")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_threads_are_left_alone() -> None:
    ran = []

    def run() -> None:
        with deferred_interrupt():
            ran.append(signal.getsignal(signal.SIGINT) is signal.default_int_handler)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert ran == [True]


@pytest.mark.parametrize("at", [1, 5])
def test_while_a_step_is_launched(model: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    with load(model, miss="cpu", cache_slots=4) as engine:
        assert isinstance(engine.decoder, GraphDecoder)
        expected = greedy(engine, PROMPT)
        calls = []

        def interrupted(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == at:
                signal.raise_signal(signal.SIGINT)
            return post(*args, **kwargs)

        monkeypatch.setattr("moe_engine.decode_step.post", interrupted)
        with pytest.raises(KeyboardInterrupt):
            greedy(engine, PROMPT)
        assert greedy(engine, PROMPT) == expected


@pytest.mark.parametrize("home", ["cuda:0", "cpu"])
def test_in_a_prompt_where_the_first_layer_is_placed(model: Path, monkeypatch: pytest.MonkeyPatch, home: str) -> None:
    prompt = list(range(6))
    with load(model, eager=True, cache_slots=4, place=[rf"blk\.0\..*_exps={home}"]) as engine:
        expected = greedy(engine, prompt, 1)
        add, calls = PlainProduct.add, []

        def interrupted(self: Any, *args: Any, **kwargs: Any) -> None:
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            add(self, *args, **kwargs)

        monkeypatch.setattr(PlainProduct, "add", interrupted)
        for _ in range(6):  # more often than the ring has cells
            calls.clear()
            with pytest.raises(KeyboardInterrupt):
                greedy(engine, [7, *prompt], 1)
        monkeypatch.undo()
        assert greedy(engine, prompt, 1) == expected


@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_what_is_recorded_behind_it(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    file = tmp_path / "t.trace"
    with load(model, device=device, eager=True, trace=str(file)) as engine:
        ffn = engine.model.blk[1].ffn
        assert isinstance(ffn, MixtureOfExperts)

        def interrupted(*args: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(ffn, "on_route", interrupted)
        with pytest.raises(KeyboardInterrupt):
            greedy(engine, PROMPT)
        monkeypatch.undo()
        assert len(greedy(engine, [5, 6, 7, 8], 4)) == 4
    assert Trace.load(file).sequences[-1] == 7


@pytest.mark.parametrize("options", [{"device": "cpu"}, {"device": "simulated", "miss": "cpu", "cache_slots": 4}])
def test_a_stream_is_over_when_another_begins(model: Path, options: dict[str, Any]) -> None:
    with load(model, **options) as engine:
        expected = greedy(engine, PROMPT)
        uses: list[Callable[[], object]] = [
            lambda: greedy(engine, [4, 5]),
            lambda: engine.forward([9, 8]),
            lambda: engine.read([9, 8]),
        ]
        for use in uses if options["device"] == "cpu" else uses[:1]:
            stream = engine.stream(PROMPT, temperature=0, max_tokens=8)
            next(stream)
            use()
            with pytest.raises(ConfigError, match="this stream is over"):
                stream.result()
            assert greedy(engine, PROMPT) == expected
        stream = engine.stream(PROMPT, temperature=0, max_tokens=8)
        next(stream)
    with pytest.raises(ConfigError, match="this stream is over"):
        stream.result()
    with pytest.raises(ConfigError, match="the engine is closed"):
        engine.forward([1])


def test_a_failed_generation_is_the_only_one_that_fails(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(model, miss="cpu", cache_slots=4) as engine:
        assert isinstance(engine.decoder, GraphDecoder)
        monkeypatch.setattr(GraphDecoder, "_ahead", lambda self: 2)  # as on a GPU, once a step is captured
        expected = greedy(engine, PROMPT, 4)
        bad, wait = {engine.decoder.launched + 2, engine.decoder.launched + 3}, DecodeWorker.wait_tokens

        def found(self: DecodeWorker, step: int) -> object:
            tokens = wait(self, step)
            assert tokens is not None
            return SimpleNamespace(tokens=tokens.tokens, bad=step in bad)

        monkeypatch.setattr(DecodeWorker, "wait_tokens", found)
        with pytest.raises(ModelFormatError, match="not finite"):
            greedy(engine, PROMPT, 4)
        assert engine.decoder.taken < engine.decoder.launched == max(bad)
        assert greedy(engine, PROMPT, 4) == expected


def test_every_generation_is_a_sequence_of_the_trace(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "t.trace"
    with load(model, device="cpu", trace=str(file)) as engine:
        greedy(engine, [1, 2, 3], 3)
        assert engine.generate([1, 2, 9], temperature=0, max_tokens=2).stats.reused_tokens == 2
    assert Trace.load(file).sequences == (5, 2)


def test_closing_goes_on_behind_what_fails(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: Any) -> None:
        raise RuntimeError("what fails")

    engine = load(model, eager=True, cache_slots=4, trace=str(tmp_path / "t.trace"))
    greedy(engine, PROMPT)
    experts, recorder = engine.experts, engine.recorder
    assert isinstance(experts, CachedExperts)
    assert recorder is not None
    ends: list[str] = []
    close_store, close_recorder = experts.store.close, recorder.close

    def close_and_fail() -> None:
        close_recorder()
        failing()

    def close_and_note() -> None:
        close_store()
        ends.append("store")

    monkeypatch.setattr(recorder, "close", close_and_fail)
    monkeypatch.setattr(experts.cpu, "finish_expert_ffn", failing)
    monkeypatch.setattr(experts.store, "close", close_and_note)
    with pytest.raises(RuntimeError, match="what fails"):
        engine.close()
    assert ends == ["store"]
    assert not hasattr(engine, "model")
    engine.close()
