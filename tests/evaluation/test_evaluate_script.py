import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mpanet_jax.evaluation.metrics_output import format_table, write_metrics
from tests.evaluation import brute_force, cases
from tests.scripts_in_process import process

ROOT = Path(__file__).resolve().parents[2]


def start_script(*arguments):
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / "evaluate.py", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Features as PyTorch users have them: tensors of one framework, saved by numpy."""
    torch = pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("features")
    generator = np.random.default_rng(0)
    counts = {(camera, pid): 3 for camera in range(1, 7) for pid in range(1, 5)}
    permutation = cases.sysu_permutation(generator, counts, 4)
    cases.write_permutation(folder / "rand_perm_cam.mat", permutation)
    sets = []
    for name, images in zip(("query", "gallery"), cases.sysu_images(counts), strict=True):
        features = torch.from_numpy(generator.standard_normal((len(images), 6)))
        pids, camids, paths = zip(*images, strict=True)
        np.savez(
            folder / f"{name}.npz",
            features=features.half().numpy(),
            pids=torch.tensor(pids).numpy(),
            camids=torch.tensor(camids).numpy(),
            paths=list(paths),
        )
        sets.append(brute_force.images(cases.embeddings(images, features.half().numpy())))
    return folder, brute_force.sysu(*sets, permutation)


def test_features_of_another_framework(files):
    folder, expected = files
    out = folder / "results" / "metrics.json"
    result = start_script(
        *("--features", folder / "query.npz", folder / "gallery.npz", "--protocol", "sysu_mm01"),
        *("--permutation", folder / "rand_perm_cam.mat", "--out", out),
    )
    assert result.returncode == 0, result.stderr
    metrics = json.loads(out.read_text())
    assert list(metrics) == list(expected)
    for name, values in expected.items():
        assert metrics[name]["mAP"] == pytest.approx(values["mAP"], abs=1e-9)
        assert f"{values['mAP']:.2f} ± {values['std']['mAP']:.2f}" in result.stdout
        low, high = metrics[name]["interval"]["mAP"]
        assert low <= metrics[name]["mAP"] <= high
        assert f"{low:.2f}–{high:.2f}" in result.stdout
    for word in ("sysu_mm01", "cosine", "identity", "re-ranking off", "Rank-20", "mINP", "10 trials"):
        assert word in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected one of --features"),
        (["--features", "query.npz"], "QUERY.npz GALLERY.npz"),
        (["--features", "query.npz", "gallery.npz", "--protocol", "sysu_mm01"], "--permutation"),
        (["--features", "query.npz", "none.npz", "--protocol", "sysu_mm01_random"], "none.npz: no such file"),
        (["--features", "query.npz", "gallery.npz", "--protocol", "market"], "protocol"),
        (["--workdir", "runs", "--protocol", "regdb"], "a run's config says its own"),
        (["--features", "query.npz", "gallery.npz", "--checkpoint", "best"], "goes with --workdir"),
    ],
)
def test_bad_input_ends_with_one_line_and_code_2(files, arguments, message):
    folder = files[0]
    paths = [folder / argument if argument.endswith(".npz") else argument for argument in arguments]
    out = folder / "nothing.json"
    result = process("evaluate.py", *paths, "--out", out)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not out.exists()


def test_table_says_when_reranking_is_on_and_metrics_are_written_whole(tmp_path):
    figures = {"rank1": 70.58, "rank5": 80.0, "rank10": 85.0, "rank20": 90.0, "mAP": 68.24, "mINP": 50.0}
    values = {
        **figures,
        "std": dict.fromkeys(figures, 1.25),
        "rerank": True,
        "protocol": "regdb",
        "metric": "euclidean",
        "cmc": "image",
        "trials": 1,
        "trial": 3,
        "checkpoint": "best",
        "num_query": 2060,
        "num_query_without_match": 60,
        "num_gallery": 2061,
    }
    table = format_table({"regdb/visible_to_infrared": values})
    for text in ("re-ranking ON", "trial 3", "best checkpoint", "CMC by image", "70.58 ± 1.25", "2000", "2061"):
        assert text in table
    # Files of version 0.1 have no intervals.
    assert "interval" not in table and "bootstrap" not in table
    of_today = {**values, "interval": {name: [60.0, 100.0] for name in figures}}
    lines = format_table({"regdb/visible_to_infrared": of_today, "regdb/infrared_to_visible": values}).splitlines()
    assert "bootstrap over query identities, 2000 resamples" in lines[0]
    assert lines[3].split() == ["95", "%", "interval", *["60.00–100.00"] * 6]
    assert lines[2].index("70.58 ± 1.25") + len("70.58 ± 1.25") == lines[3].index("60.00–100.00") + len("60.00–100.00")
    path = tmp_path / "metrics.json"
    path.write_text("old")
    with pytest.raises(TypeError):
        write_metrics(path, {"a": {"rank1": object()}})
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.json"]
