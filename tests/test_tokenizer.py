"""Tokenizers against recorded ids, independent reimplementations and other libraries."""

import subprocess
import sys
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vocabularies import (
    CASES,
    DATA,
    TEXTS,
    Metadata,
    T,
    build,
    byte_alphabet,
    byte_level_metadata,
    gemma_metadata,
    score_metadata,
    stories,
    stories_metadata,
)

from moe_engine.errors import ConfigError, UnsupportedModelError
from moe_engine.pretokenizers import PRE_TOKENIZERS, PreTokenizer
from moe_engine.tokenizer import Tokenizer

# Recorded ids.


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_recorded_ids(case: dict[str, Any]) -> None:
    ids = stories().encode(case["text"])
    assert ids == case["llama_cpp"] == case["hf"]
    assert stories().decode(ids) == case["text"]


def test_properties_of_the_bundled_model() -> None:
    tokenizer = stories()
    assert (tokenizer.n_vocab, tokenizer.bos_id, tokenizer.eos_id) == (8192, None, 8189)
    assert not tokenizer.add_bos
    assert {tokenizer.token_text(i) for i in tokenizer.stop_ids} == {"<|endoftext|>", "<|im_end|>"}
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == ""


def test_import_is_light() -> None:
    code = "import sys, moe_engine.tokenizer; print({'torch', 'tokenizers', 'jinja2'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# Round trips and streams.


@given(st.text())
def test_round_trip(text: str) -> None:
    assert stories().decode(stories().encode(text)) == text


@given(st.text(alphabet="ab \n\t1é漢🦙'<|im_end>"))
def test_round_trip_of_user_text_has_no_control_tokens(text: str) -> None:
    ids = stories().encode(text)
    assert max(ids, default=0) < 8189
    assert stories().decode(ids) == text


def check_stream(tokenizer: Tokenizer, ids: list[int], pieces: list[bytes], skip_special: bool) -> None:
    """Pushes give exactly the prefix of the text that no later byte can change."""
    stream = tokenizer.stream(skip_special=skip_special)
    done = ""
    whole = b"".join(pieces).decode("utf-8", "replace")
    for token_id in ids:
        done += stream.push(token_id)
        assert whole.startswith(done)
    assert done + stream.flush() == whole == tokenizer.decode(ids, skip_special=skip_special)


@given(st.lists(st.integers(0, 8191)), st.booleans())
def test_stream_of_arbitrary_ids(ids: list[int], skip_special: bool) -> None:
    byte_of = {char: byte for byte, char in enumerate(byte_alphabet())}
    texts = [stories_metadata()[T + "tokens"][i] for i in ids]
    pieces = [
        (b"" if skip_special else text.encode()) if i >= 8189 else bytes(byte_of[char] for char in text)
        for i, text in zip(ids, texts, strict=True)
    ]
    check_stream(stories(), ids, pieces, skip_special)


def test_stream_holds_back_incomplete_characters() -> None:
    tokenizer = build(byte_level_metadata(), merges=[])
    stream = tokenizer.stream()
    assert [stream.push(i) for i in tokenizer.encode("é🦙!")] == ["", "é", "", "", "", "🦙", "!"]
    assert stream.push(0xF0) == ""
    assert stream.push(ord("a")) == "\ufffda"  # can no longer become valid
    assert stream.push(0xE2) == ""
    assert stream.flush() == "\ufffd"
    assert stream.push(ord("b")) == "b"


# Splitters.


def isolated(pattern: str, text: str) -> list[str]:
    import regex  # type: ignore[import-untyped, unused-ignore]

    pieces, end = [], 0
    for match in regex.finditer(pattern, text, flags=regex.V1 | regex.MULTILINE):
        pieces += [text[end : match.start()], match[0]]
        end = match.end()
    return [piece for piece in [*pieces, text[end:]] if piece]


def reference_ids(metadata: Metadata, pre: PreTokenizer, text: str) -> list[int]:
    """Byte-pair encoding by the book: split, then join the most urgent adjacent pair until none is left."""
    ids = {token: i for i, token in reversed(list(enumerate(metadata[T + "tokens"])))}
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(metadata[T + "merges"])}
    pieces = [text]
    for pattern in pre.patterns:
        pieces = [part for piece in pieces for part in isolated(pattern, piece)]
    result = []
    for piece in pieces:
        symbols = [byte_alphabet()[byte] for byte in piece.encode()]
        if pre.ignore_merges and "".join(symbols) in ids:
            symbols = ["".join(symbols)]
        while pairs := [pair for pair in pairwise(symbols) if pair in ranks]:
            best = min(pairs, key=lambda pair: ranks[pair])
            at = next(i for i in range(len(symbols)) if tuple(symbols[i : i + 2]) == best)
            symbols[at : at + 2] = ["".join(best)]
        result += [ids[symbol] for symbol in symbols]
    return result


@pytest.mark.parametrize("pre", sorted({p: n for n, p in PRE_TOKENIZERS.items() if p.byte_level}.values()))
def test_byte_level_families_against_plain_python(pre: str) -> None:
    metadata = byte_level_metadata(pre)
    # Tokens that no merge makes: only splitters that ignore merges may use them.
    extra = ["ĠleadingĠsp", "Ġleading", "CamelCase"]
    metadata[T + "tokens"] += extra
    metadata[T + "token_type"] += [1] * len(extra)
    tokenizer = build(metadata)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == reference_ids(metadata, PRE_TOKENIZERS[pre], text), text
        assert tokenizer.decode(ids) == text


def test_ignore_merges() -> None:
    tokens = [*byte_alphabet(), "abc"]
    for pre, wanted in {"llama-bpe": [256], "dbrx": [97, 98, 99]}.items():
        tokenizer = build({T + "model": "gpt2", T + "pre": pre, T + "tokens": tokens, T + "merges": []})
        assert tokenizer.encode("abc") == wanted


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("llama-bpe", "I'LL pay 12345", "I 'LL ␣pay ␣ 123 45"),
        ("qwen2", "I'LL pay 123", "I 'LL ␣pay ␣ 1 2 3"),
        ("qwen2", "हिन्दी", "ह िन ्द ी"),
        ("qwen35", "हिन्दी", "हिन्दी"),
        ("gpt-2", "I'LL it's 12345 ...", "I ' LL ␣it 's ␣12345 ␣..."),
        ("gpt-4o", "МирHello don't a/b", "Мир Hello ␣don't ␣a /b"),
        ("tekken", "МирHello don't 12", "Мир Hello ␣don 't ␣ 1 2"),
        ("deepseek-v3", "abc1234漢字 #x", "abc 123 4 漢字 ␣# x"),
        ("deepseek-llm", "Abc漢字 123!?", "Abc 漢字 ␣ 123 !?"),
        ("deepseek-coder", "x 12!", "x ␣ 1 2 !"),
        ("kimi-k2", "漢字abc don't 1234", "漢字 abc ␣don't ␣ 123 4"),
        ("bailingmoe", "I'LL 12", "I 'LL ␣ 1 2"),
        ("refact", "v10 a", "v 1 0 ␣a"),
        ("cohere2moe", "1234567 a", "1 234 567 ␣a"),
        ("afmoe", "1234567x12", "1 234 567 x 12"),
        ("youtu", "한국中文ab12", "한국 中文 ab 1 2"),
        ("exaone-moe", "New York 12", "New␣York ␣ 1 2"),
        ("falcon", "a`b 12345", "a ` b ␣ 123 45"),
        ("default", "a$b 12345", "a $ b ␣ 123 45"),
        ("minicpm5", "a 12345", "a ␣ 123 45"),
        ("seed-coder", "a!\n\nb", "a ! \n\n b"),
    ],
)
def test_pieces(pre: str, text: str, pieces: str) -> None:
    wanted = [piece.replace("␣", " ") for piece in pieces.split(" ")]
    found = [text]
    for pattern in PRE_TOKENIZERS[pre].patterns:
        found = [part for piece in found for part in isolated(pattern, piece)]
    assert found == wanted


def test_unknown_splitter_is_named() -> None:
    with pytest.raises(UnsupportedModelError, match=r"m.gguf: tokenizer.ggml.pre = 'nope'.*qwen2"):
        build(byte_level_metadata("nope"))


def test_missing_splitter_falls_back_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    metadata = byte_level_metadata()
    del metadata[T + "pre"]
    tokenizer = build(metadata)
    assert "tokenizer.ggml.pre is missing" in caplog.text
    assert tokenizer.encode("a$b 12345") == reference_ids(metadata, PRE_TOKENIZERS["default"], "a$b 12345")


def test_bytes_without_a_token_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    build({T + "model": "gpt2", T + "pre": "qwen2", T + "tokens": ["a", "b", "ab"], T + "merges": ["a b"]})
    assert "254 of 256 byte values have no token" in caplog.text


# Vocabularies with scores (SentencePiece).


@cache
def scored() -> Tokenizer:
    return build(score_metadata())


def reference_score_ids(metadata: Metadata, text: str) -> list[int]:
    """Join the adjacent pair that makes the best-scored piece, leftmost first, until none is left."""
    ids = {token: i for i, token in enumerate(metadata[T + "tokens"])}
    symbols = list("\u2581" + text.replace(" ", "\u2581")) if text else []
    while True:
        joined = ["".join(pair) for pair in pairwise(symbols)]
        scored = [(metadata[T + "scores"][ids[j]], -at) for at, j in enumerate(joined) if j in ids]
        if not scored:
            break
        at = -max(scored)[1]
        symbols[at : at + 2] = [joined[at]]
    bytes_of = [[ids[s]] if s in ids else [3 + byte for byte in s.encode()] for s in symbols]
    return [i for group in bytes_of for i in group]


@pytest.mark.parametrize("seed", range(4))
def test_scores_against_the_direct_algorithm(seed: int) -> None:
    metadata = score_metadata(seed)
    tokenizer = build(metadata)
    corpus = (DATA / "heldout-4k.txt").read_text(encoding="utf-8")
    for text in [*TEXTS, *(corpus[start : start + 80] for start in range(0, 8000, 80))]:
        ids = tokenizer.encode(text)
        assert ids == [1, *reference_score_ids(metadata, text)], text
        assert tokenizer.decode(ids) == text


@given(st.text().filter(lambda text: "\u2581" not in text))
def test_round_trip_with_scores(text: str) -> None:
    assert scored().decode(scored().encode(text)) == text


@given(st.lists(st.integers(0, 800)), st.booleans())
def test_stream_of_arbitrary_ids_with_scores(ids: list[int], skip_special: bool) -> None:
    tokens = score_metadata()[T + "tokens"]
    pieces = [tokens[i].replace("\u2581", " ").encode() if i > 258 else bytes([(i - 3) % 256]) for i in ids]
    pieces = [(b"" if skip_special else tokens[i].encode()) if i < 3 else p for i, p in zip(ids, pieces, strict=True)]
    whole = b"".join(pieces)
    first = next((i for i, piece in enumerate(pieces) if piece), 0)
    if whole.startswith(b" "):
        pieces[first] = pieces[first][1:]
    check_stream(scored(), ids, pieces, skip_special)


def test_space_prefix() -> None:
    tokenizer = scored()
    ids = tokenizer.encode("the cat", add_bos=False)
    assert tokenizer.token_text(ids[0]).startswith("\u2581")
    assert tokenizer.decode(ids) == "the cat"
    assert tokenizer.decode(ids, continuation=True) == " the cat"
    assert tokenizer.decode([*tokenizer.encode(" x")]) == " x"
    plain = build(score_metadata(), add_space_prefix=False)
    assert not plain.token_text(plain.encode("the cat", add_bos=False)[0]).startswith("\u2581")
    assert plain.decode(plain.encode(" the cat")) == " the cat"
    # Like llama.cpp: the text after a special token begins with a space again.
    assert tokenizer.encode("</s>the cat", add_bos=False, parse_special=True) == [2, *ids]


def test_user_text_cannot_merge_into_a_control_token() -> None:
    metadata = score_metadata()
    tokens = [*metadata[T + "tokens"], "<", "s", ">", "<s", "/s>"]
    types = metadata[T + "token_type"] + [1] * 5
    scores = metadata[T + "scores"] + [0.0] * 5
    tokenizer = build(metadata, tokens=tokens, token_type=types, scores=scores)
    assert not {0, 1, 2} & set(tokenizer.encode("<s></s><unk>", add_bos=False))
    assert tokenizer.encode("<s>", parse_special=True) == [1]


def test_characters_without_byte_tokens_are_unknown() -> None:
    metadata = score_metadata()
    keep = [i for i in range(len(metadata[T + "tokens"])) if not 3 <= i < 259]
    lists = {key: [metadata[T + key][i] for i in keep] for key in ("tokens", "token_type", "scores")}
    tokenizer = build(metadata, **lists)
    assert tokenizer.encode("🦙🦙", add_bos=False)[-1] == 0
    assert tokenizer.decode([0, 0], skip_special=False) == "<unk><unk>"


# Merges over raw text (Gemma 4).


def test_gemma() -> None:
    tokenizer = build(gemma_metadata())
    assert tokenizer.add_bos  # whatever the file says
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids[0] == 2
        assert tokenizer.decode(ids) == text
    texts = [tokenizer.token_text(i) for i in tokenizer.encode("a\n\nb", add_bos=False)]
    assert texts == ["a", "\n\n", "b"]


# Other libraries.


@pytest.mark.parametrize("pre", ["qwen2", "qwen35", "llama-bpe", "tekken", "gpt-4o", "dbrx", "gpt-2"])
def test_byte_level_against_transformers(pre: str) -> None:
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    metadata = byte_level_metadata(pre)
    names = {"tokens": "tokens", "merges": "merges", "token_type": "token_type", "pre": "pre_tokenizer_type"}
    theirs, _ = mapping.convert_gguf_tokenizer(
        "llama", {"tokenizer_type": "gpt2"} | {name: metadata[T + key] for key, name in names.items()}
    )
    ours = build(metadata)
    for text in TEXTS:
        if "\u0301" not in text:  # the original Qwen tokenizers compose accents first
            assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, text


@pytest.mark.parametrize("family", ["phi3", "gemma4"])
def test_raw_text_vocabularies_against_transformers(family: str) -> None:
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    metadata = gemma_metadata() if family == "gemma4" else score_metadata()
    keys = ("tokens", "token_type", "scores", "merges")
    given = {key: metadata[T + key] for key in keys if T + key in metadata}
    kind = "gemma4" if family == "gemma4" else "llama"
    theirs, _ = mapping.convert_gguf_tokenizer(family, {"tokenizer_type": kind} | given)
    ours = build(metadata)
    for text in TEXTS:
        ids = ours.encode(text, add_bos=False)
        assert ids == theirs.encode(text, add_special_tokens=False).ids, text
        assert ours.decode(ids) == theirs.decode(ids)


def test_embedded_tokenizer_json() -> None:
    metadata = byte_level_metadata()
    theirs = build(metadata)
    core = build(metadata)._cores[False]
    core.add_special_tokens(["<|endoftext|>"])
    ours = build(metadata | {"tokenizer.huggingface.json": core.to_str()}, pre="unheard-of")
    for text in [*TEXTS, "a<|endoftext|>b"]:
        for parse_special in (False, True):
            assert ours.encode(text, parse_special=parse_special) == theirs.encode(text, parse_special=parse_special)


# Special tokens.


def test_control_tokens_only_on_request() -> None:
    tokenizer = stories()
    text = "a<|im_start|>b<|im_end|>"
    assert not {8189, 8190, 8191} & set(tokenizer.encode(text))
    ids = tokenizer.encode(text, parse_special=True)
    assert ids == [*tokenizer.encode("a"), 8190, *tokenizer.encode("b"), 8191]
    assert tokenizer.decode(ids) == "ab"
    assert tokenizer.decode(ids, skip_special=False) == text


def test_user_defined_tokens_always_and_longest_first() -> None:
    metadata = byte_level_metadata()
    n_plain = len(metadata[T + "tokens"])
    extra = ["<think>", "<think>\n", "\t\t", "<｜User｜>"]
    tokenizer = build(
        metadata,
        tokens=metadata[T + "tokens"] + extra,
        token_type=metadata[T + "token_type"] + [4, 4, 4, 3],
    )
    assert tokenizer.encode("<think>\n<think>\t\t") == [n_plain + 1, n_plain, n_plain + 2]
    assert tokenizer.decode([n_plain + 1, n_plain + 2]) == "<think>\n\t\t"
    assert tokenizer.encode("<｜User｜>", parse_special=True) == [n_plain + 3]
    assert tokenizer.decode([n_plain + 3], skip_special=False) == "<｜User｜>"  # not in the byte alphabet


@pytest.mark.parametrize(
    ("pre", "add_bos", "wanted"),
    [("llama-bpe", None, True), ("qwen2", None, False), ("qwen2", True, True), ("llama-bpe", False, False)],
)
def test_bos(pre: str, add_bos: bool | None, wanted: bool) -> None:
    metadata = byte_level_metadata(pre, control=("<|endoftext|>", "<bos>"))
    bos = len(metadata[T + "tokens"]) - 1
    changes: dict[str, Any] = {"bos_token_id": bos} | ({} if add_bos is None else {"add_bos_token": add_bos})
    tokenizer = build(metadata, **changes)
    assert tokenizer.add_bos is wanted
    assert tokenizer.encode("a") == [bos] * wanted + [ord("a")]
    assert tokenizer.encode("a", add_bos=True) == [bos, ord("a")]
    assert tokenizer.encode("a", add_bos=False) == [ord("a")]
    assert tokenizer.encode("<bos>a", add_bos=True, parse_special=True) == [bos, ord("a")]
    assert not build(metadata, add_bos_token=True).add_bos  # no such token
    with pytest.raises(ConfigError, match="no BOS token"):
        build(metadata).encode("a", add_bos=True)


@pytest.mark.parametrize(
    ("control", "types", "keys", "stops"),
    [
        (["<|im_end|>", "<|x|>"], [3, 3], {}, ["<|im_end|>"]),
        (["<|im_end|>"], [1], {}, ["<|im_end|>"]),  # marked normal in some files
        (["<|end|>", "<|return|>", "<|call|>"], [3, 3, 3], {}, ["<|return|>", "<|call|>"]),
        (["<|end|>", "<|calls|>", "<|flush|>"], [3, 3, 3], {}, ["<|calls|>", "<|flush|>"]),
        (["<|end|>", "<|call|>"], [3, 3], {}, ["<|end|>", "<|call|>"]),
        (["</s>", "<|tool_response>"], [1, 3], {}, ["<|tool_response>"]),
        (["<|user|>", "<|observation|>"], [3, 3], {"eot": 0, "eom": 1}, ["<|user|>", "<|observation|>"]),
        (["<pad>", "<rep>", "<sep>"], [3, 3, 3], {"fim_pad": 0, "fim_rep": 1}, ["<pad>", "<rep>"]),
    ],
)
def test_stop_ids(control: list[str], types: list[int], keys: dict[str, int], stops: list[str]) -> None:
    metadata = byte_level_metadata()
    n_plain = len(metadata[T + "tokens"])
    tokenizer = build(
        metadata,
        tokens=metadata[T + "tokens"] + control,
        token_type=metadata[T + "token_type"] + types,
        **{f"{name}_token_id": n_plain + at for name, at in keys.items()},
    )
    assert {tokenizer.token_text(i) for i in tokenizer.stop_ids} == {"<|endoftext|>", *stops}
    for text in stops:
        assert len(tokenizer.encode(text, parse_special=True)) == 1
        assert len(tokenizer.encode(text)) > 1


def test_ordinary_tokens_in_special_roles_stay_text() -> None:
    metadata = byte_level_metadata()
    comma, joined = metadata[T + "tokens"].index(","), metadata[T + "tokens"].index("Ġthe")
    tokenizer = build(metadata, bos_token_id=comma, padding_token_id=joined, eos_token_id=comma)
    assert tokenizer.decode([comma, joined]) == ", the"
    assert tokenizer.encode(", the", parse_special=True) == tokenizer.encode(", the") == [comma, joined]
    assert tokenizer.stop_ids >= {comma}


def test_padding_and_repeated_tokens() -> None:
    metadata = byte_level_metadata()
    n_plain = len(metadata[T + "tokens"])
    tokens = [*metadata[T + "tokens"], "a", "", *["[PAD]"] * 500]
    tokenizer = build(metadata, tokens=tokens, token_type=metadata[T + "token_type"] + [1, 1] + [5] * 500)
    assert tokenizer.n_vocab == n_plain + 502
    assert tokenizer.encode("a") == [ord("a")]  # the first of the two
    assert tokenizer.decode([n_plain, n_plain + 1]) == "a"
    assert build(metadata, suppress_tokens=[3, 5]).suppress_ids == (3, 5)
