"""Sampling against distributions worked out by hand."""

from typing import Any

import pytest
import torch

from moe_engine import ConfigError, ModelFormatError, SamplingParams
from moe_engine.sampling import REPEAT_WINDOW, Sampler

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0])


def draws(n: int = 400, logits: torch.Tensor = LOGITS, history: tuple[int, ...] = (), **options: Any) -> list[int]:
    sampler = Sampler(SamplingParams.of(**{"seed": 1, "repeat_penalty": 1.0, **options}))
    return [sampler(logits, history) for _ in range(n)]


def test_greedy_takes_the_best_and_leaves_the_logits_alone() -> None:
    logits = LOGITS.clone()
    assert Sampler(SamplingParams(temperature=0))(logits, [0, 0]) == 0
    assert torch.equal(logits, LOGITS)


def test_frequencies_follow_the_softmax_of_logits_over_temperature() -> None:
    n = 4000
    counts = torch.bincount(torch.tensor(draws(n, temperature=1.5, top_k=0, top_p=1.0)), minlength=5)
    expected = (LOGITS / 1.5).softmax(0)
    assert torch.allclose(counts / n, expected, atol=4 * (0.25 / n) ** 0.5)


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"top_k": 2, "top_p": 1.0}, {0, 1}),
        ({"top_k": 1, "top_p": 1.0}, {0}),
        # probabilities 0.636, 0.234, 0.086, 0.032, 0.012: 0.8 is reached with the second
        ({"top_k": 0, "top_p": 0.8}, {0, 1}),
        ({"top_k": 0, "top_p": 0.6}, {0}),
        ({"top_k": 0, "top_p": 1.0, "min_p": 0.1}, {0, 1, 2}),
    ],
)
def test_only_candidates_are_drawn(options: dict[str, Any], allowed: set[int]) -> None:
    assert set(draws(temperature=3.0, **options)) == allowed


def test_seed_repeats_and_other_seeds_differ() -> None:
    assert draws(50, seed=5) == draws(50, seed=5) != draws(50, seed=6)


def test_repeat_penalty_acts_on_recent_tokens_of_either_sign() -> None:
    logits = torch.tensor([2.0, 1.9, -1.0, -1.1])
    assert draws(1, logits, (0,), temperature=0, repeat_penalty=1.2) == [1]
    assert draws(1, logits[2:], (0,), temperature=0, repeat_penalty=1.2) == [1]
    old = (0, *[1] * REPEAT_WINDOW)
    assert draws(1, torch.tensor([2.0, 1.0]), old, temperature=0, repeat_penalty=3.0) == [0]


def test_suppressed_tokens_are_never_chosen() -> None:
    assert Sampler(SamplingParams(temperature=0), suppress=[0, 1])(LOGITS, []) == 2


def test_damaged_logits_are_an_error() -> None:
    with pytest.raises(ModelFormatError, match="not finite"):
        draws(1, torch.tensor([1.0, float("nan")]))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.5},
        {"min_p": 2},
        {"repeat_penalty": 0},
        {"max_tokens": -1},
        {"max_tokens": 1.5},
        {"seed": -1},
        {"stop": [""]},
        {"tempature": 1},
    ],
)
def test_bad_options_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        SamplingParams.of(**options)
