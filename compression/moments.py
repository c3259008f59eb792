"""Carrying a parameter and Adam's moments through a truncation.

Adam's first moment is an average of gradients, so it moves as the gradient does: where a weight becomes M w,
its gradient goes through the transposed inverse of M. The second moment is an average of squares and goes
through the squared magnitudes of the same map, which is exact for independent entries.

Shapes: N entries before, R after, H columns that the map leaves alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Carry = Literal["transport", "slice", "reset"]


@dataclass(frozen=True)
class ParameterState:
    """One whole parameter as the optimizer knows it: three float32 tensors of one shape."""

    value: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.value, self.exp_avg, self.exp_avg_sq

    def select(self, pick: Callable[[Tensor], Tensor]) -> ParameterState:
        """The same choice of entries from all three; exact, because a choice of entries is its own inverse."""
        return ParameterState(*(pick(part).contiguous() for part in self.tensors()))

    @classmethod
    def fresh(cls, value: Tensor) -> ParameterState:
        """A parameter that Adam has not seen yet."""
        return cls(value, torch.zeros_like(value), torch.zeros_like(value))

    def through(self, map_RN: Tensor, gradient_map_RN: Tensor) -> ParameterState:
        """`map_RN` @ value (N, H), where the gradient becomes `gradient_map_RN` @ gradient; both float64."""
        maps = (map_RN, gradient_map_RN, gradient_map_RN.square())
        mapped = (m @ part.double() for m, part in zip(maps, self.tensors(), strict=True))
        return ParameterState(*(part.to(self.value.dtype) for part in mapped))

    def replaced(self, how: Carry, shrunk: ParameterState) -> ParameterState:
        """`shrunk`, this parameter after a cut, with other moments: for comparison with carrying them along.

        slice: the leading entries of the moments, by position, whatever the cut was. reset: zeros.
        """
        if how == "transport" or self.value.shape == shrunk.value.shape:
            return shrunk
        if how == "reset":
            return ParameterState.fresh(shrunk.value)
        leading = tuple(slice(size) for size in shrunk.value.shape)
        return ParameterState(shrunk.value, self.exp_avg[leading].clone(), self.exp_avg_sq[leading].clone())


@dataclass(frozen=True)
class ComplexMoments:
    """Adam's moments of a complex weight whose real and imaginary part are separate parameters."""

    first: Tensor  # complex: first moment of the real part + i x that of the imaginary part
    second_re: Tensor
    second_im: Tensor

    @classmethod
    def of(cls, real: ParameterState, imag: ParameterState) -> ComplexMoments:
        first = torch.complex(real.exp_avg.double(), imag.exp_avg.double())
        return cls(first, real.exp_avg_sq.double(), imag.exp_avg_sq.double())

    def through(self, gradient_map_RN: Tensor) -> ComplexMoments:
        """Moments of the weight whose gradient is `gradient_map_RN` @ gradient; rows are the mapped axis."""
        re2_RN, im2_RN = gradient_map_RN.real.square(), gradient_map_RN.imag.square()
        return ComplexMoments(
            gradient_map_RN @ self.first,
            re2_RN @ self.second_re + im2_RN @ self.second_im,
            im2_RN @ self.second_re + re2_RN @ self.second_im,
        )

    def scaled(self, factor_re: Tensor | float, factor_im: Tensor) -> ComplexMoments:
        """Moments after a change of variables that scales each part's gradient by a real factor."""
        first = torch.complex(self.first.real * factor_re, self.first.imag * factor_im)
        return ComplexMoments(first, self.second_re * factor_re**2, self.second_im * factor_im**2)

    @property
    def T(self) -> ComplexMoments:
        return ComplexMoments(self.first.T, self.second_re.T, self.second_im.T)

    def with_values(self, real: Tensor, imag: Tensor) -> tuple[ParameterState, ParameterState]:
        """Both parts as float32 parameters with these values."""
        return (
            ParameterState(real.float(), self.first.real.float(), self.second_re.float()),
            ParameterState(imag.float(), self.first.imag.float(), self.second_im.float()),
        )
