"""Finds the images of a gallery that look like the person in a query: prints paths and distances, writes results.json.

python scripts/search.py --model=runs/sysu --gallery=photos --query query.jpg another.jpg --top=10 --out=results.json
python scripts/search.py --model=hf:owner/name --gallery=photos --modality=visible --query night.jpg \\
    --query_modality=infrared

--gallery is a folder (with all folders below it), a text file with one path a line, or an images.csv, as in extract.py.
Its embeddings are kept in an index beside it (--index); a later call embeds only images that are new, or whose file has
another size or time. Files that changed but kept both need --rebuild. An index belongs to one model and one precision:
to search an index in bfloat16 on a CPU, give --dtype=bfloat16.

Images that cannot be read are named and left out, and the exit code is 1. docs/search.md describes results.json.
"""

import sys
from pathlib import Path

from absl import flags

from mpanet_jax.errors import UserError, run_script

MODALITIES = ["visible", "infrared"]
MODEL = flags.DEFINE_string(
    "model", None, "A run's workdir, a file of weights, a saved model's folder, or hf:owner/name.", required=True
)
GALLERY = flags.DEFINE_string("gallery", None, "A folder, a list of paths, or an images.csv.", required=True)
QUERY = flags.DEFINE_multi_string("query", None, "An image to search for; more may follow.", required=True)
TOP = flags.DEFINE_integer("top", 10, "How many images to find for each query.", lower_bound=1)
OUT = flags.DEFINE_string("out", None, "A JSON file to write the results to.")
INDEX = flags.DEFINE_string("index", None, "The index's folder; default: beside the gallery, its name and '.index'.")
REBUILD = flags.DEFINE_bool("rebuild", False, "Embed the whole gallery again.")
MODALITY = flags.DEFINE_enum(
    "modality",
    None,
    MODALITIES,
    "Leave out gallery images that are known to be of the other modality, and take unknown ones for this one.",
)
QUERY_MODALITY = flags.DEFINE_enum(
    "query_modality", None, MODALITIES, "The modality of the queries; AGW and CAJ need it."
)
DTYPE = flags.DEFINE_enum("dtype", None, ["auto", "float32", "bfloat16"], "Precision; default: as trained.")


def main(arguments: list[str]) -> int:
    queries = [*QUERY.value, *arguments]
    if OUT.value and (Path(OUT.value).suffix != ".json" or Path(OUT.value).is_dir()):
        raise UserError(f"--out={OUT.value}: expected the name of a file that ends in .json")
    from mpanet_jax.evaluation.search import Index  # imports JAX
    from mpanet_jax.model import load

    model = load(MODEL.value, dtype=DTYPE.value)
    index = Index.build(model, GALLERY.value, index=INDEX.value, modality=MODALITY.value, rebuild=REBUILD.value)
    for path, reason in index.skipped:
        print(f"skipped {_printable(path)}: {reason}", file=sys.stderr)
    print(f"{_printable(str(index.folder))}: {len(index):,} images, {index.num_embedded:,} of them embedded now")
    results = index.search(queries, top=TOP.value, modality=QUERY_MODALITY.value, errors="skip")
    for image in results.skipped:
        print(f"skipped {_printable(image.name)}: {image.reason}", file=sys.stderr)
    if not results.queries:
        raise UserError("no query can be read; expected image files")
    for ranking in results.queries:
        print(_printable(ranking.path))
        for place, match in enumerate(ranking.matches, 1):
            print(f"{place:6}  {match.distance:.4f}  {_printable(match.path)}")
    if OUT.value:
        results.write(OUT.value)
    return int(bool(index.skipped or results.skipped))


def _printable(path: str) -> str:
    """A path on one line; what cannot be printed is escaped."""
    text = path.encode(sys.stdout.encoding or "utf-8", "backslashreplace").decode(sys.stdout.encoding or "utf-8")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


if __name__ == "__main__":
    flags.FLAGS.set_gnu_getopt(True)  # flags may follow a query
    run_script(main)
