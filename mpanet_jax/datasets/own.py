"""Your own cameras: a folder of images, and an `images.csv` that says who is in each image and what it is for.

    path,pid,camid,modality,split
    night/0001.png,anna,3,infrared,train

The file is UTF-8 and has this header. Paths are relative to the folder. pid is any text; camid is a number, or empty if
it is unknown; modality is visible or infrared; split is train, val, test, query or gallery. Other columns are ignored.
See docs/data.md.
"""

import csv
import io
import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np

from mpanet_jax.datasets.dataset import Dataset, Evaluation, Images, rows_of
from mpanet_jax.datasets.raw import Report, raise_fault, read_text
from mpanet_jax.datasets.schema import INFRARED, MODALITY_NAMES, UNKNOWN, VISIBLE, ImageRecord, Split
from mpanet_jax.embeddings import Embeddings
from mpanet_jax.protocol import (
    Comparison,
    Protocol,
    Setting,
    both_directions,
    compare_across_cameras,
    everything,
    visible_and_infrared,
)
from mpanet_jax.settings import DatasetSettings
from mpanet_jax.settings_base import one_of, setting

CSV_FILE = "images.csv"
COLUMNS = ("path", "pid", "camid", "modality", "split")
PARTS = {"train": ("train", "val"), "test": ("test", "query", "gallery")}  # split that is built → its parts in the CSV
MODALITIES = {name: modality for modality, name in MODALITY_NAMES.items()}
LARGEST_CAMID = 2**31 - 1
_EXPECTED = f"expected the header {','.join(COLUMNS)}"


@dataclass(frozen=True)
class OwnSettings(DatasetSettings):
    """The settings of a CSV data set: the common ones and `drop_unpaired`."""

    name: str = setting("own", "the data set", one_of("own"))
    drop_unpaired: bool = setting(False, "leave out training identities that have images of one modality only")


@dataclass(frozen=True)
class OwnProtocol(Protocol):
    """Both directions, all images of one modality against all of the other.

    A query meets no image of its own identity and camera, if its camera is known.
    """

    name = "own"

    def comparisons(self, query: Embeddings, gallery: Embeddings) -> list[Comparison]:
        return [
            compare_across_cameras(one, other, [Setting(f"own/{direction}", everything(other))])
            for direction, one, other in both_directions(*visible_and_infrared(query, gallery, {}))
        ]


@dataclass(frozen=True)
class QueryGalleryProtocol(Protocol):
    """The images of part 'query' against those of part 'gallery', whatever their modalities.

    A query meets no image of its own identity and camera, if its camera is known.
    """

    name = "query_gallery"

    def comparisons(self, query: Embeddings, gallery: Embeddings) -> list[Comparison]:
        return [compare_across_cameras(query, gallery, [Setting("own/query_to_gallery", everything(gallery))])]


class Own(Dataset):
    """Images of your own cameras, listed in images.csv."""

    name = "own"
    licence = "The images belong to whoever trained the model; ask them what may be done with it."
    settings_class = OwnSettings
    companions = (CSV_FILE,)
    protocols = (OwnProtocol, QueryGalleryProtocol)
    has_validation = True

    @property
    def options(self) -> str:
        assert isinstance(self.settings, OwnSettings)
        return " --drop_unpaired" if self.settings.drop_unpaired else ""

    def list_images(self, source: Path, split: str, report: Report = raise_fault) -> list[ImageRecord]:
        """The images of a split, ordered by identity, camera, modality and path; see `Dataset.list_images`.

        With `drop_unpaired`, training identities without images in one modality are left out.
        """
        images = [image for image in read_csv(Path(source), report) if image.part in PARTS[split]]
        assert isinstance(self.settings, OwnSettings)
        if split == "train" and self.settings.drop_unpaired:
            dropped = set(_unpaired(images))
            images = [image for image in images if image.pid_name not in dropped]
        return sorted(images, key=lambda image: (image.pid, image.camid, image.modality, image.path))

    def check_identities(self, source: Path, images: Images, report: Report) -> None:
        """Reports identities in two parts that must not share any, unpaired identities, and parts that test nothing."""
        path, everything_listed = Path(source) / CSV_FILE, [image for split in images.values() for image in split]
        if not everything_listed and _is_unreadable(Path(source)):
            return  # `list_images` has said why
        for message in (
            *_shared_identities(everything_listed),
            *_unpaired_faults(images["train"]),
            *_untestable(everything_listed),
        ):
            report(f"{path}{message}")

    def warnings(self, source: Path, images: Images) -> list[str]:
        """A line for each training identity that `drop_unpaired` has left out, with its name."""
        kept = {image.path for image in images["train"]}
        listed = read_csv(Path(source), report=lambda fault: None)
        return [
            f"{Path(source) / CSV_FILE}:{image.line}: training identity '{name}' has {MODALITY_NAMES[image.modality]} "
            "images only and is left out"
            for name, image in _unpaired(listed).items()
            if image.path not in kept
        ]

    def evaluations(self, split: Split, directory: Path) -> list[Evaluation]:
        test, query, gallery = (np.flatnonzero(split.parts == part) for part in PARTS["test"])
        found = _both_modalities(split, test) if len(test) else []
        return [*found, Evaluation(query, gallery, QueryGalleryProtocol())] if len(query) else found

    def validations(self, split: Split) -> list[Evaluation]:
        return _both_modalities(split, np.arange(len(split)))


def _both_modalities(split: Split, rows: np.ndarray) -> list[Evaluation]:
    visible, infrared = (np.intersect1d(rows, rows_of(split, modality)) for modality in (VISIBLE, INFRARED))
    return [Evaluation(visible, infrared, OwnProtocol())]


# ---- images.csv ----


def read_csv(source: Path, report: Report, file: str = CSV_FILE) -> list[ImageRecord]:
    """Reads a list of images.

    Args:
      source: the folder of images.
      report: told each fault in one line, with its line's number (the header is line 1); the image is left out.
      file: the list's name in the folder.

    Returns:
      The images in the list's order. An identity's pid is its place among the sorted names, from 0.
    """
    path = source / file
    text = read_text(
        path,
        report,
        missing=f"name the folder that holds it as the source, or write it ({_EXPECTED}, then a line for each image)",
        no_text="save it as UTF-8",
    )
    if not text:
        if path.is_file() and not path.stat().st_size:  # `read_text` has reported anything else
            report(f"{path}:1: empty; {_EXPECTED}")
        return []
    rows = csv.reader(io.StringIO(text, newline=""))
    images: dict[str, ImageRecord] = {}
    spelled: dict[str, ImageRecord] = {}  # by the identity's name, in Unicode's composed form
    try:
        header = [name.strip() for name in next(rows, [])]
        missing = [name for name in COLUMNS if name not in header]
        twice = [name for name in COLUMNS if header.count(name) > 1]
        if missing or twice:
            what = f"no column {', '.join(missing)}" if missing else f"column {', '.join(twice)} comes twice"
            commas = ", with commas between the columns" if len(header) == 1 else ""
            report(f"{path}:1: {what}; {_EXPECTED}{commas}")
            return []
        end = rows.line_num
        for row in rows:
            line, end = end + 1, rows.line_num  # a quoted field may hold line breaks
            if not any(field.strip() for field in row):
                continue
            where = f"{path}:{line}"
            if len(row) != len(header):
                report(f"{where}: {len(row)} fields, but the header has {len(header)}; correct the line")
                continue
            fields = {name: value.strip() for name, value in zip(header, row, strict=True)}
            image, fault = _image(source, fields, line)
            if image is not None and image.path in images:
                fault = f"path '{image.path}' is in line {images[image.path].line} too; remove one of the two"
            elif image is not None:
                first = spelled.setdefault(unicodedata.normalize("NFC", image.pid_name), image)
                if first.pid_name != image.pid_name:
                    fault = (
                        f"pid '{image.pid_name}' looks like that of line {first.line}, but has other characters "
                        f"({image.pid_name!a} and {first.pid_name!a}); write both alike"
                    )
            if fault or image is None:
                report(f"{where}: {fault}")
            else:
                images[image.path] = image
    except csv.Error as error:
        report(f"{path}:{rows.line_num}: not CSV ({error}); correct the line")
    numbers = {name: number for number, name in enumerate(sorted({image.pid_name for image in images.values()}))}
    return [replace(image, pid=numbers[image.pid_name]) for image in images.values()]


def _image(source: Path, fields: dict[str, str], line: int) -> tuple[ImageRecord | None, str]:
    """The image that a line describes, or None and what is wrong with it."""
    path, pid, camid = (fields[name] for name in ("path", "pid", "camid"))
    relative = PurePosixPath(path)
    if not path or not pid:
        return None, f"{'path' if not path else 'pid'} is empty; fill it in"
    if not path.isprintable():
        return None, f"path {path!r} is not printable; rename the file"
    if any(unicodedata.category(character) in ("Cc", "Zl", "Zp") for character in pid):
        return None, f"pid {pid!r} holds a line break or another control character; leave it out"
    if relative.is_absolute() or ".." in relative.parts:
        return None, f"path '{path}' points outside {source}; paths must be relative to the folder of {CSV_FILE}"
    if camid and not (camid.isascii() and camid.isdigit() and int(camid[:20]) <= LARGEST_CAMID):
        return (
            None,
            f"camid {camid[:99]!r}; expected a number from 0 to {LARGEST_CAMID}, or nothing where it is unknown",
        )
    if fields["modality"] not in MODALITIES:
        return None, f"modality {fields['modality'][:99]!r}; expected {' or '.join(MODALITIES)}"
    parts = [part for parts in PARTS.values() for part in parts]
    if fields["split"] not in parts:
        return None, f"split {fields['split'][:99]!r}; expected one of {', '.join(parts)}"
    if not os.path.isfile(source / path):  # Path.is_file raises for names that are too long
        slashes = ", or write '/' between the parts of its path" if "\\" in path else ""
        return None, f"there is no image {str(source / path)[:300]}; restore the file or remove the line{slashes}"
    modality, number = MODALITIES[fields["modality"]], int(camid) if camid else UNKNOWN
    return ImageRecord(str(relative), UNKNOWN, number, modality, fields["split"], pid, line), ""


def _is_unreadable(source: Path) -> bool:
    """Whether faults are the reason why images.csv lists no image."""
    faults: list[str] = []
    return not read_csv(source, faults.append) and bool(faults)


def _by_name(images: Iterable[ImageRecord]) -> dict[str, list[ImageRecord]]:
    """{identity's name: its images in the order of their lines}."""
    found = defaultdict(list)
    for image in sorted(images, key=lambda image: image.line):
        found[image.pid_name].append(image)
    return found


def _shared_identities(images: Iterable[ImageRecord]) -> Iterator[str]:
    """Faults: identities that are in more than one of train, val and the test split's three parts."""
    for name, of_pid in _by_name(images).items():
        first: dict[str, ImageRecord] = {}
        for image in of_pid:
            first.setdefault(image.part if image.part in PARTS["train"] else "test", image)
        if len(first) > 1:
            one, other = sorted(first.values(), key=lambda image: image.line)[:2]
            yield (
                f":{other.line}: pid '{name}' is in {other.part}, and in {one.part} (line {one.line}); "
                "an identity must be in one of train, val and the test set only"
            )


def _unpaired(images: Iterable[ImageRecord]) -> dict[str, ImageRecord]:
    """{identity's name: its first image} for training identities whose images are all of one modality."""
    by_name = _by_name(image for image in images if image.part in PARTS["train"])
    return {name: of_pid[0] for name, of_pid in by_name.items() if len({image.modality for image in of_pid}) == 1}


def _unpaired_faults(images: Iterable[ImageRecord]) -> Iterator[str]:
    for name, image in _unpaired(images).items():
        yield (
            f":{image.line}: training identity '{name}' has {MODALITY_NAMES[image.modality]} images only, and training "
            "needs both modalities; complete it, remove it, or leave all such identities out with drop_unpaired"
        )


def _untestable(images: list[ImageRecord]) -> Iterator[str]:
    """Faults: parts without images, and tests in which no query can have a match."""
    visible, infrared, both = (_cameras(images, modalities) for modalities in ([VISIBLE], [INFRARED], MODALITY_NAMES))
    query, gallery = both["query"], both["gallery"]
    if not both["train"]:
        yield ": no image of split train; training needs some"
    if not both["test"] and not (query or gallery):
        yield ": no image of split test, nor of query and gallery; evaluation needs some"
    if bool(query) != bool(gallery):
        empty, other = ("gallery", "query") if query else ("query", "gallery")
        yield f": images of split {other} but none of {empty}; the two go together"
    elif query and not query.keys() & gallery.keys():
        yield ": no identity is in query and in gallery; no query would have a match"
    elif query and not _can_meet(query, gallery):
        yield f": no identity is in query and, from another camera, in gallery; {_OWN_CAMERA}"
    for part in ("test", "val"):
        if both[part] and not visible[part].keys() & infrared[part].keys():
            yield f": no identity of split {part} has images of both modalities; no query would have a match"
        elif both[part] and not _can_meet(visible[part], infrared[part]):
            yield f": no identity of split {part} has images of both modalities from two cameras; {_OWN_CAMERA}"


_OWN_CAMERA = (
    "no query would have a match, as it meets no image of its own identity and camera; correct camid, or leave it empty"
)

Cameras = dict[str, set[int]]  # identity's name → the cameras of its images


def _cameras(images: Iterable[ImageRecord], modalities: Iterable[int]) -> dict[str, Cameras]:
    """The cameras of the images of some modalities, for each part."""
    found: dict[str, Cameras] = {part: defaultdict(set) for parts in PARTS.values() for part in parts}
    for image in images:
        if image.modality in modalities:
            found[image.part][image.pid_name].add(image.camid)
    return found


def _can_meet(one: Cameras, other: Cameras) -> bool:
    """Whether an identity has images in both that are not of the same known camera."""
    cameras = [one[name] | other[name] for name in one.keys() & other.keys()]
    return any(len(of_identity) > 1 or UNKNOWN in of_identity for of_identity in cameras)
