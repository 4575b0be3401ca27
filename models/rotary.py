"""Rotary position embeddings (RoPE, arXiv 2104.09864), and how checkpoints stretch them.

A head's C channels are P = C / 2 pairs (p, p + P). At position i the pair p turns by i f_p, where
f_p = theta^(-p/P); a pair of long wavelength 2 pi / f_p never saw all of its angles in training.
Each kind below has other f_p for texts longer than that; its fields are the keys of config.json.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mixlora.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Rope:
    """The plain kind, `default`."""

    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        least = {"rope_theta": 1, "factor": 0, "low_freq_factor": 0, "high_freq_factor": 0}
        for name, bound in least.items():
            value = getattr(self, name, math.e)
            if not bound < value < math.inf:
                raise InputError(f"{name} must be > {bound}, got {value}")

    def frequency(self, C: int, positions_BS: Tensor, segments_BS: Tensor | None) -> Tensor:
        """f_p in radians per position: [P], or [B, S, P] where it depends on the text."""
        return 1.0 / self.rope_theta ** exponents(C, positions_BS)

    def amplitude(self) -> float:
        """What the cosines and sines are multiplied by."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class LinearRope(Rope):
    """f_p / factor: positions are squeezed into the original length (arXiv 2306.15595)."""

    factor: float

    def frequency(self, C: int, positions_BS: Tensor, segments_BS: Tensor | None) -> Tensor:
        return super().frequency(C, positions_BS, segments_BS) / self.factor


@dataclass(frozen=True, kw_only=True)
class DynamicRope(Rope):
    """NTK-aware scaling: theta grows with the text once it is longer than the model was made for.

    The text of a token is its row or segment, up to the last position that this forward is given;
    other rows and padding change nothing. With a cache a new token's theta follows its row so
    far, and cached keys stay turned as they were when they came: `generate` of transformers does
    the same for one row. So beyond `max_position_embeddings` cached logits are not those of the
    whole text at once.
    """

    factor: float
    max_position_embeddings: int

    def frequency(self, C: int, positions_BS: Tensor, segments_BS: Tensor | None) -> Tensor:
        if segments_BS is None:
            last_BS = positions_BS.amax(1, keepdim=True)
        else:
            same_BSS = segments_BS[:, :, None] == segments_BS[:, None]
            last_BS = (positions_BS[:, None] * same_BSS).amax(2)
        excess_BS = ((last_BS + 1) / self.max_position_embeddings - 1).clamp_min(0)
        theta_BS = self.rope_theta * (1 + self.factor * excess_BS) ** (C / (C - 2))
        return 1.0 / theta_BS[..., None] ** exponents(C, positions_BS)


@dataclass(frozen=True, kw_only=True)
class Llama3Rope(Rope):
    """f_p / factor where the original length holds less than `low_freq_factor` turns, f_p where it
    holds more than `high_freq_factor`, in between the one fades into the other (arXiv 2407.21783).
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.high_freq_factor <= self.low_freq_factor:
            raise InputError(
                f"high_freq_factor must be greater than low_freq_factor {self.low_freq_factor}, "
                f"got {self.high_freq_factor}"
            )

    def frequency(self, C: int, positions_BS: Tensor, segments_BS: Tensor | None) -> Tensor:
        frequency_P = super().frequency(C, positions_BS, segments_BS)
        turns_P = self.original_max_position_embeddings / (2 * math.pi / frequency_P)
        low, high = self.low_freq_factor, self.high_freq_factor
        kept_P = ((turns_P - low) / (high - low)).clamp(0, 1)
        return (1 - kept_P) * frequency_P / self.factor + kept_P * frequency_P


@dataclass(frozen=True, kw_only=True)
class YarnRope(Rope):
    """YaRN (arXiv 2309.00071): f_p for pairs of more than `beta_fast` turns within the original
    length, f_p / factor below `beta_slow`, a ramp over p between; and attention made sharper."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None  # None: from factor and the mscales
    mscale: float | None = None
    mscale_all_dim: float | None = None
    beta_fast: float | None = None  # None or 0: 32
    beta_slow: float | None = None  # None or 0: 1
    truncate: bool = True  # the ramp's ends to whole pairs

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta_fast", "beta_slow"):
            turns = getattr(self, name) or 1  # transformers takes 0, too, as the default
            if not 0 < turns < math.inf:
                raise InputError(f"{name} must be >= 0, got {turns}")

    def frequency(self, C: int, positions_BS: Tensor, segments_BS: Tensor | None) -> Tensor:
        period_P = self.rope_theta ** exponents(C, positions_BS)
        start, end = self._pair(self.beta_fast or 32, C), self._pair(self.beta_slow or 1, C)
        if self.truncate:
            start, end = math.floor(start), math.ceil(end)
        start, end = max(start, 0), min(end, C - 1)
        pair_P = torch.arange(C // 2, device=positions_BS.device)
        kept_P = 1 - ((pair_P - start) / (end - start or 0.001)).clamp(0, 1)  # equal ends: a step
        return (1 - kept_P) * (1.0 / (self.factor * period_P)) + kept_P * (1.0 / period_P)

    def _pair(self, turns: float, C: int) -> float:
        """The p, a real number, whose angle makes so many turns within the original length."""
        wavelength = self.original_max_position_embeddings / turns
        return C * math.log(wavelength / (2 * math.pi)) / (2 * math.log(self.rope_theta))

    def amplitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._mscale(self.mscale) / self._mscale(self.mscale_all_dim)
        return self._mscale(1.0)

    def _mscale(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(max(self.factor, 1)) + 1


ROPES: dict[str, type[Rope]] = {
    "default": Rope,
    "linear": LinearRope,
    "dynamic": DynamicRope,
    "llama3": Llama3Rope,
    "yarn": YarnRope,
}


def exponents(C: int, positions_BS: Tensor) -> Tensor:
    """p / P for each pair."""
    return torch.arange(0, C, 2, device=positions_BS.device).float() / C


def rotary(
    rope: Rope, positions_BS: Tensor, segments_BS: Tensor | None, head_dim: int, dtype: torch.dtype
) -> Tensor:
    """[2, B, 1, S, C]: cosine and sine of every channel's angle."""
    frequency = rope.frequency(head_dim, positions_BS, segments_BS)
    angle_BSP = positions_BS[..., None].float() * frequency
    angle_BSC = torch.cat([angle_BSP, angle_BSP], dim=-1)
    table = torch.stack([angle_BSC.cos(), angle_BSC.sin()])[:, :, None]
    return (table * rope.amplitude()).to(dtype)


def apply_rotary(x_BHSC: Tensor, rope: Tensor) -> Tensor:
    first, second = x_BHSC.chunk(2, dim=-1)
    return x_BHSC * rope[0] + torch.cat([-second, first], dim=-1) * rope[1]
