"""From Hankel singular values to the number of states each layer keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

# Below this relative gain a cut costs more (a rebuild) than it saves (CompreSSM, arXiv 2510.02823, appendix B).
SMALLEST_GAIN = 0.05
SILENT = "kept: no state carries anything yet"

Dim = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, lt=1)]


class Budget(BaseModel):
    """What all layers may have together after the last cut."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    states: Dim | None = Field(None, description="Sum of the layers' state dimensions.")
    cost: Share | None = Field(
        None, description="Share of the first model's scan cost; a layer's is its states times its channels."
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> Budget:
        if (self.states is None) == (self.cost is None):
            raise ValueError("takes states or cost, one of both")
        return self


class Target(BaseModel):
    """How far to truncate: by a tolerance on the spectrum, to a size, or to whatever of both is smaller.

    The spectrum is that of the HSVs, or of a score that has its own (`Ranking.sigma_N`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tolerance: Share | None = Field(
        None, description="Share of the spectrum's sum that each cut may discard, in (0, 1)."
    )
    dim: Dim | tuple[Dim, ...] | None = Field(
        None, description="State dimension after the last cut: of all layers, or of each."
    )
    fraction: Share | None = Field(None, description="Share of its states that a layer has after the last cut.")
    budget: Budget | None = Field(None, description="Of all layers together.")
    allocation: Literal["layer", "global"] = Field(
        "layer",
        description="Each layer on its own, and with a budget the same share of every layer's spectrum; "
        "or one ranking of all states by their share of their layer's spectrum.",
    )
    ladder: tuple[Dim, ...] | None = Field(
        None, description="Dimensions that the hardware likes; ranks are rounded up to them, or down for a budget."
    )
    uniform: bool = Field(False, description="The same dimension in all layers, which stock formats need.")

    @model_validator(mode="after")
    def _says_one_thing(self) -> Target:
        sizes = [name for name in ("dim", "fraction", "budget") if getattr(self, name) is not None]
        if len(sizes) > 1:
            raise ValueError(f"takes one of dim, fraction and budget, not {' and '.join(sizes)}")
        if not sizes and self.tolerance is None:
            raise ValueError("needs tolerance, dim, fraction or budget")
        if self.ladder is not None:
            if any(b <= a for a, b in zip(self.ladder, self.ladder[1:], strict=False)) or not self.ladder:
                raise ValueError(f"ladder {list(self.ladder)} must increase")
            if not set(self.dims) <= set(self.ladder):
                raise ValueError(f"dim {self.dim} must be on the ladder {list(self.ladder)}")
        if self.uniform and len(set(self.dims)) > 1:
            raise ValueError(f"dim {self.dim} must be one number with uniform true")
        if self.allocation == "global" and len(self.dims) > 1:
            raise ValueError(f"dim {self.dim} must be one number with allocation global, which shares it out")
        return self

    @property
    def together(self) -> bool:
        """Whether how much one layer keeps depends on the others."""
        return self.allocation == "global" or self.uniform or self.budget is not None

    @property
    def dims(self) -> tuple[int, ...]:
        """What `dim` says, as far as it says anything: one number for all layers, or one for each."""
        return self.dim if isinstance(self.dim, tuple) else () if self.dim is None else (self.dim,)


@dataclass(frozen=True)
class Spectrum:
    """What ranking needs to know of one layer."""

    sigma: tuple[float, ...]  # descending
    initial_dim: int  # before the first cut
    channels: int  # that the scan carries for each state

    @property
    def dim(self) -> int:
        return len(self.sigma)

    @property
    def silent(self) -> bool:
        return sum(self.sigma) == 0


def rank_within_tolerance(sigma: Sequence[float], tolerance: float) -> int:
    """Smallest rank whose leading HSVs sum to at least (1 - tolerance) of all; `sigma` descending."""
    mass = list(accumulate(sigma))
    return sum(part < (1 - tolerance) * mass[-1] for part in mass) + 1


def choose_ranks(spectra: Sequence[Spectrum], target: Target, event: int, events: int) -> list[tuple[int, str]]:
    """States that each layer keeps at cut `event` of `events` (from 1), and the reasons in words.

    A size is approached geometrically over the events, so that each cut removes the same share. Never below 1, or
    below the lowest rung of a ladder. A layer stays as it is where no state carries anything yet, and where a cut
    would shrink it by less than 5 %, unless that is what the last event still needs to reach a size.
    """
    limits, size = _sizes(spectra, target, event, events)
    if target.uniform and (target.allocation == "global" or target.budget is not None) and size:
        limits = [sum(limits) // len(limits)] * len(limits)
    limits = _rounded(limits, spectra, target)
    ranks, reasons = list(limits), [size] * len(spectra)
    if target.tolerance is not None:
        within = _rounded_up(_within_tolerance(spectra, target, target.tolerance), spectra, target)
        ranks = [min(pair) for pair in zip(within, limits, strict=True)]
        word = f"tolerance {target.tolerance:g}"
        reasons = [size if limit < rank else word for rank, limit in zip(within, limits, strict=True)]
    if target.uniform:
        if any(spectrum.silent for spectrum in spectra):
            waiting = "kept: another layer carries nothing yet, and all are to be alike"
            return [(s.dim, SILENT if s.silent else waiting) for s in spectra]
        ranks = [min(max(ranks), *(spectrum.dim for spectrum in spectra))] * len(spectra)
    last = [event == events and limit < spectrum.dim for limit, spectrum in zip(limits, spectra, strict=True)]
    if target.uniform:
        last = [any(last)] * len(spectra)
    return [_gated(*layer) for layer in zip(spectra, ranks, reasons, last, strict=True)]


def _gated(spectrum: Spectrum, rank: int, reason: str, last: bool) -> tuple[int, str]:
    """A size has to be reached with the last event, however small the step."""
    dim = spectrum.dim
    if spectrum.silent:
        return dim, SILENT
    if rank == dim or (rank > (1 - SMALLEST_GAIN) * dim and not last):
        return dim, f"kept: rank {rank} would shrink it by less than {SMALLEST_GAIN:.0%}"
    return rank, reason


def _within_tolerance(spectra: Sequence[Spectrum], target: Target, tolerance: float) -> list[int]:
    if target.allocation == "layer":
        return [s.dim if s.silent else rank_within_tolerance(s.sigma, tolerance) for s in spectra]
    # Globally the layers' mean share is within the tolerance.
    loud = [spectrum for spectrum in spectra if not spectrum.silent]
    ranks = [s.dim if s.silent else 0 for s in spectra]
    missing = (1 - tolerance) * len(loud)
    for layer, share in _by_share(spectra, [1] * len(spectra)):
        if missing <= 0:
            break
        ranks[layer] += 1
        missing -= share
    return [max(1, rank) for rank in ranks]


def _by_share(spectra: Sequence[Spectrum], costs: Sequence[int]) -> list[tuple[int, float]]:
    """All states as (layer, share of its layer's mass), the largest share for its cost first; ties go round the layers.

    Without the states of layers that carry nothing, which stay as they are.
    """
    states = [
        (-sigma / sum(spectrum.sigma) / costs[layer], place, layer)
        for layer, spectrum in enumerate(spectra)
        if not spectrum.silent
        for place, sigma in enumerate(spectrum.sigma)
    ]
    return [(layer, -key * costs[layer]) for key, _, layer in sorted(states)]


def _by_share_before(spectra: Sequence[Spectrum]) -> list[int]:
    """The layers of all states, in the order in which layers get theirs that are to keep the same share of their mass.

    A layer needs a state as soon as that share is more than what its larger ones hold.
    """
    states = [
        (before / sum(spectrum.sigma), place, layer)
        for layer, spectrum in enumerate(spectra)
        if not spectrum.silent
        for place, before in enumerate(accumulate(spectrum.sigma[:-1], initial=0.0))
    ]
    return [layer for _, _, layer in sorted(states)]


def _sizes(spectra: Sequence[Spectrum], target: Target, event: int, events: int) -> tuple[list[int], str]:
    """The largest rank of each layer that a size allows at this event, on a ladder or not, and the reason in words."""
    dims = [spectrum.dim for spectrum in spectra]
    floor = target.ladder[0] if target.ladder else 1
    when = f", event {event} of {events}"

    def now(initial: float, final: float) -> float:
        return initial * math.pow(min(1.0, final / initial), event / events)

    if target.dim is not None or target.fraction is not None:
        if target.dim is not None:
            finals = list(target.dims) if len(target.dims) > 1 else list(target.dims) * len(spectra)
            what = f"dim {', '.join(map(str, target.dims))}"
        else:
            assert target.fraction is not None
            finals = [max(floor, round(target.fraction * s.initial_dim)) for s in spectra]
            what = f"fraction {target.fraction:g}"
        limits = [round(now(s.initial_dim, final)) for s, final in zip(spectra, finals, strict=True)]
        if target.allocation == "global":
            limits = _allocate(spectra, [1] * len(spectra), sum(limits), floor, target.allocation)
        return [max(1, limit) for limit in limits], what + when
    if target.budget is not None:
        if target.budget.states is not None:
            costs, what = [1] * len(spectra), f"budget of {target.budget.states} states"
            initial = sum(s.initial_dim for s in spectra)
            total = round(now(initial, target.budget.states))
        else:
            assert target.budget.cost is not None
            costs, what = [s.channels for s in spectra], f"budget of {target.budget.cost:g} of the scan cost"
            initial = sum(s.initial_dim * s.channels for s in spectra)
            total = int(now(initial, target.budget.cost * initial) * (1 + 1e-12))  # 0.57 of 100 are 57
        return _allocate(spectra, costs, total, floor, target.allocation), what + when
    return dims, ""


def _allocate(
    spectra: Sequence[Spectrum], costs: Sequence[int], total: int, floor: int, allocation: Literal["layer", "global"]
) -> list[int]:
    """Give out `total`: all layers keep the same share of their mass, or go by shares of single states for their cost.

    The same share is how regularised models are cut as published (Schwerdtner, Berman, Peherstorfer, arXiv 2510.22951).
    A layer that carries nothing keeps its states, and every other one at least `floor` of them, whatever that costs.
    """
    ranks = [s.dim if s.silent else min(floor, s.dim) for s in spectra]
    left = total - sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))
    given = list(ranks)  # which each layer's first states are counted against
    order = _by_share_before(spectra) if allocation == "layer" else [layer for layer, _ in _by_share(spectra, costs)]
    for layer in order:
        if given[layer] > 0:
            given[layer] -= 1
        elif costs[layer] <= left:  # else a layer's smaller states cost too much as well
            ranks[layer] += 1
            left -= costs[layer]
    return ranks


def _rounded(limits: Sequence[int], spectra: Sequence[Spectrum], target: Target) -> list[int]:
    """What a size allows, on the ladder: a budget must not be exceeded."""
    if target.budget is None:
        return _rounded_up(limits, spectra, target)
    rungs = target.ladder or ()
    # What the budget leaves whole stays so; where all are to be alike, only together.
    whole = [limit >= spectrum.dim for limit, spectrum in zip(limits, spectra, strict=True)]
    if target.uniform:
        whole = [all(whole)] * len(whole)
    return [
        limit if stays else max((rung for rung in rungs if rung <= limit), default=limit)
        for limit, stays in zip(limits, whole, strict=True)
    ]


def _rounded_up(ranks: Sequence[int], spectra: Sequence[Spectrum], target: Target) -> list[int]:
    """To the next rung of the ladder, or to the present dimension where none lies below it."""
    rungs = target.ladder or ()
    return [
        min([rung for rung in rungs if rung >= rank] + [spectrum.dim]) if rungs else min(rank, spectrum.dim)
        for rank, spectrum in zip(ranks, spectra, strict=True)
    ]
