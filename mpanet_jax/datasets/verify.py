"""Checks a raw data set before it is built; every fault is one line that names the file and the fix."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from mpanet_jax.datasets.builder import Track, no_progress
from mpanet_jax.datasets.dataset import SPLITS, Dataset, Images
from mpanet_jax.datasets.raw import decode_fault
from mpanet_jax.datasets.schema import INFRARED, MODALITY_NAMES, UNKNOWN, VISIBLE
from mpanet_jax.errors import UserError


@dataclass
class Verification:
    """What a check has found.

    Attributes:
      source: the raw folder.
      images: {variant's title: {split: its images}}.
      faults: lines; with any of them the data set is not built.
      warnings: lines about what is unusual but no fault.
    """

    source: Path
    images: dict[str, Images] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def verify(variants: Sequence[Dataset], source: str | Path, *, track: Track = no_progress) -> Verification:
    """Checks folders, lists, identities, counts and companions of a raw data set, and decodes every image once.

    Args:
      variants: the data set, or several of its variants.
      source: the raw folder.
      track: shows a progress bar; see `builder.Track`.

    Returns:
      The images, the faults and the warnings.

    Raises:
      UserError: there is no such folder, or a part of it cannot be read.
    """
    source = Path(source).expanduser()
    if not source.is_dir():
        raise UserError(f"{source}: no such folder; give the folder that holds the raw data set")
    found = Verification(source)
    for dataset in variants:
        try:
            images = {split: dataset.list_images(source, split, found.faults.append) for split in SPLITS}
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be read ({error.strerror}); mend its permissions") from error
        found.images[dataset.title] = images
        dataset.check_identities(source, images, found.faults.append)
        dataset.check_source(source, images, found.faults.append)
        found.warnings += dataset.warnings(source, images)
    _check_files(found, track)
    found.faults = list(dict.fromkeys(found.faults))  # both splits may report the same fault
    return found


def require_sound(dataset: Dataset, source: str | Path, *, track: Track = no_progress) -> None:
    """Checks a raw data set by `verify`.

    Raises:
      UserError: it has faults; the message is the first one and the command that lists all.
    """
    found = verify([dataset], source, track=track)
    if found.faults:
        more = (
            f" ({len(found.faults)} faults; python scripts/prepare_data.py --dataset {dataset.name} --source {source}"
        )
        more += f"{dataset.options} --check lists them all)"
        raise UserError(found.faults[0] + (more if len(found.faults) > 1 else ""))


def format_counts(images: Images) -> str:
    """A table, as text, of the numbers of identities and images by camera and split."""
    cameras = sorted({(image.camid, image.modality) for split in images.values() for image in split})
    rows: list[tuple[str, ...]] = [
        ("camera", "", *(f"{s} {what}" for s in images for what in ("identities", "images")))
    ]
    for camid, modality in [*cameras, (None, VISIBLE), (None, INFRARED), (None, None)]:
        row = ["all" if camid is None else _camera(camid), "both" if modality is None else MODALITY_NAMES[modality]]
        for split in images.values():
            kept = [i for i in split if camid in (None, i.camid) and modality in (None, i.modality)]
            row += [f"{len({i.pid for i in kept}):,}", f"{len(kept):,}"]
        rows.append(tuple(row))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(c.ljust(w) if n < 2 else c.rjust(w) for n, (c, w) in enumerate(zip(r, widths, strict=True)))
        for r in rows
    ]
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1:-3], rule, *lines[-3:]])


def _camera(camid: int) -> str:
    return "unknown" if camid == UNKNOWN else str(camid)


def _check_files(found: Verification, track: Track) -> None:
    images = {image.path: image for of in found.images.values() for split in of.values() for image in split}
    paths = sorted(images)
    # Threads are enough: Pillow releases Python's lock while it decodes.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        faults = zip(paths, pool.map(lambda path: _file_fault(found.source, path), paths), strict=True)
        for path, fault in track(faults, "checking images", len(paths)):
            if fault:
                found.faults.append(fault + (f" (line {line} of images.csv)" if (line := images[path].line) else ""))


def _file_fault(source: Path, path: str) -> str | None:
    if not path.isprintable():  # bytes that are no UTF-8 are not printable either, and records cannot hold them
        return f"{source}: the file name {path!r} is not printable UTF-8; rename the file"
    return decode_fault(source / path)
