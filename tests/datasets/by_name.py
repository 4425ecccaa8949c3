"""Data sets as most tests name them: by name, raw folder and data_dir."""

from mpanet_jax import datasets
from mpanet_jax.datasets import verify as verification


def settings(name, data_dir, source=None, **own):
    return datasets.settings_of({"name": name, "data_dir": str(data_dir), "source": str(source or ""), **own})


def prepare(name, source, data_dir, *, verify=True, track=datasets.builder.no_progress, **own):
    return datasets.prepare(settings(name, data_dir, source, **own), verify=verify, track=track)


def load_split(name, data_dir, split, **own):
    return datasets.load_split(settings(name, data_dir, **own), split)


def prepared_dir(name, data_dir, **own):
    return datasets.prepared_dir(settings(name, data_dir, **own))


def is_prepared(name, data_dir, **own):
    return datasets.is_prepared(settings(name, data_dir, **own))


def make_dataset(name, **own):
    return datasets.make_dataset(settings(name, "data", **own))


def list_images(name, source, split, **own):
    return make_dataset(name, **own).list_images(source, split)


def verify(name, source, **own):
    return verification.verify([make_dataset(name, **own)], source)
