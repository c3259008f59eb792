"""From all layers' spectra to one decision, and from the decision to the plan.

Three stages, so that workers can share the work: each layer's owner solves it, one place decides for all layers, the
owners reduce. `plan_truncation` is all three in one process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from compression.gramians import Statistics
from compression.hankel import overlap, spectrum_drift
from compression.plan import LayerPlan, StateSelection, TruncationPlan
from compression.ranking import Spectrum, Target, choose_ranks
from compression.schedule import Stable
from compression.scores import Score
from compression.truncation import Solution, solve


@dataclass(frozen=True)
class Rule:
    """What is the same at all probes of a run."""

    target: Target
    score: Score
    compensate: bool
    stable: Stable | None
    initial_dims: tuple[int, ...]
    seed: int

    def may_cut(self, dims: Sequence[int]) -> bool:
        """Whether a probe can still lead to a cut: one is all that a layer gets when it has come to rest."""
        return self.stable is None or any(dim == first for dim, first in zip(dims, self.initial_dims, strict=True))


@dataclass(frozen=True)
class Occasion:
    """Which probe this is: `event` of `events`, from 1."""

    step: int
    attempt: int
    event: int
    events: int

    @property
    def last(self) -> bool:
        return self.event == self.events


@dataclass(frozen=True)
class Submission:
    """What an owner tells of a layer before anything is decided."""

    hsv: tuple[float, ...]
    sigma: tuple[float, ...]
    order: tuple[int, ...]
    channels: int

    @classmethod
    def of(cls, solution: Solution) -> Submission:
        return cls(tuple(solution.hsv_N.tolist()), tuple(solution.sigma_N.tolist()), solution.order, solution.channels)


@dataclass(frozen=True)
class Decision:
    """What was decided for one layer."""

    rank: int
    reason: str
    drift: float | None
    overlap: float | None
    quiet: int


def solve_layer(layer: int, statistics: Statistics, rule: Rule, step: int) -> Solution:
    """What a layer's owner does before anything is decided.

    Raises:
        ValueError: names the layer whose statistics are not finite, or that is not stable.
    """
    seed = (rule.seed * 1_000_003 + step) * 1_009 + layer  # every cut of every layer draws anew
    try:
        return solve(statistics, rule.score, rule.compensate, seed % 2**63)
    except ValueError as error:
        raise ValueError(f"layer {layer} at step {step}: {error}") from error


def decide(
    layers: Sequence[Submission], rule: Rule, occasion: Occasion, previous: TruncationPlan | None
) -> list[Decision]:
    """How many states each layer keeps; `previous` is the plan of the probe before, which tells what has moved."""
    spectra = [
        Spectrum(layer.sigma, initial, layer.channels) for layer, initial in zip(layers, rule.initial_dims, strict=True)
    ]
    event, events = (1, 1) if rule.stable else (occasion.event, occasion.events)
    ranks = choose_ranks(spectra, rule.target, event, events)
    decisions = []
    for index, (layer, (rank, reason)) in enumerate(zip(layers, ranks, strict=True)):
        before = previous.layers[index] if previous else None
        drift, common = _movement(layer, rank, before, rule)
        quiet = 0
        if rule.stable is not None and rule.stable.is_quiet(drift, common):
            quiet = 1 + (before.quiet if before else 0)
        decisions.append(Decision(rank, reason, drift, common, quiet))
    return decisions if rule.stable is None else _wait(decisions, spectra, rule.stable, rule.target, occasion)


def _movement(layer: Submission, rank: int, before: LayerPlan | None, rule: Rule) -> tuple[float | None, float | None]:
    """Drift of the HSVs and overlap of the kept states since the last probe.

    Greedy elimination takes one of several states that can stand for each other, now this one and now that: which
    ones it keeps says nothing, so their overlap is not known.
    """
    if before is None or not before.spectrum:
        return None, None
    order = before.order
    if isinstance(before.reduction, StateSelection):
        place = {state: i for i, state in enumerate(before.reduction.kept)}
        order = tuple(place[state] for state in order if state in place)
    common = overlap(order, layer.order, rank) if order and rule.score != "greedy" else None
    return spectrum_drift(before.spectrum, layer.hsv), common


def _wait(
    decisions: Sequence[Decision], spectra: Sequence[Spectrum], stable: Stable, target: Target, occasion: Occasion
) -> list[Decision]:
    """Let only those layers be cut that are at rest and have not been cut yet."""
    at_rest = [occasion.last or decision.quiet >= stable.patience for decision in decisions]
    if target.together:
        at_rest = [all(at_rest)] * len(at_rest)
    waiting = []
    for decision, spectrum, ready in zip(decisions, spectra, at_rest, strict=True):
        rank, reason = decision.rank, decision.reason
        if spectrum.dim < spectrum.initial_dim:
            rank, reason = spectrum.dim, "kept: cut already"
        elif not ready:
            rank, reason = spectrum.dim, f"kept: {decision.quiet} of {stable.patience} quiet probes"
        elif rank < spectrum.dim:
            reason += "; the deadline" if decision.quiet < stable.patience else f"; quiet for {decision.quiet} probes"
        waiting.append(Decision(rank, reason, decision.drift, decision.overlap, decision.quiet))
    return waiting


def layer_plan(layer: int, solution: Solution, decision: Decision) -> LayerPlan:
    """Reduce one layer as was decided."""
    dim, rank, reason, reduction = len(solution.sigma_N), decision.rank, decision.reason, None
    if rank < dim:
        outcome = solution.reduce(rank)
        rank, reduction = outcome.rank, outcome.reduction
        reason += f"; {outcome.remark}" if outcome.remark else ""
    total = float(solution.sigma_N.sum())
    return LayerPlan(
        layer=layer,
        dim_before=dim,
        dim_after=rank,
        reduction=reduction,
        spectrum=tuple(solution.hsv_N.tolist()),
        score_spectrum=tuple(solution.sigma_N.tolist()),
        order=solution.order,
        mass_kept=min(1.0, float(solution.own_N[:rank].sum()) / total) if reduction is not None and total > 0 else 1.0,
        drift=decision.drift,
        overlap=decision.overlap,
        quiet=decision.quiet,
        error_bound=solution.error_bound(rank),
        output_error=None,
        reason=reason,
    )


def assemble(layers: Mapping[int, LayerPlan], occasion: Occasion) -> TruncationPlan:
    ordered = tuple(layers[layer] for layer in range(len(layers)))
    return TruncationPlan(occasion.step, occasion.attempt, occasion.event, ordered)


def plan_truncation(
    statistics: Sequence[Statistics], rule: Rule, occasion: Occasion, previous: TruncationPlan | None = None
) -> TruncationPlan:
    """Solve, decide and reduce in this process.

    Raises:
        ValueError: as `solve_layer`.
    """
    solutions = [solve_layer(layer, part, rule, occasion.step) for layer, part in enumerate(statistics)]
    decisions = decide([Submission.of(solution) for solution in solutions], rule, occasion, previous)
    pairs = zip(solutions, decisions, strict=True)
    return assemble({layer: layer_plan(layer, *pair) for layer, pair in enumerate(pairs)}, occasion)


def keep_everything(dims: Sequence[int], occasion: Occasion, reason: str) -> TruncationPlan:
    """A plan without a cut and without spectra, for a probe that could not be completed."""
    layers = {
        layer: LayerPlan(layer, dim, dim, None, (), (), (), 1.0, None, None, 0, None, None, reason)
        for layer, dim in enumerate(dims)
    }
    return assemble(layers, occasion)
