"""Rotary position embedding, with linear and YaRN scaling.

Sources: Su et al. 2021 (RoFormer); Peng et al. 2023 (YaRN).
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_engine.errors import ModelFormatError, UnsupportedModelError
from moe_engine.metadata import Metadata


@dataclass(frozen=True)
class RopeConfig:
    """What the rotation's angles follow from. factor: by how much the context is stretched."""

    n_rot: int  # dimensions of a head that are rotated
    base: float
    scaling: str = "none"  # none, linear or yarn
    factor: float = 1.0
    original_context: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0  # multiplies cosines and sines

    @classmethod
    def from_metadata(cls, meta: Metadata, head_dim: int) -> "RopeConfig":
        n_rot = meta.integer("rope.dimension_count", head_dim, high=head_dim)
        if n_rot % 2:
            raise meta.fail("rope.dimension_count", "an even number")
        config = cls(n_rot, meta.number("rope.freq_base", 10000.0, low=1.0 + 1e-6))
        factor = meta.number("rope.scaling.factor", meta.number("rope.scale_linear", 1.0, low=1e-6), low=1e-6)
        scaling = meta.text("rope.scaling.type", "linear")
        if scaling in ("none", "linear"):
            return replace(config, scaling=scaling, factor=factor if scaling == "linear" else 1.0)
        if scaling != "yarn":
            raise UnsupportedModelError(
                f"{meta.source}: key '{meta.architecture}.rope.scaling.type' is '{scaling}', expected none, linear "
                "or yarn"
            )
        return replace(
            config,
            scaling="yarn",
            factor=factor,
            original_context=meta.integer("rope.scaling.original_context_length", meta.integer("context_length")),
            beta_fast=meta.number("rope.scaling.yarn_beta_fast", 32.0, low=1e-3),
            beta_slow=meta.number("rope.scaling.yarn_beta_slow", 1.0, low=1e-3),
            attention_factor=(1.0 + 0.1 * math.log(max(factor, 1.0)))
            * meta.number("rope.scaling.attn_factor", meta.number("rope.scaling.yarn_attn_factor", 1.0)),
        )

    def frequencies(self) -> Tensor:
        """Angle per position of each rotated pair, f64 `[n_rot / 2]`."""
        pair = torch.arange(self.n_rot // 2, dtype=torch.float64)
        theta = self.base ** (-2.0 * pair / self.n_rot)
        if self.scaling != "yarn":
            return theta / self.factor

        def pair_with_turns(turns: float) -> float:
            """The (fractional) pair that turns this often within the original context."""
            return self.n_rot * math.log(self.original_context / (2 * math.pi * turns)) / (2 * math.log(self.base))

        low = max(0, math.floor(pair_with_turns(self.beta_fast)))
        high = min(self.n_rot - 1, math.ceil(pair_with_turns(self.beta_slow)))
        keep = 1.0 - ((pair - low) / max(0.001, high - low)).clamp(0.0, 1.0)
        return theta / self.factor * (1.0 - keep) + theta * keep


class Rope:
    """Cosines and sines for all positions, f32 `[n_position, n_rot / 2]`, and the two ways to pair dimensions."""

    def __init__(
        self, config: RopeConfig, n_position: int, device: torch.device, factors: Tensor | None = None
    ) -> None:
        frequencies = config.frequencies()
        if factors is not None:
            if not bool((factors > 0).all()):
                raise ModelFormatError("tensor 'rope_freqs.weight' holds values that are not positive")
            frequencies = frequencies / factors.cpu().double()
        angles = torch.outer(torch.arange(n_position, dtype=torch.float64), frequencies)
        self.n_rot = config.n_rot
        self.cos = (angles.cos() * config.attention_factor).float().to(device)
        self.sin = (angles.sin() * config.attention_factor).float().to(device)

    def half_split(self, x: Tensor, position: int) -> Tensor:
        """Rotates pairs (i, i + n_rot/2) of `x` `[n_token, n_head, head_dim]` (NEOX); the rest passes through."""
        a, b, rest = x.split([self.n_rot // 2, self.n_rot // 2, x.shape[-1] - self.n_rot], dim=-1)
        cos, sin = self._at(position, x.shape[0])
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)

    def interleaved(self, x: Tensor, position: int) -> Tensor:
        """Rotates pairs (2i, 2i + 1) of `x` `[n_token, n_head, n_rot]` (NORM)."""
        a, b = x[..., 0::2], x[..., 1::2]
        cos, sin = self._at(position, x.shape[0])
        return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)

    def _at(self, position: int, n_token: int) -> tuple[Tensor, Tensor]:
        span = slice(position, position + n_token)
        return self.cos[span, None], self.sin[span, None]
