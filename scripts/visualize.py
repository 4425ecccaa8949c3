"""Draws what a network has learned: PNG and SVG files in WORKDIR/figures, and a retrieval page (docs/visualize.md).

python scripts/visualize.py patterns --workdir=runs/sysu                    (figure 3 of the paper)
python scripts/visualize.py tsne --workdir=runs/sysu,runs/baseline,runs/sysu --checkpoint=untrained,last,last \
    --titles=untrained,baseline,MPANet                                      (figure 4)
python scripts/visualize.py query --workdir=runs/sysu                       (a query, its first results, its patterns)
python scripts/visualize.py distances|curves|augmentation|roc --workdir=runs/sysu
python scripts/visualize.py patterns|tsne|distances --model=model.safetensors --images=my_cameras/images.csv
python scripts/visualize.py retrieval --workdir=runs/sysu                   (writes runs/sysu/report.html)
python scripts/visualize.py retrieval --features query.npz gallery.npz --protocol=sysu_mm01 \
    --permutation=rand_perm_cam.mat --images=SYSU-MM01 --out=report.html    (embeddings of any framework)
python scripts/visualize.py retrieval --results=results.json --images=photos --out=report.html  (scripts/search.py's)
"""

import sys
from pathlib import Path
from typing import Any

from absl import flags

from mpanet_jax.datasets import PROTOCOLS, make_protocol
from mpanet_jax.embeddings import load_embeddings
from mpanet_jax.errors import UserError, run_script
from mpanet_jax.evaluation.metrics import CMC_DEFINITIONS, METRICS

PICTURES = ("patterns", "query", "tsne", "distances", "curves", "augmentation", "roc", "retrieval")
CHECKPOINTS = ("last", "best", "untrained")

WORKDIR = flags.DEFINE_list("workdir", None, "A training run; for tsne one or more, which are shown side by side.")
CHECKPOINT = flags.DEFINE_list(
    "checkpoint", ["last"], f"Which checkpoint of --workdir, {', '.join(CHECKPOINTS)}: one for all, or one for each."
)
DATA_DIR = flags.DEFINE_string("data_dir", None, "The folder of prepared data, if it is not config.dataset.data_dir.")
MODEL = flags.DEFINE_string("model", None, "Or a network: anything that mpanet_jax.load takes; needs --images.")
IMAGES = flags.DEFINE_string(
    "images",
    None,
    "With --model: a folder, a list or an images.csv. With --features or --results: the folder of the images.",
)
SPLIT = flags.DEFINE_string("split", "", "A part of images.csv: train, val, test, query or gallery; default: all.")
OUT = flags.DEFINE_string("out", None, "The folder of the figures; for retrieval, the HTML file.")
SEED = flags.DEFINE_integer("seed", 0, "Draws people and images; the same seed gives the same picture.", lower_bound=0)
NUM_IDENTITIES = flags.DEFINE_integer(
    "num_identities", None, "How many people are shown; default: 3, for tsne 10.", lower_bound=1
)
PEOPLE = flags.DEFINE_list("people", None, "patterns: these identities, instead of random ones.")
QUERY = flags.DEFINE_string("query", None, "query: the path of its image in the data set; default: a random one.")
PLAIN = flags.DEFINE_bool("plain", False, "patterns, query: the maps M themselves, not Grad-CAM on M ⊙ F.")
TITLES = flags.DEFINE_list("titles", None, "tsne: what stands above each panel; default: the folders' names.")
PERPLEXITY = flags.DEFINE_float("perplexity", 30.0, "tsne: roughly how many neighbours an image has.", lower_bound=1.0)
STEP = flags.DEFINE_integer("step", 0, "augmentation: the step of the training, from 0.", lower_bound=0)
FEATURES = flags.DEFINE_string("features", None, "retrieval, roc: QUERY.npz, followed by GALLERY.npz.")
PROTOCOL = flags.DEFINE_enum("protocol", None, list(PROTOCOLS), "How --features are compared.")
PERMUTATION = flags.DEFINE_string("permutation", None, "SYSU-MM01's rand_perm_cam.mat, for --protocol sysu_mm01.")
RESULTS = flags.DEFINE_string("results", None, "retrieval: the JSON file that scripts/search.py wrote.")
SETTING = flags.DEFINE_string("setting", None, "retrieval, query: a line of the table of results; default: the first.")
TRIAL = flags.DEFINE_integer("trial", 1, "retrieval, query: which of the setting's galleries.", lower_bound=1)
RERANK = flags.DEFINE_bool(
    "rerank", None, "retrieval, query: k-reciprocal re-ranking; default: as the run's own results."
)
METRIC = flags.DEFINE_enum("metric", None, METRICS, "retrieval, query: the distance; default: the protocol's.")
CMC = flags.DEFINE_enum("cmc", None, CMC_DEFINITIONS, "retrieval, query: what a rank counts; default: the protocol's.")
MAPS = flags.DEFINE_bool("maps", True, "retrieval: show the pattern maps of all images, if the network makes them.")


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0] not in PICTURES:
        given = arguments[0] if arguments else "nothing"
        raise UserError(f"expected one of {', '.join(PICTURES)} as the first argument, got {given}")
    what, files = arguments[0], arguments[1:]
    ways = {"workdir": WORKDIR.value, "model": MODEL.value, "features": FEATURES.value, "results": RESULTS.value}
    given = [name for name, value in ways.items() if value]
    if what in ("curves", "augmentation", "query"):
        allowed = ["workdir"]
    elif what == "retrieval":
        allowed = ["workdir", "features", "results"]
    elif what == "roc":
        allowed = ["workdir", "model", "features"]
    else:
        allowed = ["workdir", "model"]
    if len(given) != 1 or given[0] not in allowed:
        raise UserError(
            f"{what}: expected one of {', '.join('--' + name for name in allowed)}, "
            f"got {', '.join('--' + name for name in given) or 'none'}"
        )
    if files and not FEATURES.value:
        raise UserError(f"{files[0]}: not a flag; see --help")
    if FEATURES.value and (len(files) != 1 or PROTOCOL.value is None):
        raise UserError("--features: expected --features QUERY.npz GALLERY.npz --protocol=" + "|".join(PROTOCOLS))
    if MODEL.value and not IMAGES.value:
        raise UserError("--model: expected --images=FOLDER too")
    if WORKDIR.value and len(WORKDIR.value) > 1 and what != "tsne":
        raise UserError(f"--workdir: {what} shows one run, got {len(WORKDIR.value)}; only tsne shows several")
    if what == "retrieval":
        _retrieval(files)
    else:
        for path in _figure(what, files):
            print(path)


def _checkpoints() -> list[str]:
    number, given = len(WORKDIR.value), CHECKPOINT.value
    if len(given) not in (1, number):
        raise UserError(f"--checkpoint: {len(given)} for {number} workdirs; expected one for all, or one for each")
    for name in given:
        if name not in CHECKPOINTS:
            raise UserError(f"--checkpoint={name}: expected one of {', '.join(CHECKPOINTS)}")
    return given * number if len(given) == 1 else given


def _sources():
    from mpanet_jax.report.sources import source_of_model, source_of_run  # imports JAX

    if MODEL.value:
        return [source_of_model(MODEL.value, IMAGES.value, split=SPLIT.value)]
    return [
        source_of_run(workdir, checkpoint=checkpoint, data_dir=DATA_DIR.value)
        for workdir, checkpoint in zip(WORKDIR.value, _checkpoints(), strict=True)
    ]


def _folder() -> Path:
    if OUT.value:
        return Path(OUT.value)
    return Path(WORKDIR.value[0]) / "figures" if WORKDIR.value else Path("figures")


def _figure(what: str, files: list[str]) -> list[Path]:
    from mpanet_jax.report.requirements import require_report

    require_report("matplotlib", *(["sklearn"] if what == "tsne" else []))
    if what == "curves":
        from mpanet_jax.report.curves import draw_curves

        return draw_curves(WORKDIR.value[0], _folder())
    if what == "augmentation":
        from mpanet_jax.report.augmented import draw_augmentation

        return draw_augmentation(WORKDIR.value[0], _folder(), step=STEP.value, data_dir=DATA_DIR.value)
    if what == "patterns":
        return _patterns()
    if what == "query":
        return _query()
    if what == "tsne":
        from mpanet_jax.report.tsne import draw_tsne

        titles = TITLES.value
        number = len(WORKDIR.value or [MODEL.value])
        if titles and len(titles) != number:
            raise UserError(f"--titles: {len(titles)} for {number} panels; expected one for each")
        options = {"num_identities": NUM_IDENTITIES.value or 10, "perplexity": PERPLEXITY.value, "seed": SEED.value}
        return draw_tsne(_sources(), _folder(), titles=titles, **options)
    if what == "roc":
        from mpanet_jax.report.roc import draw_roc

        return draw_roc(_embedded(files) if FEATURES.value else _sources()[0], _folder(), seed=SEED.value)
    from mpanet_jax.report.distances import draw_distances

    return draw_distances(_sources()[0], _folder())


def _embedded(files: list[str]):
    from mpanet_jax.report.sources import source_of_features

    protocol = make_protocol(PROTOCOL.value, permutation=PERMUTATION.value)
    return source_of_features(load_embeddings(FEATURES.value), load_embeddings(files[0]), protocol)


def _patterns() -> list[Path]:
    from mpanet_jax.report.patterns import draw_patterns
    from mpanet_jax.report.people import choose_people, named_people, people_with_both

    (source,) = _sources()
    if PEOPLE.value:
        pids = named_people(source, PEOPLE.value)
    else:
        pids = choose_people(people_with_both(source), NUM_IDENTITIES.value or 3, SEED.value, source.title)
    return draw_patterns(source, pids, _folder(), seed=SEED.value, plain=PLAIN.value)


def _query() -> list[Path]:
    from mpanet_jax.report.query import SHOWN, choose_query, draw_query

    source, ranking = _ranked_run(top=SHOWN)
    return draw_query(source, ranking, choose_query(ranking, QUERY.value, SEED.value), _folder(), plain=PLAIN.value)


def _ranked_run(**options: Any):
    """A run's test images, and the rankings of its queries by the flags."""
    from mpanet_jax.report.sources import rank_run

    (source,) = _sources()
    rerank = source.rerank if RERANK.value is None else RERANK.value
    return source, rank_run(source, rerank=rerank, **_ranking_options(), **options)


def _ranking_options() -> dict[str, Any]:
    return {"setting": SETTING.value, "trial": TRIAL.value, "metric": METRIC.value, "cmc": CMC.value}


def _retrieval(files: list[str]) -> None:
    from mpanet_jax.report.requirements import require_report

    require_report("jinja2")
    from mpanet_jax.report.retrieval_page import write_page

    out = Path(OUT.value or Path(WORKDIR.value[0] if WORKDIR.value else ".") / "report.html")
    if out.suffix != ".html":
        raise UserError(f"--out={out}: expected the name of a file that ends in .html")
    if WORKDIR.value:
        page, photos, maps = _page_of_run()
    elif RESULTS.value:
        from mpanet_jax.report.search_page import page_of_search

        (page, photos), maps = page_of_search(RESULTS.value, IMAGES.value), None
    else:
        from mpanet_jax.report.page_content import page_of_ranking
        from mpanet_jax.report.retrieval import rank_queries
        from mpanet_jax.report.thumbnails import photos_of_folder

        if not IMAGES.value or not Path(IMAGES.value).is_dir():
            raise UserError(f"--images={IMAGES.value or ''}: expected the folder that the paths are relative to")
        query, gallery = load_embeddings(FEATURES.value), load_embeddings(files[0])
        protocol = make_protocol(PROTOCOL.value, permutation=PERMUTATION.value)
        ranking = rank_queries(query, gallery, protocol=protocol, rerank=bool(RERANK.value), **_ranking_options())
        page, photos, maps = page_of_ranking(ranking, Path(FEATURES.value).name), photos_of_folder(IMAGES.value), None
    written = write_page(out, page, photos, maps)
    queries = f"{len(page.queries):,} {'query' if len(page.queries) == 1 else 'queries'}"
    print(f"{out}: {queries}, {written.num_images:,} images")
    if written.missing:
        print(
            f"{len(written.missing):,} of {written.num_images:,} images have a placeholder, first {written.missing[0]}",
            file=sys.stderr,
        )


def _page_of_run():
    from mpanet_jax.report.page_content import page_of_ranking
    from mpanet_jax.report.sources import makes_maps

    source, ranking = _ranked_run()
    page = page_of_ranking(ranking, f"Retrieval of {source.title}", source.about)
    return page, source.photos, source.pattern_maps if MAPS.value and makes_maps(source) else None


if __name__ == "__main__":
    flags.FLAGS.set_gnu_getopt(True)  # flags may follow the names
    run_script(main)
