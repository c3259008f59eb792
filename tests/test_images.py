"""IDX files and CIFAR-10's archives, written here byte by byte as the originals are, become sequences of pixels."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from models.registry import ClassificationTask
from orchestrator.data import arrow, plain_pickle
from orchestrator.data.batches import TrainBatches, validation_batches
from orchestrator.data.images import CIFAR_MEAN, CIFAR_STD, Cifar10, FashionMnist, Mnist, _check_labels
from orchestrator.data.sources import prepare
from orchestrator.errors import UserError

SPLITS = {"train": "train", "t10k": "val"}


def examples(folder: Path, split: arrow.Split) -> tuple[np.ndarray, np.ndarray]:
    batch = arrow.read(folder, split)
    features = np.array(batch.column("features").to_pylist(), np.float32)
    n_features = arrow.describe(folder).n_features
    return features.reshape(batch.num_rows, -1, n_features), batch.column("label").to_numpy()


def everything_but(folder: Path) -> list[str]:
    """What is left in a data root besides finished datasets."""
    if not folder.exists():
        return []
    return [path.name for path in folder.iterdir() if not (path / arrow.DESCRIPTION).exists()]


# --- IDX ---


def idx_images(images: np.ndarray) -> bytes:
    return struct.pack(">IIII", 0x00000803, *images.shape) + images.tobytes()


def idx_labels(labels: np.ndarray) -> bytes:
    return struct.pack(">II", 0x00000801, len(labels)) + labels.tobytes()


@pytest.fixture
def idx(tmp_path: Path) -> tuple[Path, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Seven images of 28 x 28 pixels to train on and three to test with, two files of four gzipped."""
    folder, written = tmp_path / "idx", {}
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, count in (("train", 7), ("t10k", 3)):
        images = rng.integers(256, size=(count, 28, 28), dtype=np.uint8)
        labels = rng.integers(10, size=count, dtype=np.uint8)
        (folder / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_images(images)))
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(idx_labels(labels))
        written[name] = images, labels
    return folder, written


@pytest.mark.parametrize("source", [Mnist, FashionMnist])
def test_idx_files_become_grey_values_row_by_row(
    source: type[Mnist] | type[FashionMnist],
    idx: tuple[Path, dict[str, tuple[np.ndarray, np.ndarray]]],
    tmp_path: Path,
) -> None:
    path, written = idx
    name = source.model_fields["source"].annotation.__args__[0]
    folder = prepare(source(source=name, path=path), tmp_path / "data")
    assert arrow.describe(folder).task == ClassificationTask(n_features=1, n_classes=10)
    for part, split in SPLITS.items():
        images, labels = written[part]
        features, stored = examples(folder, split)
        assert features.shape == (len(images), 784, 1)
        assert features.min() >= 0
        assert features.max() <= 1
        np.testing.assert_allclose(features[:, :, 0] * 255, images.reshape(-1, 784), atol=1e-4)
        assert (stored == labels).all()
    held_out = next(validation_batches(folder, None, 3, 3, 0, 1))
    assert sorted(held_out.targets.tolist()) == sorted(written["t10k"][1].tolist())
    assert TrainBatches(folder, None, 5, 0, 0, 1).at(1).inputs.shape == (5, 784, 1)


def test_names_with_a_dot_are_found(idx: tuple[Path, dict[str, tuple[np.ndarray, np.ndarray]]], tmp_path: Path) -> None:
    path, _ = idx
    (path / "train-labels-idx1-ubyte").rename(path / "train-labels.idx1-ubyte")
    assert prepare(Mnist(source="mnist", path=path), tmp_path / "data").is_dir()


def test_other_files_are_another_dataset(idx: tuple[Path, dict[str, tuple[np.ndarray, np.ndarray]]]) -> None:
    path, _ = idx
    before = Mnist(source="mnist", path=path).dataset_name
    assert Mnist(source="mnist", path=path).dataset_name == before
    assert FashionMnist(source="fashion_mnist", path=path).dataset_name != before
    os.utime(path / "train-labels-idx1-ubyte", ns=(1, 1))
    assert Mnist(source="mnist", path=path).dataset_name != before


LABELS = "train-labels-idx1-ubyte"
IMAGES = "train-images-idx3-ubyte.gz"


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (LABELS, lambda data: None, r"has no file train-labels-idx1-ubyte or train-labels-idx1-ubyte\.gz"),
        (LABELS, lambda data: data[:-1], "holds 6 bytes after its header, which announces 7"),
        (LABELS, lambda data: data + b"\0", "holds 8 bytes after its header, which announces 7"),
        (LABELS, lambda data: data[:5], "is not an IDX file of unsigned bytes with 1 dimensions"),
        (LABELS, lambda data: b"\0\0\x0d\x01" + data[4:], "is not an IDX file of unsigned bytes"),  # float32
        (LABELS, lambda data: data[:8] + b"\x0a" + data[9:], "holds the label 10; labels are 0 to 9"),
        (LABELS, lambda data: idx_labels(np.zeros(6, np.uint8)), "has 7 images, but .* has 6 labels"),
        (IMAGES, lambda data: data[:-20], "is not a whole gzip file"),
        (IMAGES, lambda data: b"no gzip", "is not a whole gzip file"),
        (IMAGES, lambda data: gzip.compress(idx_labels(np.zeros(7, np.uint8))), "with 3 dimensions"),
        (IMAGES, lambda data: gzip.compress(idx_images(np.zeros((7, 27, 27), np.uint8))), "must be of one size"),
    ],
)
def test_damaged_idx_files_are_refused_in_a_sentence(
    idx: tuple[Path, dict[str, tuple[np.ndarray, np.ndarray]]],
    tmp_path: Path,
    name: str,
    change: Callable[[bytes], bytes | None],
    words: str,
) -> None:
    path = idx[0]
    data = change((path / name).read_bytes())
    if data is None:
        (path / name).unlink()
    else:
        (path / name).write_bytes(data)
    with pytest.raises(UserError, match=words) as refused:
        prepare(Mnist(source="mnist", path=path), tmp_path / "data")
    assert "\n" not in str(refused.value)
    assert everything_but(tmp_path / "data") == []


@pytest.mark.parametrize("source", [Mnist, Cifar10])
def test_a_missing_folder_is_refused(source: type[Mnist] | type[Cifar10], tmp_path: Path) -> None:
    name = source.model_fields["source"].annotation.__args__[0]
    with pytest.raises(UserError, match=r"data\.path .*absent does not exist; valid: .*[Ff]older"):
        prepare(source(source=name, path=tmp_path / "absent"), tmp_path / "data")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"data\.path .*empty has no file"):
        prepare(source(source=name, path=tmp_path / "empty"), tmp_path / "data")


# --- CIFAR-10 ---


def string(text: bytes) -> bytes:
    """What Python 2 made of a str."""
    return b"U" + bytes([len(text)]) + text if len(text) < 256 else b"T" + struct.pack("<i", len(text)) + text


def number(value: int) -> bytes:
    return b"K" + bytes([value]) if value < 256 else b"M" + struct.pack("<H", value)


def python_batch(pixels: np.ndarray, labels: np.ndarray) -> bytes:
    """A pickle of protocol 2 as Python 2's cPickle and an old numpy write it, opcode by opcode."""
    rows, columns = pixels.shape
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x05cnumpy\nndarray\nq\x06K\x00\x85q\x07U\x01b\x87Rq\x08"
        + (b"(K\x01" + number(rows) + number(columns) + b"\x86")
        + b"cnumpy\ndtype\nq\x09U\x02u1K\x00K\x01\x87Rq\x0a(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        + (string(pixels.tobytes()) + b"tb")
    )
    names = b"".join(string(b"image_s_%06d.png" % i) for i in range(rows))
    entries = (
        string(b"batch_label")
        + (b"q\x02" + string(b"training batch 1 of 5"))
        + (string(b"labels") + b"q\x03]q\x04(" + b"".join(number(int(label)) for label in labels) + b"e")
        + (string(b"data") + array)
        + (string(b"filenames") + b"]q\x0b(" + names + b"e")
    )
    return b"\x80\x02}q\x01(" + entries + b"u."


def binary_batch(pixels: np.ndarray, labels: np.ndarray) -> bytes:
    return b"".join(bytes([label]) + row.tobytes() for row, label in zip(pixels, labels, strict=True))


Batches = dict[str, tuple[np.ndarray, np.ndarray]]


@pytest.fixture
def batches() -> Batches:
    rng = np.random.default_rng(1)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    return {n: (rng.integers(256, size=(3, 3072), dtype=np.uint8), rng.integers(10, size=3)) for n in names}


def files(batches: Batches, version: str) -> dict[str, bytes]:
    if version == "py":
        found = {f"cifar-10-batches-py/{name}": python_batch(*batch) for name, batch in batches.items()}
        return found | {"cifar-10-batches-py/batches.meta": pickle.dumps({b"num_vis": 3072}, protocol=2)}
    found = {f"cifar-10-batches-bin/{name}.bin": binary_batch(*batch) for name, batch in batches.items()}
    return found | {"cifar-10-batches-bin/batches.meta.txt": b"airplane\n"}


def unpacked(folder: Path, contents: dict[str, bytes]) -> Path:
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def archive(path: Path, contents: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_the_pickles_here_are_what_python_reads_too(batches: Batches) -> None:
    pixels, labels = batches["test_batch"]
    data = python_batch(pixels, labels)
    expected = pickle.loads(data, encoding="bytes")
    found = plain_pickle.loads(data)
    assert found.keys() == expected.keys() == {b"batch_label", b"labels", b"data", b"filenames"}
    assert (found.pop(b"data") == expected.pop(b"data")).all()
    assert found == expected
    assert found[b"labels"] == labels.tolist()


@pytest.mark.parametrize("version", ["py", "bin"])
@pytest.mark.parametrize("packed", ["archive", "folder", "inner folder"])
def test_cifar_becomes_normalised_colours_row_by_row(
    batches: Batches, version: str, packed: str, tmp_path: Path
) -> None:
    contents = files(batches, version)
    if packed == "archive":
        path = archive(tmp_path / "cifar-10.tar.gz", contents)
    else:
        path = unpacked(tmp_path / "cifar", contents)
        path = path / f"cifar-10-batches-{version}" if packed == "inner folder" else path
    folder = prepare(Cifar10(source="cifar10", path=path), tmp_path / "data")
    assert arrow.describe(folder).task == ClassificationTask(n_features=3, n_classes=10)
    for split, names in {"train": [f"data_batch_{i}" for i in range(1, 6)], "val": ["test_batch"]}.items():
        features, labels = examples(folder, split)
        assert features.shape == (3 * len(names), 1024, 3)
        assert labels.tolist() == [int(label) for name in names for label in batches[name][1]]
        pixels = np.concatenate([batches[name][0] for name in names])
        for x, row, column, colour in [(0, 0, 0, 0), (1, 0, 31, 1), (2, 17, 5, 2)]:
            byte = pixels[x, 1024 * colour + 32 * row + column]
            expected = (byte / 255 - CIFAR_MEAN[colour]) / CIFAR_STD[colour]
            assert features[x, 32 * row + column, colour] == pytest.approx(expected, abs=1e-5)


class _Touch:
    """What a malicious pickle holds: a call of any function on loading."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_malicious_pickle_is_refused_and_nothing_runs(batches: Batches, protocol: int, tmp_path: Path) -> None:
    mark = tmp_path / "it ran"
    bomb = pickle.dumps({"data": _Touch(mark), "labels": [0]}, protocol=protocol)
    contents = files(batches, "py") | {"cifar-10-batches-py/data_batch_3": bomb}
    path = archive(tmp_path / "cifar.tar.gz", contents)
    with pytest.raises(UserError, match=r"data_batch_3 is no batch of CIFAR-10: it (names|holds)") as refused:
        prepare(Cifar10(source="cifar10", path=path), tmp_path / "data")
    assert "\n" not in str(refused.value)
    assert not mark.exists()
    assert everything_but(tmp_path / "data") == []


@pytest.mark.parametrize(
    "data",
    [
        b"cos\nsystem\n(S'true'\ntR.",
        b"(S'true'\nios\nsystem\n.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"cnumpy\nndarray\n(K\x01tR.",  # an allowed name, called in another way
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\ndtype\nK\x00\x85U\x01btR.",
        b"\x80\x02cnumpy\nndarray\n)\x81.",
        b"U\x04evil(K\x01K\x02tb.",  # state for what is no array
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
        b"\x82\x01.",  # a name from the extension registry
        b"Pid\n.",
        b"}(K\x01",  # no end
        b"q",
        b"",
        b"]q\x00.",
        b"0.",
        b"h\x07.",  # from an empty memo
        b"}]K\x01s.",  # a list as key
        b"})" + 400_000 * b"\x85" + b"K\x01s.",  # a key of tuples in tuples
        b"(" + b")" + 400_000 * b"\x85" + b"K\x01d.",
        b")" + 100_000 * b"\x85" + b")R.",  # a call of tuples in tuples
    ],
)
def test_pickles_of_anything_else_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        plain_pickle.loads(data)


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.9, 0.999])
def test_truncated_batches_are_refused(batches: Batches, cut: float, tmp_path: Path) -> None:
    for version, name in (("py", "cifar-10-batches-py/test_batch"), ("bin", "cifar-10-batches-bin/test_batch.bin")):
        contents = files(batches, version)
        contents[name] = contents[name][: int(cut * len(contents[name]))]
        path = unpacked(tmp_path / version, contents)
        with pytest.raises(UserError, match=r"test_batch(\.bin)? (is|must)") as refused:
            prepare(Cifar10(source="cifar10", path=path), tmp_path / "data")
        assert "\n" not in str(refused.value)
    assert everything_but(tmp_path / "data") == []


def test_archives_that_lead_elsewhere_are_refused(batches: Batches, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(binary_batch(*batches["test_batch"]))
    for name, link in (("../test_batch.bin", None), ("/test_batch.bin", None), ("in/test_batch.bin", "../secret")):
        path = archive(tmp_path / "cifar.tar.gz", files(batches, "bin"))
        with tarfile.open(path, "w:gz") as tar:
            member = tarfile.TarInfo(name)
            if link is not None:
                member.type, member.linkname = tarfile.SYMTYPE, link
            tar.addfile(member, io.BytesIO())
        with pytest.raises(UserError, match=r"is refused: its member .* leads elsewhere"):
            prepare(Cifar10(source="cifar10", path=path), tmp_path / "data")


def test_archives_that_are_none_or_incomplete_are_refused(batches: Batches, tmp_path: Path) -> None:
    contents = files(batches, "py")
    whole = archive(tmp_path / "whole.tar.gz", contents).read_bytes()
    del contents["cifar-10-batches-py/data_batch_4"]
    for name, data, words in (
        ("none.tar.gz", b"no archive", "is not a whole tar archive"),
        ("cut.tar.gz", whole[: len(whole) // 2], "is not a whole tar archive"),
        ("less.tar.gz", archive(tmp_path / "x.tar.gz", contents).read_bytes(), r"no member data_batch_4 or"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=words) as refused:
            prepare(Cifar10(source="cifar10", path=tmp_path / name), tmp_path / "data")
        assert "\n" not in str(refused.value)


def test_the_label_that_is_wrong_is_named() -> None:
    with pytest.raises(UserError, match="it holds the label -1; labels are 0 to 9"):
        _check_labels(np.array([3, -1, 9]), "it")


def test_labels_and_shapes_that_are_not_cifars_are_refused(batches: Batches, tmp_path: Path) -> None:
    pixels, labels = batches["test_batch"]
    for case, (data, words) in enumerate(
        [
            (python_batch(pixels, labels + 10), "holds the label 1[0-9]; labels are 0 to 9"),
            (python_batch(pixels[:, :300], labels), "must hold images of 3072 bytes with a label each"),
            (python_batch(pixels, labels[:2]), "must hold images of 3072 bytes with a label each"),
            (b"}U\x06labels]s.", "has no entry b'data'"),
        ]
    ):
        contents = files(batches, "py") | {"cifar-10-batches-py/data_batch_2": data}
        path = unpacked(tmp_path / str(case), contents)
        with pytest.raises(UserError, match=words):
            prepare(Cifar10(source="cifar10", path=path), tmp_path / "data")
