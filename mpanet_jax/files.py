"""Files and folders that appear whole or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from mpanet_jax.errors import UserError


@contextlib.contextmanager
def write_whole(path: str | os.PathLike, mode: str = "w", *, sync: bool = True) -> Iterator[IO[Any]]:
    """A file to write (`mode` "w", UTF-8, or "wb") that takes the place of `path` when the block ends without an error.

    Until then, and after an error or a kill, whatever stood there stays. The folder is made if need be. Without `sync`
    the disk is not waited for: a crash of the system, soon after, may leave an empty file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    encoding = None if "b" in mode else "utf-8"
    with tempfile.NamedTemporaryFile(
        mode, dir=path.parent, prefix=f".{path.name}.", delete=False, encoding=encoding
    ) as file:
        try:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
            file.close()
            os.chmod(file.name, 0o644)  # a temporary file is private
            os.replace(file.name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(file.name)
            raise


@contextlib.contextmanager
def write_whole_folder(path: str | os.PathLike) -> Iterator[Path]:
    """An empty folder to fill, which takes the name `path` when the block ends without an error; else nothing is left.

    Raises:
      UserError: there is something at `path` already, which an empty folder is not.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path}: exists already{' and is not empty' if path.is_dir() else ''}; name a new folder")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
