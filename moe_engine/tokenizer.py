"""Text to token ids and back, rebuilt from the `tokenizer.*` keys of a GGUF file.

Special tokens are cut out here, before the `tokenizers` library sees a piece: user text cannot smuggle in
control tokens, while prompts made from chat templates ask for them. No Unicode normalisation is applied.
"""

import codecs
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from moe_engine.errors import ConfigError
from moe_engine.vocab import (
    CONTROL,
    HF_JSON_KEY,
    SPACE,
    UNKNOWN,
    USER_DEFINED,
    Fields,
    Vocabulary,
    read_vocabulary,
)

if TYPE_CHECKING:
    import tokenizers

T = TypeVar("T")
_TEMPLATE_KEY = "tokenizer.chat_template"


class TextStream:
    """Turns token ids into text as they arrive, holding back characters whose UTF-8 is not complete yet."""

    def __init__(self, vocab: Vocabulary, *, skip_special: bool, strip_space: bool) -> None:
        self._vocab = vocab
        self._skip_special = skip_special
        self._strip_space = strip_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes, maybe empty; U+FFFD for bytes that can no longer become valid.

        Raises: ConfigError if there is no such token.
        """
        _check_id(self._vocab, token_id)
        return self._strip(self._utf8.decode(self._vocab.piece(token_id, skip_special=self._skip_special)))

    def flush(self) -> str:
        """What is left at the end: U+FFFD if the last character was never completed, else nothing."""
        return self._strip(self._utf8.decode(b"", final=True))

    def _strip(self, text: str) -> str:
        if not (self._strip_space and text):
            return text
        self._strip_space = False
        return text.removeprefix(" ")


class Tokenizer:
    """The tokenizer of one model file.

    Attributes: n_vocab; bos_id and eos_id, None if the model has none; add_bos, whether prompts begin with
    BOS; stop_ids, tokens that end an answer; suppress_ids, tokens that must never be sampled.
    """

    def __init__(
        self,
        vocab: Vocabulary,
        cores: Mapping[bool, "tokenizers.Tokenizer"],
        chat_templates: Mapping[str, str],
        *,
        cut_special: bool,
    ) -> None:
        """`cores[parse_special]` encodes; with `cut_special` it never sees a special token's text."""
        self.n_vocab = len(vocab.tokens)
        self.bos_id = vocab.bos_id
        self.eos_id = vocab.eos_id
        self.add_bos = vocab.add_bos
        self.stop_ids = vocab.stop_ids
        self.suppress_ids = vocab.suppress_ids
        self._vocab = vocab
        self._cores = cores
        self._chat_templates = chat_templates
        self._specials = {}
        if cut_special:
            self._specials = {False: _special_pattern(vocab, (USER_DEFINED,))}
            self._specials[True] = _special_pattern(vocab, (USER_DEFINED, CONTROL, UNKNOWN))

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], source: str) -> "Tokenizer":
        """Build from GGUF metadata (key -> str, int, float, bool or list); `source` names the file in errors.

        Raises: ModelFormatError for missing or damaged keys, UnsupportedModelError for unknown tokenizers.
        """
        fields = Fields(metadata, source)
        vocab = read_vocabulary(metadata, source)
        templates = {
            key.removeprefix(_TEMPLATE_KEY).removeprefix("."): fields.scalar(key, str) or ""
            for key in metadata
            if key == _TEMPLATE_KEY or key.startswith(_TEMPLATE_KEY + ".")
        }
        if HF_JSON_KEY in metadata:
            cores = _cores_from_json(fields, vocab)
        else:
            core = _guard(fields, "tokenizer.ggml.tokens", lambda: _build_core(vocab))
            cores = {False: core, True: core}
        return cls(vocab, cores, templates, cut_special=HF_JSON_KEY not in metadata)

    def encode(self, text: str, *, add_bos: bool | None = None, parse_special: bool = False) -> list[int]:
        """Token ids of `text`; control tokens in it are recognised only with `parse_special`.

        `add_bos` defaults to what the file says. A BOS that the text already spells out is not doubled.
        Raises: ConfigError for text that is not valid Unicode, or add_bos without a BOS token.
        """
        if add_bos and self.bos_id is None:
            raise ConfigError(f"{self._vocab.source}: add_bos was asked for, but the model has no BOS token")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"text is not valid Unicode: {error}") from error
        special = self._specials.get(parse_special)
        ids: list[int] = []
        for index, part in enumerate(special.split(text) if special else [text]):
            if index % 2:  # the group of the pattern: a special token
                ids.append(self._vocab.ids[part])
            elif part:
                ids += self._encode_plain(part, parse_special)
        wanted = self.add_bos if add_bos is None else add_bos
        if wanted and self.bos_id is not None and not (parse_special and ids[:1] == [self.bos_id]):
            ids.insert(0, self.bos_id)
        return ids

    def _encode_plain(self, text: str, parse_special: bool) -> list[int]:
        if self._specials and not self._vocab.pre.byte_level:
            text = SPACE * self._vocab.space_prefix + text.replace(" ", SPACE)
        try:
            return self._cores[parse_special].encode(text, add_special_tokens=False).ids
        except BaseException as error:
            if not _is_library_error(error):
                raise
            raise ConfigError(f"cannot tokenize this text of {len(text)} characters: {error}") from error

    def decode(self, ids: Sequence[int], *, skip_special: bool = True, continuation: bool = False) -> str:
        """The text of `ids`; U+FFFD for bytes that are not UTF-8.

        `continuation` keeps the space before the first word where the model's first word always has one.
        Raises: ConfigError for ids outside the vocabulary.
        """
        stream = self.stream(skip_special=skip_special, continuation=continuation)
        return "".join([*map(stream.push, ids), stream.flush()])

    def stream(self, *, skip_special: bool = True, continuation: bool = False) -> TextStream:
        """A decoder for tokens that arrive one by one; its joined output equals `decode` of all."""
        strip_space = self._vocab.space_prefix and not continuation
        return TextStream(self._vocab, skip_special=skip_special, strip_space=strip_space)

    def token_text(self, token_id: int) -> str:
        """The token as the file spells it. Raises: ConfigError if there is no such token."""
        _check_id(self._vocab, token_id)
        return self._vocab.tokens[token_id]

    def chat_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> list[int]:
        """Token ids of a conversation, written out by the file's chat template and with one BOS at most.

        `variables` reach the template, for instance enable_thinking=False.
        Raises: ConfigError without a template or if it refuses the messages, ModelFormatError for a broken one.
        """
        from moe_engine.chat import render_chat

        name = "tool_use" if tools and "tool_use" in self._chat_templates else ""
        if name not in self._chat_templates:
            raise ConfigError(f"{self._vocab.source} has no chat template; give a plain prompt instead")
        text = render_chat(
            self._chat_templates[name],
            f"{self._vocab.source}: {_TEMPLATE_KEY}{'.' * bool(name)}{name}",
            messages,
            {
                "bos_token": self._text_or_empty(self.bos_id),
                "eos_token": self._text_or_empty(self.eos_id),
                "unk_token": self._text_or_empty(self._vocab.unk_id),
                "documents": None,
                "tools": tools,
                "add_generation_prompt": add_generation_prompt,
                **variables,
            },
        )
        return self.encode(text, parse_special=True)

    def _text_or_empty(self, token_id: int | None) -> str:
        return "" if token_id is None else self._vocab.tokens[token_id]


def _check_id(vocab: Vocabulary, token_id: int) -> None:
    if not 0 <= token_id < len(vocab.tokens):
        raise ConfigError(f"{vocab.source}: no token {token_id}; ids go from 0 to {len(vocab.tokens) - 1}")


def _special_pattern(vocab: Vocabulary, kinds: tuple[int, ...]) -> re.Pattern[str] | None:
    texts = {text for text, index in vocab.ids.items() if vocab.types[index] in kinds}
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})") if texts else None


def _build_core(vocab: Vocabulary) -> "tokenizers.Tokenizer":
    """Cuts pieces and merges; control tokens are left out, so that no text can merge into one."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    used = {part for left, right in vocab.merges for part in (left, right, left + right)}
    plain = {
        text: index
        for text, index in vocab.ids.items()
        if vocab.types[index] != CONTROL or index == vocab.unk_id or text in used
    }
    byte_level = vocab.pre.byte_level
    unk_token = None if byte_level or vocab.unk_id is None else vocab.tokens[vocab.unk_id]
    core = Tokenizer(
        models.BPE(
            plain,
            vocab.merges,
            unk_token=unk_token,
            byte_fallback=not byte_level,
            fuse_unk=not byte_level,
            ignore_merges=vocab.pre.ignore_merges,
        )
    )
    steps: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in vocab.pre.patterns]
    if byte_level:
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    if steps:
        core.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return core


def _cores_from_json(fields: Fields, vocab: Vocabulary) -> dict[bool, "tokenizers.Tokenizer"]:
    """Two copies of a complete tokenizer.json: one blind to control tokens, one that sees them."""
    from tokenizers import Tokenizer

    text = fields.scalar(HF_JSON_KEY, str) or ""
    cores = {mode: _guard(fields, HF_JSON_KEY, lambda: Tokenizer.from_str(text)) for mode in (False, True)}
    cores[False].encode_special_tokens = True
    highest = max(cores[True].get_vocab(with_added_tokens=True).values(), default=0)
    if highest >= len(vocab.tokens):
        raise fields.error(HF_JSON_KEY, f"token id {highest}", f"ids below {len(vocab.tokens)}")
    return cores


def _guard(fields: Fields, key: str, build: Callable[[], T]) -> T:
    """`build()`, with whatever the tokenizers library throws as a ModelFormatError about `key`."""
    try:
        return build()
    except BaseException as error:
        if not _is_library_error(error):
            raise
        raise fields.error(key, str(error), "what the tokenizers library accepts") from error


def _is_library_error(error: BaseException) -> bool:
    """A Rust panic is no Exception, so that a plain `except Exception` would let it through."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"
