"""Vocabularies for tests of tokenizers, as a GGUF file's metadata: the bundled model's, and small trained ones."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import gguf

from moe_engine.tokenizer import Tokenizer

DATA = Path(__file__).parent / "data"
MODEL = Path(__file__).parents[1] / "moe_engine" / "data" / "stories-deepseek-Q4_K_M.gguf"
CASES = json.loads((DATA / "tokenizer_cases.json").read_text(encoding="utf-8"))
TEXTS = [case["text"] for case in CASES] + [
    "МирHello хелло HELLOworld don't DON'T we'Ve",
    "हिन्दी cafe\u0301 1234567 12,345.678 ១២៣",
    "漢字かなカナ한국어, abc中文def ไทย ‘q’",
    "a/b\n/c  \r\n\r\n\t x\u3000y $x+=1; `z` ~|^",
]
Metadata = dict[str, Any]
T = "tokenizer.ggml."


@cache
def stories_metadata() -> Metadata:
    fields = gguf.GGUFReader(MODEL).fields.items()
    return {key: field.contents() for key, field in fields if key.startswith("tokenizer.")}


@cache
def stories() -> Tokenizer:
    return Tokenizer.from_metadata(stories_metadata(), MODEL.name)


def byte_alphabet() -> list[str]:
    """The character for each byte, from the published definition."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


@cache
def trained_merges() -> tuple[str, ...]:
    """Merges that a small byte-level trainer learns, across words too, so that splitting matters."""
    from tokenizers import Tokenizer as Core
    from tokenizers import models, pre_tokenizers, trainers

    core = Core(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(vocab_size=900, show_progress=False, initial_alphabet=byte_alphabet())
    corpus = (DATA / "heldout-4k.txt").read_text(encoding="utf-8")
    lines = [corpus[start : start + 60] for start in range(0, len(corpus), 60)]
    core.train_from_iterator(lines + TEXTS * 3, trainer)
    return tuple(" ".join(pair) for pair in json.loads(core.to_str())["model"]["merges"])


def byte_level_metadata(pre: str = "qwen2", control: tuple[str, ...] = ("<|endoftext|>",)) -> Metadata:
    merges = list(trained_merges())
    plain = byte_alphabet() + [merge.replace(" ", "") for merge in merges]
    plain = list(dict.fromkeys(plain))
    tokens = [*plain, *control]
    return {
        T + "model": "gpt2",
        T + "pre": pre,
        T + "tokens": tokens,
        T + "token_type": [1] * len(plain) + [3] * len(control),
        T + "merges": merges,
        T + "eos_token_id": len(plain),
    }


def build(metadata: Metadata, **changes: Any) -> Tokenizer:
    return Tokenizer.from_metadata(metadata | {T + key: value for key, value in changes.items()}, "m.gguf")


@cache
def score_metadata(seed: int = 0) -> Metadata:
    """Frequent substrings of a text as pieces, in an order that `seed` shuffles."""
    import random

    corpus = (DATA / "heldout-4k.txt").read_text(encoding="utf-8")[:6000].replace(" ", "\u2581")
    pieces = sorted({corpus[i : i + size] for size in range(2, 7) for i in range(0, len(corpus), 3)})
    random.Random(seed).shuffle(pieces)
    pieces = sorted(set(corpus) | {"\u2581"}) + pieces[:3000]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    return {
        T + "model": "llama",
        T + "tokens": tokens,
        T + "token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        T + "scores": [0.0] * 259 + [-float(rank) for rank in range(len(pieces))],
    }


@cache
def gemma_metadata() -> Metadata:
    from tokenizers import Tokenizer as Core
    from tokenizers import models, trainers

    core = Core(models.BPE())
    corpus = (DATA / "heldout-4k.txt").read_text(encoding="utf-8").replace(" ", "\u2581")
    lines = [line[start : start + 50] for line in corpus.splitlines() for start in range(0, len(line), 50)]
    core.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=700, show_progress=False))
    model = json.loads(core.to_str())["model"]
    pieces = [*sorted(model["vocab"], key=model["vocab"].__getitem__), "\n", "\n\n"]
    merges = [" ".join(pair) for pair in model["merges"]] + ["\n \n"]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    return {
        T + "model": "gemma4",
        T + "tokens": tokens,
        T + "token_type": [3, 3, 3, 2] + [6] * 256 + [1] * len(pieces),
        T + "merges": merges,
        T + "bos_token_id": 2,
        T + "eos_token_id": 1,
        T + "unknown_token_id": 3,
        T + "add_bos_token": False,
    }
