"""The one exception that means "your input is wrong, here is the fix", and how scripts end on it."""

import errno
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from absl import app, flags, logging

from mpanet_jax.lost_process import lost_process_is_said


class UserError(Exception):
    """A mistake in a flag, a config field or a file that the user can mend.

    The message is one line: it names the field or file, says what was expected and gives the fix.
    Scripts print it without a traceback and exit with code 2.
    """


class SettingsError(UserError):
    """A field of the settings that cannot be as it is; the message begins with the field's path, `data.height`."""


class ArgumentError(UserError):
    """An argument of a function that cannot be as it is; a script's flag has the same name."""

    def __init__(self, argument: str, message: str):
        super().__init__(f"{argument} {message}")


class AbsentProcessError(UserError):
    """Another process of the run did not come in time.

    Scripts end at once then: JAX would wait for that process once more, and abort this one with a stack trace.
    """


class Stopped(KeyboardInterrupt):
    """A run was asked to stop, by a signal, and did.

    Scripts print the message, if there is one, and exit with `exit_code`: 128 + the signal's number, as shells say it.
    """

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def first_line(error: BaseException) -> str:
    """What an exception of a library says, as one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def lacks_room(error: BaseException) -> bool:
    """Whether something could not be written for lack of room: a full disk, a quota, a limit of file sizes.

    Libraries wrap the system's error in exceptions of their own, which keep its words at best.
    """
    words = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]
    return any(said in str(cause) for cause in _chain(error) for said in words)


def _fail(message: object) -> NoReturn:
    print("error: " + " ".join(str(message).split()), file=sys.stderr, flush=True)
    if isinstance(message, AbsentProcessError):
        lost_process_is_said()
        sys.stdout.flush()
        os._exit(2)
    _silence()
    sys.exit(2)


def _silence() -> None:
    """What threads and coroutines that were cut short would still say would bury the last line."""
    logging.set_verbosity(logging.FATAL)
    sys.unraisablehook = lambda _: None
    warnings.simplefilter("ignore")


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        positional = flags.FLAGS(argv)
        if getattr(flags.FLAGS, "config", None) is not None:
            # ml_collections keeps a config file's failure to load to itself until a field is read.
            getattr(flags.FLAGS.config, "seed", None)
        return positional
    except (AttributeError, KeyError) as error:  # what ml_collections raises for a field that the config lacks
        text = str(error).replace("\\n", " ")
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        if "get_config" in text or "ml_collections" not in raised_in:
            _fail_config(error)
        path, close = re.search(r"Attempting to lookup: ([\w.]+)", text), re.search(r'Did you mean "(\w+)"', text)
        name = path[1] if path else re.findall(r"\w+", text)[0]
        _fail(f"unknown config field '{name}'" + (f"; did you mean '{close[1]}'?" if close else ""))
    except (flags.Error, TypeError, ValueError, OSError) as error:
        # A config file that refuses its option arrives as the text of a traceback; its last line is the message.
        text = str(error)
        if "Failed loading config file" in text:  # ends in "No such file or directory: 'NAME'"
            _fail(f"--config: {text.splitlines()[-1].partition('] ')[2]}; expected configs/NAME.py")
        if field := re.match(r"Unknown command line flag '(config\..*?)'", text):
            _fail(f"--{field[1]}: fields of a config go with --config=configs/NAME.py")
        if "earlier failure to load" in text:
            _fail(
                f"--config: cannot be read ({text.rpartition(': [')[2].rpartition('] ')[2]}); expected configs/NAME.py"
            )
        _fail(text.splitlines()[-1].partition(": ")[2] if "Traceback" in text else text)
    except Exception as error:
        _fail_config(error)


def _fail_config(error: Exception) -> NoReturn:
    """Ends with whatever a file raised that is no config, or no Python at all."""
    reason = f"{type(error).__name__}: {first_line(error)}"
    _fail(f"--config: cannot be read as a config ({reason}); expected configs/NAME.py")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def run_script(main: Callable[[list[str]], int | None]) -> None:
    """Parse absl's flags, run `main(positional arguments)` and exit.

    The exit code is 0 or what `main` returns; 2, with one line on stderr, for a flag or config field that cannot be
    parsed, for a `UserError`, and for a file or folder that the system refuses (missing, no permission, disk full);
    130 after Ctrl-C and 143 after a SIGTERM that was caught.
    """

    def guarded(argv: list[str]) -> int:
        logging.set_verbosity(logging.WARNING)
        try:
            return main(argv[1:]) or 0
        except (SettingsError, ArgumentError) as error:
            _fail(f"--{'config.' if isinstance(error, SettingsError) else ''}{error}")
        except UserError as error:
            _fail(error)
        except Stopped as stopped:
            if message := str(stopped):
                print(message, file=sys.stderr, flush=True)
            _silence()
            return stopped.exit_code
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr, flush=True)
            _silence()
            return 128 + signal.SIGINT
        except Exception as error:
            if lacks_room(error):
                _fail(f"{os.strerror(errno.ENOSPC)}: make room where this program writes, or name another place for it")
            if not isinstance(error, OSError) or error.filename is None:
                raise
            _fail(f"{os.fsdecode(error.filename)}: cannot be read or written ({error.strerror}); name another place")

    # Beside the folder of scripts lie configs/, benchmarks/ and ablations/, which are not installed.
    sys.path.append(str(Path(sys.argv[0]).resolve().parents[1]))
    app.run(guarded, flags_parser=_parse_flags)
