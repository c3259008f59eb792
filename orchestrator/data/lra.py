"""Tasks of Long Range Arena (Tay et al. 2020, arXiv 2011.04006) from the files that its code reads.

IMDB's reviews and AAN's pairs of papers are sequences of bytes, cut to a length; Pathfinder's images are sequences of
pixels. ListOps is in `listops`, and the Image task's photographs are CIFAR-10's, in `images`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from orchestrator.data import arrow
from orchestrator.data.source import Source, SourcePath, cannot_be_read, digest, file_facts, read, require_folder
from orchestrator.errors import UserError

VOCAB_SIZE = 256
Labels = NDArray[np.int64]
# Folders of the release, by how long the paths are.
DIFFICULTIES = {"easy": "curv_baseline", "intermediate": "curv_contour_length_9", "hard": "curv_contour_length_14"}


def _tokens(text: bytes, max_length: int) -> bytes:
    """Bytes are tokens. NUL, which pads, is in no text worth reading."""
    return text.replace(b"\0", b"")[:max_length]


class Imdb(Source):
    """Film reviews, negative or positive, as bytes (Maas et al. 2011; the Text task of Long Range Arena).

    The official test reviews are held out, which have no validation set beside them.
    """

    source: Literal["imdb"]
    path: SourcePath = Field(description="Folder aclImdb, with {train,test}/{neg,pos}/*.txt.")
    max_length: int = Field(4096, ge=1, description="Bytes after which a review is cut.")

    @property
    def dataset_name(self) -> str:
        files = [file for split in ("train", "test") for file, _ in self._reviews(split)]
        return f"imdb-{digest((self.max_length, file_facts(files)))}"

    def _reviews(self, split: str) -> list[tuple[Path, int]]:
        """Files in order of their names, with labels."""
        require_folder(self.path, self)
        found = []
        for label, sentiment in enumerate(("neg", "pos")):
            folder = self.path / split / sentiment
            files = sorted(folder.glob("*.txt"))
            if not files:
                raise UserError(f"data.path {self.path} has no files {split}/{sentiment}/*.txt, as aclImdb has")
            found += [(file, label) for file in files]
        return found

    def prepare(self, folder: Path) -> None:
        splits: dict[arrow.Split, tuple[list[arrow.Documents], Labels]] = {}
        for split, name in zip(arrow.SPLITS, ("train", "test"), strict=True):
            reviews = self._reviews(name)
            documents = arrow.Documents(_tokens(read(file), self.max_length) for file, _ in reviews)
            splits[split] = [documents], np.array([label for _, label in reviews], np.int64)
        arrow.write_documents(folder, splits, VOCAB_SIZE, n_classes=2, origin=str(self.path))


class Aan(Source):
    """Pairs of papers of the ACL Anthology Network as bytes (the Retrieval task of Long Range Arena): is one cited?

    The test pairs are held out, or those meant for validation ("val": new_aan_pairs.eval.tsv).
    """

    source: Literal["aan"]
    path: SourcePath = Field(description="Folder of new_aan_pairs.{train,eval,test}.tsv, called tsv_data there.")
    held_out: Literal["test", "val"] = Field("test", description="Which pairs are held out.")
    max_length: int = Field(4096, ge=1, description="Bytes after which each paper is cut.")

    @property
    def dataset_name(self) -> str:
        return f"aan-{digest((self.max_length, file_facts(self._files())))}"

    def _files(self) -> list[Path]:
        require_folder(self.path, self)
        names = ("train", "eval" if self.held_out == "val" else "test")
        files = [self.path / f"new_aan_pairs.{name}.tsv" for name in names]
        for file in files:
            if not file.is_file():
                raise UserError(f"data.path {self.path} has no file {file.name}, as Long Range Arena calls it")
        return files

    def prepare(self, folder: Path) -> None:
        splits = {split: self._read(file) for split, file in zip(arrow.SPLITS, self._files(), strict=True)}
        arrow.write_documents(folder, splits, VOCAB_SIZE, n_classes=2, origin=str(self.path))

    def _read(self, file: Path) -> tuple[list[arrow.Documents], Labels]:
        first, second, labels = arrow.Documents(), arrow.Documents(), []
        for label, text, other in _pairs(file):
            labels.append(label)
            first.add(_tokens(text, self.max_length))
            second.add(_tokens(other, self.max_length))
        if not labels:
            raise UserError(f"{file} has no pairs")
        return [first, second], np.array(labels, np.int64)


def _pairs(file: Path) -> Iterator[tuple[int, bytes, bytes]]:
    """Label and texts of each line, which has a label, two ids and two texts, with tabs between and no quoting."""
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                fields = line.rstrip(b"\r\n").split(b"\t")
                if len(fields) != 5 or fields[0] not in (b"0", b"1", b"0.0", b"1.0"):
                    raise UserError(
                        f"line {number} of {file} must be a label, 0 or 1, two ids and two texts with tabs between"
                    )
                yield int(fields[0][:1]), fields[3], fields[4]
    except OSError as error:
        raise cannot_be_read(error) from error


class Pathfinder(Source):
    """Images with two dots: does a dashed path join them? Long Range Arena's Pathfinder, as sequences of grey values.

    An image of 32 x 32 pixels is 1,024 values in [-1, 1], row by row. A tenth of the images is held out and another one
    left for validation, the same for every run; the release has no such parts, and draws differ from code to code.
    Empty files, of which the release has one, are left out as there. CompreSSM's code takes the easy images, that of S4
    the hard ones.
    """

    source: Literal["pathfinder"]
    path: SourcePath = Field(description="Folder pathfinder32 of the release, or that of a larger size.")
    difficulty: Literal["easy", "intermediate", "hard"] = Field(
        "hard", description="Which images: curv_baseline, curv_contour_length_9 or curv_contour_length_14."
    )
    held_out: Literal["test", "val"] = Field("test", description="Which tenth is held out.")

    @property
    def dataset_name(self) -> str:
        """Changes with the metadata alone: looking at 200,000 images would take longer than reading their dataset."""
        return f"pathfinder-{digest((self.held_out, file_facts(self._metadata())))}"

    @property
    def _folder(self) -> Path:
        return self.path / DIFFICULTIES[self.difficulty]

    def _metadata(self) -> list[Path]:
        """Text files, whatever they are called, one per folder of images."""
        require_folder(self.path, self)
        files = sorted(self._folder.glob("metadata/*.npy"), key=lambda file: (len(file.stem), file.stem))
        if not files:
            raise UserError(
                f"data.path {self.path} has no files {self._folder.name}/metadata/*.npy, as Long Range Arena's "
                "pathfinder32 has"
            )
        return files

    def _images(self) -> list[tuple[Path, int]]:
        found = []
        for file in self._metadata():
            for number, line in enumerate(read(file).decode(errors="replace").splitlines(), 1):
                fields = line.split()
                if len(fields) < 4 or fields[3] not in ("0", "1"):
                    raise UserError(f"line {number} of {file} must begin with folder, file, number, and label 0 or 1")
                place = PurePosixPath(fields[0], fields[1])
                if place.is_absolute() or ".." in place.parts:
                    raise UserError(f"line {number} of {file} leads out of {self._folder}: {place}")
                found.append((self._folder / place, int(fields[3])))
        return found

    def prepare(self, folder: Path) -> None:
        pixels, labels = _read_images(self._images())
        tenth = len(labels) // 10
        if not tenth:
            raise UserError(f"data.path {self.path} has {len(labels)} images of {self._folder.name}; 10 are needed")
        order = np.random.Generator(np.random.Philox(key=[0, 0])).permutation(len(labels))
        parts = {"train": order[2 * tenth :], "val": order[tenth : 2 * tenth], "test": order[:tenth]}
        splits: dict[arrow.Split, tuple[NDArray[np.float32], Labels]] = {}
        for split, rows in (("train", parts["train"]), ("val", parts[self.held_out])):
            features_XL1 = pixels[rows].reshape(len(rows), -1, 1).astype(np.float32)
            features_XL1 /= 127.5
            features_XL1 -= 1
            splits[split] = features_XL1, labels[rows]  # type: ignore[index]
        arrow.write_examples(folder, splits, n_classes=2, origin=str(self._folder))


def _read_images(files: list[tuple[Path, int]]) -> tuple[NDArray[np.uint8], Labels]:
    """Grey values (images, rows, columns) and labels of all files that are not empty."""
    from PIL import Image

    images: list[NDArray[np.uint8]] = []
    labels = []
    for path, label in files:
        try:
            if not path.stat().st_size:
                continue
            with Image.open(path, formats=["PNG"]) as image:
                images.append(np.asarray(image.convert("L"), np.uint8))
        except FileNotFoundError as error:
            raise cannot_be_read(error) from error
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"{path} is not a whole image: {error}") from error
        if images[-1].shape != images[0].shape:
            sizes = " and ".join(f"{s[1]} x {s[0]}" for s in (images[0].shape, images[-1].shape))
            raise UserError(f"{path} is of another size than the images before it, {sizes}")
        labels.append(label)
    return np.array(images, np.uint8), np.array(labels, np.int64)
