"""All sources of data, and the datasets that they become."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from orchestrator.data import arrow
from orchestrator.data.images import Cifar10, Digits, FashionMnist, Mnist
from orchestrator.data.listops import ListOps
from orchestrator.data.lra import Aan, Imdb, Pathfinder
from orchestrator.data.recall import Recall
from orchestrator.data.text import StdlibText, TextFiles

AnySource = (
    StdlibText | TextFiles | Digits | Recall | Mnist | FashionMnist | Cifar10 | ListOps | Imdb | Aan | Pathfinder
)
DataConfig = Annotated[AnySource, Field(discriminator="source")]
SOURCES: dict[str, type[AnySource]] = {
    "stdlib": StdlibText,
    "text": TextFiles,
    "digits": Digits,
    "recall": Recall,
    "mnist": Mnist,
    "fashion_mnist": FashionMnist,
    "cifar10": Cifar10,
    "listops": ListOps,
    "imdb": Imdb,
    "aan": Aan,
    "pathfinder": Pathfinder,
}


def prepare(config: AnySource, root: Path) -> Path:
    """The dataset's folder below `root`, written if it is not there yet. Safe to call from many processes.

    Raises:
        UserError: the source is missing or empty, or the folder cannot be written.
    """
    folder = root / config.dataset_name
    if not (folder / arrow.DESCRIPTION).exists():
        config.prepare(folder)
    return folder
