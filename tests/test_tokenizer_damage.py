"""Tokenizers from damaged metadata, and with arguments that are none."""

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vocabularies import Metadata, T, build, byte_level_metadata, score_metadata, stories

from moe_engine.errors import ConfigError, ModelFormatError, UnsupportedModelError
from moe_engine.tokenizer import Tokenizer


def without(key: str) -> Callable[[Metadata], Metadata]:
    return lambda metadata: {name: value for name, value in metadata.items() if name != T + key}


def with_values(**changes: Any) -> Callable[[Metadata], Metadata]:
    return lambda metadata: metadata | {T + key: value for key, value in changes.items()}


def with_item(key: str, index: int, item: Any) -> Callable[[Metadata], Metadata]:
    def change(metadata: Metadata) -> Metadata:
        items = list(metadata[T + key])
        items[index] = item
        return metadata | {T + key: items}

    return change


DAMAGE: list[tuple[Callable[[Metadata], Metadata], str]] = [
    (without("model"), "model"),
    (without("tokens"), "tokens"),
    (without("merges"), "merges"),
    (with_values(model=7), "model"),
    (with_values(model=["gpt2"]), "model"),
    (with_values(pre=1.5), "pre"),
    (with_values(tokens=[]), "tokens"),
    (with_values(tokens="abc"), "tokens"),
    (with_values(tokens={"a": 0}), "tokens"),
    (with_item("tokens", 3, 3), "tokens.*index 3"),
    (with_item("tokens", 3, b"a"), "tokens.*index 3"),
    (with_item("tokens", 3, None), "tokens.*index 3"),
    (with_item("tokens", 3, "\ud800"), "tokens"),
    (with_item("tokens", 3, "x" * 100_000), "tokens.*100000 characters"),
    (lambda m: m | {T + "tokens": ["a"] * len(m[T + "tokens"])}, "tokens.*differ"),
    (with_values(token_type=[1, 1]), "token_type"),
    (with_values(token_type=1), "token_type"),
    (with_item("token_type", 0, 99), "token_type"),
    (with_item("token_type", 0, True), "token_type"),
    (with_item("token_type", 0, 1.0), "token_type"),
    (with_values(merges="a b"), "merges"),
    (with_values(merges=[["a", "b"]]), "merges"),
    (with_item("merges", 2, "nospace"), "merges.*index 2"),
    (with_item("merges", 2, ""), "merges.*index 2"),
    (with_item("merges", 2, "a "), "merges.*index 2"),
    (with_item("merges", 2, " b"), "merges.*index 2"),
    (with_item("merges", 2, "a unknown-token"), "merges.*index 2"),
    (with_item("merges", 2, "z ~"), "merges.*index 2"),
    (with_values(eos_token_id=10**6), "eos_token_id.*1000000"),
    (with_values(bos_token_id=-1), "bos_token_id"),
    (with_values(bos_token_id="1"), "bos_token_id"),
    (with_values(eot_token_id=True), "eot_token_id"),
    (with_values(fim_pad_token_id=2**32 - 1), "fim_pad_token_id"),
    (with_values(add_bos_token=1), "add_bos_token"),
    (with_values(suppress_tokens=[10**6]), "suppress_tokens"),
    (with_values(suppress_tokens="x"), "suppress_tokens"),
    (lambda m: m | {"tokenizer.chat_template": 3}, "chat_template"),
    (lambda m: m | {"tokenizer.huggingface.json": 3}, "huggingface"),
    (lambda m: m | {"tokenizer.huggingface.json": "{"}, "huggingface"),
    (lambda m: m | {"tokenizer.huggingface.json": '{"model": {}}'}, "huggingface"),
]

SCORE_DAMAGE: list[tuple[Callable[[Metadata], Metadata], str]] = [
    (without("scores"), "scores"),
    (with_values(scores=[0.0]), "scores"),
    (with_item("scores", 300, math.nan), "scores"),
    (with_item("scores", 300, "1"), "scores.*index 300"),
    (with_item("tokens", 5, "<0xZZ>"), "tokens.*index 5"),
    (with_values(add_space_prefix="yes"), "add_space_prefix"),
]


@pytest.mark.parametrize(("damage", "match"), DAMAGE)
def test_damaged_metadata(damage: Callable[[Metadata], Metadata], match: str) -> None:
    with pytest.raises(ModelFormatError, match=f"m.gguf: tokenizer.*{match}.*expected"):
        build(damage(byte_level_metadata()))


@pytest.mark.parametrize(("damage", "match"), SCORE_DAMAGE)
def test_damaged_score_metadata(damage: Callable[[Metadata], Metadata], match: str) -> None:
    with pytest.raises(ModelFormatError, match=f"m.gguf: tokenizer.*{match}.*expected"):
        build(damage(score_metadata()))


def test_json_with_too_many_tokens() -> None:
    metadata = byte_level_metadata()
    text = build(metadata)._cores[False].to_str()
    few = {T + "tokens": ["a", "b"], T + "token_type": [1, 1], T + "eos_token_id": 1}
    with pytest.raises(ModelFormatError, match="ids below 2"):
        build(metadata | few | {"tokenizer.huggingface.json": text})


@pytest.mark.parametrize("model", ["bert", "t5", "rwkv", "none", "GPT2"])
def test_other_tokenizer_models(model: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"m.gguf: tokenizer.ggml.model = '{model}'.*gpt2"):
        build(byte_level_metadata(), model=model)


ANY_KEYS = ("model", "pre", "tokens", "token_type", "scores", "merges", "bos_token_id", "add_bos_token")


@settings(max_examples=200)
@given(
    st.dictionaries(
        st.sampled_from([T + key for key in ANY_KEYS]),
        st.one_of(
            st.none(),
            st.integers(),
            st.text(),
            st.floats(),
            st.lists(st.one_of(st.text(), st.integers(), st.floats()), max_size=5),
            st.sampled_from(["gpt2", "llama", "gemma4"]),
        ),
        max_size=4,
    )
)
def test_arbitrary_metadata_raises_only_our_errors(changes: Metadata) -> None:
    small: Metadata = {T + "model": "gpt2", T + "pre": "qwen2", T + "tokens": ["a", "b", "ab"]}
    small |= {T + "merges": ["a b"], T + "scores": [0.0, 1.0, 2.0]}
    try:
        tokenizer = Tokenizer.from_metadata(small | changes, "m.gguf")
    except ModelFormatError:
        return
    tokenizer.decode(tokenizer.encode("ab <unk>", parse_special=True))


def test_bad_arguments() -> None:
    for bad in (-1, 8192):
        with pytest.raises(ConfigError, match=f"no token {bad}; ids go from 0 to 8191"):
            stories().decode([bad])
        with pytest.raises(ConfigError, match="no token"):
            stories().token_text(bad)
    with pytest.raises(ConfigError, match="not valid Unicode"):
        stories().encode("a\ud800")


def test_text_that_the_splitter_gives_up_on(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="cannot tokenize this text of 11000000 characters"):
        stories().encode(" " * 11_000_000)
    capfd.readouterr()  # the library reports its panic on stderr
