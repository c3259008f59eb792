"""Whole runs whose cuts are taken back, wait for a settled ranking, or combine states."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compression.plan import StateRotation, TruncationPlan
from orchestrator import checkpoint
from orchestrator.config import GuardConfig
from orchestrator.config_reading import parse_config
from orchestrator.filesystem import Folder
from orchestrator.guard import Watch
from orchestrator.inference import load_model
from orchestrator.run_folder import read_metrics
from orchestrator.storage import checkpoints_of
from tests.conftest import small_run as small_run_fixture
from tests.runs import losses, plans, train


def finished(raw: dict[str, Any], **changes: Any) -> tuple[Path, dict[str, Any]]:
    config = parse_config(raw | changes)
    summary = train(config)
    return config.storage / config.name, summary


# What a cut to the `smallest` states hurts after 100 steps, and one step later still.
HURTFUL: dict[str, Any] = {
    "data": {"source": "digits"},
    "model": {"kind": "lru", "n_layers": 2, "d_model": 16, "d_state": 16},
}
LONGER: dict[str, Any] = {"steps": 110, "batch_size": 40, "eval_every": 101, "checkpoint_every": 90}
DIVERGING: dict[str, Any] = {
    "target": {"dim": 1},
    "steps": [100],
    "score": "smallest",
    "lr_factor": 1e30,
    "guard": {"tolerance": 0, "patience": 9},
}


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory, corpus: Path, local_ray: None) -> tuple[Path, dict[str, Any]]:
    """The run of HURTFUL and LONGER that is never cut."""
    raw = small_run_fixture.__wrapped__(tmp_path_factory.mktemp("uncut"), corpus)
    return finished(raw | HURTFUL | {"train": raw["train"] | LONGER}, truncation=None)


def newest(run: Path) -> Folder:
    path = checkpoint.newest(checkpoints_of(run, None))
    assert path is not None
    return path


def weights(folder: Path) -> dict[str, torch.Tensor]:
    path = newest(folder)
    shards = (load_file(Path(path.path, shard.file)) for shard in checkpoint.verify(path).shards)
    return {name: part for shard in shards for name, part in shard.items()}


@pytest.mark.parametrize(
    ("metric", "before", "values", "verdicts"),
    [
        ("val_loss", 2.0, [2.04], ["recovered"]),
        ("val_loss", 2.0, [2.05, 2.041, 2.0], ["waiting", "waiting", "recovered"]),
        ("val_loss", 2.0, [2.05, 2.05, 2.05], ["waiting", "waiting", "hurt"]),
        ("val_loss", 2.0, [float("nan")] * 3, ["waiting", "waiting", "hurt"]),
        ("val_accuracy", 0.5, [0.48, 0.49], ["waiting", "recovered"]),
    ],
)
def test_a_watch_ends_with_recovery_or_with_patience(
    metric: str, before: float, values: list[float], verdicts: list[str]
) -> None:
    """Or with the training: what has not recovered by then never will."""
    guard = GuardConfig(metric=metric, tolerance=0.02, patience=2)  # type: ignore[arg-type]
    watch, found = Watch(step=1, before=before, evaluations_left=guard.patience + 1), []
    for value in values:
        watch = watch.after_another()
        found.append(watch.verdict(guard, value, last=False))
        at_the_end = "recovered" if found[-1] == "recovered" else "hurt"
        assert watch.verdict(guard, value, last=True) == at_the_end
    assert found == verdicts


@pytest.mark.cluster
@pytest.mark.parametrize("patience", [pytest.param(0, marks=pytest.mark.long), 1])
def test_a_cut_that_hurts_is_taken_back(
    small_run: dict[str, Any], uncut: tuple[Path, dict[str, Any]], patience: int
) -> None:
    """The run goes on as if it had never been cut, from the same data, to the last bit."""
    small_run |= HURTFUL
    # One step after the cut, which is all that patience 1 grants, nothing can have recovered.
    small_run["train"] |= LONGER
    hurts = {"target": {"dim": 1}, "steps": [100, 105], "score": "smallest"}
    hurts |= {"guard": {"tolerance": 0, "patience": patience}}
    folder, summary = finished(small_run, name="guarded", truncation=hurts)
    whole, expected = uncut
    (cut,) = summary["truncations"]
    assert (cut["step"], cut["rolled_back"], cut["dims_after"]) == (100, True, [4, 4])
    assert summary["final_dims"] == [16, 16]
    assert losses(folder) == losses(whole)
    assert summary["val_loss_final"] == expected["val_loss_final"]
    ours, theirs = weights(folder), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not list((folder / "checkpoints").glob("uncut*"))
    [back] = [row for row in read_metrics(folder) if "rolled_back" in row]
    assert (back["step"], back["states"], back["d_state_00"]) == (100, 32.0, 16.0)
    assert back["val_loss"] == back["val_loss_before"] == cut["val_loss_before"] < cut["val_loss_after"]


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("steps", "seen"),
    [
        ([100], "the held-out loss after step 101 is no number"),
        ([100, 101], "layer 0 at step 101: a state matrix holds NaN or infinity"),
    ],
)
def test_a_cut_after_which_training_diverges_is_taken_back(
    steps: list[int],
    seen: str,
    small_run: dict[str, Any],
    uncut: tuple[Path, dict[str, Any]],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """At once, whatever the patience; and with the learning rate that was before it."""
    small_run |= HURTFUL
    small_run["train"] |= LONGER
    folder, summary = finished(small_run, name="guarded", truncation=DIVERGING | {"steps": steps})
    _was_taken_back(summary, seen, capfd)
    assert losses(folder) == losses(uncut[0])


@pytest.mark.cluster
def test_a_cut_after_which_weights_overflow_is_taken_back(
    small_run: dict[str, Any], local_ray: None, capfd: pytest.CaptureFixture[str]
) -> None:
    """Where nothing but a checkpoint looks at them."""
    small_run |= HURTFUL
    small_run["train"] |= LONGER | {"eval_every": 110, "checkpoint_every": 101, "betas": (0.5, 0.999)}
    # The learning rate of step 101 is just below float32's largest number; with this beta1 Adam's step is beyond it.
    folder, summary = finished(small_run, name="guarded", truncation=DIVERGING | {"lr_factor": 2.8e41})
    _was_taken_back(summary, "a parameter or moment after step 101 is no number", capfd)
    assert sorted(losses(folder)) == list(range(1, 111))


def _was_taken_back(summary: dict[str, Any], seen: str, capfd: pytest.CaptureFixture[str]) -> None:
    [line] = [line for line in capfd.readouterr().out.splitlines() if line.startswith("rolled back")]
    assert line.startswith(f"rolled back to step 100, before the cut: {seen}")
    assert [cut["rolled_back"] for cut in summary["truncations"]] == [True]
    assert summary["final_dims"] == [16, 16]


@pytest.mark.cluster
def test_a_cut_is_judged_by_what_was_right_before_it(small_run: dict[str, Any], local_ray: None) -> None:
    """Not by the loss before an earlier one, which the training has meanwhile made good."""
    small_run |= HURTFUL
    small_run["train"] |= LONGER
    cut = {"target": {"dim": 4}, "steps": [2], "score": "smallest"}
    guard = {"guard": {"tolerance": 0, "patience": 1}}
    folder, summary = finished(
        small_run, name="guarded", truncation=cut | {"target": {"dim": 1}, "steps": [2, 100]} | guard
    )
    once, expected = finished(small_run, name="once", truncation=cut)
    first, second = summary["truncations"]
    assert first["val_loss_after"] > first["val_loss_before"], "else nothing is open at the second cut"
    assert second["val_loss_before"] < first["val_loss_before"]
    assert [(cut["step"], cut["rolled_back"]) for cut in (first, second)] == [(2, False), (100, True)]
    assert summary["final_dims"] == [4, 4]
    assert losses(folder) == losses(once)
    assert summary["val_loss_final"] == expected["val_loss_final"]
    assert not list((folder / "checkpoints").glob("uncut*"))
    assert [plan.step for plan in plans(folder)] == [2, 100]


@pytest.mark.cluster
def test_a_cut_that_recovers_stays(small_run: dict[str, Any], local_ray: None) -> None:
    small_run["truncation"] |= {"guard": {"tolerance": 0.5}, "score": "hankel"}
    folder, summary = finished(small_run)
    assert summary["final_dims"] == [4, 4]
    assert not any(cut["rolled_back"] for cut in summary["truncations"])
    assert not list((folder / "checkpoints").glob("uncut*"))
    assert checkpoint.verify(newest(folder)).watch is None
    [moved] = [row for row in read_metrics(folder) if "hsv_drift_00" in row]
    assert (moved["step"], set(moved) >= {"hsv_drift_01", "kept_overlap_00", "kept_overlap_01"}) == (7, True)


@pytest.mark.cluster
def test_a_settled_ranking_is_cut_and_a_continued_run_knows_how_long_it_has_been_quiet(
    small_run: dict[str, Any], local_ray: None, tmp_path: Path
) -> None:
    small_run["truncation"] = {
        "target": {"dim": 4},
        "stable": {"probes": 4, "deadline": 0.67, "drift": 0.9, "overlap": 0.01, "patience": 2},
        "score": "greedy",
        "compensate": True,
    }
    small_run["train"]["checkpoint_every"] = 5
    folder, summary = finished(small_run)
    assert [cut["step"] for cut in summary["truncations"]] == [6]  # probes at 2, 4 and 6: two quiet ones
    assert summary["final_dims"] == [4, 4]
    rows = {row["step"]: row for row in read_metrics(folder)}
    assert 0 <= rows[4]["hsv_drift_00"] <= 0.9
    # The probes that only looked take their time too; a cut's begins with its probe.
    spent = sum(row.get("step_ms", 0) for row in rows.values()) + rows[2]["probe_ms"] + rows[4]["probe_ms"]
    assert summary["train_seconds"] == pytest.approx(spent / 1000 + summary["truncations"][0]["seconds"])
    assert "kept_overlap_01" not in rows[6]  # greedy's costs bound no change of its selection
    plan = plans(folder)[-1]
    assert all("quiet for 2 probes" in layer.reason for layer in plan.layers)
    assert all(layer.output_error is not None and 0 < layer.output_error < 1 for layer in plan.layers)

    copy = tmp_path / "again" / folder.name
    shutil.copytree(folder, copy)
    for path in (copy / "checkpoints").iterdir():
        if path.name != "step-00000005":
            shutil.rmtree(path)
    shutil.rmtree(copy / "plans")  # its machine is gone
    kept = [line for line in (copy / "metrics.jsonl").read_text().splitlines() if json.loads(line)["step"] <= 5]
    (copy / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    (copy / "summary.json").unlink()
    train(parse_config(small_run | {"storage": str(copy.parent)}))
    assert losses(copy) == losses(folder)
    assert [layer.quiet for layer in plans(copy)[-1].layers] == [2, 2]


@pytest.mark.cluster
def test_a_rotated_layer_is_cut_twice_saved_and_loaded(small_run: dict[str, Any], local_ray: None) -> None:
    small_run["model"] = {
        "kind": "mamba2",
        "n_layers": 2,
        "d_model": 16,
        "d_state": 16,
        "headdim": 8,
        "basis": "rotated",
    }
    folder, summary = finished(small_run)
    assert [cut["dims_after"] for cut in summary["truncations"]] == [[8, 8], [4, 4]]
    plans = [TruncationPlan.from_json(path.read_text()) for path in sorted((folder / "plans").iterdir())]
    assert all(isinstance(layer.reduction, StateRotation) for plan in plans for layer in plan.layers)
    model = load_model(folder)
    mixer = model.mixers()[0]
    assert mixer.get_parameter("B_map").shape == (4, 16)
    assert model.state_dims == [4, 4]
