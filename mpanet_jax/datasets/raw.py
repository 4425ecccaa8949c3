"""Reading raw data sets: identity lists, index files, image folders and image files.

Every reader takes `report`, a function that is told each fault as one line (file, what was expected, the fix).
`raise_fault` stops at the first one (building); the verifier passes `list.append` and gets them all.
"""

import io
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from PIL import Image, UnidentifiedImageError

from mpanet_jax.errors import UserError

Report = Callable[[str], object]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")
_STORED_AS_THEY_ARE = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")  # JPEG and PNG signatures


def raise_fault(message: str) -> None:
    """The report that stops at the first fault: raises `UserError(message)`."""
    raise UserError(message)


def read_text(path: Path, report: Report) -> str:
    """The text of a list file, '' when it is missing or not text (reported)."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        report(f"{path}: file missing; unpack the whole data set, or name the folder that holds it as the source")
    except UnicodeDecodeError:
        report(f"{path}: not a UTF-8 text file; unpack it again from the original archive")
    return ""


def is_number(text: str) -> bool:
    """Whether a text is a number from 0 on that int32 holds."""
    return text.isascii() and text.isdigit() and len(text) < 20 and int(text) < 2**31


def read_identities(path: Path, report: Report) -> list[int]:
    """The identities of a list like `1,2,3` (commas, spaces or line breaks), in the file's order, each once.

    Reports a missing or empty list, an entry that is no positive number, and one that is listed twice.
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
    """The image files of a folder, sorted by name; suffixes in any case; [] when the folder is missing."""
    try:
        names = [entry.name for entry in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(n for n in names if n.lower().endswith(IMAGE_SUFFIXES) and not n.startswith("."))


def read_index(path: Path, root: Path, report: Report) -> list[tuple[str, int]]:
    """The `(image path, label)` lines of an index file such as `Visible/285/name.bmp 0`.

    Paths are relative to `root` and may hold spaces; where only the suffix's case differs from the file on disk
    (`.bmp`, `.BMP`), the file on disk is meant. Reports lines of another form, repeated paths, paths that leave
    the root and files that are not there.
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
    """Report identities with two labels and labels with two identities in the `(pid, label)` pairs of an index file."""
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
    """Decode every pixel of an image file; None when that works, else the fault in one line."""
    try:
        if path.stat().st_size == 0:
            return f"{path}: empty file; restore it from the original archive"
        with Image.open(path) as image:
            image.load()
    except UnidentifiedImageError:
        return f"{path}: not an image; restore it from the original archive"
    except Exception as error:
        # Pillow's decoders raise many types for damaged files (OSError, SyntaxError, ValueError, struct.error ...).
        return (
            f"{path}: cannot be decoded ({str(error).splitlines()[0] if str(error) else type(error).__name__}); "
            "restore it from the original archive"
        )
    return None


def read_encoded(path: Path) -> bytes:
    """The bytes to store for an image file: JPEG and PNG files as they are, anything else (BMP) as lossless PNG.

    Raises `UserError` where the file is no image.
    """
    data = path.read_bytes()
    if data.startswith(_STORED_AS_THEY_ARE):
        return data
    fault = decode_fault(path)
    if fault:
        raise UserError(fault)
    with Image.open(io.BytesIO(data)) as image:
        image = image if image.mode in ("L", "RGB") else image.convert("RGB")
        buffer = io.BytesIO()
        image.save(buffer, format="png", compress_level=3)
    return buffer.getvalue()
