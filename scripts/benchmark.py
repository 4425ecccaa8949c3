"""Measures one part of the program: python scripts/benchmark.py NAME [flags].

Prints a table and writes runs/benchmark/NAME.json. It uses all accelerators; CUDA_VISIBLE_DEVICES=0 leaves it one.

python scripts/benchmark.py step --config.dtype=float32 --profile=runs/profile
python scripts/benchmark.py step --try=xla_gpu_autotune_level=0 --try=xla_gpu_triton_gemm_any=true
python scripts/benchmark.py train --config=configs/sysu.py --config.dataset.data_dir=data --config.data.cache=none
python scripts/benchmark.py extract --files --num_files=200000
python scripts/benchmark.py evaluate --dimensions=256,14336 --permutation=SYSU-MM01/exp/rand_perm_cam.mat
python scripts/benchmark.py gallery --gallery=100000 --queries=1000 --rerank
python scripts/benchmark.py search --gallery=1000000 --queries=100 --dimension=2048     (writes 8 GB beside --out)
python scripts/benchmark.py precision --config.dataset.data_dir=data     (whether bfloat16 follows float32)
python scripts/benchmark.py save                       (a checkpoint, with checksums and without; beside --out)
python scripts/benchmark.py growth --over=gallery --rerank --sizes=1000,3000,10000     (how cost grows: one table)
python scripts/benchmark.py data                       (draws a small data set where config.dataset names none)
"""

import shlex
import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from mpanet_jax.compilation import start_fast
from mpanet_jax.errors import UserError, run_script

NAMES = ("step", "train", "extract", "evaluate", "gallery", "search", "save", "data", "precision", "growth")
OVER = ("batch", "devices", "images", "ids", "gallery")
ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # the default recipe is loaded in the next line, and imports from configs/
CONFIG = config_flags.DEFINE_config_file(
    "config", str(ROOT / "configs/sysu.py"), "the recipe that is measured", lock_config=True
)
OUT = flags.DEFINE_string("out", None, "the file of the report; default: runs/benchmark/NAME.json")
STEPS = flags.DEFINE_integer(
    "steps",
    None,
    "how many steps (step, growth: 240; train: a tenth of the epochs; precision: 200), batches (extract: 60), or saves "
    "of each kind (save: 9) are timed",
    lower_bound=2,
)
STARTS = flags.DEFINE_integer("starts", 4, "precision: runs of each type", lower_bound=1)
IMAGES = flags.DEFINE_integer(
    "images", None, "how many images are in device memory (2048), or decoded (data: 1000)", lower_bound=1
)
PROFILE = flags.DEFINE_string("profile", None, "step: a folder for a jax.profiler trace")
FILES = flags.DEFINE_bool("files", False, "extract: also from the files of config.dataset's training images")
NUM_FILES = flags.DEFINE_integer(
    "num_files", None, "extract --files: how many, the images again and again; default: each once", lower_bound=1
)
DIMENSIONS = flags.DEFINE_list("dimensions", ["256", "14336"], "evaluate: lengths of the features")
PERMUTATION = flags.DEFINE_string(
    "permutation", None, "evaluate: SYSU-MM01's rand_perm_cam.mat; default: one with its counts"
)
RERANK = flags.DEFINE_bool(
    "rerank",
    False,
    "evaluate: also k-reciprocal re-ranking of RegDB's 2,060 x 2,060; gallery, growth: re-ranking, not plain ranking",
)
OVER_WHAT = flags.DEFINE_enum("over", None, OVER, "growth: what grows; one table each")
SIZES = flags.DEFINE_list("sizes", [], "growth: the sizes, like 1000,10000; default: those of benchmarks/growth.py")
TRIES = flags.DEFINE_multi_string(
    "try",
    [],
    "step: measure it as it is and with this try, in turns; may be given several times. A try is one or more words "
    "NAME=VALUE, options of XLA for the step's program",
)
COMPILER_OPTIONS = flags.DEFINE_multi_string(
    "compiler_option",
    [],
    "step, growth: NAME=VALUE, an option of XLA for the step's program; may be given several times",
)
GALLERY = flags.DEFINE_integer("gallery", 100_000, "gallery, search: size of the synthetic gallery", lower_bound=1)
QUERIES = flags.DEFINE_integer("queries", 1000, "gallery, search, growth: number of synthetic queries", lower_bound=1)
DIMENSION = flags.DEFINE_integer("dimension", 2048, "gallery, search, growth: length of the features", lower_bound=1)
TOP = flags.DEFINE_integer("top", 10, "search: how many images to find for a query", lower_bound=1)
CACHE = flags.DEFINE_string(
    "compilation_cache",
    None,
    "folder of compiled programs, '': none; default: that of train.py for train, else none, so that compilation is "
    "measured",
)


def main(arguments: list[str]) -> None:
    if len(arguments) != 1 or arguments[0] not in NAMES:
        raise UserError(f"benchmark.py {' '.join(arguments)}: expected one of {', '.join(NAMES)}, then flags")
    # Imports JAX, and with it takes the accelerator.
    from benchmarks import data, evaluation, extract, gallery, growth, measure, precision, save, search, step, train
    from mpanet_jax.compilation import DEFAULT_CACHE, end_start, set_compilation_cache
    from mpanet_jax.methods import settings_of
    from mpanet_jax.settings_base import to_dict

    (name,), settings = arguments, settings_of(CONFIG.value.to_dict())
    if name != "train":
        end_start()  # `train` does so itself
    over = OVER_WHAT.value or ""
    if name == "growth" and not over:
        raise UserError(f"--over: expected one of {', '.join(OVER)}")
    default_out = f"growth_{over}" if name == "growth" else "tries" if TRIES.value else name
    out = Path(OUT.value or f"runs/benchmark/{default_out}.json")
    cache = CACHE.value if CACHE.value is not None else DEFAULT_CACHE if name == "train" else None
    set_compilation_cache(cache)
    if NUM_FILES.value and not FILES.value:
        raise UserError("--num_files goes with --files")
    if not DIMENSIONS.value:
        raise UserError("--dimensions: expected numbers, like 256,14336")
    options = xla_options("compiler_option", COMPILER_OPTIONS.value)
    tries = {words: xla_options("try", words.split() or [words]) for words in TRIES.value}
    number = {"num_steps": STEPS.value} if STEPS.value else {}
    saves = {"num_saves": STEPS.value} if STEPS.value else {}
    images = {"num_images": IMAGES.value} if IMAGES.value else {}

    # How cost grows is measured in processes of their own, for which the accelerator is left.
    environment = growth.in_new_process(measure.environment) if name == "growth" else measure.environment()
    command = shlex.join(["python", "scripts/benchmark.py", *sys.argv[1:]])

    def write(results: dict) -> dict:
        report = {"name": name, "command": command, **environment, "config": to_dict(settings), "results": results}
        measure.write_report(out, report)
        return report

    benchmarks = {
        "step": lambda: (
            step.benchmark_tries(settings, tries, **number, **images)
            if tries
            else step.benchmark_step(
                settings, **number, **images, compiler_options=options or None, profile=PROFILE.value
            )
        ),
        "train": lambda: train.benchmark_train(settings, out.parent, **number),
        "extract": lambda: extract.benchmark_extract(
            settings, **number, **images, from_files=FILES.value, num_files=NUM_FILES.value
        ),
        "evaluate": lambda: evaluation.benchmark_all(
            DIMENSIONS.value, PERMUTATION.value, rerank=RERANK.value, on_device=measure.has_accelerator()
        ),
        "gallery": lambda: gallery.benchmark_gallery(
            GALLERY.value, QUERIES.value, DIMENSION.value, rerank=RERANK.value, on_device=measure.has_accelerator()
        ),
        "search": lambda: search.benchmark_search(
            out.parent,
            num_gallery=GALLERY.value,
            num_query=QUERIES.value,
            dimension=DIMENSION.value,
            k=TOP.value,
            on_device=measure.has_accelerator(),
        ),
        "save": lambda: save.benchmark_save(settings, out.parent, **saves),
        "data": lambda: data.benchmark_dataset(settings, **images),
        "precision": lambda: precision.benchmark_precision(settings, **number, num_starts=STARTS.value),
        "growth": lambda: growth.benchmark_growth(
            over,
            growth.Asked(
                settings,
                out.parent,
                STEPS.value,
                QUERIES.value,
                DIMENSION.value,
                RERANK.value,
                options or None,
            ),
            whole_numbers("sizes", SIZES.value),
            on_row=write,
        ),
    }
    print(measure.format_report(write(benchmarks[name]())))


def whole_numbers(flag: str, values: list[str]) -> list[int]:
    """The numbers in a flag's list.

    Raises:
      UserError: an entry is not a positive whole number.
    """
    if not all(value.isdigit() and int(value) for value in values):
        raise UserError(f"--{flag}={','.join(values)}: expected whole numbers, like 1000,10000")
    return [int(value) for value in values]


def xla_options(flag: str, words: list[str]) -> dict[str, str | bool]:
    """{NAME: value} of words NAME=VALUE in a flag; true and false are truth values, which XLA does not take as text.

    Raises:
      UserError: a word is not NAME=VALUE.
    """
    options = {}
    for word in words:
        name, sign, value = word.partition("=")
        if not (name and sign):
            raise UserError(f"--{flag}={word}: expected NAME=VALUE, like xla_gpu_autotune_level=0")
        options[name] = {"true": True, "false": False}.get(value.lower(), value)
    return options


if __name__ == "__main__":
    start_fast(devices="train" in sys.argv)  # as scripts/train.py
    flags.FLAGS.set_gnu_getopt(True)  # flags follow the name
    run_script(main)
