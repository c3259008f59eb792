"""Step by step is the same as all at once, and what `rayduce generate` makes of it.

Shapes: B batch, L time, M d_model, V vocabulary.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from models.generation import generate, sample
from models.heads import LanguageModel
from models.layer import TruncatableLayer
from models.lru import LRU, LRUConfig
from models.mamba import Mamba, MambaConfig
from models.registry import LanguageTask, build_model
from orchestrator import checkpoint
from orchestrator.cli import main
from orchestrator.config_reading import parse_config
from orchestrator.errors import UserError
from orchestrator.filesystem import Folder
from orchestrator.inference import load_model
from orchestrator.storage import checkpoints_of
from tests.runs import train

F64 = torch.float64
VOCABULARY = 256
CONFIGS: dict[str, MambaConfig | LRUConfig] = {
    "mamba": MambaConfig(kind="mamba", n_layers=2, d_model=10, d_state=6),
    "mamba without a window": MambaConfig(kind="mamba", n_layers=2, d_model=10, d_state=1, d_conv=1),
    "lru": LRUConfig(kind="lru", n_layers=2, d_model=10, d_state=6),
}


def layer(name: str) -> TruncatableLayer:
    torch.manual_seed(0)
    config = CONFIGS[name]
    return Mamba(config, config.d_state) if isinstance(config, MambaConfig) else LRU(config, config.d_state)


def language_model(name: str) -> LanguageModel:
    """With layers of two sizes, as after a cut, and logits far enough apart that a draw is not uniform."""
    torch.manual_seed(0)
    config = CONFIGS[name]
    model = build_model(config, LanguageTask(VOCABULARY), [config.d_state, 1])
    assert isinstance(model, LanguageModel)
    with torch.no_grad():
        model.lm_head.weight *= 50
    return model


# --- the recurrence ---


@pytest.mark.parametrize("length", [1, 2, 3, 4, 37])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-10), (torch.float32, 1e-5)])
@torch.no_grad()
def test_steps_equal_the_parallel_forward(name: str, length: int, dtype: torch.dtype, tolerance: float) -> None:
    mixer = layer(name).to(dtype)
    x_BLM = torch.randn(3, length, 10, dtype=F64, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected_BLM = mixer(x_BLM)
    state = mixer.initial_state(3)
    assert all(part.dtype == torch.float32 and not part.any() and part.shape[0] == 3 for part in state)
    shapes = [part.shape for part in state]
    for x_BM, expected_BM in zip(x_BLM.unbind(1), expected_BLM.unbind(1), strict=True):
        y_BM, state = mixer.step(x_BM, state)
        assert float((y_BM - expected_BM).norm() / expected_BM.norm()) < tolerance
        assert [part.shape for part in state] == shapes


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_language_model_steps_equal_its_logits(name: str) -> None:
    model = language_model(name).double()
    tokens_BL = torch.randint(VOCABULARY, (2, 21), generator=torch.Generator().manual_seed(2))
    states = model.initial_state(2)
    steps = []
    for tokens_B in tokens_BL.unbind(1):
        logits_BV, states = model.step(tokens_B, states)
        steps.append(logits_BV)
    torch.testing.assert_close(torch.stack(steps, dim=1), model(tokens_BL), rtol=1e-10, atol=1e-10)


def text(model: LanguageModel, temperature: float, top_k: int | None = None, seed: int = 0, tokens: int = 40) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    return bytes(islice(generate(model, b"def ", temperature, top_k, generator), tokens))


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_greedy_text_takes_the_largest_logit_each_time(name: str) -> None:
    model = language_model(name)
    tokens = list(b"def ")
    for _ in range(40):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    greedy = text(model, temperature=0)
    assert greedy == bytes(tokens[4:])
    assert greedy == text(model, temperature=0, seed=1) == text(model, temperature=3, top_k=1, seed=2)
    assert greedy == text(model, temperature=1e-320, seed=3)


def test_a_seed_fixes_what_is_drawn() -> None:
    model = language_model("mamba")
    drawn = text(model, temperature=1, seed=5)
    assert drawn == text(model, temperature=1, seed=5) == text(model, temperature=1, top_k=VOCABULARY, seed=5)
    assert drawn == text(model, temperature=1, top_k=10**6, seed=5)
    assert drawn != text(model, temperature=1, seed=6)
    assert drawn.startswith(text(model, temperature=1, seed=5, tokens=7))


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.5, None), (2.0, 3)])
def test_draws_have_the_probabilities_of_the_softmax(temperature: float, top_k: int | None) -> None:
    logits_V = torch.tensor([0.1, 2.0, -1.0, 1.0, 0.5])
    kept_V = logits_V if top_k is None else logits_V.where(logits_V >= logits_V.sort().values[-top_k], -torch.inf)
    expected_V = torch.softmax(kept_V / temperature, dim=0)
    generator = torch.Generator().manual_seed(0)
    draws = 4000
    drawn_V = torch.bincount(
        torch.tensor([sample(logits_V, temperature, top_k, generator) for _ in range(draws)]), minlength=5
    )
    deviation_V = (expected_V * (1 - expected_V) / draws).sqrt()
    assert bool(((drawn_V / draws - expected_V).abs() <= 4 * deviation_V).all())


# --- the command ---


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, corpus: Path, local_ray: None) -> Path:
    """The folder of a finished run, cut to 4 states, whose dataset is gone."""
    from tests.conftest import small_run  # its values, with a folder that lives for the whole module

    root = tmp_path_factory.mktemp("run")
    train(parse_config(small_run.__wrapped__(root, corpus)))
    shutil.rmtree(root / "data")
    return root / "runs" / "small"


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Path:
    root = tmp_path_factory.mktemp("classifier")
    raw = {
        "name": "digits",
        "storage": str(root / "runs"),
        "data_root": str(root / "data"),
        "data": {"source": "digits"},
        "model": {"kind": "lru", "n_layers": 1, "d_model": 4, "d_state": 6},
        "train": {"steps": 1, "batch_size": 4, "lr": 0.01},
        "cluster": {"workers": 2, "timeout_s": 60},  # as other tests have it, whose workers wait
        "tracking": {"mlflow": False},
    }
    train(parse_config(raw))
    return root / "runs" / "digits"


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be damaged."""
    return Path(shutil.copytree(run, tmp_path / "small"))


def last(run: Path) -> Path:
    path = checkpoint.newest(checkpoints_of(run, None))
    assert path is not None
    return Path(path.path)


def command(run: Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["generate", str(run), *options], catch_exceptions=False)


def refusal(run: Path, *options: str) -> str:
    """The one sentence of a refused command."""
    result = command(run, *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("rayduce: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.mark.cluster
def test_the_loaded_model_is_the_trained_one(run: Path, classifier: Path) -> None:
    for folder, dims in ((run, [4, 4]), (classifier, [6])):
        model = load_model(folder)
        assert (model.state_dims, model.training) == (dims, False)
        saved = {key: part for shard in last(folder).glob("*.safetensors") for key, part in load_file(shard).items()}
        values = {key.removeprefix("value:"): part for key, part in saved.items() if key.startswith("value:")}
        assert values.keys() == dict(model.named_parameters()).keys()
        assert all(torch.equal(parameter, values[name]) for name, parameter in model.named_parameters())
        if isinstance(model, LanguageModel):
            assert model.lm_head.weight is model.backbone.embedding.weight


@pytest.mark.cluster
def test_an_earlier_checkpoint_is_loaded_by_its_step(run: Path) -> None:
    assert load_model(run, step=5).state_dims == [8, 8]
    with pytest.raises(UserError, match=r"no complete checkpoint of step 4; it has 3, 5, 7, 10, 12$"):
        load_model(run, step=4)


@pytest.mark.cluster
def test_the_command_prints_the_prompt_and_what_follows(run: Path) -> None:
    """Through the command itself, as a person starts it."""
    options = ["--prompt", "def größe(", "--tokens", "300", "--seed", "3"]
    rayduce = [str(Path(sys.executable).with_name("rayduce")), "generate", str(run), *options]
    # Text is UTF-8 whatever the terminal claims.
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(rayduce, capture_output=True, timeout=120, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    printed = done.stdout.decode()

    model = load_model(run)
    assert isinstance(model, LanguageModel)
    given = "def größe(".encode()
    following = bytes(islice(generate(model, given, 0.8, None, torch.Generator().manual_seed(3)), 300))
    assert printed == (given + following).decode(errors="replace") + "\n"
    assert "\N{REPLACEMENT CHARACTER}" in printed, "after 12 steps it has not learnt UTF-8"


@pytest.mark.cluster
def test_a_prompt_may_be_empty_or_no_text(run: Path) -> None:
    greedy = ("--tokens", "8", "--temperature", "0")
    line = command(run, *greedy)
    assert line.exit_code == 0
    assert command(run, "--prompt", "\n", *greedy).stdout == "\n" + line.stdout
    half = command(run, "--prompt", "\udcc3", *greedy)  # as Python reads the argument byte C3
    assert half.exit_code == 0


@pytest.mark.cluster
def test_options_reach_the_draw(run: Path) -> None:
    def drawn(*options: str) -> str:
        result = command(run, "--prompt", "import ", "--tokens", "60", *options)
        assert result.exit_code == 0
        return result.stdout

    assert drawn("--seed", "1") == drawn("--seed", "1", "--temperature", "0.8") != drawn("--seed", "2")
    assert drawn() != drawn(), "without a seed every call draws anew"
    assert drawn("--top-k", "1") == drawn("--temperature", "0") != drawn("--seed", "1", "--top-k", "2")


@pytest.mark.cluster
def test_a_killed_run_generates_from_its_newest_complete_checkpoint(copy: Path) -> None:
    (copy / "summary.json").unlink()
    (copy / "config.yaml").unlink()
    newest = last(copy)
    newest.rename(newest.with_name(newest.name + ".partial"))
    path = Folder.of(last(copy), "checkpoint")
    expected = checkpoint.load_values(path, checkpoint.verify(path))
    model = load_model(copy)
    assert all(torch.equal(parameter, expected[name]) for name, parameter in model.named_parameters())
    assert command(copy, "--tokens", "3").exit_code == 0


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tokens", "0"], "tokens 0 must be at least 1"),
        (["--temperature", "-0.5"], "temperature -0.5 must be 0 .* or a positive number"),
        (["--temperature", "nan"], "temperature nan must be"),
        (["--temperature", "inf"], "temperature inf must be"),
        (["--top-k", "0"], "top-k 0 must be at least 1"),
        (["--seed", "-1"], "seed -1 must lie between"),
        (["--seed", str(2**63)], "seed 9223372036854775808 must lie between"),
    ],
)
def test_settings_out_of_range_are_refused(run: Path, options: list[str], words: str) -> None:
    assert re.search(words, refusal(run, *options))


@pytest.mark.cluster
def test_folders_without_a_model_of_text_are_refused(run: Path, classifier: Path, copy: Path, tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", run / "checkpoints", run.parent):
        assert f"{folder} has no folder checkpoints: expected the folder of a training run" in refusal(folder)
    assert f"run {classifier} models no text; generate needs a run whose data.source is text" in refusal(classifier)
    for path in (copy / "checkpoints").iterdir():
        path.rename(path.with_name(path.name + ".partial"))
    assert f"run {copy} has no complete checkpoint yet" in refusal(copy)


@pytest.mark.cluster
def test_damaged_checkpoints_are_refused(copy: Path) -> None:
    shard = next(iter(sorted(last(copy).glob("*.safetensors"))))
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    assert f"checkpoint shard {shard} is damaged" in refusal(copy)
    shard.unlink()
    assert f"checkpoint shard {shard} is missing" in refusal(copy)


@pytest.mark.cluster
def test_a_diverged_model_ends_in_one_sentence(copy: Path) -> None:
    path = last(copy)
    manifest = checkpoint.verify(Folder.of(path, "checkpoint"))
    shards = []
    for shard in manifest.shards:
        tensors = load_file(path / shard.file)
        save_file({key: tensor * torch.nan for key, tensor in tensors.items()}, path / shard.file)
        digest = hashlib.sha256((path / shard.file).read_bytes()).hexdigest()
        shards.append(shard.model_copy(update={"sha256": digest}))
    (path / checkpoint.MANIFEST).write_text(manifest.completed(shards).model_dump_json())
    result = command(copy, "--prompt", "def")
    assert (result.exit_code, result.stdout) == (2, "def\n")
    assert re.fullmatch(r"rayduce: run .* generates nothing: .* the training has diverged\n", result.stderr)


@pytest.fixture
def midway(run: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The command in the midst of an endless text."""
    rayduce = [str(Path(sys.executable).with_name("rayduce")), "generate", str(run), "--tokens", str(10**9)]
    # Where the tests run in the background, a shell may have had SIGINT ignored.
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(rayduce, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heard) as process:
        assert process.stdout is not None
        assert len(process.stdout.read(5)) == 5, "text comes before the end"
        yield process
        process.kill()


@pytest.mark.cluster
def test_interrupting_it_is_no_error(midway: subprocess.Popen[bytes]) -> None:
    midway.send_signal(signal.SIGINT)
    _, stderr = midway.communicate(timeout=60)
    assert (midway.returncode, stderr) == (130, b"")


@pytest.mark.cluster
def test_a_closed_pipe_ends_it_silently(midway: subprocess.Popen[bytes]) -> None:
    assert midway.stdout is not None
    assert midway.stderr is not None
    midway.stdout.close()
    assert midway.stderr.read() == b""
    assert midway.wait(timeout=60) == 1
