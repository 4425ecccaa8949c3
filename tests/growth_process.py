"""`scripts/benchmark.py growth`, one table after the other, with all sizes in this process.

    python -m tests.growth_process OVER=SIZES,OVER=SIZES FLAGS OF scripts/benchmark.py …

SIZES are joined by '+'. Writes what benchmark.py writes, and prints what it prints. METHODS has 'linen' too.
"""

import pickle
import sys
from typing import Any
from unittest import mock

from benchmarks import growth
from mpanet_jax.methods import METHODS, Entry
from mpanet_jax.settings import Settings
from tests import scripts_in_process
from tests.methods_in_tests import LinenMethod


def in_this_process(*function_and_arguments: Any) -> Any:
    """Takes the place of `growth.in_new_process`, whose processes cost more than what tests measure in them."""
    function, *arguments = pickle.loads(pickle.dumps(function_and_arguments))  # as on the way to a process
    return function(*arguments)


def main(tables: str, flags: list[str]) -> int:
    METHODS["linen"] = Entry(LinenMethod, Settings)
    for table in tables.split(","):
        over, sizes = table.split("=")
        table_flags = [f"--over={over}", f"--sizes={sizes.replace('+', ',')}"]
        with mock.patch.object(growth, "in_new_process", in_this_process):
            done = scripts_in_process.process("benchmark.py", "growth", *table_flags, *flags)
        print(done.stdout)
        print(done.stderr, file=sys.stderr)
        if done.returncode:
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
