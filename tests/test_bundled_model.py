"""The bundled model against results recorded from llama.cpp and from exact float32 arithmetic."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from check_models import FLIP, Recorded, greedy_agreement, logit_differences

from moe_engine import Engine
from moe_engine.perplexity import perplexity

DATA = Path(__file__).parent / "data"
N_PROMPT = 6


@pytest.fixture(scope="module")
def recorded() -> Recorded:
    return Recorded.load(DATA, "stories-deepseek-Q4_K_M")


@pytest.fixture(scope="module")
def exact_engine() -> Iterator[Engine]:
    with Engine.load(device="cpu", activations="float", kv_dtype="f32") as engine:
        yield engine


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.load(device="cpu") as engine:
        yield engine


def test_prompt_tokens_equal_recorded_ones(engine: Engine, recorded: Recorded) -> None:
    assert len(recorded.llama_cpp) == N_PROMPT
    for i, prompt in enumerate(recorded.llama_cpp):
        assert engine.encode(prompt["prompt"]) == prompt["tokens"] == recorded.exact[f"p{i}.tokens"].tolist()


def test_float_activations_give_exact_logits(exact_engine: Engine, recorded: Recorded) -> None:
    differences = logit_differences(exact_engine, recorded)
    assert len(differences) == 248
    assert np.median(differences) < 1e-4
    assert (differences > FLIP).sum() <= 5  # router near-ties


@pytest.mark.parametrize("i", range(N_PROMPT))
def test_float_activations_give_exact_greedy_tokens(exact_engine: Engine, recorded: Recorded, i: int) -> None:
    equal, sure = greedy_agreement(exact_engine, recorded, i)
    assert equal >= sure


@pytest.mark.parametrize("i", range(N_PROMPT))
def test_greedy_tokens_equal_up_to_the_first_small_margin(engine: Engine, recorded: Recorded, i: int) -> None:
    equal, sure = greedy_agreement(engine, recorded, i)
    assert equal >= sure


def test_perplexity_is_the_recorded_one(engine: Engine, recorded: Recorded) -> None:
    result = perplexity(engine, (DATA / "heldout-4k.txt").read_text(encoding="utf-8"))
    assert result.chunks == 8
    assert result.tokens == 8 * 255
    nearest = min((recorded.ppl_llama_cpp, recorded.ppl_exact), key=lambda ppl: abs(ppl - result.ppl))
    assert result.ppl == pytest.approx(nearest, rel=0.007)
