"""The exceptions that mean "your input is wrong, and this is the fix", and how scripts end on them."""

import atexit
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

from mpanet_jax.lost_process import suppress_abort_line


class UserError(Exception):
    """A mistake in an argument, a setting or a file, which the user can correct.

    The message is one line: it names the argument, setting or file, and says what was expected and what the fix is.
    Scripts print it without a traceback and exit with code 2.
    """


class SettingsError(UserError):
    """A field of the settings has a value that it cannot have; the message begins with its path, `data.height`."""


class ArgumentError(UserError):
    """An argument of a function has a value that it cannot have; the message begins with its name.

    A script that passes the argument on has a flag of the same name.
    """

    def __init__(self, argument: str, message: str):
        super().__init__(f"{argument} {message}")


class AbsentProcessError(UserError):
    """Another process of the run did not arrive in time.

    Scripts then end at once: JAX would wait for that process again, and abort this one with a stack trace.
    """


class Stopped(KeyboardInterrupt):
    """A signal has asked a run to stop, and it has stopped.

    Scripts print the message, if there is one, and exit with `exit_code`: 128 + the signal's number, as in shells.
    """

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def first_line(error: BaseException) -> str:
    """The first line of an exception's message; the name of its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def lacks_room(error: BaseException) -> bool:
    """Whether an error means that there was no room for a file: a full disk, a quota, a limit of file sizes.

    Libraries wrap the system's error in their own exceptions, which at best repeat its words; these are looked for.
    """
    words = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]
    return any(said in str(cause) for cause in _chain(error) for said in words)


def _fail(message: object) -> NoReturn:
    print("error: " + " ".join(str(message).split()), file=sys.stderr, flush=True)
    if isinstance(message, AbsentProcessError):
        suppress_abort_line()
        sys.stdout.flush()
        os._exit(2)
    sys.exit(_cut_short(2))


def _silence() -> None:
    """Silences threads and coroutines that are cut short: their messages would bury the last line."""
    logging.set_verbosity(logging.FATAL)
    sys.unraisablehook = lambda _: None
    warnings.simplefilter("ignore")


def _cut_short(exit_code: int) -> int:
    """Prepares the end of a script that an error, Ctrl-C or a SIGTERM has stopped."""
    _silence()
    atexit.register(_leave_without_jax, exit_code)  # the last one is called first
    return exit_code


def _leave_without_jax(exit_code: int) -> None:
    """Ends the process without what JAX does at its end.

    XLA compiles in threads of its own. JAX does not wait for them, takes apart what they use, and the process crashes.
    Other processes of a run do wait for JAX's end. Nothing that was registered with atexit before is called any more.
    """
    if "jax" in sys.modules and leaves_at_once():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        positional = flags.FLAGS(argv)
        if getattr(flags.FLAGS, "config", None) is not None:
            # ml_collections raises a config file's failure to load only when a field is read.
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
        # If a config file refuses its option, the error's text is a traceback, whose last line is the message.
        text = str(error)
        if "Failed loading config file" in text:  # ends in "No such file or directory: 'NAME'"
            _fail(f"--config: {text.splitlines()[-1].partition('] ')[2]}; expected configs/NAME.py")
        if field := re.match(r"Unknown command line flag '(config\..*?)'", text):
            _fail(f"--{field[1]}: fields of a config go with --config=configs/NAME.py")
        if missing := re.match(r"flag --(\w+)=None: Flag --\w+ must have a value", text):
            _fail(f"--{missing[1]}: missing; give it, --help says what it is")
        if "earlier failure to load" in text:
            _fail(
                f"--config: cannot be read ({text.rpartition(': [')[2].rpartition('] ')[2]}); expected configs/NAME.py"
            )
        _fail(text.splitlines()[-1].partition(": ")[2] if "Traceback" in text else text)
    except Exception as error:
        _fail_config(error)


def _fail_config(error: Exception) -> NoReturn:
    """Ends the script with what a file raised that is no config, or no Python."""
    reason = f"{type(error).__name__}: {first_line(error)}"
    _fail(f"--config: cannot be read as a config ({reason}); expected configs/NAME.py")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


_in_script = False


def leaves_at_once() -> bool:
    """Whether this process, if it is cut short, ends while threads of it compile: `run_script` runs in it, alone."""
    jax = sys.modules.get("jax")
    return _in_script and not (jax is not None and jax.distributed.is_initialized())


def run_script(main: Callable[[list[str]], int | None]) -> None:
    """Parses absl's flags, runs `main(positional arguments)` and exits.

    The exit code is 0, or what `main` returns. It is 2, with one line on stderr, for a flag or config field that cannot
    be parsed, for a `UserError`, and for a file or folder that the system refuses (missing, no permission, disk full).
    It is 130 after Ctrl-C, 143 after a SIGTERM that was caught, and 1 for any other exception, with its traceback. Then
    the process leaves at once (`_leave_without_jax`).
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
            return _cut_short(stopped.exit_code)
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr, flush=True)
            return _cut_short(128 + signal.SIGINT)
        except Exception as error:
            if lacks_room(error):
                _fail(f"{os.strerror(errno.ENOSPC)}: make room where this program writes, or name another place for it")
            if not isinstance(error, OSError) or error.filename is None:
                atexit.register(_leave_without_jax, 1)
                raise
            _fail(f"{os.fsdecode(error.filename)}: cannot be read or written ({error.strerror}); name another place")

    global _in_script
    _in_script = True
    # configs/, benchmarks/ and ablations/ are not installed; they lie beside the folder of scripts.
    sys.path.append(str(Path(sys.argv[0]).resolve().parents[1]))
    app.run(guarded, flags_parser=_parse_flags)
