"""After a cut that loses nothing, training goes on as if what was cut had never been there, Adam's moments included."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, get_args

import pytest
import torch
from torch import Tensor, nn

from compression.moments import Carry, ParameterState
from compression.planning import plan_truncation
from compression.ranking import Target
from models.heads import SequenceModel
from models.lru import LRU, LRUConfig
from models.mamba import Mamba, MambaConfig
from models.mamba2 import Mamba2, Mamba2Config
from models.registry import AnyConfig, ClassificationTask, build_model
from tests.plans import ONLY, rule

SMALL, PADDED, SILENT = 5, 8, (1, 2, 6)
TASK = ClassificationTask(n_features=3, n_classes=4)
COMMON = {"n_layers": 2, "d_model": 8, "d_state": PADDED}
CONFIGS: dict[str, AnyConfig] = {
    "mamba": MambaConfig(kind="mamba", **COMMON),
    "mamba2": Mamba2Config(kind="mamba2", headdim=4, **COMMON),
    "lru": LRUConfig(kind="lru", r_min=0.3, r_max=0.9, **COMMON),
}
ROTATED = CONFIGS["mamba2"].model_copy(update={"basis": "rotated"})
Lacking = Literal["unreachable", "unobservable"]
Parts = dict[str, tuple[int, list[Tensor]]]


def state_axes(mixer: nn.Module) -> Parts:
    """By name, the axis along which a parameter has states, and where: the indices of states 0 ... N - 1, per block."""
    n = torch.arange(mixer.d_state)
    if isinstance(mixer, Mamba):
        R, N = mixer.dt_rank, mixer.d_state
        return {"A_log": (1, [n]), "x_proj.weight": (0, [R + n, R + N + n])}
    if isinstance(mixer, Mamba2):
        D, N = mixer.d_inner, mixer.d_state
        channels = [D + n, D + N + n]
        return {
            "in_proj.weight": (0, [D + part for part in channels]),
            "conv1d.weight": (0, channels),
            "conv1d.bias": (0, channels),
        }
    assert isinstance(mixer, LRU)
    rows = dict.fromkeys(("nu_log", "theta_log", "gamma_log", "B_re", "B_im"), (0, [n]))
    return rows | dict.fromkeys(("C_re", "C_im"), (1, [n]))


# Where inputs enter a state, and where outputs read it: parameters, and which of their blocks. What is zero there gets
# the only gradients that reach the state, and none if both are.
ENTRANCES: dict[str, dict[Lacking, list[tuple[str, int]]]] = {
    "mamba": {"unreachable": [("x_proj.weight", 0)], "unobservable": [("x_proj.weight", 1)]},
    "mamba2": {
        "unreachable": [("in_proj.weight", 0), ("conv1d.bias", 0)],
        "unobservable": [("in_proj.weight", 1), ("conv1d.bias", 1)],
    },
    "lru": {"unreachable": [("B_re", 0), ("B_im", 0)], "unobservable": [("C_re", 0), ("C_im", 0)]},
}


def silenced(config: AnyConfig, mixer: nn.Module, *lacking: Lacking) -> Iterator[tuple[str, int, Tensor]]:
    """By name, the axis and the places at which the padding's states are cut off."""
    for name, block in (entrance for how in lacking for entrance in ENTRANCES[config.kind][how]):
        axis, blocks = state_axes(mixer)[name]
        yield name, axis, blocks[block][list(SILENT)]


def places_left(model: SequenceModel, name: str) -> tuple[int, Tensor] | None:
    """The axis and the places of a parameter that are left without the padding; None where all are."""
    for i, mixer in enumerate(model.mixers()):
        prefix = f"backbone.layers.{i}.mixer."
        if name.startswith(prefix) and (found := state_axes(mixer).get(name.removeprefix(prefix))):
            axis, blocks = found
            cut = torch.cat([block[list(SILENT)] for block in blocks])
            size = model.get_parameter(name).shape[axis]
            return axis, torch.tensor([j for j in range(size) if j not in cut.tolist()])
    return None


@torch.no_grad()
def padded_and_bare(config: AnyConfig, *lacking: Lacking) -> tuple[SequenceModel, SequenceModel]:
    """One model twice: with three more states in each layer that lack this, and without."""
    torch.manual_seed(0)
    padded = build_model(config, TASK, [PADDED] * 2)
    bare = build_model(config.model_copy(update={"d_state": SMALL}), TASK, [SMALL] * 2)
    for mixer in padded.mixers():
        for name, axis, places in silenced(config, mixer, *lacking):
            mixer.get_parameter(name).index_fill_(axis, places, 0)
    taken = dict(bare.named_parameters())
    for name, parameter in padded.named_parameters():
        left = places_left(padded, name)
        taken[name].copy_(parameter if left is None else parameter.index_select(*left))
    return padded, bare


def embedded(config: AnyConfig, padded: SequenceModel, bare: Run, *lacking: Lacking) -> Run:
    """`bare` as it is by now with the padding of `padded`, whose moments are any that its gradients may have left."""
    states = bare.states()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in padded.named_parameters():
        left = places_left(padded, name)
        if left is None:
            continue
        axis, places = left
        whole = ParameterState.fresh(parameter.detach().clone())
        for part, own in zip(whole.tensors(), states[name].tensors(), strict=True):
            part.index_copy_(axis, places, own)
        states[name] = whole
    for i, mixer in enumerate(padded.mixers()):
        for name, axis, places in silenced(config, mixer, *lacking):
            for part in states[f"backbone.layers.{i}.mixer.{name}"].tensors()[1:]:
                moments = torch.rand(part.index_select(axis, places).shape, generator=generator)
                part.index_copy_(axis, places, moments)
    return Run(padded, states, bare.step)


class Run:
    """A model under AdamW, with clipping, on batches that are a function of the step."""

    def __init__(self, model: SequenceModel, states: dict[str, ParameterState] | None = None, step: int = 0) -> None:
        self.model, self.step = model, step
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
        for name, parameter in model.named_parameters():
            if states is not None:
                parameter.data.copy_(states[name].value)
                state = {"exp_avg": states[name].exp_avg, "exp_avg_sq": states[name].exp_avg_sq}
                self.optimizer.state[parameter] = state | {"step": torch.tensor(float(step))}

    def train(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            self.step += 1
            generator = torch.Generator().manual_seed(self.step)
            features_BLI = torch.randn(16, 20, 3, generator=generator)
            loss = self.model.loss(self.model(features_BLI), torch.randint(4, (16,), generator=generator))
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            losses.append(loss.item())
        return losses

    def states(self) -> dict[str, ParameterState]:
        states = {}
        for name, parameter in self.model.named_parameters():
            adam = self.optimizer.state[parameter]
            parts = (parameter.detach(), adam["exp_avg"], adam["exp_avg_sq"])
            states[name] = ParameterState(*(part.clone() for part in parts))
        return states

    def cut(self, config: AnyConfig, dim: int, how: Carry = "transport", **changes: object) -> Run:
        mixers, states = self.model.mixers(), self.states()
        for mixer in mixers:
            mixer.start_statistics()
        with torch.no_grad():
            self.model(torch.randn(16, 20, 3, generator=torch.Generator().manual_seed(self.step)))
        rules = rule([mixer.d_state for mixer in mixers], Target(dim=dim), **changes)
        plan = plan_truncation([mixer.finish_statistics() for mixer in mixers], rules, ONLY)
        assert plan.dims_after == (dim, dim)
        for i, mixer in enumerate(mixers):
            prefix = f"backbone.layers.{i}.mixer."
            own = {name.removeprefix(prefix): part for name, part in states.items() if name.startswith(prefix)}
            for name, part in mixer.shrink(plan.layers[i], own).items():
                states[prefix + name] = own[name].replaced(how, part) if name in own else part
        return Run(build_model(config, TASK, plan.dims_after), states, self.step)


@pytest.mark.parametrize(("kind", "compensate"), [*((kind, False) for kind in CONFIGS), ("mamba", True)])
def test_training_goes_on_as_without_the_padding(kind: str, compensate: bool, backend: str) -> None:
    config = CONFIGS[kind]
    padded, bare = (Run(model) for model in padded_and_bare(config, "unreachable", "unobservable"))
    assert padded.train(6) == pytest.approx(bare.train(6), rel=1e-5)
    assert padded.cut(config, SMALL, compensate=compensate).train(10) == pytest.approx(bare.train(10), rel=1e-5)


def test_combinations_of_states_are_the_same_without_the_padding(backend: str) -> None:
    """A first cut gives such a layer two maps to train, so without the padding there has to be a cut as well."""
    padded, bare = (Run(model) for model in padded_and_bare(ROTATED, "unreachable", "unobservable"))
    for dim in (SMALL - 1, SMALL - 2):
        assert padded.train(6) == pytest.approx(bare.train(6), rel=1e-5)
        padded, bare = padded.cut(ROTATED, dim), bare.cut(ROTATED.model_copy(update={"d_state": SMALL}), dim)
    assert padded.train(6) == pytest.approx(bare.train(6), rel=1e-5)


@pytest.mark.parametrize("lacking", get_args(Lacking))
@pytest.mark.parametrize(("kind", "compensate"), [*((kind, False) for kind in CONFIGS), ("mamba", True)])
def test_a_state_that_lacks_one_of_both_is_cut_with_the_moments_it_has(
    kind: str, compensate: bool, lacking: Lacking
) -> None:
    """Gradients reach such a state, so it has moments; nothing of them may pass to the others."""
    config = CONFIGS[kind]
    padded, bare_model = padded_and_bare(config, lacking)
    bare = Run(bare_model)
    bare.train(6)
    cut = embedded(config, padded, bare, lacking).cut(config, SMALL, compensate=compensate)
    assert cut.train(10) == pytest.approx(bare.train(10), rel=1e-5)


def final_weights(run: Run) -> Tensor:
    run.train(3)
    return torch.cat([parameter.detach().flatten() for parameter in run.model.parameters()])


@pytest.mark.parametrize("kind", CONFIGS)
def test_no_other_way_of_the_moments_does(kind: str, backend: str) -> None:
    """So that the test above can fail: slicing by position takes others' moments, resetting forgets them."""
    config = CONFIGS[kind]
    padded, bare = (Run(model) for model in padded_and_bare(config, "unreachable", "unobservable"))
    padded.train(6)
    bare.train(6)
    cuts: dict[Carry, Callable[[], Run]] = {
        how: (lambda how=how: padded.cut(config, SMALL, how)) for how in ("transport", "slice", "reset")
    }
    weights = {how: final_weights(cut()) for how, cut in cuts.items()}
    expected = final_weights(bare)
    # An LRU's states come back in another order, which no norm of all weights can tell.
    errors = {how: abs(float(part.norm() - expected.norm())) for how, part in weights.items()}
    assert errors["transport"] < 0.1 * min(errors["slice"], errors["reset"])
