"""Finds the images of a gallery that show who a query shows: a table of paths and distances, and results.json.

python scripts/search.py --model=runs/sysu --gallery=photos --query query.jpg another.jpg --top=10 --out=results.json
python scripts/search.py --model=hf:owner/name --gallery=photos --modality=visible --query night.jpg \\
    --query_modality=infrared

--gallery is a folder (with all below it), a text file with one path a line, or an images.csv, as for extract.py. It is
embedded once: the index lies beside it (--index), and each call embeds only what is new or changed, by the files' sizes
and times. A file that was changed without a change of both is not seen: --rebuild embeds all.
An index belongs to one model and one precision: to search an index in bfloat16 on a CPU, give --dtype=bfloat16.

Images that cannot be read are named and left out, with exit code 1 at the end. docs/search.md describes results.json.
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
QUERY = flags.DEFINE_multi_string("query", None, "Images to search for; more of them may follow.", required=True)
TOP = flags.DEFINE_integer("top", 10, "Images found for each query.", lower_bound=1)
OUT = flags.DEFINE_string("out", None, "Also write what is found, as JSON.")
INDEX = flags.DEFINE_string("index", None, "The index's folder; default: the gallery's name and '.index', beside it.")
REBUILD = flags.DEFINE_bool("rebuild", False, "Embed the whole gallery, whatever the index has.")
MODALITY = flags.DEFINE_enum(
    "modality", None, MODALITIES, "Only the gallery's images of it, and those of which nothing says what they are."
)
QUERY_MODALITY = flags.DEFINE_enum("query_modality", None, MODALITIES, "Of the queries; AGW and CAJ need it.")
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
        raise UserError(f"none of the {len(queries)} queries can be read")
    for ranking in results.queries:
        print(_printable(ranking.path))
        for place, match in enumerate(ranking.matches, 1):
            print(f"{place:6}  {match.distance:.4f}  {_printable(match.path)}")
    if OUT.value:
        results.write(OUT.value)
    return int(bool(index.skipped or results.skipped))


def _printable(path: str) -> str:
    """A path on one line, whatever its bytes are: what cannot be printed as an escape."""
    text = path.encode(sys.stdout.encoding or "utf-8", "backslashreplace").decode(sys.stdout.encoding or "utf-8")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


if __name__ == "__main__":
    flags.FLAGS.set_gnu_getopt(True)  # flags may follow a query
    run_script(main)
