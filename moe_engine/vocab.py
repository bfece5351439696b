"""The vocabulary of a GGUF file: the `tokenizer.*` keys read, checked and completed, without any Rust object.

Damaged metadata stops here with a ModelFormatError that names the file, the key, what was found and expected.
"""

import logging
import math
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from moe_engine.errors import ModelFormatError, UnsupportedModelError
from moe_engine.pretokenizers import PRE_TOKENIZERS, PreTokenizer

T = TypeVar("T")
Merges = list[tuple[str, str]]  # (left, right), most urgent first
logger = logging.getLogger(__name__)

UNDEFINED, NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(7)  # tokenizer.ggml.token_type
MODELS: Final = ("gpt2", "llama", "gemma4")
HF_JSON_KEY: Final = "tokenizer.huggingface.json"  # rare; used as it is when present
SPACE: Final = "\u2581"
_MAX_TOKEN_CHARS: Final = 4096  # all ways to split a token are tried: quadratic in its length

_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_PRINTABLE: Final = [*range(33, 127), *range(161, 173), *range(174, 256)]
# Byte-level alphabet: printable bytes stand for themselves, the other 68 are U+0100 and up, in order.
_BYTE_OF_CHAR: Final = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(256 + rank): byte for rank, byte in enumerate(sorted(set(range(256)) - set(_PRINTABLE)))
}

_STOP_TEXTS: Final = frozenset(
    """<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s>
    <|eom_id|> <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <｜end▁of▁sentence｜> <eos> <turn|> <|tool_response>
    [e~[ <|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD] <|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame>
    <|file_sep|>""".split()  # noqa: SIM905
)
_FIM_TEXTS: Final = frozenset(
    """<|fim_prefix|> <fim-prefix> <fim_prefix> <｜fim▁begin｜> <PRE> ▁<PRE> <|code_prefix|>
    <|fim_suffix|> <fim-suffix> <fim_suffix> <｜fim▁hole｜> <SUF> ▁<SUF> <|code_suffix|>
    <|fim_middle|> <fim-middle> <fim_middle> <｜fim▁end｜> <MID> ▁<MID> <|code_middle|>""".split()  # noqa: SIM905
)
# Beside all of the first, the second is a separator (harmony) or plain text (Gemma 4), not an end.
_NOT_A_STOP: Final = (
    ({"<|return|>", "<|call|>"}, "<|end|>"),
    ({"<|calls|>", "<|flush|>"}, "<|end|>"),
    ({"<|tool_response>"}, "</s>"),
)
_STOP_KEYS: Final = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
_OTHER_KEYS: Final = ("bos", "unknown", "padding", "seperator", "mask", "fim_pre", "fim_suf", "fim_mid")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a tokenizer needs to know; `tokens[i]` and `types[i]` belong to token id i."""

    source: str
    tokens: list[str]
    types: list[int]
    ids: dict[str, int]  # of a text that several tokens share, the first
    merges: Merges
    pre: PreTokenizer
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    add_bos: bool
    space_prefix: bool
    stop_ids: frozenset[int]
    suppress_ids: tuple[int, ...]

    def piece(self, token_id: int, *, skip_special: bool) -> bytes:
        """The bytes that a token stands for; none for control tokens if they are skipped."""
        text, kind = self.tokens[token_id], self.types[token_id]
        if kind in (CONTROL, UNKNOWN):
            return b"" if skip_special else text.encode()
        if kind == USER_DEFINED:
            return text.encode()
        if self.pre.byte_level:
            try:
                return bytes([_BYTE_OF_CHAR[char] for char in text])
            except KeyError:  # not in the byte alphabet: the text is meant literally
                return text.encode()
        byte = _BYTE_TOKEN.fullmatch(text)
        return bytes([int(byte[1], 16)]) if byte else text.replace(SPACE, " ").encode()


class Fields:
    """Metadata with checks. `source` names the file in messages."""

    def __init__(self, metadata: Mapping[str, Any], source: str) -> None:
        self.metadata = metadata
        self.source = source

    def error(self, key: str, found: str, expected: str) -> ModelFormatError:
        return ModelFormatError(f"{self.source}: {key}: found {found}, expected {expected}")

    def scalar(self, key: str, kind: type[T]) -> T | None:
        value = self.metadata.get(key)
        if value is not None and type(value) is not kind:
            raise self.error(key, reprlib.repr(value), f"one {kind.__name__}")
        return value

    def array(self, key: str, kind: type[T], length: int | None = None) -> list[T]:
        """The list at `key`; all items must be of type `kind`, and `length` many if given."""
        value: Any = self.metadata.get(key)
        items = value.tolist() if hasattr(value, "tolist") else value
        if not isinstance(items, list | tuple):
            found = "nothing" if items is None else reprlib.repr(items)
            raise self.error(key, found, f"a list of {kind.__name__}")
        if set(map(type, items)) - {kind}:
            index = next(i for i, item in enumerate(items) if type(item) is not kind)
            raise self.error(key, f"{reprlib.repr(items[index])} at index {index}", f"only {kind.__name__}")
        if length is not None and len(items) != length:
            raise self.error(key, f"{len(items)} items", f"{length}, one for each token")
        return list(items)

    def token_id(self, name: str, n_vocab: int) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        value = self.scalar(key, int)
        if value is not None and not 0 <= value < n_vocab:
            raise self.error(key, str(value), f"a token id from 0 to {n_vocab - 1}")
        return value


def read_vocabulary(metadata: Mapping[str, Any], source: str) -> Vocabulary:
    """Read and check the `tokenizer.ggml.*` keys.

    Raises: UnsupportedModelError for an unknown tokenizer model or splitter, ModelFormatError for damage.
    """
    fields = Fields(metadata, source)
    model = fields.scalar("tokenizer.ggml.model", str)
    if model is None:
        raise fields.error("tokenizer.ggml.model", "nothing", f"one of {', '.join(MODELS)}")
    if model not in MODELS:
        raise UnsupportedModelError(
            f"{source}: tokenizer.ggml.model = {model!r} is not supported; known: {', '.join(MODELS)}"
        )
    tokens, types, ids = _read_tokens(fields, model)
    pre = _read_pre(fields, model)
    if HF_JSON_KEY in metadata:
        merges: Merges = []
    elif model == "llama":
        merges = _merges_from_scores(fields, tokens, types)
    else:
        merges = _read_merges(fields, ids)
        missing = sum(char not in ids for char in _BYTE_OF_CHAR) if pre.byte_level else 0
        if missing:
            logger.warning("%s: %d of 256 byte values have no token; text loses them", source, missing)

    named = _read_named_ids(fields, model, len(tokens))
    in_use = {i for i in named.values() if i is not None}
    stop_ids = _promote_control_tokens(tokens, types, ids, merges, in_use)
    stop_ids |= {i for name in _STOP_KEYS if (i := named[name]) is not None}
    for present, text in _NOT_A_STOP:
        if present <= ids.keys() and ids.get(text) != named["eos"]:
            stop_ids.discard(ids.get(text, -1))

    add_bos = fields.scalar("tokenizer.ggml.add_bos_token", bool)
    if add_bos is None or model == "gemma4":  # some Gemma 4 files say false, but the model needs it
        add_bos = pre.add_bos
    return Vocabulary(
        source=source,
        tokens=tokens,
        types=types,
        ids=ids,
        merges=merges,
        pre=pre,
        bos_id=named["bos"],
        eos_id=named["eos"],
        unk_id=named["unknown"],
        add_bos=add_bos and named["bos"] is not None,
        space_prefix=model == "llama" and fields.scalar("tokenizer.ggml.add_space_prefix", bool) is not False,
        stop_ids=frozenset(stop_ids),
        suppress_ids=_read_suppress_ids(fields, len(tokens)),
    )


def _read_tokens(fields: Fields, model: str) -> tuple[list[str], list[int], dict[str, int]]:
    key, type_key = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
    tokens = fields.array(key, str)
    if not tokens:
        raise fields.error(key, "an empty list", "at least one token")
    if len(longest := max(tokens, key=len)) > _MAX_TOKEN_CHARS:
        raise fields.error(key, f"a token of {len(longest)} characters", f"at most {_MAX_TOKEN_CHARS}")
    try:
        "".join(tokens).encode()
    except UnicodeEncodeError as error:
        raise fields.error(key, f"invalid Unicode: {error}", "valid UTF-8 text") from error
    types = [NORMAL] * len(tokens)
    if type_key in fields.metadata:
        types = fields.array(type_key, int, len(tokens))
    if not set(types) <= set(range(7)):
        raise fields.error(type_key, reprlib.repr(sorted(set(types))), "values from 0 to 6")
    for index, (text, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind == BYTE and model != "gpt2" and not _BYTE_TOKEN.fullmatch(text):
            raise fields.error(key, f"byte token {reprlib.repr(text)} at index {index}", "the form <0x1F>")
    ids = dict(zip(reversed(tokens), range(len(tokens) - 1, -1, -1), strict=True))
    # A handful of repeated texts is known from good files and harmless; many mean a damaged list.
    if (len(tokens) - types.count(UNUSED)) > len(ids) + len(tokens) // 100 + 1:
        raise fields.error(key, f"{len(tokens)} tokens of which only {len(ids)} differ", "distinct tokens")
    ids.pop("", None)
    return tokens, types, ids


def _read_named_ids(fields: Fields, model: str, n_vocab: int) -> dict[str, int | None]:
    named = {name: fields.token_id(name, n_vocab) for name in (*_STOP_KEYS, *_OTHER_KEYS)}
    if model == "llama":
        for name, default in (("unknown", 0), ("bos", 1), ("eos", 2)):
            if named[name] is None and default < n_vocab:
                named[name] = default
    return named


def _read_suppress_ids(fields: Fields, n_vocab: int) -> tuple[int, ...]:
    key = "tokenizer.ggml.suppress_tokens"
    suppress = fields.array(key, int) if key in fields.metadata else []
    if any(not 0 <= index < n_vocab for index in suppress):
        raise fields.error(key, reprlib.repr(suppress), f"token ids from 0 to {n_vocab - 1}")
    return tuple(suppress)


def _read_pre(fields: Fields, model: str) -> PreTokenizer:
    key = "tokenizer.ggml.pre"
    name = fields.scalar(key, str)
    if model == "gemma4":
        return PRE_TOKENIZERS["gemma4"]
    if model == "llama":
        return PreTokenizer((), add_bos=True, byte_level=False)
    if HF_JSON_KEY in fields.metadata:  # that text holds its own splitter
        return PRE_TOKENIZERS.get(name or "", PreTokenizer(()))
    if name is None:
        logger.warning("%s: %s is missing; the default may not suit the model", fields.source, key)
        name = "default"
    if name not in PRE_TOKENIZERS:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise UnsupportedModelError(f"{fields.source}: {key} = {name!r} is not supported; known: {known}")
    return PRE_TOKENIZERS[name]


def _read_merges(fields: Fields, ids: Mapping[str, int]) -> Merges:
    key = "tokenizer.ggml.merges"
    merges = []
    for rank, text in enumerate(fields.array(key, str)):
        cut = text.find(" ", 1)  # a piece may itself begin with a space
        left, right = text[:cut], text[cut + 1 :]
        if cut < 0 or left not in ids or right not in ids or left + right not in ids:
            found = f"{reprlib.repr(text)} at index {rank}"
            raise fields.error(key, found, "two tokens, 'left right', that join to a third")
        merges.append((left, right))
    return merges


def _merges_from_scores(fields: Fields, tokens: list[str], types: list[int]) -> Merges:
    """Every way to join two pieces to a third, highest score of the third first."""
    key = "tokenizer.ggml.scores"
    scores = fields.array(key, float, len(tokens))
    if any(map(math.isnan, scores)):
        raise fields.error(key, "a NaN", "numbers")
    pieces: dict[str, int] = {}
    for index, (text, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind in (NORMAL, USER_DEFINED, UNUSED):
            pieces.setdefault(text, index)
    merges: list[tuple[float, int, int, str, str]] = []
    for text, index in pieces.items():
        splits = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
        found = [(left, right) for left, right in splits if left in pieces and right in pieces]
        found.sort(key=lambda pair: (pieces[pair[0]], pieces[pair[1]]))
        merges += ((-scores[index], -len(left), -len(right), left, right) for left, right in found)
    merges.sort(key=lambda merge: merge[:3])  # stable: ties stay in token order
    return [(left, right) for *_, left, right in merges]


def _promote_control_tokens(
    tokens: list[str], types: list[int], ids: Mapping[str, int], merges: Merges, named: set[int]
) -> set[int]:
    """Turn tokens that are control by role or name into CONTROL; returns the ids of stop tokens by name.

    Some files mark them as normal. A normal token that merges can produce stays what it is: ordinary text.
    """
    by_text = {ids[text]: text for text in _STOP_TEXTS | _FIM_TEXTS if text in ids}
    joined = {left + right for left, right in merges}
    stop_ids = set()
    for index in named | by_text.keys():
        ordinary = types[index] == NORMAL and (len(tokens[index]) <= 1 or tokens[index] in joined)
        if not ordinary:
            if types[index] != UNKNOWN:
                types[index] = CONTROL
            if by_text.get(index) in _STOP_TEXTS:
                stop_ids.add(index)
    return stop_ids
