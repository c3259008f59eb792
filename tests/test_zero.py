"""Training through cuts at every ZeRO stage, on two real workers, against plain torch on the whole batch."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from compression.gramians import SelectiveMoments
from compression.moments import ParameterState
from compression.plan import StateSelection, TruncationPlan
from compression.planning import Occasion, plan_truncation
from models.heads import SequenceModel
from models.registry import ClassificationTask, build_model
from orchestrator.config import RunConfig
from orchestrator.config_reading import parse_config
from orchestrator.data.batches import Batch
from orchestrator.group import Group, limit_waiting
from orchestrator.objective import Objective
from tests.conftest import Pair
from tests.errors import relative_error
from tests.plans import cut_of
from tests.runs import HANGS_S

pytestmark = pytest.mark.cluster
TASK = ClassificationTask(n_features=3, n_classes=5)
STEPS, CUTS, BATCH, LENGTH = 6, (2, 4), 9, 20  # one row more for the first worker
# Odd sizes, so that no parameter divides evenly between two ranks.
MODELS: dict[str, dict[str, Any]] = {
    "mamba": {"kind": "mamba", "n_layers": 2, "d_model": 9, "d_state": 16},
    "mamba2": {"kind": "mamba2", "n_layers": 2, "d_model": 9, "headdim": 6, "d_state": 16},
    "rotated": {"kind": "mamba2", "n_layers": 2, "d_model": 9, "headdim": 6, "d_state": 16, "basis": "rotated"},
    "lru": {"kind": "lru", "n_layers": 2, "d_model": 9, "d_state": 16, "r_min": 0.3, "r_max": 0.9},
    "dropping": {"kind": "mamba", "n_layers": 2, "d_model": 9, "d_state": 16, "dropout": 0.2},
}
# Without weight decay and at a rate of their own: what a recurrence is made of, in each kind of model.
STATE_SPACE = tuple(
    f".mixer.{name}"
    for name in (
        *("A_log", "D", "dt_proj.bias", "dt_bias", "B_map", "C_map"),
        *("nu_log", "theta_log", "gamma_log", "B_re", "B_im", "C_re", "C_im"),
    )
)
Moments = dict[str, tuple[torch.Tensor, ...]]


def config_of(model: str, workers: int = 2, **changes: dict[str, Any]) -> RunConfig:
    train = {"steps": STEPS, "batch_size": BATCH, "lr": 0.01, "warmup": 0.0, "grad_clip": 0.5, "ssm_lr_factor": 0.5}
    raw: dict[str, Any] = {"name": "zero", "data": {"source": "digits"}, "model": MODELS[model]}
    raw |= {"train": train | changes.get("train", {})}
    raw |= {"cluster": {"workers": workers, **changes.get("cluster", {})}}
    return parse_config(raw | {"truncation": {"target": {"dim": 4}, "steps": list(CUTS)}})


def batch_at(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    targets = torch.randint(TASK.n_classes, (BATCH,), generator=generator)
    return Batch(torch.randn(BATCH, LENGTH, TASK.n_features, generator=generator), targets)


def held_out(rank: int) -> Batch:
    """Rows of which only the first worker has some, as at the end of a small split."""
    first = batch_at(0).split(2)[0]
    return first if rank == 0 else first.unasked()


def teacher() -> SequenceModel:
    torch.manual_seed(11)
    model = config_of("lru").model
    return build_model(model, TASK, model.state_dims).eval()


def planned(engine: Any, own: Batch, step: int, group: Group, config: RunConfig) -> TruncationPlan:
    """The plan of one of the cuts, from all workers' statistics."""
    statistics = engine.statistics([own])
    summed = [
        part.from_vector(group.sum(part.to_vector())) if isinstance(part, SelectiveMoments) else part
        for part in statistics
    ]
    assert config.truncation_rule is not None
    return plan_truncation(summed, config.truncation_rule, Occasion(step, 1, CUTS.index(step) + 1, len(CUTS)))


def shrunk(model: SequenceModel, plan: TruncationPlan, states: dict[str, ParameterState]) -> dict[str, ParameterState]:
    """All parameters and moments after a cut, through the layers' own `shrink`."""
    states = dict(states)
    for i, mixer in enumerate(model.mixers()):
        prefix = f"backbone.layers.{i}.mixer."
        own = {name.removeprefix(prefix): states.pop(name) for name in list(states) if name.startswith(prefix)}
        states |= {prefix + name: part for name, part in mixer.shrink(plan.layers[i], own).items()}
    return states


def train(rank: int, config: RunConfig) -> tuple[list[float], Moments, list[str], str]:
    """What one of two workers does.

    Returns the losses of its rows and the norms of the gradients, with the losses of held-out rows before each cut
    among them, the parameters that it owns, the plans with their certificates, and the last checksum.
    """
    from orchestrator.engine import Engine

    group = Group(rank, config.cluster.workers.max, torch.device("cpu"))
    with patch("orchestrator.objective.load_model", lambda path: teacher()):
        engine = Engine(config, TASK, config.model.state_dims, group)
    losses, plans = [], []
    for step in range(1, STEPS + 1):
        own = batch_at(step).split(group.size)[rank]
        losses += [float(engine.step(own, step)), float(engine.gradient_norm)]
        if step in CUTS:
            plan = planned(engine, own, step, group, config)
            plan, metrics = engine.certify(plan, [held_out(rank)])
            losses.append(metrics["val_loss"])
            engine.reshape(plan)
            plans.append(plan.to_json())
    state = engine.state()
    assert state.optimizer_step == STEPS
    checksum = engine.checksum()
    engine.close()
    return losses, {name: part.tensors() for name, part in state.own.items()}, plans, checksum


def reference(config: RunConfig, plans: list[str]) -> tuple[list[float], Moments]:
    """One process, torch's AdamW, the same cuts."""
    cuts = {plan.step: plan for plan in map(TruncationPlan.from_json, plans)}
    torch.manual_seed(config.seed)
    model = build_model(config.model, TASK, config.model.state_dims)
    states: dict[str, ParameterState] = {}
    losses = []
    with patch("orchestrator.objective.load_model", lambda path: teacher()):
        objective = Objective(config.train, Group(0, 1, torch.device("cpu")))
    for step in range(1, STEPS + 1):
        space = {name for name, _ in model.named_parameters() if name.endswith(STATE_SPACE)}
        optimizer = torch.optim.AdamW(
            [
                {
                    "params": [parameter],
                    "weight_decay": config.train.weight_decay if parameter.ndim > 1 and name not in space else 0.0,
                    "lr": config.train.learning_rate(step) * (config.train.ssm_lr_factor if name in space else 1.0),
                }
                for name, parameter in model.named_parameters()
            ],
            betas=config.train.betas,
        )
        for name, state in states.items():
            count = torch.tensor(float(step - 1))
            optimizer.state[model.get_parameter(name)] = {
                "step": count,
                "exp_avg": state.exp_avg,
                "exp_avg_sq": state.exp_avg_sq,
            }
        batch = batch_at(step)
        model.seed_dropout((config.seed, step), batch.first)
        loss = objective.loss(model, model(batch.inputs), batch.inputs, batch.targets)
        (loss + objective.penalty(model)).backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.grad_clip)
        optimizer.step()
        losses += [loss.item(), norm.item()]
        states = {
            name: ParameterState(
                parameter.detach(), optimizer.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg_sq"]
            )
            for name, parameter in model.named_parameters()
        }
        if step in cuts:
            model.eval()
            losses.append(float(model.loss(model(held_out(0).inputs), held_out(0).targets)))
            states = shrunk(model, cuts[step], states)
            model = build_model(config.model, TASK, cuts[step].dims_after)
            model.load_state_dict({name: state.value for name, state in states.items()})
        model.zero_grad()
    return losses, {name: state.tensors() for name, state in states.items()}


def case(
    name: str, model: str, stage: int, train: dict[str, Any] | None = None, offload: bool = False, long: bool = False
) -> Any:
    cluster, marks = {"zero_stage": stage, "offload_optimizer": offload}, [pytest.mark.long] * long
    return pytest.param(model, {"cluster": cluster, "train": train or {}}, marks=marks, id=f"ZeRO-{stage}, {name}")


PARTS = {"accumulation": 2, "activation_checkpointing": True}
PENALTY = {"accumulation": 2, "regularize": {"weight": 1e-3}}
CASES = [
    *(case("plain", "mamba", stage) for stage in (0, 1, 2, 3)),
    *(case("offload", "mamba", stage, offload=True, long=stage == 1) for stage in (1, 2, 3)),
    *(case("accumulating and recomputing", "mamba", stage, PARTS, long=stage < 2) for stage in (0, 1, 2, 3)),
    *(case(model, model, 3, long=model == "dropping") for model in MODELS if model != "mamba"),
    case("penalised", "lru", 2, PENALTY),
    case("distilled", "mamba", 2, {"accumulation": 2, "distill": {"teacher": "/teacher"}}),
    case("dropping, in parts", "dropping", 1, PARTS),
]


@pytest.mark.parametrize(("model", "changes"), CASES)
def test_every_stage_trains_as_plain_torch_does(model: str, changes: dict[str, Any], pair: Pair) -> None:
    config = config_of(model, **changes)
    (losses, own, plans, checksum), (other_losses, other, other_plans, other_checksum) = pair(train, config)
    assert plans == other_plans
    assert [TruncationPlan.from_json(plan).dims_after for plan in plans] == [(8, 8), (4, 4)]
    assert checksum == other_checksum
    expected_losses, expected = reference(config, plans)
    assert [sum(both) / 2 for both in zip(losses, other_losses, strict=True)] == pytest.approx(
        expected_losses, rel=1e-4
    )
    assert own.keys() | other.keys() == expected.keys()
    assert own.keys() & other.keys() == set()
    for name, parts in (own | other).items():
        for part, expectation in zip(parts, expected[name], strict=True):
            torch.testing.assert_close(part, expectation, rtol=2e-3, atol=1e-6)
        # Of each tensor by itself too: second moments are far below any absolute tolerance.
        errors = [relative_error(*pair) for pair in zip(parts, expected[name], strict=True)]
        assert max(errors) < 2e-3, (name, errors)


def spoil_a_gradient(rank: int, config: RunConfig) -> tuple[list[float], list[float], bool]:
    """Losses and gradient norms of two steps, the second with NaN in one worker's gradient; is the state of numbers?"""
    from orchestrator.engine import Engine

    def spoil(module: torch.nn.Module, inputs: Any, out: torch.Tensor) -> None:
        out.register_hook(lambda gradient: gradient * math.nan)

    engine = Engine(config, TASK, config.model.state_dims, Group(rank, 2, torch.device("cpu")))
    losses, norms = [], []
    for step in (1, 2):
        if step == 2 and rank == 1:
            engine._model.mixers()[0].register_forward_hook(spoil)
        losses.append(float(engine.step(batch_at(step).split(2)[rank], step)))
        norms.append(float(engine.gradient_norm))
    finite = engine.state().is_finite()
    engine.close()
    return losses, norms, finite


@pytest.mark.parametrize(("stage", "offload"), [(0, False), (1, False), (2, False), (2, True), (3, False)])
@pytest.mark.parametrize("grad_clip", [pytest.param(0.0, marks=pytest.mark.long), 0.5])
def test_a_gradient_that_is_no_number_is_seen_on_every_worker(
    stage: int, offload: bool, grad_clip: float, pair: Pair
) -> None:
    """Though it came from one of them, and the loss of its step looks well."""
    cluster = {"zero_stage": stage, "offload_optimizer": offload}
    config = config_of("mamba", cluster=cluster, train={"grad_clip": grad_clip, "accumulation": 2})
    found = pair(spoil_a_gradient, config)
    for losses, norms, finite in found:
        assert all(map(math.isfinite, [*losses, norms[0]]))
        assert not math.isfinite(norms[1])
        # ZeRO-0 has made the step, the others have left it out.
        assert finite == (stage > 0)
    assert found[0][1][0] == pytest.approx(found[1][1][0])


def mean_with_one_that_is_no_number(rank: int) -> list[float]:
    return Group(rank, 2, torch.device("cpu")).mean(
        [torch.tensor(math.nan if rank == 1 else 1.0), torch.tensor(1.0 + rank)]
    )


def test_a_loss_that_is_no_number_on_one_worker_is_none_on_any(pair: Pair) -> None:
    for spoilt, other in pair(mean_with_one_that_is_no_number):
        assert math.isnan(spoilt)
        assert other == 1.5


def pass_around(rank: int, configs: list[RunConfig]) -> list[bool]:
    """A state through engines of all these configs, a step in each: is it bit by bit what it was?"""
    from orchestrator.engine import Engine

    state, found = None, []
    for step, config in enumerate(configs, start=1):
        engine = Engine(config, TASK, config.model.state_dims, Group(rank, 2, torch.device("cpu")))
        same = True
        if state is not None:
            engine.load(state)
            loaded = engine.state()
            assert (loaded.optimizer_step, loaded.shapes) == (state.optimizer_step, state.shapes)
            assert loaded.own.keys() == state.own.keys()
            pairs = [zip(state.own[name].tensors(), part.tensors(), strict=True) for name, part in loaded.own.items()]
            same = all(torch.equal(*pair) for parts in pairs for pair in parts)
        engine.step(batch_at(step).split(2)[rank], step)
        state = engine.state()
        found.append(same)
        engine.close()
    return found


def test_a_state_passes_between_stages_bit_by_bit(pair: Pair) -> None:
    """Masters and moments are whole float32 also where products are bfloat16."""
    stages = [(3, False), (0, False), (2, True), (1, False), (3, True), (2, False), (3, False)]
    configs = [
        config_of("mamba", cluster={"zero_stage": s, "offload_optimizer": o}, train={"precision": "bfloat16"})
        for s, o in stages
    ]
    for found in pair(pass_around, configs):
        assert all(found)


def cut_in_bfloat16(rank: int, config: RunConfig) -> bool:
    """Are this worker's masters and moments after a cut bit by bit what the layers make of those before it?"""
    from orchestrator.engine import Engine

    group = Group(rank, 2, torch.device("cpu"))
    engine = Engine(config, TASK, config.model.state_dims, group)
    for step in range(1, CUTS[0] + 1):
        own = batch_at(step).split(2)[rank]
        engine.step(own, step)
    before, whole = engine.state(), {}
    for name, shape in before.shapes.items():
        parts = before.own[name].tensors() if name in before.own else torch.empty(3, *shape)
        whole[name] = ParameterState(*group.broadcast(torch.stack(tuple(parts)), before.owners[name]))
    plan = planned(engine, own, CUTS[0], group, config)
    assert plan.dims_after == (8, 8)
    expected = shrunk(engine._model, plan, whole)
    engine.reshape(plan)
    after = engine.state()
    assert after.shapes == {name: tuple(state.value.shape) for name, state in expected.items()}
    engine.close()
    pairs = [zip(state.tensors(), expected[name].tensors(), strict=True) for name, state in after.own.items()]
    return all(torch.equal(*pair) for parts in pairs for pair in parts)


STAGES = [
    *((0, False), (2, True), (3, False)),
    *(pytest.param(*each, marks=pytest.mark.long) for each in ((1, False), (1, True), (2, False), (3, True))),
]


@pytest.mark.parametrize(("stage", "offload"), STAGES)
def test_a_cut_in_bfloat16_rounds_no_master_and_no_moment(stage: int, offload: bool, pair: Pair) -> None:
    cluster = {"zero_stage": stage, "offload_optimizer": offload}
    assert all(pair(cut_in_bfloat16, config_of("mamba", cluster=cluster, train={"precision": "bfloat16"})))


def plan_to(engine: Any, step: int, dim: int) -> TruncationPlan:
    """All layers to their first `dim` states."""
    layers = [
        replace(cut_of(StateSelection(tuple(range(dim)), None), before, dim), layer=layer)
        for layer, before in enumerate(engine.state_dims)
    ]
    return TruncationPlan(step, 1, 1, tuple(layers))


def resident_mib() -> float:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free already, but kept by the allocator, does not count
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def peak_mib() -> float:
    """The highest resident memory since the peak last started again."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 2**10


def return_freed_memory_at_once() -> None:
    """Map every tensor of 64 KiB or more by itself (glibc's M_MMAP_THRESHOLD): what is resident is then in use."""
    assert ctypes.CDLL(None).mallopt(-3, 2**16) == 1


WARM_UP = 6  # cuts, which fill the libraries' pools


def reshape_often(rank: int, config: RunConfig) -> list[float]:
    """Resident memory after each cut, with a step before each."""
    from orchestrator.engine import Engine

    return_freed_memory_at_once()
    engine = Engine(config, TASK, config.model.state_dims, Group(rank, 2, torch.device("cpu")))
    resident = []
    for step in range(1, WARM_UP + 9):
        engine.step(batch_at(step).split(2)[rank], step)
        [dim] = set(engine.state_dims)
        engine.reshape(plan_to(engine, step, dim - 1))
        resident.append(resident_mib())
    engine.close()
    return resident


@pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=pytest.mark.long) for stage in (0, 1, 2)), 3])
def test_reshapes_leave_no_memory_behind(stage: int, pair: Pair) -> None:
    """A worker's part of this model's state is 12 MiB, a leak of 8 of them six times what is allowed."""
    config = config_of("mamba", cluster={"zero_stage": stage})
    model = config.model.model_copy(update={"d_model": 512, "d_state": 64, "n_layers": 1})
    for resident in pair(reshape_often, config.model_copy(update={"model": model})):
        assert max(resident[WARM_UP:]) <= 1.02 * resident[WARM_UP - 1], resident


def peaks(rank: int, small: RunConfig, config: RunConfig) -> tuple[float, float, float, float]:
    """MiB that a new model, without the optimizer, adds to the resident memory at its peak; the model's; and of a cut.

    The last two are what a cut adds at its peak, and the whole state, of parameters and moments. A `small` model fills
    the libraries' pools before.
    """
    import deepspeed

    from orchestrator.engine import Engine

    group = Group(rank, 2, torch.device("cpu"))
    return_freed_memory_at_once()
    Engine(small, TASK, small.model.state_dims, group).close()
    before, built, initialize = resident_mib(), [], deepspeed.initialize

    def initialize_and_tell(**arguments: Any) -> Any:
        built.append(peak_mib() - before)
        return initialize(**arguments)

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepspeed, "initialize", initialize_and_tell)
        engine = Engine(config, TASK, config.model.state_dims, group)
    [of_building] = built
    engine.step(batch_at(1).split(2)[rank], 1)
    before = resident_mib()
    Path("/proc/self/clear_refs").write_text("5")
    model = 4 * engine.parameter_count / 2**20
    engine.reshape(plan_to(engine, 1, 4))
    of_the_cut = peak_mib() - before
    state = 3 * 4 * engine.parameter_count / 2**20
    engine.close()
    return of_building, model, of_the_cut, state


def test_under_zero_3_a_model_is_built_and_cut_one_layer_at_a_time(pair: Pair) -> None:
    """Beside the half that a rank keeps: of a new model a layer, at a cut a layer as it was and what changes of it.

    With all layers of a state read at once a cut would take 2.5 times what is allowed.
    """
    config = config_of("mamba", cluster={"zero_stage": 3})
    layers = 16
    sizes = config.model.model_copy(update={"d_model": 384, "n_layers": layers})
    for of_building, model, of_the_cut, state in pair(peaks, config, config.model_copy(update={"model": sizes})):
        assert of_building <= model / 2 + 1.5 * model / layers
        assert of_the_cut <= state / 2 + 1.5 * state / layers


LEFT_BEHIND = """
from pathlib import Path
from torch.utils.cpp_extension import _get_build_directory
from orchestrator.zero import COLLECTIVES, prepare_collectives
lock = Path(_get_build_directory(COLLECTIVES, verbose=False), "lock")
lock.touch()
prepare_collectives()
print(lock.exists())
"""


def test_a_build_that_was_killed_holds_nobody_up() -> None:
    """torch's loader would wait for the end of a process that has gone."""
    command, environment = [sys.executable, "-c", LEFT_BEHIND], os.environ | {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANGS_S, check=False)
    assert done.stdout.endswith("False\n"), done.stderr


def _write_slowly(rank: int) -> int:
    """A write on one rank that lasts longer than any rank waits in a collective."""
    limit_waiting(1)
    group = Group(rank, 2, torch.device("cpu"))
    try:
        return group.together(lambda: time.sleep(3 * rank) or rank)  # type: ignore[func-returns-value]
    finally:
        limit_waiting(1800)


def test_workers_wait_for_a_write_longer_than_for_each_other(pair: Pair) -> None:
    assert pair(_write_slowly) == [0, 1]
