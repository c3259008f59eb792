"""IMDB, AAN and Pathfinder from folders laid out as their releases are."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from models.heads import PADDING
from models.registry import ClassificationTask, PairClassificationTask, TokenClassificationTask
from orchestrator.data import arrow
from orchestrator.data.batches import Batch, TrainBatches, validation_batches
from orchestrator.data.lra import DIFFICULTIES, Aan, Imdb, Pathfinder
from orchestrator.data.sources import prepare
from orchestrator.errors import UserError

REVIEWS = {
    "train/neg/0_3.txt": "Dull.",
    "train/neg/10_1.txt": "A film without end, café scenes and all.<br /><br />Avoid it.",
    "train/pos/0_9.txt": "Wonderful!",
    "train/unsup/0_0.txt": "Neither here nor there.",
    "test/neg/0_2.txt": "Bad",
    "test/pos/0_10.txt": "Good",
    "test/pos/1_8.txt": "Quite good",
}
PAIRS = {
    "train": [(1, "P04-1", "W05-2", "first paper", "the second, longer paper"), (0, "a", "b", "x", "y" * 60)],
    "eval": [(1, "c", "d", "seen in validation", "too")],
    "test": [(0, "e", "f", "a 'quoted' \"text\"", "another"), (1, "g", "h", "", "nothing before")],
}


def imdb(folder: Path) -> Path:
    for name, text in REVIEWS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode())
    return folder


def aan(folder: Path) -> Path:
    folder.mkdir()
    for split, pairs in PAIRS.items():
        lines = ["\t".join([f"{float(label)}", *rest]) + "\n" for label, *rest in pairs]
        (folder / f"new_aan_pairs.{split}.tsv").write_text("".join(lines))
    return folder


def pathfinder(folder: Path, count: int = 40, kind: str = "hard") -> Path:
    """Two folders of images, of which every second shows a joined path; the first pixels say which image it is."""
    root = folder / DIFFICULTIES[kind]
    rng = np.random.default_rng(0)
    for number in range(2):
        images, metadata = root / "imgs" / str(number), root / "metadata" / f"{number}.npy"
        images.mkdir(parents=True)
        metadata.parent.mkdir(exist_ok=True)
        lines = []
        for i in range(count // 2):
            pixels = rng.integers(256, size=(32, 32), dtype=np.uint8)
            pixels[0, :2] = number, i
            Image.fromarray(pixels).save(images / f"sample_{i}.png")
            lines.append(f"imgs/{number} sample_{i}.png {i} {i % 2} 1.0 14 4 2 0.75 1.5\n")
        metadata.write_text("".join(lines))
    return folder


def documents(folder: Path, split: arrow.Split, column: str = "tokens") -> list[bytes]:
    return [bytes(row) for row in arrow.read(folder, split).column(column).to_pylist()]


def labels(folder: Path, split: arrow.Split) -> list[int]:
    found: list[int] = arrow.read(folder, split).column("label").to_pylist()
    return found


# --- IMDB ---


def test_reviews_are_bytes_with_their_sentiment(tmp_path: Path) -> None:
    path = imdb(tmp_path / "aclImdb")
    folder = prepare(Imdb(source="imdb", path=path, max_length=30), tmp_path / "data")
    assert arrow.describe(folder).task == TokenClassificationTask(256, 2)
    texts = {split: [REVIEWS[n].encode()[:30] for n in REVIEWS if n.startswith(split)] for split in ("train", "test")}
    assert documents(folder, "train") == texts["train"][:3]  # not the one without a sentiment
    assert documents(folder, "val") == texts["test"]
    assert labels(folder, "train") == [0, 0, 1]
    assert labels(folder, "val") == [0, 1, 1]


def test_a_bytes_length_is_a_setting_of_the_dataset(tmp_path: Path) -> None:
    path = imdb(tmp_path / "aclImdb")
    names = {Imdb(source="imdb", path=path, max_length=length).dataset_name for length in (30, 40, 30)}
    assert len(names) == 2
    os.utime(path / "test/pos/1_8.txt", ns=(1, 1))
    assert Imdb(source="imdb", path=path, max_length=30).dataset_name not in names


@pytest.mark.parametrize("gone", ["train/pos/0_9.txt", "test/neg/0_2.txt"])
def test_missing_reviews_are_refused(gone: str, tmp_path: Path) -> None:
    path = imdb(tmp_path / "aclImdb")
    (path / gone).unlink()
    with pytest.raises(UserError, match=rf"has no files {Path(gone).parent}/\*\.txt, as aclImdb has"):
        prepare(Imdb(source="imdb", path=path), tmp_path / "data")


# --- AAN ---


@pytest.mark.parametrize(("held_out", "name"), [("test", "test"), ("val", "eval")])
def test_pairs_keep_their_order_and_label(held_out: Any, name: str, tmp_path: Path) -> None:
    path = aan(tmp_path / "tsv_data")
    folder = prepare(Aan(source="aan", path=path, held_out=held_out, max_length=50), tmp_path / "data")
    assert arrow.describe(folder).task == PairClassificationTask(256, 2)
    for split, part in (("train", "train"), ("val", name)):
        assert labels(folder, split) == [pair[0] for pair in PAIRS[part]]
        for column, place in (("tokens", 3), ("tokens_2", 4)):
            expected = [str(pair[place]).encode()[:50] for pair in PAIRS[part]]
            assert documents(folder, split, column) == expected


def test_batches_of_pairs_are_as_long_as_the_longest(tmp_path: Path) -> None:
    folder = prepare(Aan(source="aan", path=aan(tmp_path / "tsv_data")), tmp_path / "data")
    whole = TrainBatches(folder, None, 2, 0, 0, 1).at(1)
    parts = [TrainBatches(folder, None, 2, 0, rank, 2).at(1) for rank in range(2)]
    assert whole.inputs.shape == (2, 2, 60)
    assert all(part.inputs.shape == (1, 2, 60) for part in parts)
    for row, label in zip(whole.inputs, whole.targets.tolist(), strict=True):
        texts = [bytes(document[document != PADDING].tolist()).decode() for document in row]
        assert (label, *texts) in [(pair[0], *pair[3:]) for pair in PAIRS["train"]]


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_every_held_out_pair_is_asked_once(workers: int, tmp_path: Path) -> None:
    folder = prepare(Aan(source="aan", path=aan(tmp_path / "tsv_data")), tmp_path / "data")
    shares: list[list[Batch]] = [list(validation_batches(folder, None, 10, 10, r, workers)) for r in range(workers)]
    assert {len(share) for share in shares} == {1}
    asked = [target for share in shares for batch in share for target in batch.targets.tolist() if target >= 0]
    assert sorted(asked) == [0, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"has no file new_aan_pairs\.train\.tsv, as Long Range Arena calls it"),
        (b"", "has no pairs"),
        (b"1.0\ta\tb\ttext\n", "line 1 of .* must be a label, 0 or 1, two ids and two texts"),
        (b"1\ta\tb\tx\ty\n2\ta\tb\tx\ty\n", "line 2 of .* must be a label"),
    ],
)
def test_pairs_that_are_none_are_refused(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = aan(tmp_path / "tsv_data")
    (path / "new_aan_pairs.train.tsv").unlink()
    if content is not None:
        (path / "new_aan_pairs.train.tsv").write_bytes(content)
    with pytest.raises(UserError, match=message) as refused:
        prepare(Aan(source="aan", path=path), tmp_path / "data")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "data").exists()


# --- Pathfinder ---


def stored_images(folder: Path, split: arrow.Split) -> dict[tuple[int, int], tuple[np.ndarray, int]]:
    batch = arrow.read(folder, split)
    features = np.array(batch.column("features").to_pylist(), np.float32)
    pixels = np.round((features + 1) * 127.5).astype(np.uint8)
    return {(int(p[0]), int(p[1])): (p, y) for p, y in zip(pixels, labels(folder, split), strict=True)}


def test_images_are_grey_values_row_by_row_with_their_label(tmp_path: Path) -> None:
    path = pathfinder(tmp_path / "pathfinder32")
    parts = {}
    for held_out in ("test", "val"):
        config = Pathfinder(source="pathfinder", path=path, held_out=held_out)
        folder = prepare(config, tmp_path / "data")
        assert arrow.describe(folder).task == ClassificationTask(1, 2)
        for split in arrow.SPLITS:
            for (number, i), (pixels, label) in stored_images(folder, split).items():
                with Image.open(path / DIFFICULTIES["hard"] / f"imgs/{number}/sample_{i}.png") as image:
                    assert (pixels.reshape(32, 32) == np.asarray(image)).all()
                assert label == i % 2
        parts[held_out] = set(stored_images(folder, "val"))
        parts["train"] = set(stored_images(folder, "train"))
    assert {name: len(part) for name, part in parts.items()} == {"test": 4, "val": 4, "train": 32}
    assert len(set().union(*parts.values())) == 40


def test_difficulties_are_different_data(tmp_path: Path) -> None:
    path = pathfinder(pathfinder(tmp_path / "pathfinder32"), kind="easy")
    names = {Pathfinder(source="pathfinder", path=path, difficulty=d).dataset_name for d in ("easy", "hard")}
    assert len(names) == 2


def test_empty_images_are_left_out_as_in_the_original(tmp_path: Path) -> None:
    path = pathfinder(tmp_path / "pathfinder32")
    (path / DIFFICULTIES["hard"] / "imgs/0/sample_3.png").write_bytes(b"")
    folder = prepare(Pathfinder(source="pathfinder", path=path), tmp_path / "data")
    count = Counter(labels(folder, "train")) + Counter(labels(folder, "val"))
    assert count.total() == 36  # and 3 are left for validation
    assert (0, 3) not in stored_images(folder, "train").keys() | stored_images(folder, "val").keys()


def spoil_image(content: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        image = folder / "imgs/1/sample_7.png"
        image.write_bytes(content(image.read_bytes()))

    return spoil


def spoil_metadata(line: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "metadata/1.npy").write_text(line)


def smaller(folder: Path) -> None:
    Image.new("L", (16, 32)).save(folder / "imgs/1/sample_7.png")


def missing(folder: Path) -> None:
    (folder / "imgs/1/sample_7.png").unlink()


def no_metadata(folder: Path) -> None:
    for file in folder.glob("metadata/*"):
        file.unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_metadata, r"has no files curv_contour_length_14/metadata/\*\.npy"),
        (missing, r"sample_7\.png cannot be read: No such file"),
        (smaller, r"sample_7\.png is of another size than the images before it, 32 x 32 and 16 x 32"),
        (spoil_image(lambda data: data[: len(data) // 2]), r"sample_7\.png is not a whole image"),
        (spoil_image(lambda data: data[:40]), r"sample_7\.png is not a whole image"),
        (spoil_image(lambda data: b"no image"), r"sample_7\.png is not a whole image"),
        (spoil_image(lambda data: data[:60] + b"\0" * 20 + data[80:]), r"sample_7\.png is not a whole image"),
        (
            spoil_metadata("imgs/1 sample_0.png 0"),
            r"line 1 of .*1\.npy must begin with folder, file, number, and label",
        ),
        (spoil_metadata("imgs/1 sample_0.png 0 x"), "line 1 of .* must begin with"),
        (spoil_metadata("../.. secret.png 0 1"), r"line 1 of .* leads out of .*: \.\./\.\./secret\.png"),
        (spoil_metadata("/etc passwd 0 1"), "leads out of"),
    ],
)
def test_damaged_releases_are_refused_in_a_sentence(
    spoil: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    path = pathfinder(tmp_path / "pathfinder32")
    spoil(path / DIFFICULTIES["hard"])
    with pytest.raises(UserError, match=message) as refused:
        prepare(Pathfinder(source="pathfinder", path=path), tmp_path / "data")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "data").exists()


def test_too_few_images_to_hold_some_out_are_refused(tmp_path: Path) -> None:
    path = pathfinder(tmp_path / "pathfinder32", count=8)
    with pytest.raises(UserError, match="has 8 images of curv_contour_length_14; 10 are needed"):
        prepare(Pathfinder(source="pathfinder", path=path), tmp_path / "data")


@pytest.mark.parametrize("source", [Imdb, Aan, Pathfinder])
def test_a_missing_folder_is_refused(source: type[Imdb] | type[Aan] | type[Pathfinder], tmp_path: Path) -> None:
    name = source.model_fields["source"].annotation.__args__[0]
    with pytest.raises(UserError, match=r"data\.path .*absent does not exist; valid: .*[Ff]older"):
        prepare(source(source=name, path=tmp_path / "absent"), tmp_path / "data")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data\.path .*file is no folder; valid: .*[Ff]older"):
        prepare(source(source=name, path=tmp_path / "file"), tmp_path / "data")
