"""The `rayduce` command."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Literal, ParamSpec

import click

from orchestrator.errors import Interrupted, TrainingError, UserError

# Each command imports what it needs: `--help` and a typing error should not wait seconds for torch and Ray.

P = ParamSpec("P")


def _told_plainly(command: Callable[P, None]) -> Callable[P, None]:
    """Errors as one sentence: exit code 2 for what the user can mend, 1 for a training that failed."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except (UserError, TrainingError) as error:
            print(f"rayduce: {error}", file=sys.stderr)
            sys.exit(2 if isinstance(error, UserError) else 1)
        except BrokenPipeError:
            raise  # the reader of a pipe has seen enough; click ends without a word
        except OSError as error:
            print(f"rayduce: {error.filename or 'files'}: {error.strerror or error}", file=sys.stderr)
            sys.exit(2)
        except Interrupted as stop:
            print(f"rayduce: {stop}", file=sys.stderr)
            sys.exit(128 + stop.signal)
        except KeyboardInterrupt:
            sys.exit(130)

    return run


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="rayduce")
def main() -> None:
    """Train state-space models on a Ray cluster and make them smaller while they train."""
    # torch and DeepSpeed look for ninja, which pip put beside this interpreter.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


@main.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", metavar="[KEY.SUB=VALUE]...", nargs=-1)
@_told_plainly
def train(config: Path, overrides: tuple[str, ...]) -> None:
    """Train what CONFIG describes, truncating its states on the way.

    CONFIG is a YAML file (`rayduce settings` lists what it may hold); KEY.SUB=VALUE replaces one of its settings by a
    YAML value. Training runs on the Ray cluster that RAY_ADDRESS names, else on this machine. The run's folder below
    `storage` is called like the run (`name`) and holds metrics, plans, checkpoints, figures and a report.

    The same command continues a run that was interrupted from its last complete checkpoint, and leaves a finished
    one as it is. Ctrl-C or SIGTERM stops a run with a checkpoint; a second one ends it at once.

    \b
    Examples:
      rayduce train configs/quickstart.yaml
      rayduce train configs/quickstart.yaml name=smaller 'truncation.target={dim: 2}' train.steps=1000
    """
    from orchestrator.config_reading import load_config

    run_config = load_config(config, overrides)
    from orchestrator import launch

    launch.train(run_config)


@main.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", metavar="[KEY.SUB=VALUE]...", nargs=-1)
@click.option("--space", required=True, metavar="NAME", help="A space of tune_spaces, or the path of a Python file.")
@click.option("--samples", type=int, metavar="N", help="Trials of a random or TPE search.  [default: 16]")
@click.option(
    "--objective",
    "objectives",
    multiple=True,
    default=("val_loss",),
    show_default=True,
    help="val_loss, val_accuracy, states or train_seconds; several make a Pareto search. The first chooses the best.",
)
@click.option("--search", type=click.Choice(["tpe", "random", "grid"]), default="tpe", show_default=True)
@click.option(
    "--pruning",
    type=click.Choice(["none", "asha", "median"]),
    default="none",
    show_default=True,
    help="Which trials end early, after their cuts: all but the best of every four, or those worse than the median.",
)
@click.option("--share/--no-share", default=True, help="Train once what trials have in common up to their first cuts.")
@click.option("--baselines/--no-baselines", default=True, help="Train full size and the best size from scratch too.")
@click.option("--concurrent", type=int, metavar="N", help="Trials at a time, where the cluster grows to hold them.")
@_told_plainly
def tune(
    config: Path,
    overrides: tuple[str, ...],
    space: str,
    samples: int | None,
    objectives: tuple[str, ...],
    search: Literal["tpe", "random", "grid"],
    pruning: Literal["none", "asha", "median"],
    share: bool,
    baselines: bool,
    concurrent: int | None,
) -> None:
    """Search a space of compression schedules for CONFIG: when to cut, and how far.

    Every trial is a training run below the sweep's folder, which is called like the config and the space. The same
    command continues a sweep that was interrupted. It leaves best.yaml, ready for `rayduce train`, a table of the
    trials, Pareto fronts, and a report.

    \b
    Examples:
      rayduce tune configs/digits_lru.yaml --space timing --samples 16
      rayduce tune configs/quickstart.yaml --space schedule --samples 32 --objective val_loss --objective states
      rayduce tune configs/quickstart.yaml --space schedule --samples 64 --pruning asha
    """
    from orchestrator.config_reading import load_config
    from orchestrator.sweep import SAMPLES, Request, tune_schedules

    if samples is None and search != "grid":
        samples = SAMPLES
    request = Request(space, samples, objectives, search, pruning, share, baselines, concurrent)
    tune_schedules(load_config(config, overrides), request)


@main.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", metavar="[KEY.SUB=VALUE]...", nargs=-1)
@click.option(
    "--methods",
    default="full,scratch,hankel,random,smallest,magnitude,distill",
    show_default=True,
    help="Also hsv_regularized and nuclear_regularized, for LRUs. full and hankel are always there.",
)
@click.option(
    "--seeds", default=3, show_default=True, help="Trainings of every method; the first has the config's seed."
)
@click.option(
    "--tolerance",
    "tolerances",
    type=float,
    multiple=True,
    help="A target of truncation instead of the config's; several give several sizes.",
)
@click.option("--fine-tune", default=0.1, show_default=True, help="Steps after magnitude pruning, as a share of all.")
@click.option("--penalty", default=1e-5, show_default=True, help="Weight of the Hankel singular values in the loss.")
@_told_plainly
def compare(
    config: Path,
    overrides: tuple[str, ...],
    methods: str,
    seeds: int,
    tolerances: tuple[float, ...],
    fine_tune: float,
    penalty: float,
) -> None:
    """Compare truncation of CONFIG with what it claims to beat: one table of quality, size and time.

    Every method trains with the same data order, steps and optimizer; those that end smaller get the dimensions that
    truncation has reached, and those that are cut at their end as many states in all. Distillation is charged its
    teacher's time, pruning its fine-tuning. The same command continues a comparison that was interrupted; one that
    names more methods, tolerances or seeds trains those alone.

    \b
    Examples:
      rayduce compare configs/digits_lru.yaml
      rayduce compare configs/digits_lru.yaml --tolerance 0.1 --tolerance 0.2 --methods scratch,random --seeds 5
    """
    from orchestrator.comparison import Request
    from orchestrator.comparison import compare as run
    from orchestrator.config_reading import load_config

    names = tuple(method.strip() for method in methods.split(","))
    run(load_config(config, overrides), Request(names, seeds, tolerances, fine_tune, penalty))


@main.command()
@click.argument("run")
@click.option("--prompt", metavar="TEXT", default="", help="What the text begins with; by default a new line.")
@click.option(
    "--tokens", default=256, show_default=True, help="How many bytes to generate, or tokens of the run's tokenizer."
)
@click.option("--temperature", default=0.8, show_default=True, help="0 always takes the likeliest byte or token.")
@click.option("--top-k", type=int, metavar="K", help="Draw from the K likeliest bytes or tokens only.")
@click.option("--seed", type=int, help="The same seed draws the same text.")
@_told_plainly
def generate(run: str, prompt: str, tokens: int, temperature: float, top_k: int | None, seed: int | None) -> None:
    """Continue a text with the model of the run in folder RUN, as its newest checkpoint has it.

    RUN may also be the URI of its checkpoints, such as s3://bucket/checkpoints/quickstart. The text appears as it is
    generated, in UTF-8. This works while the run trains and after it was killed.

    \b
    Examples:
      rayduce generate runs/quickstart --prompt "def "
      rayduce generate runs/quickstart --prompt "import " --temperature 0
    """
    from orchestrator.generate import generate_text

    pieces = generate_text(run, prompt, tokens, temperature, top_k, seed)
    try:
        for piece in pieces:
            click.echo(piece.encode(), nl=False)
    finally:
        click.echo()


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@_told_plainly
def report(run: Path) -> None:
    """Draw the figures and the page of the run, sweep or comparison in folder RUN again.

    Everything comes from its own files, so this works while a run trains and after it was killed; a sweep has to
    have ended. The page, RUN/report.html, needs no other file and no network; a comparison has RUN/comparison.md.
    """
    if (run / "comparison.parquet").exists():
        from orchestrator.comparison_report import render as render_comparison

        print(render_comparison(run))
        return
    if (run / "request.json").exists():
        from orchestrator.sweep_report import render

        print(render(run))
        return
    from orchestrator.report import write_report

    print(write_report(run))


@main.command()
@click.argument("section", required=False)
@_told_plainly
def settings(section: str | None) -> None:
    """List what a config may hold, with meanings and defaults: everything, or one SECTION.

    \b
    Examples:
      rayduce settings truncation
      rayduce settings data                           # the sources of data
    """
    from orchestrator.settings import describe

    click.echo(describe(section))


@main.command()
@_told_plainly
def doctor() -> None:
    """Tell what this machine has, what it lacks, and what to do.

    Looks at Python, compiler, cores, memory, disk, GPU, Ray, DeepSpeed and MLflow. Exit code 1 if training
    cannot work here.
    """
    from orchestrator.doctor import examine, format_findings

    findings = examine()
    print(format_findings(findings))
    sys.exit(any(finding.state == "missing" for finding in findings))


@main.group()
def data() -> None:
    """Prepare datasets."""


@data.command(name="prepare")
@click.argument("name")
@click.argument("settings", metavar="[KEY=VALUE]...", nargs=-1)
@click.option(
    "--data-root",
    type=click.Path(path_type=Path),
    default=Path("data"),
    show_default=True,
    help="Folder of datasets.",
)
@_told_plainly
def data_prepare(name: str, settings: tuple[str, ...], data_root: Path) -> None:
    """Write the Arrow files of source NAME now. Training does it by itself where they are missing.

    \b
    Examples:
      rayduce data prepare stdlib
      rayduce data prepare text path=book.txt
      rayduce data prepare cifar10 path=cifar-10-python.tar.gz
    """
    from orchestrator.config_reading import parse_data
    from orchestrator.data.source import absolute
    from orchestrator.data.sources import prepare

    try:
        root = absolute(data_root)
    except ValueError as error:
        raise UserError(f"--data-root: {error}") from error
    print(prepare(parse_data(name, settings), root))
