"""The decode step with its native worker, on the simulated device: Triton's interpreter stands in for the GPU.

`eager=True` runs the same kernels without worker and mailbox, and is compared with transformers elsewhere; here the
protocol is at stake: whatever the cache holds, and whoever computes a miss, the tokens are the same.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor

from moe_engine import ConfigError, DecodeError, Engine
from moe_engine.decode_step import StepForm
from moe_engine.decoder import EagerDecoder, StagedDecoder
from moe_engine.graph_decoder import GraphDecoder
from moe_engine.kernels.device import run_kernels
from moe_engine.kernels.norm_rope_cache import cached_floats
from moe_engine.layers import MixtureOfExperts

PROMPT = [1, 2, 3]
MODELS = {"qwen3moe/plain": "F16", "deepseek2/v3": "Q8_0"}
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}  # interpreted kernels are slow
TOP_K, N_LAYER = 3, 2  # of the first, all of whose layers are MoE


@pytest.fixture(scope="module")
def path_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def path(name: str) -> Path:
        if name not in made:
            directory = tmp_path_factory.mktemp("model")
            made[name] = tiny_models.make(name, directory, MODELS[name], **SMALL).path
        return made[name]

    return path


def load(path: Path, **options: Any) -> Engine:
    common: dict[str, Any] = {"device": "simulated", "ctx": 32, "threads": 2, "vram_budget": "64MiB"}
    return Engine.load(path, **(common | options))


def greedy(engine: Engine, n: int, prompt: list[int] = PROMPT) -> list[int]:
    tokens = engine.generate(prompt, temperature=0, max_tokens=n).tokens
    if isinstance(engine.decoder, GraphDecoder):
        engine.decoder.worker.settle()
        engine.decoder.worker.check_integrity()
    return tokens


def kept(engine: Engine) -> list[Tensor]:
    """Keys and values, or latents: what a layer has computed shows in those of the next."""
    return [cached_floats(cache).clone() for layer in engine.cache.tensors for cache in layer]


@pytest.fixture(scope="module")
def eager(path_of: Callable[[str], Path]) -> Callable[[str], tuple[list[int], list[Tensor]]]:
    """Tokens and KV cache of the reference."""

    @cache
    def run(name: str) -> tuple[list[int], list[Tensor]]:
        with load(path_of(name), eager=True, kv_dtype="f32") as engine:
            assert isinstance(engine.decoder, StagedDecoder)
            return greedy(engine, 2), kept(engine)

    return run


@pytest.mark.parametrize(("name", "slots"), [("qwen3moe/plain", 3), ("qwen3moe/plain", None), ("deepseek2/v3", 3)])
def test_exact_is_the_reference_bit_for_bit(
    path_of: Callable[[str], Path], eager: Callable[[str], tuple[list[int], list[Tensor]]], name: str, slots: int | None
) -> None:
    tokens, tensors = eager(name)
    with load(path_of(name), exact=True, cache_slots=slots, kv_dtype="f32") as engine:
        assert isinstance(engine.decoder, GraphDecoder)
        assert engine.decoder.misses == (("merge",) if slots else ("none",))
        assert greedy(engine, 2) == tokens
        assert all(map(torch.equal, kept(engine), tensors))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("qwen3moe/plain", {"experts": "cpu"}),
        ("qwen3moe/plain", {"miss": "fetch", "cache_slots": 3}),
        ("deepseek2/v3", {"experts": "cpu"}),
    ],
    ids=["qwen3moe-cpu", "qwen3moe-fetch", "deepseek2-cpu"],
)
def test_tokens_do_not_depend_on_who_computes_a_miss(
    path_of: Callable[[str], Path],
    eager: Callable[[str], tuple[list[int], list[Tensor]]],
    name: str,
    options: dict[str, Any],
) -> None:
    with load(path_of(name), **options) as engine:
        assert greedy(engine, 2) == eager(name)[0]


def test_auto_tries_both_ways(
    path_of: Callable[[str], Path],
    eager: Callable[[str], tuple[list[int], list[Tensor]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("moe_engine.trial_switch.WINDOW", 1)
    forms: list[str] = []
    with load(path_of("qwen3moe/plain"), miss="auto", cache_slots=3) as engine:
        assert isinstance(engine.decoder, GraphDecoder)
        engine.decoder.late.first = 1
        step = engine.decoder.step
        run = step.run

        def noted(form: StepForm) -> None:
            forms.append(form.misses)
            run(form)

        monkeypatch.setattr(step, "run", noted)
        assert greedy(engine, 2) == eager("qwen3moe/plain")[0]
    assert forms == ["cpu", "late"]


class Played:
    """Stands for a captured graph."""

    def __init__(self, decoder: GraphDecoder, form: StepForm) -> None:
        self.decoder, self.form = decoder, form

    def replay(self) -> None:
        self.decoder.step.run(self.form)


@pytest.mark.parametrize("options", [{"exact": True, "kv_dtype": "f32"}, {"miss": "cpu"}], ids=["exact", "cpu"])
def test_kernels_are_loaded_in_a_step_that_changes_nothing(
    path_of: Callable[[str], Path],
    eager: Callable[[str], tuple[list[int], list[Tensor]]],
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
) -> None:
    """As where steps are captured: each form runs idle first, and nothing of that is counted."""
    with load(path_of("qwen3moe/plain"), cache_slots=3, **options) as engine:
        decoder = engine.decoder
        assert isinstance(decoder, GraphDecoder)
        decoder._pool = (0, 0)  # type: ignore[assignment]
        loaded: list[StepForm] = []

        def capture(form: StepForm) -> None:
            loaded.append(form)
            decoder._graphs[form] = Played(decoder, form)  # type: ignore[assignment]

        monkeypatch.setattr(decoder, "_capture", capture)
        result = engine.generate(PROMPT, temperature=0, max_tokens=2)
        assert result.tokens == eager("qwen3moe/plain")[0]
        assert len(loaded) == 1
        assert (result.stats.steps, decoder.taken, decoder.idle_steps) == (2, 3, [1])
        assert result.stats.expert_hits + result.stats.expert_misses == 2 * 2 * engine.model.router.top_k
        if engine.config.exact:
            assert all(map(torch.equal, kept(engine), eager("qwen3moe/plain")[1]))
        else:
            before, positions = kept(engine), decoder.step.prompt_positions.clone()
            with torch.inference_mode():
                decoder._load(StepForm(4, "late", "greedy", prompt_of=0))
            assert all(map(torch.equal, kept(engine), before))
            assert torch.equal(decoder.step.prompt_positions, positions)
        decoder.worker.settle()
        decoder.worker.check_integrity()


def test_looking_ahead_changes_no_bit(path_of: Callable[[str], Path]) -> None:
    found = []
    for lookahead in (True, False):
        with load(path_of("qwen3moe/plain"), experts="cpu", lookahead=lookahead, kv_dtype="f32") as engine:
            result = engine.generate(PROMPT, temperature=0, max_tokens=2)
            found.append((result.tokens, kept(engine)))
        stats = result.stats
        assert stats.layer_missed == ([0, 2 * TOP_K] if lookahead else [0, 0])
        assert stats.layer_expected == stats.layer_missed  # nothing is in a slot, so what is expected is missed
        assert all(0 <= n <= 2 * TOP_K for n in stats.layer_foreseen)
        assert (stats.pulled_bytes > 0) == lookahead
        assert (stats.lookahead_recall is None) != lookahead
    assert found[0][0] == found[1][0]
    assert all(map(torch.equal, found[0][1], found[1][1]))


def test_recorded_routing_without_predictions_predicts_nothing(tmp_path: Path) -> None:
    with load(tiny_models.make("qwen3moe/plain", tmp_path, "F16").path, cache_slots=4) as engine:
        assert isinstance(engine.decoder, GraphDecoder)
        step = engine.decoder.step
        layer = next(block.ffn for block in engine.model.blk if isinstance(block.ffn, MixtureOfExperts))
        assert len(step._next_routers(layer, 1)) == 1
        recorded = torch.zeros(3, *step.experts.slot_table.shape[:1], engine.model.router.top_k, dtype=torch.int32)
        step.replay = recorded
        assert step._next_routers(layer, 1) == []
        step.replay_ahead = recorded.expand(2, *recorded.shape).contiguous()
        assert len(step._next_routers(layer, 1)) == 1


def test_prefetch_changes_no_token(tmp_path: Path) -> None:
    path = tiny_models.make("qwen3moe/plain", tmp_path, "F16", **(SMALL | {"num_hidden_layers": 3})).path
    with load(path, eager=True) as engine:
        expected = greedy(engine, 2)
    with load(path, miss="cpu", cache_slots=6, prefetch="always") as engine:
        result = engine.generate(PROMPT, temperature=0, max_tokens=2)
    assert result.tokens == expected
    stats = result.stats
    assert stats.layer_prefetched[0] == 0  # which nothing foresees
    assert 0 < sum(stats.layer_prefetched) <= 2 * TOP_K * 2
    for layer in range(3):
        assert stats.layer_in_time[layer] + stats.layer_late[layer] <= stats.layer_prefetched[layer]


def test_a_batch_gives_what_its_sequences_give_alone(path_of: Callable[[str], Path]) -> None:
    path, prompts = path_of("qwen3moe/plain"), [PROMPT, [9, 8]]
    with load(path, n_sequence=2, miss="cpu", cache_slots=6) as engine:
        results = engine.generate_batch(prompts, temperature=0, max_tokens=2)
        assert isinstance(engine.decoder, GraphDecoder)
        engine.decoder.worker.settle()
        engine.decoder.worker.check_integrity()
        with pytest.raises(ConfigError, match="n_sequence"):
            engine.generate_batch([*prompts, [1]])
    with load(path, experts="cpu") as engine:
        assert [result.tokens for result in results] == [greedy(engine, 2, prompt) for prompt in prompts]
    stats = results[0].stats
    assert (stats.steps, stats.decode_tokens) == (2, 4)
    choices = 4 * N_LAYER * TOP_K
    assert stats.expert_hits + stats.expert_misses == sum(stats.layer_hits) + sum(stats.layer_misses) == choices


def test_sequences_of_a_batch_end_on_their_own(path_of: Callable[[str], Path]) -> None:
    with load(path_of("qwen3moe/plain"), n_sequence=2, experts="cpu", ctx=5) as engine:
        long, short = engine.generate_batch([[1, 2], [1, 2, 3, 4]], temperature=0, max_tokens=3)
    assert (len(long.tokens), len(short.tokens)) == (3, 2)  # the second is at the end of its context


def test_a_known_prefix_is_not_computed_again(path_of: Callable[[str], Path]) -> None:
    changed = [*PROMPT[:2], 60, 61]
    with load(path_of("qwen3moe/plain"), experts="cpu") as engine:
        first = engine.generate(PROMPT, temperature=0, max_tokens=2)
        again = engine.generate([*PROMPT, *first.tokens], temperature=0, max_tokens=1)
        other = engine.generate(changed, temperature=0, max_tokens=1)
        same = engine.generate(PROMPT, temperature=0, max_tokens=1)
    assert [result.stats.reused_tokens for result in (first, again, other, same)] == [0, 4, 2, 2]
    assert same.tokens == first.tokens[:1]
    with load(path_of("qwen3moe/plain"), experts="cpu") as engine:
        assert greedy(engine, 1, changed) == other.tokens


def test_statistics_add_up(path_of: Callable[[str], Path]) -> None:
    with load(path_of("qwen3moe/plain"), miss="cpu", cache_slots=5) as engine:
        stats = engine.generate(PROMPT, temperature=0, max_tokens=2).stats
    assert (stats.steps, stats.decode_tokens) == (2, 2)
    assert stats.expert_hits + stats.expert_misses == 2 * N_LAYER * TOP_K
    assert stats.miss_bytes == stats.cpu_bytes > 0
    assert stats.fetched_now == 0
    assert stats.pcie_bytes > 0
    assert stats.bound is not None
    assert 0 < stats.bound.share < 1
    assert {"hit_rate", "bound", "layer_hits", "gpu_wait_seconds"} <= stats.as_dict().keys()


def test_a_worker_that_has_died_is_an_error(path_of: Callable[[str], Path]) -> None:
    with load(path_of("qwen3moe/plain"), experts="cpu") as engine:
        assert isinstance(engine.decoder, GraphDecoder)
        engine.decoder.worker.stop()
        with pytest.raises(DecodeError, match="stopped"):
            engine.generate(PROMPT, max_tokens=3)


def test_slots_for_a_whole_step_are_needed_to_be_exact(path_of: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match="cache_slots"):
        load(path_of("qwen3moe/plain"), exact=True, cache_slots=5, n_sequence=2)


def test_sampling_follows_its_seed(path_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path, options = path_of("qwen3moe/plain"), {"seed": 3, "temperature": 2.0, "top_k": 8}
    with load(path, experts="cpu") as engine:
        first = engine.generate(PROMPT, max_tokens=2, **options).tokens
        assert engine.generate(PROMPT, max_tokens=2, **options).tokens == first
    monkeypatch.setattr("moe_engine.kernels.device.is_interpreted", lambda: False)
    with load(path) as engine:
        assert isinstance(engine.decoder, EagerDecoder)  # draws on the CPU
        assert engine.generate(PROMPT, max_tokens=2, **options).tokens == first
        assert greedy(engine, 2) != first


def test_without_kernels_decoding_is_eager(path_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_engine.kernels.device.is_interpreted", lambda: False)
    with load(path_of("qwen3moe/plain")) as engine:
        assert not run_kernels(engine.model.output_norm)
        assert isinstance(engine.decoder, EagerDecoder)
        assert len(greedy(engine, 3)) == 3


@pytest.mark.parametrize("name", MODELS)
def test_prompts_in_steps_fill_the_kv_cache_as_micro_batches_do(path_of: Callable[[str], Path], name: str) -> None:
    """One step for few tokens, padded; then one that continues."""
    prompt = [1, 2, 3, 4, 5]
    with load(path_of(name), miss="cpu", kv_dtype="f32") as engine:
        decoder = engine.decoder
        assert isinstance(decoder, GraphDecoder)
        assert decoder.takes_prompts
        engine.prefill(prompt)  # streamed
        streamed = [tensor[:, : len(prompt)] for tensor in kept(engine)]
        decoder.prompt(0, prompt[:3], 0)
        decoder.prompt(0, prompt[3:], 3)
        in_steps = [tensor[:, : len(prompt)] for tensor in kept(engine)]
        decoder.worker.settle()
        decoder.worker.check_integrity()
    for found, expected in zip(in_steps, streamed, strict=True):
        assert (found - expected).norm() < 0.03 * expected.norm()
