"""Readers of raw data sets: identity lists, index files, image folders and image files.

The readers call `report` with each fault, in one line: the file, what was expected, the fix. With `raise_fault` the
first fault stops them, as when a data set is built; with a list's `append` they go on, and `verify` gets all faults.
"""

import io
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, UnidentifiedImageError

from mpanet_jax.errors import UserError

Report = Callable[[str], object]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")
_STORED_AS_THEY_ARE = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")  # JPEG and PNG signatures


def raise_fault(message: str) -> None:
    """The `report` that stops at the first fault: raises `UserError(message)`."""
    raise UserError(message)


def read_text(
    path: Path,
    report: Report,
    *,
    missing: str = "unpack the whole data set, or name the folder that holds it as the source",
    no_text: str = "unpack it again from the original archive",
) -> str:
    """The text of a list file; '' if it is missing or no text, which is reported with the fix: `missing`, `no_text`."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        report(f"{path}: file missing; {missing}")
    except UnicodeDecodeError:
        report(f"{path}: not a UTF-8 text file; {no_text}")
    return ""


def is_number(text: str) -> bool:
    """Whether a text is a whole number from 0 to 2³¹ − 1, in ASCII digits."""
    return text.isascii() and text.isdigit() and len(text) < 20 and int(text) < 2**31


def read_identities(path: Path, report: Report) -> list[int]:
    """The identities of a list like `1,2,3` (commas, spaces or line breaks between them), in its order, each once.

    Reports a list that is missing or empty, and entries that are no positive numbers or are listed twice.
    """
    text = read_text(path, report)
    entries = text.replace(",", " ").split()
    if text and not entries:
        report(f"{path}: no identities in it; expected one line like '1,2,3'")
    pids: dict[int, None] = {}
    for entry in entries:
        if not (is_number(entry) and int(entry) > 0):
            report(f"{path}: '{entry[:20]}' is not an identity number; correct the list")
        elif int(entry) in pids:
            report(f"{path}: identity {int(entry)} is listed twice; remove one of the two")
        else:
            pids[int(entry)] = None
    return list(pids)


def image_names(folder: Path) -> list[str]:
    """The sorted names of a folder's image files, with suffixes in any case; [] if the folder is missing."""
    try:
        names = [entry.name for entry in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(n for n in names if n.lower().endswith(IMAGE_SUFFIXES) and not n.startswith("."))


def read_index(path: Path, root: Path, report: Report) -> list[tuple[str, int]]:
    """Reads an index file, whose lines are `path label`, such as `Visible/285/name.bmp 0`.

    Reports lines of another form, paths that come twice or leave `root`, and files that are missing.

    Args:
      path: of the index file.
      root: the folder to which its paths are relative. They may hold spaces, and their suffixes may differ from those
        of the files in case (`.bmp`, `.BMP`).
      report: told each fault.

    Returns:
      (path of the file on disk below `root`, label) of each sound line.
    """
    images: dict[str, int] = {}
    folders: dict[str, dict[str, str]] = {}
    text = read_text(path, report)
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        name, label = (*line.rsplit(maxsplit=1), "")[:2]
        name = name.strip()
        if not is_number(label):
            report(f"{where}: expected 'path label', got '{line.strip()[:200]}'; correct the line")
            continue
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts:
            report(f"{where}: '{name}' points outside {root}; paths must be relative to the data set's folder")
            continue
        parent = str(relative.parent)
        if parent not in folders:
            folders[parent] = {_suffix_lowered(n): n for n in image_names(root / parent)}
        on_disk = folders[parent].get(_suffix_lowered(relative.name))
        if on_disk is None:
            report(f"{where}: there is no image {root / relative}; restore the file or remove the line")
            continue
        found = str(relative.parent / on_disk)
        if found in images:
            report(f"{where}: '{name}' is listed twice; remove one of the two lines")
            continue
        images[found] = int(label)
    if text and not images:
        report(f"{path}: no usable lines in it; expected lines like 'folder/name.jpg 0'")
    return list(images.items())


def check_labels(path: Path, pid_labels: list[tuple[int, int]], report: Report) -> None:
    """Reports identities with two labels, and labels with two identities, among an index file's (pid, label) pairs."""
    labels: dict[int, int] = {}
    pids: dict[int, int] = {}
    for pid, label in dict.fromkeys(pid_labels):
        if labels.setdefault(pid, label) != label:
            report(f"{path}: identity {pid} has the labels {labels[pid]} and {label}; give it one")
        elif pids.setdefault(label, pid) != pid:
            report(f"{path}: label {label} stands for the identities {pids[label]} and {pid}; give each its own")


def _suffix_lowered(name: str) -> str:
    stem, dot, suffix = name.rpartition(".")
    return stem + dot + suffix.lower()


def decode_fault(path: Path) -> str | None:
    """Decodes an image file whole; returns the fault in one line, or None if it is sound."""
    try:
        if path.stat().st_size == 0:
            return f"{path}: empty file; restore it from the original archive"
        with Image.open(path) as image:
            image.load()
            eight_bits(image)
    except UnidentifiedImageError:
        return f"{path}: not an image; restore it from the original archive"
    except Exception as error:
        # Pillow's decoders raise many types for damaged files (OSError, SyntaxError, ValueError, struct.error ...).
        return (
            f"{path}: cannot be decoded ({str(error).splitlines()[0] if str(error) else type(error).__name__}); "
            "restore it from the original archive"
        )
    return None


def eight_bits(image: Image.Image) -> Image.Image:
    """The upper 8 bits of an image with grey pixels of 16, as infrared cameras write them; any other image as it is.

    Pillow's own conversion of such grey clips at 255, which makes the image white; of colour of 16 bits it takes the
    upper 8 too.

    Raises:
      ValueError: the pixels have 32 bits.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("pixels of 32 bits have no agreed range: save it with 8 or 16")
    return image


def read_encoded(path: Path) -> bytes:
    """The bytes to store for an image file: those of a JPEG or PNG file; others (BMP, TIFF) are stored as lossless PNG.

    Raises:
      UserError: the file is no image.
    """
    data = path.read_bytes()
    if data.startswith(_STORED_AS_THEY_ARE):
        return data
    fault = decode_fault(path)
    if fault:
        raise UserError(fault)
    with Image.open(io.BytesIO(data)) as opened:
        image = eight_bits(opened)
        image = image if image.mode in ("L", "RGB") else image.convert("RGB")
        buffer = io.BytesIO()
        image.save(buffer, format="png", compress_level=3)
    return buffer.getvalue()
