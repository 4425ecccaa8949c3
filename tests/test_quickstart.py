"""docs/quickstart.ipynb runs from its first cell to its last, in a folder of its own and without the network."""

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

NOTEBOOK = Path(__file__).parent.parent / "docs/quickstart.ipynb"
# All that is changed: nothing below depends on how well the network learns.
EPOCHS = '"train.num_epochs": 30,'
SHORTER = '"train.num_epochs": 2, "loss.separation": 0.0, "loss.modality_identity": 0.0, "loss.mutual_mean": 0.0,'


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (cell,) = (cell for cell in notebook.cells if cell.cell_type == "code" and EPOCHS in cell.source)
    cell.source = cell.source.replace(EPOCHS, SHORTER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]))
        resources = {"metadata": {"path": str(folder)}}
        nbclient.NotebookClient(notebook, timeout=None, startup_timeout=600, resources=resources).execute()
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(cell, kind):
    return [output["data"][kind] for output in cell.outputs if kind in output.get("data", {})]


def test_it_trains_embeds_and_shows(executed):
    printed = "".join(output["text"] for cell in executed for output in cell.outputs if output.output_type == "stream")
    assert re.search(r"^Rank-1 \d+ %, mAP \d+ %$", printed, re.M)
    shapes = [text for cell in executed for text in outputs(cell, "text/plain") if re.match(r"\(\(\d", text)]
    (queries, length), (gallery, same) = eval(shapes[0])
    # Of six people, three images or four in every camera that saw them; one feature and six patterns of 64 channels.
    assert queries >= 6 * 3 and gallery >= 6 * 3 and length == same == 7 * 64
    assert sum(len(outputs(cell, "image/png")) for cell in executed) == 2


def test_it_is_stored_without_outputs():
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None
