"""SYSU-MM01, RegDB and LLCM: importing this registers their tfds builders.

`prepare` builds a data set from its raw folder, `load_split` opens a prepared split.
"""

from mpanet_jax.datasets.builder import progress_bar
from mpanet_jax.datasets.prepared import (
    BUILDERS,
    is_prepared,
    load_split,
    make_builder,
    open_split,
    permutation_file,
    prepare,
    prepared_dir,
    settings_of,
)
from mpanet_jax.datasets.schema import INFRARED, VISIBLE, ImageRecord, Split

__all__ = [
    "BUILDERS",
    "INFRARED",
    "VISIBLE",
    "ImageRecord",
    "Split",
    "is_prepared",
    "load_split",
    "make_builder",
    "open_split",
    "permutation_file",
    "prepare",
    "prepared_dir",
    "progress_bar",
    "settings_of",
]
