import tempfile

from benchmarks.data import benchmark_data
from mpanet_jax.settings import DataSettings
from tests.data.toy import toy_split


def test_every_figure_is_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    data = DataSettings(height=24, width=12, num_ids_per_batch=4, images_per_id=4)
    results = benchmark_data(toy_split(), data, num_images=20, num_batches=3, repeats=1)
    assert results["images"] == len(toy_split())
    assert results["streaming_over_pillow"] == results["streaming_per_core"] / results["pillow_loop"]
    assert all(value > 0 for value in results.values())
    assert not list(tmp_path.iterdir())
