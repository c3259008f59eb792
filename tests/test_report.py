"""The report of a run, and the doctor: both are all a person has when something went wrong elsewhere."""

import base64
import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib import image

from orchestrator import launch
from orchestrator.config_reading import parse_config
from orchestrator.doctor import Finding, examine, format_findings
from orchestrator.errors import UserError
from orchestrator.report import _drift, write_report
from orchestrator.run_folder import read_run

STEPS = 40
CUTS = {10: ([64, 64], [45, 30]), 20: ([45, 30], [45, 30]), 30: ([45, 30], [12, 7])}  # step 20 cuts nothing


def write_run(folder: Path) -> Path:
    """The folder of a finished run with two layers, three probes and two cuts."""
    (folder / "plans").mkdir(parents=True)
    (folder / "config.yaml").write_text("tracking: {uri: 'http://tracker.invalid'}\nname: <script>demo</script>\n")
    truncations = []
    for event, (step, (before, after)) in enumerate(CUTS.items()):
        digest = hashlib.sha256(str(step).encode()).hexdigest()
        layers = [
            {
                "layer": i, "dim_before": old, "dim_after": new, "reduction": None, "order": list(range(old)),
                "spectrum": [math.exp(-0.2 * n) for n in range(old - 1)] + [0.0],
                "score_spectrum": [math.exp(-0.4 * n) for n in range(old - 1)] + [0.0],
                "drift": 0.123 if event else None, "overlap": 0.75 if event else None, "quiet": 0,
                "mass_kept": 0.98, "error_bound": 0.5 + i, "output_error": 0.0321, "reason": "tolerance",
            }
            for i, (old, new) in enumerate(zip(before, after, strict=True))
        ]  # fmt: skip
        plan = {"format": 3, "step": step, "attempt": 0, "event": event, "digest": digest, "layers": layers}
        (folder / "plans" / f"{step:08d}-0.json").write_text(json.dumps(plan))
        if before != after:
            truncations.append(
                {
                    "step": step, "dims_before": before, "dims_after": after, "mass_kept": [0.98, 0.97],
                    "error_bounds": [0.5, 1.5], "output_errors": [0.0321, 0.0456], "rolled_back": False,
                    "seconds": 0.42, "digest": digest, "val_loss_before": 1.51, "val_loss_after": 1.62,
                }
            )  # fmt: skip
    rows: list[dict[str, Any]] = []
    for step in range(1, STEPS + 1):
        row = {
            "step": step,
            "seconds": 0.1 * step,
            "train_loss": 1 + 3 * math.exp(-step / 10),
            "step_ms": 100.0,
        }
        if step % 10 == 0:
            row |= {"val_loss": row["train_loss"] + 0.1, "val_accuracy": 0.5}
        if step in CUTS:
            row |= {f"d_state_{i:02d}": dim for i, dim in enumerate(CUTS[step][1])}
        rows.append(row)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = {
        "name": "demo", "model": "mamba", "workers": 2, "zero_stage": 2, "steps": STEPS,
        "initial_dims": [64, 64], "final_dims": [12, 7], "truncations": truncations, "val_loss_final": 1.2345,
        "step_ms_before": 100.0, "step_ms_after": 62.5, "tokens_per_s_before": 2000.0,
        "tokens_per_s_after": 3200.0, "mlflow_run_id": None, "checkpoint": "checkpoints/40",
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def text_of(page: Path) -> str:
    """What a reader sees: no images, no tags, single spaces."""
    return re.sub(r"\s+", " ", re.sub(r"<style>.*?</style>|<[^>]*>", " ", page.read_text(), flags=re.DOTALL))


def append(run: Path, text: str) -> None:
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.write(text)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


def figures_of(run: Path) -> list[Path]:
    """In the order of the page."""
    write_report(run)
    return [run / "figures" / f"{name}.png" for name in ("loss", "state_dims", "hsv_spectra", "hsv_drift")]


def test_figures_are_images_with_something_on_them(run: Path) -> None:
    paths = figures_of(run)
    assert [path.relative_to(run).as_posix() for path in paths] == [
        "figures/loss.png", "figures/state_dims.png", "figures/hsv_spectra.png",
        "figures/hsv_drift.png",
    ]  # fmt: skip
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        pixels = image.imread(path)
        height, width = pixels.shape[:2]
        assert 900 <= width <= 2400
        assert 400 <= height <= 2400
        assert 0.005 < (pixels[..., :3].min(axis=2) < 0.9).mean() < 0.5, f"{path.name} is blank or flooded"


def drift_panels(run: Path) -> list[str]:
    return [axes.get_ylabel() for axes in _drift(read_run(run)).axes]


def test_overlap_is_drawn_where_any_is_known(run: Path) -> None:
    assert drift_panels(run) == ["share of the spectrum that moved", "share of the kept states that stayed"]
    for path in (run / "plans").iterdir():
        plan = json.loads(path.read_text())
        for layer in plan["layers"]:
            layer["overlap"] = None
        path.write_text(json.dumps(plan))
    assert drift_panels(run) == ["share of the spectrum that moved"]


def test_page_needs_no_other_file_and_escapes_what_it_shows(run: Path) -> None:
    html = write_report(run).read_text()
    sources = re.findall(r"""(?:src|href|srcset|data|action)\s*=\s*["']?([^"'>\s]*)""", html)
    assert len(sources) == 4
    for source, path in zip(sources, figures_of(run), strict=True):
        encoded = source.removeprefix("data:image/png;base64,")
        assert base64.b64decode(encoded, validate=True) == path.read_bytes()
    assert not re.search(r"url\(|@import|<script|<link", html)
    assert "prefers-color-scheme: dark" in html
    assert "&lt;script&gt;demo" in html


def test_page_tells_what_happened(run: Path) -> None:
    text = text_of(write_report(run))
    assert "finished" in text
    assert "unfinished" not in text
    for fact in ("all 64 → 12 7", "100.0 → 62.5", "2,000 → 3,200", "1.2345", "50.00%", "checkpoints/40"):
        assert fact in text
    assert "MLflow" not in text, "a fact without a value has no line"
    digest = hashlib.sha256(b"30").hexdigest()
    assert f"30 45 30 → 12 7 98.00% 97.00% 0.5 1.5 3.21% 4.56% 1.5100 → 1.6200 0.42 {digest[:12]} " in text
    assert digest not in text
    assert "the bounds of several cuts add up, here to 1 3 per layer" in text
    assert "30 12.3% 12.3% 75% 75% tolerance" in text
    assert hashlib.sha256(b"20").hexdigest()[:12] not in text, "a probe without a cut is no truncation"


def test_unfinished_run_is_read_from_its_plans(run: Path) -> None:
    (run / "summary.json").unlink()
    (run / "config.yaml").unlink()
    text = text_of(write_report(run))
    assert f"unfinished: last recorded step {STEPS}" in text
    assert "all 64 → 45 30 98.00% 98.00%" in text
    assert "45 30 → 12 7" in text
    assert hashlib.sha256(b"20").hexdigest()[:12] not in text


def test_a_cut_that_was_taken_back_is_not_in_force(run: Path) -> None:
    (run / "summary.json").unlink()
    append(run, '{"step": 30, "rolled_back": 1.0}\n{"step": 31, "train_loss": 2.0}\n')
    text = text_of(write_report(run))
    assert "30, rolled back 45 30 → 12 7" in text
    assert "10 all 64 → 45 30" in text
    assert "the bounds of several cuts add up" in text
    assert "here to 0.5 1.5 per layer" in text, "those of the first cut alone"
    rows = {row["step"]: row for row in read_run(run).rows}
    assert rows[30]["train_loss"] > 1, "what was measured at the step stays"
    assert rows[31] == {"step": 31, "train_loss": 2.0}, "what was trained again counts anew"


def test_plan_of_the_latest_attempt_counts(run: Path) -> None:
    (run / "summary.json").unlink()
    plan = json.loads((run / "plans/00000030-0.json").read_text())
    (run / "plans/00000030-1.json").write_text(json.dumps(plan | {"attempt": 1, "digest": "f" * 64}))
    text = text_of(write_report(run))
    assert "f" * 12 in text
    assert plan["digest"][:12] not in text


def test_run_without_probes(run: Path) -> None:
    shutil.rmtree(run / "plans")
    (run / "summary.json").unlink()
    (run / "metrics.jsonl").write_text('{"step": 1, "train_loss": 2.0}\n{"step": 2, "train_loss": NaN}\n')
    text = text_of(write_report(run))
    assert "No layer was cut." in text


def test_last_row_of_a_step_counts(run: Path) -> None:
    (run / "summary.json").unlink()
    resumed = [{"step": 39, "val_loss": 7.0}, {"step": 40, "val_loss": 8.0}, {"step": 40, "train_seconds": 99.0}]
    append(run, "".join(json.dumps(row) + "\n" for row in resumed))
    text = text_of(write_report(run))
    assert "Held-out loss 8.0000" in text
    assert "99.0 s" in text, "neighbouring rows of one step complete each other"
    append(run, '{"step": 0, "val_loss": 0.5}\n')
    assert "Held-out loss 8.0000" in text_of(write_report(run)), "order is that of the steps, not of the file"


def test_half_written_last_line_is_ignored(run: Path) -> None:
    whole = text_of(write_report(run))
    append(run, '{"step": 41, "train_lo')
    assert text_of(write_report(run)) == whole


@pytest.mark.parametrize("broken", ['{"step": 3, "train_', '{"train_loss": 1.0}', "[1, 2]", "7", ""])
def test_broken_line_is_refused_with_its_number(run: Path, broken: str) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[2] = broken
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 3\b"):
        write_report(run)


def test_complete_but_broken_last_line_is_refused(run: Path) -> None:
    append(run, '{"step": 41, "train_lo\n')
    with pytest.raises(UserError, match=f"line {STEPS + 1}"):
        write_report(run)


def break_plan(run: Path) -> None:
    (run / "plans/00000010-0.json").write_text('{"format": 1}')


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (shutil.rmtree, "run"),
        (lambda run: (run / "metrics.jsonl").unlink(), "metrics.jsonl"),
        (lambda run: (run / "metrics.jsonl").write_text(""), "metrics.jsonl"),
        (lambda run: (run / "summary.json").write_text("{"), "summary.json"),
        (break_plan, "00000010-0.json"),
    ],
)
def test_what_is_no_run_is_refused_by_name(run: Path, damage: Callable[[Path], object], named: str) -> None:
    damage(run)
    with pytest.raises(UserError, match=rf"{re.escape(named)}.*expected") as refusal:
        write_report(run)
    assert str(run) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def find(subject: str) -> Finding:
    return next(finding for finding in examine() if finding.subject == subject)


def test_doctor_notes_that_there_is_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    findings = {finding.subject: finding for finding in examine()}
    assert findings["C++ compiler"].state == findings["ninja"].state == "note"
    text = format_findings(list(findings.values()))
    assert findings["C++ compiler"].remedy in text


@pytest.mark.parametrize(("name", "state"), [("c++", "ok"), ("g++", "note")])
def test_doctor_judges_a_compiler_as_torch_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, state: str
) -> None:
    compiler = tmp_path / name
    compiler.write_text("#!/bin/sh\necho compiler 99.1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    finding = find("C++ compiler")
    assert finding.state == state
    if state == "ok":
        assert "compiler 99.1" in finding.detail
    monkeypatch.setenv("CXX", str(compiler))
    assert find("C++ compiler").state == "ok", "CXX names it"


def test_doctor_asks_for_a_cluster_only_where_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert find("Ray").state == "ok"
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert find("Ray").state == "missing"


def test_another_deepspeed_is_refused_before_anything_starts(
    small_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the doctor, and by the command in one sentence; it is known by its metadata alone."""
    installed = tmp_path / "site" / "deepspeed-0.20.1.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.20.1\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    with pytest.raises(UserError, match=r"DeepSpeed 0\.20\.1 is installed, .* 0\.19 alone: pip install") as refused:
        launch.train(parse_config(small_run))
    finding = find("DeepSpeed")
    assert (finding.state, finding.detail) == ("missing", str(refused.value))
    assert not Path(small_run["storage"]).exists()


def test_doctor_looks_where_runs_will_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find("disk").detail.endswith(str(tmp_path))
