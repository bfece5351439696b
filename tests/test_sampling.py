"""Sampling against distributions worked out by hand."""

from typing import Any

import pytest
import torch

from moe_engine import ConfigError, ModelFormatError, SamplingParams
from moe_engine.sampling import REPEAT_WINDOW, Sampler, philox, uniform

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0])


def draws(n: int = 400, logits: torch.Tensor = LOGITS, history: tuple[int, ...] = (), **options: Any) -> list[int]:
    """Of one seed at `n` positions."""
    sampler = Sampler(SamplingParams.of(**{"seed": 1, "repeat_penalty": 1.0, **options}))
    return [sampler(logits, (*[history[0] if history else 0] * i, *history)) for i in range(n)]


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


def test_a_draw_depends_on_seed_position_and_logits_alone() -> None:
    sampler = Sampler(SamplingParams(seed=3, repeat_penalty=1.0, temperature=2.0))
    tokens = [sampler(LOGITS, [0] * i) for i in range(20)]
    assert [sampler(LOGITS, [1] * i) for i in reversed(range(20))] == tokens[::-1]


def test_seeds_are_new_ones_by_default() -> None:
    assert len({Sampler(SamplingParams()).seed for _ in range(8)}) == 8


def test_ties_go_to_the_lowest_tokens() -> None:
    logits = torch.tensor([-1.0, 2.0, 2.0, -0.0, 2.0, 0.0])
    assert Sampler(SamplingParams(temperature=0))(logits, []) == 1
    assert set(draws(60, logits, top_k=2, top_p=1.0, temperature=9.0)) == {1, 2}
    assert set(draws(200, logits, top_k=4, top_p=1.0, temperature=50.0)) == {1, 2, 3, 4}


def test_top_p_of_one_keeps_the_least_probable() -> None:
    """At temperature 1 their probability is less than rounding, at 100 it is not."""
    logits = torch.tensor([60.0, 0.0, 0.0])
    assert set(draws(200, logits, temperature=100.0, top_k=0, top_p=1.0)) == {0, 1, 2}


def test_padding_in_the_prompt_is_ignored() -> None:
    assert Sampler(SamplingParams(temperature=0, repeat_penalty=1.5))(LOGITS, [7, 5]) == 0


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_words_that_random123_publishes(counter: str, key: str, words: str) -> None:
    c0, c1, c2, c3 = (int(word, 16) for word in counter.split())
    k0, k1 = (int(word, 16) for word in key.split())
    assert philox((c0, c1, c2, c3), (k0, k1)) == tuple(int(word, 16) for word in words.split())


def test_random_numbers_are_uniform_over_positions_and_seeds() -> None:
    """Chi-square over 16 cells: 37.7 is exceeded once in a thousand."""
    for numbers in ([uniform(5, i) for i in range(4000)], [uniform(i, 5) for i in range(4000)]):
        counts = torch.tensor(numbers).histc(16, 0, 1)
        assert float(((counts - 250) ** 2 / 250).sum()) < 37.7


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
