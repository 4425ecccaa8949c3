"""The programs of scripts/ in this process: their flags are parsed, and their `main` called, as on a command line."""

import contextlib
import io
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from absl import flags, logging

from mpanet_jax import compilation, errors
from mpanet_jax.methods import settings_of

ROOT = Path(__file__).parent.parent
_early = mock.Mock()  # in place of functions of `compilation` whose effect would last for all tests


class Refused(Exception):
    """What a script says about its flags, or in the end."""


@contextlib.contextmanager
def _script(path: Path) -> Iterator[Callable[[list[str]], Any]]:
    """Its `main`; inside, its flags are there beside those of the libraries."""
    state = flags.FLAGS.__dict__
    before = {name: _copied(value) for name, value in state.items()}
    for module, defined in list(flags.FLAGS.flags_by_module_dict().items()):
        if module.startswith("scripts."):  # other tests may have imported one
            for flag in list(defined):
                delattr(flags.FLAGS, flag.name)
    sys.modules.pop("config_config", None)  # a config file is loaded into it, over what the last one has left there
    mains: list[Callable[[list[str]], Any]] = []
    try:
        with (
            mock.patch.object(errors, "run_script", mains.append),
            mock.patch.object(compilation, "start_fast", _early.start_fast),
            mock.patch.object(compilation, "autotune_fewer_tilings", _early.autotune_fewer_tilings),
        ):
            runpy.run_path(str(path), run_name="__main__")
        # What holds for the rest of a process: it would hold for the other tests too.
        with mock.patch.object(errors, "_silence"), mock.patch.object(errors, "_leave_without_jax"):
            yield mains[0]
    finally:
        state.clear()
        state.update(before)


def _copied(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {name: list(item) if isinstance(item, list) else item for name, item in value.items()}


def early_start(path: Path) -> list[Any]:
    """The calls of `compilation` that a script makes before its `main`, with the present `sys.argv`."""
    _early.reset_mock()
    with _script(ROOT / path):
        return _early.mock_calls


def flags_of(name: str) -> set[str]:
    """The names of a script's flags, without those of its config's fields."""
    with _script(ROOT / "scripts" / name):
        return set(flags.FLAGS)


def run(words: list[str], *, only_parse: bool = False) -> str:
    """Runs `scripts/NAME.py FLAG …` in the present folder, or only parses its flags and checks its config's fields.

    Returns:
      What it printed to stdout.

    Raises:
      Refused: exit code other than 0, with the message.
    """
    out, err = io.StringIO(), io.StringIO()
    try:
        with (
            mock.patch.object(sys, "argv", words),  # ml_collections reads it for the fields of configs
            _script(ROOT / words[0]) as main,
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            positional = errors._parse_flags(words)
            if getattr(flags.FLAGS, "config", None) is not None:
                settings_of(flags.FLAGS.config.to_dict())
            code = 0 if only_parse else main(positional[1:])
    except SystemExit as end:
        code = end.code
    except errors.UserError as error:
        raise Refused(f"{error}") from error
    if code:
        raise Refused(f"exit code {code}: {err.getvalue().strip()[-2000:]}")
    return out.getvalue()


def process(script: str, *arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """What `python scripts/SCRIPT ARGUMENT …` ends with in a process of its own, and prints, without its start.

    The script goes through `errors.run_script`, as there. An exception that would be a traceback there is raised.
    """
    words = [str(ROOT / "scripts" / script), *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    before, verbosity = list(sys.path), logging.get_verbosity()
    try:
        with (
            folder(cwd or Path.cwd()),
            mock.patch.object(sys, "argv", words),
            mock.patch.object(errors.app, "run", lambda main, flags_parser: sys.exit(main(flags_parser(sys.argv)))),
            # What holds for the rest of a process: it would hold for the other tests too.
            mock.patch.object(compilation, "set_compilation_cache"),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            _script(Path(words[0])) as main,
        ):
            errors.run_script(main)
    except SystemExit as end:
        return subprocess.CompletedProcess(words, end.code or 0, out.getvalue(), err.getvalue())
    finally:
        sys.path[:] = before
        logging.set_verbosity(verbosity)
    raise AssertionError("run_script ends in an exit")


@contextlib.contextmanager
def folder(path: Path) -> Iterator[None]:
    """The present folder inside."""
    before = Path.cwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)
