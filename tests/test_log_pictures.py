"""What a run's log shows at an evaluation, and that training goes on where it cannot be shown."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from mpanet_jax.errors import UserError
from mpanet_jax.evaluation import workdir as workdir_evaluation
from mpanet_jax.log_pictures import LogPictures
from mpanet_jax.methods.mpanet import MPANet, MPANetSettings
from mpanet_jax.metric_log import MetricLog
from mpanet_jax.settings_base import replace
from tests.methods_in_tests import drawn_variables
from tests.report.sources import FIELDS, HEIGHT, WIDTH, known
from tests.report.test_augmented import split
from tests.test_metric_log import read_events

TAGS = ["batch_after_augmentation", "pattern_maps", "distance/one_identity", "distance/two_identities"]


def embeddings(images, *, nan_row=None):
    features = np.random.default_rng(0).normal(size=(len(images), 4)).astype(np.float32)
    if nan_row is not None:
        features[nan_row] = np.nan
    return known(features, images.pids, images.modality).images


def test_pictures_are_written_and_a_fault_in_them_does_not_end_training(tmp_path, capsys):
    method = MPANet(replace(MPANetSettings(), FIELDS | {"data.num_ids_per_batch": 2, "data.images_per_id": 4}))
    images = split()
    variables = drawn_variables(method.network(4), HEIGHT, WIDTH)
    with MetricLog(tmp_path, total_steps=10, first_step=0) as log:
        pictures = LogPictures(log, method, images, lambda step: np.arange(8), images)
        pictures.write(1, variables, embeddings(images))
        assert capsys.readouterr().err == ""
        # As of a run that reads its images from a cache, whose record was damaged since.
        pictures._train = dataclasses.replace(images, encoded=[b"damaged", *images.encoded[1:]])
        pictures.write(2, variables, embeddings(images))
        (line,) = capsys.readouterr().err.splitlines()
        assert "step 2" in line and "0.png" in line
        pictures._train = images
        pictures.write(3, variables, embeddings(images, nan_row=0))
        assert capsys.readouterr().err == ""
    (path,) = (tmp_path / "logs").iterdir()
    values = [(event.step, value) for event in read_events(path) for value in event.summary.value]
    assert [(step, value.tag) for step, value in values] == [(step, tag) for step in (1, 3) for tag in TAGS]
    # Eight images of 64x32 in rows of four, white lines between them; of four people two images and six maps of each.
    sizes = [(value.image.height, value.image.width) for _, value in values if value.HasField("image")]
    assert sizes == [(130, 134), (8 * 66 - 2, 7 * 34 - 2)] * 2
    # Of four identities with two images in either modality: all pairs, and those that are left without image 0.
    counts = [round(value.histo.num) for _, value in values if value.HasField("histo")]
    assert counts == [16, 48, 14, 42]


def test_a_model_that_diverged_is_refused_before_anything_is_shown(monkeypatch):
    images, told = split(), []
    diverged = embeddings(images, nan_row=3)
    monkeypatch.setattr(workdir_evaluation, "_embed_set", lambda *_: (np.arange(len(images)), diverged))
    with pytest.raises(UserError, match="diverged"):
        workdir_evaluation.evaluate_set(
            MPANetSettings(), SimpleNamespace(evaluations=[]), lambda x: x, on_embeddings=told.append
        )
    assert told == []
