"""Checks a raw data set before it is built: every fault as one line that names the file and the fix."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from mpanet_jax.datasets import llcm, regdb, sysu_mm01
from mpanet_jax.datasets.builder import SPLITS, Track, no_progress
from mpanet_jax.datasets.raw import Report, decode_fault
from mpanet_jax.datasets.schema import INFRARED, VISIBLE, ImageRecord
from mpanet_jax.errors import UserError

DATASETS = {"sysu_mm01": sysu_mm01, "regdb": regdb, "llcm": llcm}
MODALITY_NAMES = {VISIBLE: "visible", INFRARED: "infrared"}


@dataclass
class Verification:
    """What was found: `faults` forbid building, `warnings` do not; `images[trial][split]` lists the images."""

    name: str
    source: Path
    images: dict[int, dict[str, list[ImageRecord]]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def verify(name: str, source: str | Path, *, trials: Sequence[int] = (1,), track: Track = no_progress) -> Verification:
    """Check folders, lists, identities, counts and companions of a raw data set, and decode every image once.

    Args:
      name: 'sysu_mm01', 'regdb' or 'llcm'.
      source: the raw folder.
      trials: which of RegDB's splits to check; (1,) for the others.
      track: shows a progress bar; see `builder.Track`.

    Raises:
      UserError: there is no such data set or folder. Everything else is in the result's `faults`.
    """
    if name not in DATASETS:
        raise UserError(f"data set '{name}': expected sysu_mm01, regdb or llcm")
    source = Path(source).expanduser()
    if not source.is_dir():
        raise UserError(f"--source {source}: no such folder; give the folder that holds the raw data set")
    dataset = DATASETS[name]
    found = Verification(name, source)
    for trial in trials:
        try:
            images = {s: dataset.list_images(source, s, trial=trial, report=found.faults.append) for s in SPLITS}
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be read ({error.strerror}); mend its permissions") from error
        found.images[trial] = images
        where = f"{source} trial {trial}" if name == "regdb" else str(source)
        _check_identities(where, images, found.faults.append)
        dataset.check_source(source, images, found.faults.append)
        _check_counts(where, images, dataset.PUBLISHED, found.warnings.append)
    _check_files(found, track)
    found.faults = list(dict.fromkeys(found.faults))  # the splits of one data set share faults
    return found


def require_sound(name: str, source: str | Path, *, trials: Sequence[int] = (1,), track: Track = no_progress) -> None:
    """Raise `UserError` with the first fault of a raw data set, if `verify` finds any."""
    faults = verify(name, source, trials=trials, track=track).faults
    if faults:
        more = f" ({len(faults)} faults; python scripts/prepare_data.py --dataset {name} --source {source} --check "
        raise UserError(faults[0] + (more + "lists them all)" if len(faults) > 1 else ""))


def format_counts(images: dict[str, list[ImageRecord]]) -> str:
    """A table of identities and images by camera and split."""
    cameras = sorted({(image.camid, image.modality) for split in images.values() for image in split})
    rows: list[tuple[str, ...]] = [
        ("camera", "", *(f"{s} {what}" for s in images for what in ("identities", "images")))
    ]
    for camid, modality in [*cameras, (None, VISIBLE), (None, INFRARED), (None, None)]:
        row = [str(camid or "all"), MODALITY_NAMES.get(modality, "both")]
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


def _check_identities(where: str, images: dict[str, list[ImageRecord]], report: Report) -> None:
    pids = {split: {image.pid for image in images[split]} for split in SPLITS}
    for pid in sorted(pids["train"] & pids["test"]):
        report(f"{where}: identity {pid} is in both the training and the test lists; remove it from one")
    for modality, other in ((VISIBLE, INFRARED), (INFRARED, VISIBLE)):
        for pid in sorted(pids["train"] - {i.pid for i in images["train"] if i.modality == other}):
            report(
                f"{where}: training identity {pid} has {MODALITY_NAMES[modality]} images only and training needs both "
                f"modalities; restore its {MODALITY_NAMES[other]} images or remove it from the training list"
            )


def _check_counts(where: str, images: dict[str, list[ImageRecord]], published: dict, warn: Report) -> None:
    for split in SPLITS:
        counts = (
            len({image.pid for image in images[split]}),
            sum(image.modality == VISIBLE for image in images[split]),
            sum(image.modality == INFRARED for image in images[split]),
        )
        if counts != published[split]:
            warn(
                f"{where}: {split} has {counts[0]:,} identities, {counts[1]:,} visible and {counts[2]:,} infrared "
                f"images; published are {published[split][0]:,}, {published[split][1]:,} and {published[split][2]:,}"
            )


def _check_files(found: Verification, track: Track) -> None:
    paths = sorted({image.path for trial in found.images.values() for split in trial.values() for image in split})
    # Threads suffice: Pillow decodes outside the interpreter's lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        faults = pool.map(lambda path: _file_fault(found.source, path), paths)
        found.faults += [fault for fault in track(faults, "checking images", len(paths)) if fault]


def _file_fault(source: Path, path: str) -> str | None:
    if not path.isprintable():  # covers bytes that are no UTF-8, which records cannot hold
        return f"{source}: the file name {path!r} is not printable UTF-8; rename the file"
    return decode_fault(source / path)
