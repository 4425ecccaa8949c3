"""scripts/visualize.py: a page from two .npz files and a folder, and one line for what cannot be drawn."""

import pytest

from mpanet_jax.embeddings import save_embeddings
from tests.report.page_cases import WICKED, people, photo
from tests.scripts_in_process import process


def run_script(*arguments):
    return process("visualize.py", *arguments)


def test_a_page_of_any_framework_s_embeddings(tmp_path):
    query, gallery = people(4, 8, 12)
    for name, images in (("query", query), ("gallery", gallery)):
        save_embeddings(tmp_path / f"{name}.npz", images)
        for path in images.paths.tolist()[1:]:  # the first of each is not there
            (tmp_path / "images" / path).parent.mkdir(parents=True, exist_ok=True)
            photo(path).save(tmp_path / "images" / path)
    common = ("retrieval", "--features", tmp_path / "query.npz", tmp_path / "gallery.npz", "--protocol=own")
    done = run_script(*common, f"--images={tmp_path}/images", f"--out={tmp_path}/report.html")
    assert done.returncode == 0, done.stderr
    assert "12 queries, 20 images" in done.stdout and "images have a placeholder" in done.stderr
    text = (tmp_path / "report.html").read_text()
    assert "own/" in text and WICKED not in text
    refused = run_script(*common, f"--out={tmp_path}/other.html")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "--images" in refused.stderr
    assert not (tmp_path / "other.html").exists()


@pytest.mark.parametrize(
    "arguments, named",
    [(["figures"], "patterns"), (["curves", "--workdir={}"], "logs"), (["retrieval", "--model=m"], "--features")],
)
def test_what_cannot_be_drawn_is_one_line(tmp_path, arguments, named):
    refused = run_script(*(argument.format(tmp_path) for argument in arguments))
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and named in refused.stderr, refused.stderr
    assert not list(tmp_path.iterdir())
