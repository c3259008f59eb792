"""What a user can get wrong in a config ends in one sentence that names the setting, before anything starts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from torch.optim.lr_scheduler import CosineAnnealingLR

from models.lru import LRUConfig
from orchestrator.cli import main
from orchestrator.config import RunConfig
from orchestrator.config_changes import differences, refuse_other_run
from orchestrator.config_reading import load_config, parse_config
from orchestrator.data.sources import SOURCES
from orchestrator.errors import UserError

QUICKSTART = Path(__file__).resolve().parents[1] / "configs/quickstart.yaml"
CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs").glob("**/*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_valid_and_survive_their_own_yaml(path: Path) -> None:
    config = load_config(path)
    assert parse_config(yaml.safe_load(config.to_yaml())) == config


# Blocks, H, N, steps, batch, learning rate, its factor for the state space, weight decay, dropout
# (CompreSSM, arXiv 2510.02823, appendix); IMDB's dropout is 0.1 to 0.2 there.
PAPER = {
    "smnist": (1, 8, 256, 200_000, 50, 4e-4, 1.0, 0.0, 0.1),
    "scifar": (6, 512, 384, 180_000, 50, 1e-3, 0.25, 0.05, 0.1),
    "listops": (6, 128, 256, 80_000, 32, 1e-3, 0.5, 0.05, 0.0),
    "imdb": (1, 256, 192, 50_000, 32, 1e-3, 0.1, 0.05, 0.1),
    "aan": (6, 128, 256, 100_000, 64, 1e-3, 0.5, 0.05, 0.1),
    "pathfinder": (6, 192, 256, 500_000, 64, 1e-3, 0.25, 0.05, 0.0),
}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_configs_have_its_hyperparameters(name: str) -> None:
    config = load_config(QUICKSTART.parent / "paper" / f"{name}.yaml")
    model, train = config.model, config.train
    sizes = (model.n_layers, model.d_model, model.d_state, train.steps, train.batch_size)
    assert (*sizes, train.lr, train.ssm_lr_factor, train.weight_decay, model.dropout) == PAPER[name]
    assert config.probe_steps == tuple(round(share * train.steps) for share in (0.025, 0.05, 0.075, 0.1))
    # A cosine after a warm-up as long as the cuts; sMNIST's rate is constant.
    pace = (0.0, 1.0) if name == "smnist" else (0.1, 0.0)
    assert (train.warmup, train.min_lr_factor) == pace
    assert isinstance(model, LRUConfig)
    assert (model.r_min, model.r_max) == (0.9, 0.999)
    assert config.truncation is not None
    assert config.truncation.target.tolerance == (0.02 if name == "smnist" else 0.1)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.stps=3", ["unknown key train.stps", "did you mean steps?"]),
        ("modle.kind=lru", ["unknown key modle", "did you mean model?"]),
        ("model.dstate=3", ["unknown key model.dstate", "did you mean d_state?"]),
        ("zzz=1", ["unknown key zzz", "valid keys here", "truncation"]),
        ("train.lr=fast", ["train.lr", "'fast'", "number"]),
        ("train.steps=0", ["train.steps", "0", "greater than or equal to 1"]),
        ("model.kind=transformer", ["model.kind", "'transformer'", "'lru', 'mamba', 'mamba2'"]),
        ("data.source=wikipedia", ["data.source", "'wikipedia'", "'stdlib', 'text', 'digits', 'recall'"]),
        ("data={}", ["data.source is required"]),
        ("truncation.target.tolerance=1.5", ["truncation.target.tolerance", "1.5", "less than 1"]),
        ("truncation.target.tolerance=0", ["truncation.target.tolerance", "0", "greater than 0"]),
        ("truncation.target.dim=0", ["truncation.target.dim is 0", "greater than or equal to 1"]),
        ("model.d_state=0", ["model.d_state is 0", "greater than or equal to 1"]),
        ("model.d_state=[16, 16, 16]", ["d_state [16, 16, 16]", "n_layers 2"]),
        ("model.d_state=[16, 0]", ["model.d_state", "0"]),
        ("model={kind: mamba2, n_layers: 1, d_model: 32, n_groups: 1, headdim: 48}", ["headdim 48", "inner width 64"]),
        (
            "model={kind: mamba2, n_layers: 1, d_model: 64, headdim: 32, n_groups: 2}",
            ["model.n_groups 2 must be 1 with truncation"],
        ),
        ("checkpoints.keep_last=0", ["checkpoints.keep_last", "0", "greater than or equal to 1"]),
        ("checkpoints.storage=s3://key:secret@bucket", ["checkpoints.storage: holds a key", "AWS_ACCESS_KEY_ID"]),
        ("train.precision=half", ["train.precision", "'half'", "'float32' or 'bfloat16'"]),
        ("cluster.scan=triton", ["cluster", "scan triton needs use_gpu true", "auto, torch or cpu"]),
        ("truncation.target={}", ["truncation.target", "needs tolerance, dim, fraction or budget"]),
        ("truncation.target={dim: 4, fraction: 0.5}", ["truncation.target", "one of dim, fraction and budget"]),
        ("truncation.target={budget: {}, allocation: global}", ["truncation.target.budget", "states or cost"]),
        (
            "truncation.target={budget: {states: 40}, allocation: global}",
            ["truncation.target.budget.states 40", "between 2", "and 32"],
        ),
        (
            "truncation.target={budget: {cost: 0.05}, allocation: global}",
            ["truncation.target.budget.cost 0.05", "must be 0.0625 or more", "2 layers of 1 states"],
        ),
        ("truncation.target={dim: [4, 8], allocation: global}", ["truncation.target: dim (4, 8)", "allocation global"]),
        ("truncation.target={dim: []}", ["truncation.target.dim []", "one number, or model.n_layers 2 of them"]),
        ("truncation.target={dim: 4, ladder: [8, 16]}", ["truncation.target", "dim 4", "ladder [8, 16]"]),
        ("truncation.target={dim: 8, ladder: [8, 8]}", ["truncation.target", "ladder [8, 8] must increase"]),
        ("name=2024-13-45", ["name=2024-13-45", "is not a YAML value"]),
        ("truncation.target.dim=17", ["truncation.target.dim 17", "between 1 and model.d_state 16"]),
        ("truncation.score=biggest", ["truncation.score", "'biggest'", "'greedy'"]),
        ("truncation.moments=forget", ["truncation.moments", "'forget'", "'transport', 'slice' or 'reset'"]),
        ("truncation.guard={metric: loss}", ["truncation.guard.metric", "'loss'", "'val_loss' or 'val_accuracy'"]),
        ("truncation.guard={metric: val_accuracy}", ["truncation.guard.metric val_accuracy", "must be val_loss"]),
        ("truncation={target: {dim: 4}, stable: {start: 0.5}}", ["truncation.stable", "start 0.5", "deadline 0.25"]),
        (
            "truncation={target: {dim: 4}, stable: {probes: 2, patience: 2}}",
            ["truncation.stable", "patience 2 must be less than probes 2"],
        ),
        ("truncation.steps=[3, 13]", ["truncation.steps", "step 13", "train.steps 12"]),
        ("truncation.steps=[7, 3]", ["truncation", "[7, 3] must increase"]),
        ("truncation.window={events: 2}", ["one of window, steps and stable"]),
        ("cluster.workers=5", ["train.batch_size 4", "less than cluster.workers 5"]),
        ("cluster.workers={min: 2, max: 1}", ["cluster.workers", "min 2", "max 1"]),
        ("cluster.workers=two", ["cluster.workers", "'two'", "must be a number"]),
        ("cluster.zero_stage=7", ["cluster.zero_stage", "7", "0, 1, 2 or 3"]),
        ("name=../elsewhere", ["name", "'../elsewhere'", "begins with a letter or digit"]),
        ("seed=-1", ["seed", "-1", "greater than or equal to 0"]),
        ("seed=100000000000000000000", ["seed", "less than 9223372036854775808"]),
        ("train.lr=.inf", ["train.lr", "inf", "finite"]),
        ("train.betas=[0.9, 1.5]", ["train.betas.1", "1.5", "less than 1"]),
        ("storage=~nobody-by-this-name/runs", ["storage", "unknown user"]),
        ("storage=s3://bucket/runs", ["storage: s3:/bucket/runs must be a path", "checkpoints.storage"]),
        ("data_root=s3://bucket/data", ["data_root: s3:/bucket/data must be a path"]),
        ("data={source: mnist, path: 's3://bucket/mnist'}", ["data.path: s3:/bucket/mnist must be a path"]),
        ("model.lru=1", ["unknown key model.lru"]),
        ("data.text=foo", ["unknown key data.text", "source, path, seq_len"]),
        ("data={source: recall, seq_len: 63}", ["data: seq_len 63 must be at least 64, four tokens for each of pairs"]),
        ("data={source: recall, vocab_size: 33}", ["data: vocab_size 33 must be at least 34", "16 different keys"]),
        ("data={source: recall, vocab_size: 65537}", ["data.vocab_size is 65537", "less than or equal to 65536"]),
        ("data={source: recall, power: -1}", ["data.power is -1", "greater than or equal to 0"]),
        ("data={source: recall, seed: -1}", ["data.seed is -1", "greater than or equal to 0"]),
        ("data={source: recall, pair: 8}", ["unknown key data.pair", "did you mean pairs?"]),
        ("data={source: text}", ["data: source text takes one of path and hub"]),
        ("data={source: mnist}", ["data.path is required"]),
        ("data={source: mnist, path: ~nobody-by-this-name/x}", ["data.path", "unknown user"]),
        ("data={source: listops, min_length: 1999}", ["data: max_length 2000 must be at least 2001"]),
        ("data={source: listops, max_depth: 2}", ["data: min_length 500 must be less than 12", "max_args 10"]),
        ("data={source: listops, held_out: train}", ["data.held_out is 'train'", "'test' or 'val'"]),
        ("data={source: pathfinder, path: a, difficulty: 3}", ["data.difficulty is 3", "'easy', 'intermediate'"]),
        ("truncation.target=small", ["truncation.target", "'small'", "group of settings"]),
        ("cluster={use_gpu: true, scan: cpu}", ["cluster", "scan cpu needs use_gpu false"]),
        ("train.steps.x=1", ["train.steps.x=1", "steps is a value"]),
        ("steps", ["'steps'", "key.sub=value"]),
        ("train.lr=[", ["train.lr=[", "not a YAML value"]),
    ],
)
def test_one_sentence_names_the_setting(
    small_run: dict[str, Any], tmp_path: Path, override: str, words: list[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(small_run))
    with pytest.raises(UserError) as refused:
        load_config(path, [override])
    sentence = str(refused.value)
    assert "\n" not in sentence
    assert all(word in sentence for word in words), sentence


LRU = {"kind": "lru", "n_layers": 2, "d_model": 8, "d_state": 16}
ROTATED = {"kind": "mamba2", "n_layers": 2, "d_model": 16, "d_state": 16, "headdim": 8, "basis": "rotated"}


@pytest.mark.parametrize(
    ("model", "settings", "words"),
    [
        (LRU, {"score": "ghost"}, "truncation.score ghost chooses among states"),
        (ROTATED, {"score": "greedy"}, "it must be hankel, smallest or random"),
        (LRU, {"compensate": True}, "truncation.compensate needs .* model.kind mamba, not lru"),
        (ROTATED, {"compensate": True}, "not mamba2"),
        (ROTATED, {"score": "magnitude"}, "it must be hankel, smallest or random"),
        (LRU, {"target": {"dim": [4, 4, 4]}}, r"truncation.target.dim \[4, 4, 4\] must be one number, or .* 2 of them"),
        (LRU, {"target": {"dim": [4, 17]}}, "must lie between 1 and model.d_state 16"),
    ],
)
def test_what_a_model_cannot_do_is_refused(
    small_run: dict[str, Any], model: dict[str, Any], settings: dict[str, Any], words: str
) -> None:
    small_run["model"] = model
    small_run["truncation"] |= settings
    with pytest.raises(UserError, match=words):
        parse_config(small_run)


def test_more_states_than_mamba_ssm_takes_are_refused(small_run: dict[str, Any]) -> None:
    small_run["cluster"] |= {"use_gpu": True, "scan": "mamba_ssm"}
    for d_state in (256, 257):
        small_run["model"]["d_state"] = d_state
        if d_state == 256:
            parse_config(small_run)
        else:
            with pytest.raises(UserError, match=r"model\.d_state 257 must be at most 256 with cluster\.scan mamba_ssm"):
                parse_config(small_run)


def test_baselines_are_refused_where_they_cannot_be(small_run: dict[str, Any]) -> None:
    small_run["train"] |= {"regularize": {"weight": 1e-5}}
    with pytest.raises(UserError, match=r"train\.regularize needs the linear layers of model\.kind lru, not mamba"):
        parse_config(small_run)
    small_run |= {"model": LRU, "cluster": {"zero_stage": 3}}
    with pytest.raises(UserError, match=r"cluster\.zero_stage 3 must be 0, 1 or 2 with train\.regularize"):
        parse_config(small_run)


def test_a_window_too_small_for_its_events_is_refused(small_run: dict[str, Any]) -> None:
    small_run["truncation"] = {"target": {"dim": 4}, "window": {"events": 4, "end": 0.2}}
    with pytest.raises(UserError, match=r"truncation has 4 probes, of which several"):
        parse_config(small_run)


def test_an_override_reaches_into_a_part_that_is_null(small_run: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(small_run | {"truncation": None}))
    truncation = load_config(path, ["truncation.target.dim=3", "train.steps=100"]).truncation
    assert truncation is not None
    assert truncation.target.dim == 3


@pytest.mark.parametrize("content", ["", "just words", "a: [1", "\x00", "name: 2024-13-45"])
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=r"broken\.yaml"):
        load_config(path)


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.yaml cannot be read"):
        load_config(tmp_path / "absent.yaml")


def test_paths_become_absolute(small_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Workers run in another directory than the driver."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("x" * 100)
    config = parse_config(small_run | {"storage": "runs", "data": {"source": "text", "path": "book.txt"}})
    assert config.storage == tmp_path / "runs"
    assert config.model_dump(mode="json")["data"]["path"] == str(tmp_path / "book.txt")


@pytest.mark.parametrize(
    ("change", "resumable"),
    [
        ("cluster.workers=1", True),
        ("cluster.zero_stage=3", True),
        ("cluster.cpus_per_worker=2", True),
        ("tracking.mlflow=true", True),
        ("checkpoints.storage=s3://bucket/elsewhere", True),
        ("checkpoints.keep_last=5", True),
        ("storage=elsewhere", True),
        ("data_root=elsewhere", True),
        ("train.accumulation=2", True),
        ("train.activation_checkpointing=true", True),
        ("train.eval_every=3", True),
        ("train.log_every=3", True),
        ("train.checkpoint_every=3", True),
        ("seed=1", False),
        ("truncation=null", False),
        ("truncation.target.dim=3", False),
        ("model.d_model=64", False),
        ("data.seq_len=32", False),
        ("train.steps=13", False),
        ("train.lr=0.5", False),
        ("train.batch_size=8", False),
        ("train.eval_batches=3", False),
        ("train.precision=bfloat16", False),
    ],
)
def test_resuming_refuses_what_would_make_it_another_run(
    small_run: dict[str, Any], tmp_path: Path, change: str, resumable: bool
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(small_run))
    saved, changed = load_config(path), load_config(path, [change])
    assert changed != saved
    if resumable:
        refuse_other_run(changed, saved.model_dump(mode="json"))
    else:
        with pytest.raises(UserError, match=re.escape(change.split("=")[0])):
            refuse_other_run(changed, saved.model_dump(mode="json"))


def test_a_teacher_may_have_moved_but_is_not_left_out(small_run: dict[str, Any], tmp_path: Path) -> None:
    def taught(**lesson: Any) -> RunConfig:
        return parse_config(small_run | {"train": small_run["train"] | {"distill": lesson}})

    saved = taught(teacher=str(tmp_path / "full")).model_dump(mode="json")
    assert differences(taught(teacher=str(tmp_path / "moved" / "full")), saved) == []
    assert differences(taught(teacher=str(tmp_path / "full"), alpha=0.1), saved) == [
        "train.distill.alpha (was 0.5, is 0.1)"
    ]
    assert differences(parse_config(small_run), saved) != []


@pytest.mark.parametrize(("warmup", "floor"), [(0.1, 0.0), (0.25, 0.1), (0.0, 0.5), (0.0, 1.0)])
def test_the_learning_rate_is_torchs_warm_up_and_cosine(small_run: dict[str, Any], warmup: float, floor: float) -> None:
    steps, lr = 40, 0.02
    rates = {"steps": steps, "lr": lr, "warmup": warmup, "min_lr_factor": floor}
    train = parse_config(small_run | {"truncation": None, "train": small_run["train"] | rates}).train
    rising = round(warmup * steps)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    cosine = CosineAnnealingLR(optimizer, T_max=steps - rising, eta_min=floor * lr)
    falling = []
    for _ in range(steps - rising):
        optimizer.step()
        cosine.step()
        falling.append(cosine.get_last_lr()[0])
    expected = [lr * step / rising for step in range(1, rising + 1)] + falling
    assert [train.learning_rate(step) for step in range(1, steps + 1)] == pytest.approx(expected)


def test_all_settings_are_listed_where_a_config_has_them() -> None:
    """What is printed is YAML but for the words behind a key, one document a variant of data and model."""
    listed = CliRunner().invoke(main, ["settings"])
    assert listed.exit_code == 0
    for line in listed.output.splitlines():
        assert re.fullmatch(r" *(#.*|\w+:|\w+: \w+|\w+: .+ \(.*(required|default .+)\))", line), line
    for section, variants in (("data", SOURCES), ("model", ("lru", "mamba", "mamba2")), ("truncation", ("",))):
        part = CliRunner().invoke(main, ["settings", section]).output
        assert part.count(f"{section}:\n") == len(variants)
        assert part in listed.output
    dumped = load_config(QUICKSTART).model_dump()
    dumped["truncation"] |= {"stable": {"probes": 10}, "guard": {"patience": 0}}
    for key in leaves(dumped):
        assert re.search(rf"^ *{key}:", listed.output, flags=re.MULTILINE), key


def leaves(part: dict[str, Any]) -> Iterator[str]:
    for key, value in part.items():
        yield key
        if isinstance(value, dict):
            yield from leaves(value)


def test_an_unknown_section_is_refused_in_one_sentence() -> None:
    told = CliRunner().invoke(main, ["settings", "trains"])
    assert told.exit_code == 2
    assert told.stderr == (
        "rayduce: section 'trains' must be one of: data, model, train, truncation, cluster, tracking, checkpoints\n"
    )
