"""SYSU-MM01, RegDB, LLCM and your own images. Importing this package registers their tfds builders.

`prepare` builds a data set from its raw folder; `open_split` and `open_evaluation` open it for training and for tests.
"""

from mpanet_jax.datasets.prepared import (
    EvaluationSet,
    is_prepared,
    load_split,
    make_builder,
    open_evaluation,
    open_split,
    prepare,
    prepared_dir,
)
from mpanet_jax.datasets.registry import (
    DATASETS,
    PROTOCOLS,
    make_dataset,
    make_protocol,
    own_fields,
    record_of_path,
    settings_of,
)
from mpanet_jax.datasets.schema import INFRARED, VISIBLE, ImageRecord, Split

__all__ = [
    "DATASETS",
    "INFRARED",
    "PROTOCOLS",
    "VISIBLE",
    "EvaluationSet",
    "ImageRecord",
    "Split",
    "is_prepared",
    "load_split",
    "make_builder",
    "make_dataset",
    "make_protocol",
    "open_evaluation",
    "open_split",
    "own_fields",
    "prepare",
    "prepared_dir",
    "record_of_path",
    "settings_of",
]
