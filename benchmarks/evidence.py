"""What scores, timing and the way of Adam's moments are worth: many short trainings of small models, seed by seed.

    python -m benchmarks.evidence run scores [--only "text, mamba"]    train what is not in the results yet
    python -m benchmarks.evidence table scores                         the means over all seeds
    python -m benchmarks.evidence gather comparison_digits_400 runs/quick-compare    keep the rows of `make compare`
    python -m benchmarks.evidence table comparison_digits_400          the means of those

`gather` takes several folders, and puts together seeds that were trained in different places.

Everything a run does is what `rayduce train` does: the same engine, data, statistics, plans and reshapes, in one
process without Ray. Variants that differ only from some step on share everything before it: one trunk is trained, and
each branches off at its first probe.
"""

from __future__ import annotations

import argparse
import fcntl
import multiprocessing
import os
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from benchmarks.measure import ROOT
from orchestrator.collection import ASKED, REQUEST, otherwise, write_rows
from orchestrator.comparison_report import METHODS, Row, draw, markdown, read_comparison, read_rows
from orchestrator.config_reading import parse_config
from orchestrator.errors import UserError
from orchestrator.run_folder import read_json

RESULTS = ROOT / "docs" / "results"
SEEDS = (0, 1, 2)
WORKERS = 2
CUT = 0.1  # share of the steps after which the scores cut

Json = dict[str, Any]

TASKS: dict[str, Json] = {
    "text": {
        "data": {"source": "stdlib", "seq_len": 128},
        "train": {"steps": 600, "batch_size": 8, "lr": 4.0e-3, "eval_batches": 64},
    },
    "recall of 8": {
        "data": {"source": "recall", "seq_len": 64, "pairs": 8, "vocab_size": 128},
        "train": {"steps": 800, "batch_size": 32, "lr": 1.0e-2, "eval_batches": 32},
    },
    # What a Mamba-1 of this size learns in some thousand steps.
    "recall of 4": {
        "data": {"source": "recall", "seq_len": 32, "pairs": 4, "vocab_size": 64, "train_examples": 60_000},
        "train": {"steps": 2500, "batch_size": 64, "lr": 3.0e-3, "weight_decay": 0.0, "eval_batches": 16},
    },
    "digits": {
        "data": {"source": "digits"},
        "train": {"steps": 800, "batch_size": 50, "lr": 4.0e-3, "weight_decay": 0.05, "eval_batches": 8},
    },
}
MODELS: dict[str, Json] = {
    "mamba": {"kind": "mamba", "n_layers": 2, "d_model": 64, "d_state": 64},
    "mamba2": {"kind": "mamba2", "n_layers": 2, "d_model": 64, "d_state": 64, "headdim": 32},
    "lru": {"kind": "lru", "n_layers": 2, "d_model": 32, "d_state": 64},
}
DIM = 8


@dataclass(frozen=True)
class Variant:
    """One training of a group: what differs from the group's config."""

    name: str
    truncation: Json | None = None
    model: Json | None = None


def _cut(name: str, model: Json | None = None, **settings: Any) -> Variant:
    at = settings.pop("at", CUT)
    timing = settings.pop("timing", {"window": {"events": 1, "end": at}})
    return Variant(name, {"target": {"dim": DIM}, **timing, **settings}, model)


REFERENCES = [Variant("full size"), Variant("8 from scratch", model={"d_state": DIM})]
PLAIN = ["hankel", "ghost", "averaged", "magnitude", "smallest", "random"]
SCORES: dict[str, list[Variant]] = {
    "mamba": [
        *(_cut(score, score=score, compensate=False) for score in PLAIN),
        *(_cut(f"{score} + compensation", score=score, compensate=True) for score in [*PLAIN, "greedy"]),
    ],
    "mamba2": [
        *(_cut(score, score=score) for score in [*PLAIN, "greedy"]),
        _cut("rotated", model={"basis": "rotated"}),
    ],
}
# Neither may depend on which score is a model's default.
PLAINLY: Json = {"score": "hankel", "compensate": False}
TIMING = [
    *(_cut(f"cut at {share:.0%}", at=share, **PLAINLY) for share in (0.02, 0.1, 0.3, 0.6)),
    _cut("window of 4", timing={"window": {}}, **PLAINLY),
    _cut("stable", timing={"stable": {"deadline": 0.6, "probes": 24}}, **PLAINLY),
]
MOMENTS = [_cut(how, moments=how, **PLAINLY) for how in ("transport", "slice", "reset")]

# Of each study: the groups (task, model) and what is trained in each.
STUDIES: dict[str, dict[tuple[str, str], list[Variant]]] = {
    "scores": {
        (task, model): [*SCORES[model], *REFERENCES]
        for task, model in (("recall of 8", "mamba2"), ("text", "mamba"), ("text", "mamba2"), ("recall of 4", "mamba"))
    },
    "timing": {
        (task, model): [*TIMING, REFERENCES[0]] for task, model in (("recall of 8", "mamba2"), ("text", "mamba"))
    },
    "moments": {
        ("digits", "lru"): [*MOMENTS, *REFERENCES],
        ("recall of 8", "mamba2"): MOMENTS,
        ("text", "mamba"): MOMENTS,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="train what is not in the results yet")
    running.add_argument("study", choices=STUDIES)
    running.add_argument("--only", default="", metavar="GROUP", help='such as "text, mamba"')
    showing = commands.add_parser("table", help="print means over all seeds")
    showing.add_argument("study", choices=sorted({*STUDIES, *(path.stem for path in RESULTS.glob("comparison_*"))}))
    gathering = commands.add_parser("gather", help="keep the rows of comparisons")
    gathering.add_argument("study", help="such as comparison_digits_400")
    gathering.add_argument("folders", nargs="+", type=Path)
    options = parser.parse_args()
    if options.command == "gather" and not options.study.startswith("comparison_"):
        parser.error(f"{options.study} must begin with comparison_, as the other studies of comparisons do")
    path = RESULTS / f"{options.study}.parquet"
    try:
        match options.command:
            case "run":
                run(options.study, options.only, path)
            case "table":
                print(table(options.study, _read(path)) if options.study in STUDIES else compared(path))
            case "gather":
                gather(path, options.folders, ROOT / "docs" / "figures")
    except UserError as error:
        parser.error(str(error))


def run(study: str, only: str, path: Path) -> None:
    """Train what the file does not have yet, of all groups or of one, and print the table."""
    done = {(row["task"], row["model"], row["seed"], row["variant"]) for row in _read(path)}
    jobs = []
    for (task, model), variants in STUDIES[study].items():
        for seed in SEEDS:
            missing = [v for v in variants if (task, model, seed, v.name) not in done]
            if missing and only in ("", f"{task}, {model}"):
                jobs.append((task, model, seed, missing))
    jobs.sort(key=lambda job: len(job[-1]), reverse=True)  # the longest first: no worker ends long before the other
    path.parent.mkdir(exist_ok=True)
    spawn = multiprocessing.get_context("spawn")
    # DeepSpeed keeps to the first process group that it meets, so each worker has one for all its groups.
    with ProcessPoolExecutor(WORKERS, spawn, _join_alone) as pool:
        for future in [pool.submit(_train_group, job, path) for job in jobs]:
            future.result()
    print(table(study, _read(path)))


def _join_alone() -> None:
    os.environ |= {"LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def _train_group(job: tuple[str, str, int, list[Variant]], path: Path) -> None:
    """All variants of one task, model and seed; each result is on the disk as soon as it is there."""
    from benchmarks.branches import Trunk

    task, model, seed, variants = job
    base = {"name": "evidence", "seed": seed, "data_root": str(ROOT / "data"), **TASKS[task], "model": MODELS[model]}
    trunk = Trunk(base)
    for variant in sorted(variants, key=trunk.first_probe):
        result = trunk.branch(variant)
        _add(path, {"task": task, "model": model, "seed": seed, "variant": variant.name, **result})
        print(f"{task}, {model}, seed {seed} {variant.name}: {result}", flush=True)


def _read(path: Path) -> list[Json]:
    return pq.read_table(path).to_pylist() if path.exists() else []


def _add(path: Path, row: Json) -> None:
    """Write the table anew with one row more; what a variant has no value of is null."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # the other worker may have a row, too
        rows = [*_read(path), row]
        write_rows(path, [{column: row.get(column) for column in (*ROW, *COLUMNS)} for row in rows])
    finally:
        os.close(folder)


def table(study: str, rows: list[Json]) -> str:
    """Means over the seeds, one line a variant, as Markdown."""
    lines = []
    for (task, model), variants in STUDIES[study].items():
        found = [row for row in rows if (row["task"], row["model"]) == (task, model)]
        if not found:
            continue
        columns = [c for c in COLUMNS if any(row.get(c) is not None for row in found)]
        lines += ["", f"{task}, {model}", "", "| variant | " + " | ".join(COLUMNS[c] for c in columns) + " | seeds |"]
        lines.append("|---" * (len(columns) + 2) + "|")
        for variant in variants:
            own = [row for row in found if row["variant"] == variant.name]
            if own:
                cells = [_mean(own, column) for column in columns]
                lines.append(f"| {variant.name} | " + " | ".join(cells) + f" | {len(own)} |")
    return "\n".join(lines)


def gather(path: Path, folders: list[Path], figures: Path) -> None:
    """Keep the rows that comparisons have left in their folders, and draw them in `figures`.

    Of a seed that is in several folders, the last one's: its runs belong together.

    Raises:
        UserError: a folder holds no comparison, or one of something else than the others.
    """
    rows: list[Row] = []
    asked = []
    for folder in folders:
        found = read_comparison(folder)
        if not found:
            raise UserError(f"{folder} holds no comparison")
        seeds = {row.seed for row in found}
        rows = [*(row for row in rows if row.seed not in seeds), *found]
        asked.append(read_json(folder / REQUEST, *ASKED))
    alike = {"name": path.stem, "seed": 0}
    known = {"config": asked[0]["config"] | alike, "request": asked[0]["request"]}
    for folder, other in zip(folders[1:], asked[1:], strict=True):
        if changed := otherwise(parse_config(other["config"] | alike), other["request"], known):
            raise UserError(f"{folder} is a comparison with another value of {', '.join(changed)}")
        known["request"] |= other["request"]
    write_rows(path, [asdict(row) for row in rows])
    draw(figures / f"{path.stem}.png", rows, METHODS)


def compared(path: Path) -> str:
    """The table of a comparison, from its rows."""
    return markdown(read_rows(path), METHODS)


ROW = ("task", "model", "seed", "variant", "dims")
COLUMNS = {
    "steps_cut": "cut at step",
    "output_error": "output error",
    "loss_before": "loss before",
    "loss_after": "right after",
    "val_loss": "at the end",
    "val_accuracy": "accuracy",
    "cosine": "cosine",
    "cosine_uncut": "without a cut",
}


def _mean(rows: list[Json], column: str) -> str:
    values = [row[column] for row in rows if row.get(column) is not None]
    if not values:
        return ""
    if isinstance(values[0], list):
        return " / ".join(",".join(map(str, value)) for value in values)
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 and column in ("val_loss", "val_accuracy") else ""
    return f"{statistics.mean(values):.3f}{spread}"


if __name__ == "__main__":
    main()
