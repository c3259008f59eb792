"""Images as sequences of pixels: MNIST and Fashion-MNIST from IDX files, CIFAR-10 from its archives, digits.

Shapes: X examples, L pixels, H rows, W columns, C colours.
"""

from __future__ import annotations

import gzip
import tarfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from orchestrator.data import arrow, plain_pickle
from orchestrator.data.source import Source, SourcePath, digest, file_facts, read, require_folder
from orchestrator.errors import UserError

Features = NDArray[np.float32]
Labels = NDArray[np.int64]
Pixels = NDArray[np.uint8]

# What each colour in [0, 1] is shifted and divided by, as in CompreSSM's code. The deviations there are means over
# images; over all pixels, as in the S4 repository, they are 0.247, 0.243 and 0.261.
CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2023, 0.1994, 0.2010)
CIFAR_ROW = 3 * 32 * 32
_BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "val": ["test_batch"]}


class Digits(Source):
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, as sequences of 64 grey values in [0, 1]."""

    source: Literal["digits"]

    @property
    def dataset_name(self) -> str:
        return "digits"

    def prepare(self, folder: Path) -> None:
        from sklearn.datasets import load_digits  # takes seconds; only a first run needs it

        images, labels = load_digits(return_X_y=True)
        features = (images / 16).astype(np.float32)[:, :, None]
        order = np.random.default_rng(0).permutation(len(labels))
        held_out, kept = order[: len(labels) // 5], order[len(labels) // 5 :]
        arrow.write_examples(
            folder,
            {
                "train": (features[kept], labels[kept].astype(np.int64)),
                "val": (features[held_out], labels[held_out].astype(np.int64)),
            },
            n_classes=10,
            origin="sklearn.datasets.load_digits",
        )


class _IdxImages(Source):
    path: SourcePath = Field(description="Folder of the four IDX files, plain or gzipped.")

    @property
    def dataset_name(self) -> str:
        return f"{type(self).__name__.lower()}-{digest(file_facts(self._files()))}"

    def _files(self) -> list[Path]:
        """Images and labels to train on, then those held out."""
        require_folder(self.path, self)
        kinds = [(split, kind) for split in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
        return [_find_idx(self.path, f"{split}-{kind}") for split, kind in kinds]

    def prepare(self, folder: Path) -> None:
        files = self._files()
        train, held_out = _read_idx_pair(*files[:2]), _read_idx_pair(*files[2:])
        if train[0].shape[1:] != held_out[0].shape[1:]:
            sizes = f"{train[0].shape[1]} pixels, those of {files[2]} {held_out[0].shape[1]}"
            raise UserError(f"the images of {files[0]} have {sizes}; they must be of one size")
        arrow.write_examples(folder, {"train": train, "val": held_out}, n_classes=10, origin=str(self.path))


class Mnist(_IdxImages):
    """MNIST's handwritten digits of 28 x 28 pixels, row by row as sequences of 784 grey values in [0, 1].

    The official test images (t10k) are held out.
    """

    source: Literal["mnist"]


class FashionMnist(_IdxImages):
    """Fashion-MNIST (arXiv 1708.07747): clothes of ten kinds, in MNIST's format and read as MNIST is."""

    source: Literal["fashion_mnist"]


def _find_idx(folder: Path, name: str) -> Path:
    dotted = name.replace("-idx", ".idx")  # as some archives unpack
    for path in (folder / f"{stem}{suffix}" for stem in (name, dotted) for suffix in ("", ".gz")):
        if path.is_file():
            return path
    raise UserError(f"data.path {folder} has no file {name} or {name}.gz, as MNIST's IDX files are called")


def _read_idx_pair(images: Path, labels: Path) -> tuple[Features, Labels]:
    """Features (X, L, 1) in [0, 1] and labels (X,)."""
    pixels_XHW, labels_X = read_idx(images, 3), read_idx(labels, 1)
    if len(pixels_XHW) != len(labels_X):
        raise UserError(f"{images} has {len(pixels_XHW)} images, but {labels} has {len(labels_X)} labels")
    if not len(labels_X):
        raise UserError(f"{images} has no images")
    _check_labels(labels_X, labels)
    features_XL1 = pixels_XHW.reshape(len(pixels_XHW), -1, 1).astype(np.float32)
    features_XL1 /= 255
    return features_XL1, labels_X.astype(np.int64)


def read_idx(path: Path, dimensions: int) -> Pixels:
    """The array of an IDX file of unsigned bytes (yann.lecun.com/exdb/mnist), uint8 with so many dimensions.

    The header is four bytes (0, 0, 8 for unsigned bytes, number of dimensions) and a big-endian size for each.

    Raises:
        UserError: the file cannot be read, is of another kind, or shorter or longer than its header says.
    """
    data = read(path)
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path} is not a whole gzip file: {error}") from error
    header = 4 + 4 * dimensions
    if len(data) < header or data[:4] != bytes([0, 0, 8, dimensions]):
        raise UserError(f"{path} is not an IDX file of unsigned bytes with {dimensions} dimensions")
    shape = tuple(int(size) for size in np.frombuffer(data, ">u4", dimensions, offset=4))
    expected = int(np.prod(shape, dtype=object))
    if len(data) - header != expected:
        raise UserError(f"{path} holds {len(data) - header} bytes after its header, which announces {expected}")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


class Cifar10(Source):
    """CIFAR-10's photographs of 32 x 32 pixels, row by row as sequences of 1,024 pixels of three colours.

    Each colour is taken from [0, 1] to mean 0 and about unit deviation, as in CompreSSM's code (the sCIFAR task); the
    LRA benchmark's Image task has grey values instead. The official test batch is held out. Both versions are read, of
    which the Python one is a pickle that is not let run anything.
    """

    source: Literal["cifar10"]
    path: SourcePath = Field(
        description="cifar-10-python.tar.gz, cifar-10-binary.tar.gz, or the folder with what was in it."
    )

    @property
    def dataset_name(self) -> str:
        facts = file_facts([self.path] if self.path.is_file() else sorted(self._folder().glob("*_batch*")))
        return f"cifar10-{digest(facts)}"

    def prepare(self, folder: Path) -> None:
        files = _from_archive(self.path) if self.path.is_file() else _from_folder(self._folder())
        splits: dict[arrow.Split, tuple[Features, Labels]] = {}
        for split in arrow.SPLITS:
            pixels, labels = zip(*(_read_batch(*files[name]) for name in _BATCHES[split]), strict=True)
            splits[split] = _colours(np.concatenate(pixels)), np.concatenate(labels)
        arrow.write_examples(folder, splits, n_classes=10, origin=str(self.path))

    def _folder(self) -> Path:
        require_folder(self.path, self)
        for folder in (self.path, self.path / "cifar-10-batches-py", self.path / "cifar-10-batches-bin"):
            if any(folder.glob("data_batch_1*")):
                return folder
        raise UserError(f"data.path {self.path} has no file data_batch_1 or data_batch_1.bin, as CIFAR-10's are called")


Named = dict[str, tuple[str, bytes]]
"""Batches by name without suffix: what to call the file in a message, and its content."""


def _wanted() -> list[str]:
    return [name for names in _BATCHES.values() for name in names]


def _from_folder(folder: Path) -> Named:
    files = {}
    for name in _wanted():
        path = folder / f"{name}.bin"
        path = path if path.is_file() else folder / name
        if not path.is_file():
            raise UserError(f"data.path {folder} has no file {name} or {name}.bin, as CIFAR-10's are called")
        files[name] = str(path), read(path)
    return files


def _from_archive(path: Path) -> Named:
    """Nothing is unpacked: members are read into memory, and only plain files with the right names."""
    files: Named = {}
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                place = PurePosixPath(member.name)
                if place.is_absolute() or ".." in place.parts or member.issym() or member.islnk():
                    raise UserError(f"data.path {path} is refused: its member {member.name} leads elsewhere")
                name = place.name.removesuffix(".bin")
                content = archive.extractfile(member)
                if name in _wanted() and content is not None:
                    files[name] = f"{path}, {member.name}", content.read()
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise UserError(f"data.path {path} is not a whole tar archive: {' '.join(str(error).split())}") from error
    if missing := [name for name in _wanted() if name not in files]:
        raise UserError(f"data.path {path} has no member {missing[0]} or {missing[0]}.bin, as CIFAR-10's are called")
    return files


def _read_batch(name: str, data: bytes) -> tuple[Pixels, Labels]:
    """Pixels (X, 3072), all red ones before all green and all blue, and labels (X,)."""
    pixels, labels = _read_binary(name, data) if name.endswith(".bin") else _read_pickle(name, data)
    if pixels.ndim != 2 or pixels.shape[1] != CIFAR_ROW or labels.shape != (len(pixels),) or not len(pixels):
        raise UserError(f"{name} must hold images of {CIFAR_ROW} bytes with a label each")
    _check_labels(labels, name)
    return pixels, labels.astype(np.int64)


def _read_binary(name: str, data: bytes) -> tuple[Pixels, NDArray[np.uint8]]:
    if len(data) % (1 + CIFAR_ROW):
        raise UserError(f"{name} is truncated: its {len(data)} bytes are no multiple of {1 + CIFAR_ROW}, an image's")
    rows = np.frombuffer(data, np.uint8).reshape(-1, 1 + CIFAR_ROW)
    return rows[:, 1:], rows[:, 0]


def _read_pickle(name: str, data: bytes) -> tuple[Pixels, NDArray[np.int64]]:
    try:
        batch = plain_pickle.loads(data)
        return np.asarray(batch[b"data"], np.uint8), np.asarray(batch[b"labels"], np.int64)
    except KeyError as error:
        raise UserError(f"{name} is no batch of CIFAR-10: it has no entry {error}") from error
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{name} is no batch of CIFAR-10: {error}") from error


def _check_labels(labels: NDArray[np.integer], name: object) -> None:
    wrong = labels[(labels < 0) | (labels > 9)]
    if wrong.size:
        raise UserError(f"{name} holds the label {int(wrong[0])}; labels are 0 to 9")


def _colours(pixels: Pixels) -> Features:
    """Bytes (X, 3072), colour by colour, as normalised features (X, 1024, 3)."""
    features_XLC = np.ascontiguousarray(pixels.reshape(-1, 3, 1024).transpose(0, 2, 1)).astype(np.float32)
    features_XLC /= 255
    features_XLC -= np.array(CIFAR_MEAN, np.float32)
    features_XLC /= np.array(CIFAR_STD, np.float32)
    return features_XLC
