"""A whole comparison, small: every method trained for real, and what the table says of them."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import mlflow
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner

from benchmarks.evidence import compared, gather
from compression.ranking import Target
from orchestrator.cli import main
from orchestrator.collection import refuse_another_request, remember_request, write_rows
from orchestrator.comparison import PENALTIES, Place, Request, _opponent, _train_all, check, compare
from orchestrator.comparison_report import METHODS, Row, _figure, markdown, read_comparison, read_rows, write_comparison
from orchestrator.config import DistillConfig, RegularizeConfig, RunConfig
from orchestrator.config_reading import parse_config
from orchestrator.errors import TrainingError, UserError
from orchestrator.inference import load_model
from orchestrator.run_folder import read_metrics
from tests.runs import end_crews, family, lend_crews, losses, start, wait_while_running

ROOT = Path(__file__).resolve().parents[1]
SMALLER = [method for method in METHODS if method != "full"]


@pytest.fixture
def digits(tracked_run: dict[str, Any]) -> dict[str, Any]:
    """Two LRU layers on real digits, cut once at step 4 of 20 to what the spectra say."""
    tracked_run["data"] = {"source": "digits"}
    tracked_run["model"] = {"kind": "lru", "n_layers": 2, "d_model": 8, "d_state": 16}
    tracked_run["train"] |= {"steps": 20, "eval_every": 20, "batch_size": 10}
    tracked_run["truncation"] = {"target": {"tolerance": 0.2}, "steps": [4]}
    tracked_run["cluster"]["workers"] = 1
    return tracked_run


@pytest.mark.cluster
def test_every_method_ends_where_truncation_does(
    digits: dict[str, Any], local_ray: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    lend_crews(monkeypatch, "orchestrator.comparison")
    config = parse_config(digits)
    request = Request(tuple(METHODS), 1, (), fine_tune=0.2, penalty=1e-4)
    folder = Path(digits["storage"]) / "small-compare"
    runs = folder / "seed-0"
    rows = {row.method: row for row in compare(config, request)}
    assert (folder / "comparison.md").read_text() in capfd.readouterr().out
    assert list(rows) == list(METHODS)
    assert [row.error for row in rows.values()] == [None] * len(rows)
    reached = rows["hankel"].final_dims
    assert all(1 <= dim < 16 for dim in reached)
    assert rows["full"].final_dims == [16, 16]
    for method in SMALLER:
        # What is cut at its end has as many states, where its own spectra want them.
        alike = sum if method in {"magnitude", *PENALTIES} else list
        assert alike(rows[method].final_dims) == alike(reached)
    assert len({rows[method].parameters for method in SMALLER}) == 1
    for method, found in rows.items():
        assert found.parameters == sum(part.numel() for part in load_model(runs / method).parameters())
    stamps = stamps_of(runs)

    # The same data order and weights up to the cut, and none of the full-size steps for what begins small.
    whole = losses(runs / "full")
    for method in ("hankel", "random", "smallest"):
        assert {step: loss for step, loss in losses(runs / method).items() if step <= 4} == dict(
            list(whole.items())[:4]
        )
    assert dict(list(losses(runs / "magnitude").items())[:20]) == whole
    assert list(losses(runs / "magnitude")) == list(range(1, 26))  # one step to the cut, and a fifth of 20 after it
    for method in PENALTIES:
        cut = json.loads((runs / method / "summary.json").read_text())["truncations"]
        assert [record["step"] for record in cut] == [20]
        assert losses(runs / method)[10] != whole[10]
    taught, alone = losses(runs / "distill"), losses(runs / "scratch")
    assert taught.keys() == alone.keys()
    assert all(taught[step] != alone[step] for step in alone), "nobody listens to the teacher"

    # Who needs the full-size model pays for it, and for whatever a step costs more.
    own = json.loads((runs / "distill" / "summary.json").read_text())["train_seconds"]
    assert rows["distill"].train_seconds == own + rows["full"].train_seconds
    assert rows["magnitude"].train_seconds > rows["full"].train_seconds
    for method in PENALTIES:
        steps = [row["step_ms"] / 1000 for row in read_metrics(runs / method) if "step_ms" in row]
        assert len(steps) == 20
        assert rows[method].train_seconds > sum(steps)
    _check_files(folder, rows)

    assert compare(config, request) == list(rows.values())
    assert stamps_of(runs) == stamps
    _check_mlflow(digits, folder)


@pytest.mark.cluster
def test_more_can_be_asked_for_and_a_method_that_fails_is_told(
    digits: dict[str, Any], local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    lend_crews(monkeypatch, "orchestrator.comparison")
    config = parse_config(digits)
    request = Request(("scratch",), 1, (0.2, 0.6), fine_tune=0.2, penalty=1e60)
    rows = compare(config, request)
    assert [row.named for row in rows] == ["full", "hankel 0.2", "scratch 0.2", "hankel 0.6", "scratch 0.6"]
    assert [row.final_dims for row in rows[1::2]] == [row.final_dims for row in rows[2::2]]
    assert sum(rows[3].final_dims) < sum(rows[1].final_dims)
    folder = Path(digits["storage"]) / "small-compare"
    stamps = stamps_of(folder / "seed-0")

    # As a kill would leave it: `scratch 0.2` was about to end.
    killed = folder / "seed-0" / "scratch-0.2"
    shutil.rmtree(killed / "checkpoints" / "step-00000020")
    for name in ("summary.json", "reported"):
        (killed / name).unlink()
    del stamps[killed / "summary.json"]

    digits["train"] |= {"log_every": 5, "checkpoint_every": 4}  # with which a run may continue too
    with pytest.raises(TrainingError, match=r"^1 of 4 runs have failed; the same command tries them again$"):
        compare(parse_config(digits), replace(request, methods=("scratch", "hsv_regularized"), tolerances=(0.2,)))
    # What was asked for before stays in the table.
    found = read_comparison(folder)
    assert {row.named: row.val_loss for row in rows}["scratch 0.2"] == found[2].val_loss
    later = ["full", "hankel 0.2", "scratch 0.2", "hsv_regularized 0.2", "hankel 0.6", "scratch 0.6"]
    assert [row.named for row in found] == later
    assert [row.named for row in found if row.error is not None] == ["hsv_regularized 0.2"]
    assert f"- failed: hsv_regularized 0.2, seed 0: {found[3].error}\n" in (folder / "comparison.md").read_text()
    assert stamps.items() <= stamps_of(folder / "seed-0").items()


@pytest.mark.long
@pytest.mark.cluster
def test_a_comparison_that_was_killed_is_continued(digits: dict[str, Any], local_ray: None) -> None:
    """What has ended is not trained again."""
    end_crews()
    config = parse_config(digits)
    request = Request(("scratch",), 1, (0.2,), fine_tune=0.2, penalty=1e-5)
    options = ["--methods", "scratch", "--seeds", "1", "--tolerance", "0.2", "--fine-tune", "0.2"]
    first = start(digits, *options, "--penalty", "1e-5", command="compare")
    runs = Path(digits["storage"]) / "small-compare" / "seed-0"
    wait_while_running(first, (runs / "hankel-0.2" / "summary.json").exists, "truncation itself ends")
    first.kill()
    first.communicate()
    before = stamps_of(runs)
    assert len(before) == 2
    rows = compare(config, request)
    assert before.items() <= stamps_of(runs).items()
    assert [(row.method, row.error) for row in rows] == [("full", None), ("hankel", None), ("scratch", None)]


@pytest.mark.long
@pytest.mark.cluster
def test_without_full_size_a_seed_has_nothing_to_be_compared_with(
    digits: dict[str, Any], local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    lend_crews(monkeypatch, "orchestrator.comparison")
    digits["train"] |= {"lr": 1e30, "warmup": 0.0}
    with pytest.raises(TrainingError, match=r"^6 of 6 runs have failed"):
        compare(parse_config(digits), Request(("scratch",), 2, (), fine_tune=0.2, penalty=1e-5))
    found = read_comparison(Path(digits["storage"]) / "small-compare")
    assert [row.run for row in found] == [
        (method, "", seed) for seed in (0, 1) for method in ("full", "hankel", "scratch")
    ]
    assert ["is no number" in str(row.error) for row in found] == [True, False, False] * 2


def test_a_comparison_continues_with_what_runs_continue_with(digits: dict[str, Any], tmp_path: Path) -> None:
    remember_request(tmp_path, parse_config(digits), {"penalty": 1.0, "seeds": None})
    digits["train"] |= {"log_every": 7}
    digits["cluster"] = {"workers": 4}
    refuse_another_request(tmp_path, parse_config(digits), {"penalty": 1.0, "seeds": None})
    digits["train"] |= {"lr": 0.5}
    with pytest.raises(
        UserError, match=r"train\.lr \(was 0\.01, is 0\.5\), penalty \(was 1\.0, is 2\.0\); another name="
    ):
        refuse_another_request(tmp_path, parse_config(digits), {"penalty": 2.0, "seeds": None})


@pytest.mark.parametrize(("method", "allocation"), [("magnitude", "global"), ("hsv_regularized", "layer")])
@pytest.mark.parametrize(
    ("target", "given"),
    [
        ({"tolerance": 0.2}, {"budget": {"states": 9}}),
        ({"dim": 6, "allocation": "global"}, {"budget": {"states": 9}}),
        ({"budget": {"states": 9}}, {"budget": {"states": 9}}),
        ({"dim": 6}, {"dim": [5, 4]}),
        ({"tolerance": 0.2, "ladder": [4, 5]}, {"dim": [5, 4]}),
    ],
)
def test_what_is_cut_at_its_end_shares_its_states_out_only_where_spectra_did(
    digits: dict[str, Any], target: dict[str, Any], given: dict[str, Any], method: str, allocation: str
) -> None:
    """By one ranking of all states, or the same share of every layer's spectrum."""
    digits["truncation"]["target"] = target
    config = parse_config(digits)
    request = Request((method,), 1, (), 0.1, 1e-5)
    small = _opponent(Place(method, "", 0), config, [5, 4], request)
    assert small.truncation is not None
    by = {"allocation": allocation} if "budget" in given else {}
    assert small.truncation.target == Target.model_validate(given | by)


@pytest.mark.parametrize("method", [method for method in SMALLER if method != "hankel"])
def test_methods_differ_in_nothing_but_what_they_are(digits: dict[str, Any], method: str) -> None:
    """Magnitude pruning has longer, for its fine-tuning, at a rate that still changes something."""
    digits["train"]["min_lr_factor"] = 0.0
    config = parse_config(digits)
    request = Request((method,), 1, (), fine_tune=0.2, penalty=1e-5)
    opponent = _opponent(Place(method, "", 0), config, [5, 4], request)
    assert (opponent.seed, opponent.data) == (config.seed, config.data)
    own = {"distill", "regularize"} | ({"steps"} if method == "magnitude" else set())
    assert opponent.train.model_dump(exclude=own) == config.train.model_dump(exclude=own)
    teacher = config.storage / "full"
    lesson = DistillConfig(teacher=teacher, temperature=2.0, alpha=0.5) if method == "distill" else None
    assert opponent.train.distill == lesson
    form = {"hsv_regularized": "hankel", "nuclear_regularized": "nuclear"}.get(method)
    assert opponent.train.regularize == (
        RegularizeConfig.model_validate({"weight": 1e-5, "form": form}) if form else None
    )
    begins_small = method in ("scratch", "distill")
    assert list(opponent.model.state_dims) == ([5, 4] if begins_small else [16, 16])
    assert (opponent.truncation is None) == begins_small
    if opponent.truncation is not None:
        cuts = {"magnitude": (21,), "hsv_regularized": (20,), "nuclear_regularized": (20,)}
        assert opponent.probe_steps == cuts.get(method, config.probe_steps)
        scores = {"magnitude": ("magnitude", False), "random": ("random", None), "smallest": ("smallest", None)}
        assert (opponent.truncation.score, opponent.truncation.compensate) == scores.get(method, (None, None))
    if method == "magnitude":
        cut = config.train.steps + 1
        rate = opponent.pace(cut=True).lr * opponent.train.learning_rate(cut)
        assert rate == pytest.approx(0.1 * config.train.lr)
        assert opponent.train.steps == cut + 4


def test_what_no_method_has_used_may_be_another_later(digits: dict[str, Any], tmp_path: Path) -> None:
    """And what one has used stays, whatever is asked for in between."""
    config = parse_config(digits)
    for asked in (Request(("scratch",), 1, (), 0.1, 1e-5), Request(("hsv_regularized",), 1, (), 0.2, 2e-5)):
        refuse_another_request(tmp_path, config, asked.lasting)
        remember_request(tmp_path, config, asked.lasting)
    pruned = Request(("magnitude",), 1, (), 0.3, 3e-5)
    refuse_another_request(tmp_path, config, pruned.lasting)
    remember_request(tmp_path, config, pruned.lasting)
    with pytest.raises(UserError, match=r"penalty \(was 2e-05, is 3e-05\), fine_tune|fine_tune .*, penalty") as refused:
        refuse_another_request(tmp_path, config, Request(tuple(METHODS), 1, (), 0.1, 3e-5).lasting)
    assert "fine_tune (was 0.3, is 0.1)" in str(refused.value)


def test_every_seed_is_trained_with_its_own_number_and_compared_with_its_own_runs(
    digits: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is trained: what would be is written down. Where truncation fails, its opponents have no size."""
    config = parse_config(digits)
    trained: list[tuple[str, int]] = []

    def train(place: Place, run: RunConfig, base: RunConfig, team: Any) -> Row:
        trained.append((place.name, run.seed))
        assert base.seed == run.seed == place.seed
        assert run.storage == base.storage
        if place == Place("hankel", "", 4):
            raise TrainingError("diverged")
        return replace(
            row(place.method, place.seed, 0.5, 10.0), final_dims=[16, 16] if place.method == "full" else [5, 4]
        )

    monkeypatch.setattr("orchestrator.comparison._train", train)
    rows = []
    for seed in (3, 4):
        own = config.model_copy(update={"seed": seed, "storage": config.storage / f"seed-{seed}"})
        rows += _train_all(own, Request(("scratch", "distill"), 2, (), 0.1, 1e-5), cast(Any, None))
    assert trained == [("full", 3), ("hankel", 3), ("scratch", 3), ("distill", 3), ("full", 4), ("hankel", 4)]
    assert [found.train_seconds for found in rows[:4]] == [10.0, 10.0, 10.0, 20.0]
    assert [found.error for found in rows[4:]] == [
        None,
        "diverged",
        *["truncation, whose dimensions it is to have, has failed"] * 2,
    ]


def test_the_command_asks_for_what_it_was_told(
    digits: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("orchestrator.comparison.compare", lambda config, request: asked.append((config, request)))
    path = tmp_path / "digits.yaml"
    path.write_text(yaml.safe_dump(digits))
    options = ["--methods", "scratch, random", "--seeds", "5", "--tolerance", "0.1", "--tolerance", "0.2"]
    command = ["compare", str(path), "name=other", *options, "--fine-tune", "0.3", "--penalty", "1e-3"]
    assert CliRunner().invoke(main, command).exit_code == 0
    [(config, request)] = asked
    assert config.name == "other"
    assert request == Request(("scratch", "random"), 5, (0.1, 0.2), 0.3, 1e-3)


def test_a_method_that_there_is_not_is_refused_by_the_command(digits: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "digits.yaml"
    path.write_text(yaml.safe_dump(digits))
    refused = CliRunner().invoke(main, ["compare", str(path), "--methods", "pruning"])
    assert refused.exit_code == 2
    assert refused.stderr.startswith("rayduce: --methods pruning must be one of full, hankel")


def test_make_compare_has_all_methods_but_the_slowest() -> None:
    makefile = (Path(__file__).resolve().parents[1] / "Makefile").read_text()
    [named] = re.findall(r"--methods (\S+)", makefile)
    assert set(named.split(",")) == set(METHODS) - {"nuclear_regularized"}


def stamps_of(runs: Path) -> dict[Path, int]:
    """When each run that has ended did."""
    return {path: path.stat().st_mtime_ns for path in runs.glob("*/summary.json")}


def _check_files(folder: Path, rows: dict[str, Row]) -> None:
    table = pq.read_table(folder / "comparison.parquet").to_pylist()
    assert [Row(**row) for row in table] == list(rows.values())
    text = (folder / "comparison.md").read_text()
    assert all(f"| {method} |" in text and f"- {method}: " in text for method in METHODS)
    figure = folder / "figures" / "comparison.png"
    assert figure.stat().st_size > 1000
    figure.unlink()
    (folder / "comparison.md").unlink()
    assert CliRunner().invoke(main, ["report", str(folder)]).output == f"{folder / 'comparison.md'}\n"
    assert (folder / "comparison.md").read_text() == text
    assert figure.exists()


def _check_mlflow(raw: dict[str, Any], folder: Path) -> None:
    parent, children = family(raw)
    assert parent.data.tags["mlflow.runName"] == folder.name
    assert {run.data.tags["method"] for run in children} >= set(METHODS)
    client = mlflow.MlflowClient(raw["tracking"]["mlflow_uri"])
    kept = {artifact.path for artifact in client.list_artifacts(parent.info.run_id)}
    assert kept >= {"comparison.md", "comparison.parquet", "comparison.png"}


def row(method: str, seed: int, accuracy: float, seconds: float, error: str | None = None) -> Row:
    return Row(method, "", seed, error, 1.0, accuracy, [4, 6], seconds, 1000, 100.0)


def test_the_table_has_means_over_all_seeds_and_times_of_each_seeds_own_full_size() -> None:
    rows = [
        row("full", 0, 0.9, 10.0),
        row("hankel", 0, 0.8, 5.0),
        row("full", 1, 0.7, 20.0),
        row("hankel", 1, 0.6, 5.0),
    ]
    rows += [row("random", 0, 0.5, 5.0), Row.failed("random", "", 1, "NaN"), Row.failed("distill", "", 0, "no teacher")]
    rows += [Row.failed(method, "", 2, "diverged") for method in ("full", "hankel")]
    full, hankel, random, distill = markdown(rows, METHODS).splitlines()[2:]
    assert full.startswith("| full |  | 80.0 % ± 14.1 | 4 6 | 1.00 |")
    assert hankel.startswith("| hankel |  | 70.0 % ± 14.1 | 4 6 | 0.38 |")  # the mean of 5/10 and 5/20
    assert hankel.endswith("| 2 of 3, else failed |")
    assert random.startswith("| random |  | 50.0 % | 4 6 |")
    assert random.endswith("| 1 of 2, else failed |")
    assert distill.endswith("| 0 of 1, else failed |")
    assert {line.count("|") for line in (full, hankel, random, distill)} == {9}
    [axes] = _figure(rows, METHODS).axes
    points = {str(drawn.get_label()): drawn.get_offsets() for drawn in axes.collections}
    assert {method: at[0].tolist() for method, at in points.items() if method in ("full", "hankel")} == {
        "full": [1.0, pytest.approx(0.8)],
        "hankel": [0.375, pytest.approx(0.7)],
    }


def test_the_figure_has_a_point_a_method_and_size() -> None:
    one, other = (replace(row("hankel", 0, 0.8, 5.0), size=size) for size in ("0.1", "0.2"))
    rows = [row("full", 0, 0.9, 10.0), one, other, replace(row("random", 0, 0.5, 5.0), size="0.2")]
    [axes] = _figure(rows, METHODS).axes
    points = {str(drawn.get_label()): len(drawn.get_offsets()) for drawn in axes.collections}
    assert points == {"full": 1, "hankel": 2, "random": 1}
    assert [text.get_text() for text in axes.texts] == ["0.1", "0.2", "0.2"]


def test_a_run_that_ends_with_other_states_than_truncation_is_told(tmp_path: Path) -> None:
    rows = [row(method, 0, 0.9, 10.0) for method in ("full", "hankel", "random", "smallest")]
    rows[0], rows[3] = replace(rows[0], final_dims=[16, 16]), replace(rows[3], final_dims=[16, 5])
    text = write_comparison(tmp_path, rows, METHODS)
    assert [line for line in text.splitlines() if "of another size" in line] == [
        "- of another size: smallest, seed 0: 21 states instead of 10"
    ]


def test_a_damaged_table_is_told_in_a_sentence(digits: dict[str, Any], tmp_path: Path) -> None:
    remember_request(tmp_path, parse_config(digits), {})
    (tmp_path / "comparison.parquet").write_bytes(b"PAR1")
    refused = CliRunner().invoke(main, ["report", str(tmp_path)])
    assert refused.exit_code == 2
    assert refused.stderr.startswith(f"rayduce: {tmp_path / 'comparison.parquet'} is damaged, or of another version (")
    assert refused.stderr.endswith("; without it the same comparison writes it anew\n")


def test_a_table_of_another_version_is_told_in_a_sentence(digits: dict[str, Any], tmp_path: Path) -> None:
    remember_request(tmp_path, parse_config(digits), {})
    write_rows(tmp_path / "comparison.parquet", [{"method": "full", "colour": "blue"}])
    refused = CliRunner().invoke(main, ["report", str(tmp_path)])
    assert refused.exit_code == 2
    assert refused.stderr.startswith(f"rayduce: {tmp_path / 'comparison.parquet'} is damaged, or of another version (")


def test_a_damaged_request_is_told_in_a_sentence(digits: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "request.json").write_text('{"config"')
    with pytest.raises(UserError, match=r"request\.json is broken .*: expected a JSON object with config, request"):
        refuse_another_request(tmp_path, parse_config(digits), {})


def test_evidence_is_of_one_request(digits: dict[str, Any], tmp_path: Path) -> None:
    """Rows of several folders are put together only where all was asked alike, but for methods of one alone."""
    for seed, asked in enumerate([{"fine_tune": 0.1}, {"penalty": 1e-5}, {"penalty": 1e-3}]):
        folder = tmp_path / str(seed)
        folder.mkdir()
        remember_request(folder, parse_config(digits | {"seed": seed}), asked)
        write_comparison(folder, [row(method, seed, 0.9, 10.0) for method in ("full", "hankel")], METHODS)
    folders = [tmp_path / str(seed) for seed in range(3)]
    gather(tmp_path / "comparison_of_tests.parquet", folders[:2], tmp_path)
    assert [found.seed for found in read_rows(tmp_path / "comparison_of_tests.parquet")] == [0, 0, 1, 1]
    with pytest.raises(UserError, match=r"is a comparison with another value of penalty \(was 1e-05, is 0\.001\)"):
        gather(tmp_path / "comparison_of_tests.parquet", folders, tmp_path)


@pytest.mark.parametrize("rows", sorted((ROOT / "docs" / "results").glob("comparison_*.parquet")), ids=lambda p: p.stem)
def test_the_readme_has_what_the_rows_say(rows: Path) -> None:
    """Every method and size, and in each of its columns what the command prints that it names."""
    [_, section] = re.split(rf"benchmarks\.evidence\s+table\s+{rows.stem}`", (ROOT / "README.md").read_text())
    lines = iter(line for line in section.splitlines() if line.startswith("|"))
    head = cells(next(lines))[1:]
    told = {}
    for line in islice(lines, 1, None):
        if not (method := re.match(r"\| `(\w+)`", line)):
            break
        row = dict(zip(head, cells(line)[1:], strict=True))
        told[method[1], row.pop("tolerance", "")] = row
    printed = compared(rows).splitlines()
    names = cells(printed[0])
    expected = {}
    for line in printed[2:]:
        row = dict(zip(names, cells(line), strict=True))
        expected[row["method"], row["tolerance"]] = {name: row[name] for name in head if name != "tolerance"}
    assert told == expected


def cells(line: str) -> list[str]:
    """Those of a line of a table in Markdown."""
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_without_labels_the_quality_is_the_loss() -> None:
    rows = [replace(row(method, 0, 0.0, 10.0), val_accuracy=None, tokens_per_s=None) for method in ("full", "hankel")]
    head, _, full, _ = markdown(rows, METHODS).splitlines()
    assert "| held-out loss |" in head
    assert full == "| full |  | 1.0000 | 4 6 | 1.00 | 1.0k | – | 1 |"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"methods": ("full", "pruning")}, "--methods pruning must be one of full, hankel, scratch"),
        ({"seeds": 0}, "--seeds 0 must be 1 or more"),
        ({"tolerances": (0.1, 1.5)}, "--tolerance 1.5 must lie between 0 and 1"),
        ({"tolerances": (0.1, 0.2, 0.1)}, r"--tolerance 0\.1 0\.2 0\.1 must differ"),
        ({"fine_tune": 0.0}, "--fine-tune 0 must be a share"),
        ({"penalty": -1.0}, "--penalty -1 must be more than 0"),
    ],
)
def test_what_cannot_be_compared_is_refused(digits: dict[str, Any], changed: dict[str, Any], words: str) -> None:
    asked: dict[str, Any] = {"methods": ("full",), "seeds": 1, "tolerances": (), "fine_tune": 0.1, "penalty": 1e-5}
    with pytest.raises(UserError, match=words):
        check(parse_config(digits), Request(**(asked | changed)))


def test_what_a_method_cannot_train_is_refused_before_the_first(tracked_run: dict[str, Any]) -> None:
    tracked_run["model"] = {"kind": "mamba2", "n_layers": 2, "d_model": 16, "d_state": 16, "headdim": 8}
    request = Request(("magnitude",), 1, (), 0.1, 1e-5)
    check(parse_config(tracked_run), request)
    tracked_run["model"]["basis"] = "rotated"
    with pytest.raises(UserError, match=r"^--methods must leave out magnitude: "):
        check(parse_config(tracked_run), request)


@pytest.mark.parametrize(
    ("part", "own", "words"),
    [
        ("truncation", {"score": "random"}, r"truncation\.score random must be left out"),
        ("truncation", {"guard": {"metric": "val_loss"}}, r"truncation\.stable and guard must be left out"),
        (
            "truncation",
            {"steps": None, "stable": {"probes": 2, "patience": 1}},
            r"truncation\.stable and guard must be left out",
        ),
        ("train", {"regularize": {"weight": 1e-5}}, r"train\.distill and regularize must be left out"),
        ("train", {"distill": {"teacher": "/teacher"}}, r"train\.distill and regularize must be left out"),
    ],
)
def test_what_is_a_method_of_its_own_is_refused(
    digits: dict[str, Any], part: str, own: dict[str, Any], words: str
) -> None:
    digits[part] |= own
    with pytest.raises(UserError, match=words):
        check(parse_config(digits), Request(("full",), 1, (), 0.1, 1e-5))


def test_there_has_to_be_a_truncation_to_compare(digits: dict[str, Any]) -> None:
    digits["truncation"] = None
    with pytest.raises(UserError, match=r"^truncation null must say how and when to truncate"):
        check(parse_config(digits), Request(("full",), 1, (), 0.1, 1e-5))


@pytest.mark.parametrize("factor", [{"lr_factor": 0.5}, {"batch_factor": 2}])
def test_all_methods_have_the_same_steps(digits: dict[str, Any], factor: dict[str, Any]) -> None:
    digits["truncation"] |= factor
    with pytest.raises(UserError, match=r"truncation\.lr_factor and batch_factor must be 1"):
        check(parse_config(digits), Request(("full",), 1, (), 0.1, 1e-5))


def test_a_penalty_needs_linear_layers(small_run: dict[str, Any]) -> None:
    request = Request(("hsv_regularized",), 1, (), 0.1, 1e-5)
    with pytest.raises(
        UserError, match=r"^--methods must leave out hsv_regularized: train\.regularize needs the linear layers"
    ):
        check(parse_config(small_run), request)
