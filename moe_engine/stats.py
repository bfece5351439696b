"""What a generation cost."""

import resource
from dataclasses import asdict, dataclass
from typing import Any

from moe_engine.config import format_size


@dataclass
class Stats:
    """Counts, seconds and bytes of one generation. Rates are tokens per second, None where nothing was timed."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    decode_tokens: int = 0  # tokens computed one at a time; the first token comes with the prompt
    decode_seconds: float = 0.0
    expert_hits: int = 0  # experts found in VRAM, each counted once per layer and forward pass
    expert_misses: int = 0
    peak_vram_bytes: int = 0  # what PyTorch held at most; the CUDA context comes on top
    peak_ram_bytes: int = 0  # the process's largest resident size, mapped file pages included

    @property
    def prompt_rate(self) -> float | None:
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds else None

    @property
    def decode_rate(self) -> float | None:
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else None

    @property
    def hit_rate(self) -> float | None:
        uses = self.expert_hits + self.expert_misses
        return self.expert_hits / uses if uses else None

    def as_dict(self) -> dict[str, Any]:
        rates = {"prompt_rate": self.prompt_rate, "decode_rate": self.decode_rate, "hit_rate": self.hit_rate}
        return {**asdict(self), **rates}

    def summary(self) -> str:
        """One line for people."""
        parts = []
        if self.prompt_rate:
            parts.append(f"prompt {self.prompt_tokens} tokens at {self.prompt_rate:.1f} tok/s")
        if self.decode_rate:
            parts.append(f"decode {self.decode_tokens} tokens at {self.decode_rate:.1f} tok/s")
        if self.hit_rate is not None:
            parts.append(f"experts from VRAM {self.hit_rate:.1%}")
        if self.peak_vram_bytes:
            parts.append(f"peak VRAM {format_size(self.peak_vram_bytes)}")
        parts.append(f"peak RAM {format_size(self.peak_ram_bytes)}")
        return ", ".join(parts)


def peak_ram_bytes() -> int:
    """Largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
