"""The settings of a run: their defaults, what they refuse, in which words, and their way through configs and JSON."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mpanet_jax import settings_base
from mpanet_jax.datasets.regdb import RegdbSettings
from mpanet_jax.errors import SettingsError, UserError
from mpanet_jax.methods import make_method, settings_of
from mpanet_jax.methods.agw import AGWSettings
from mpanet_jax.methods.caj import CAJSettings
from mpanet_jax.methods.mpanet import LossSettings, MPANet, MPANetModelSettings, MPANetSettings
from mpanet_jax.run_files import check_same_run, load_settings, save_settings
from mpanet_jax.settings import DatasetSettings, DataSettings, OptimSettings, Settings
from mpanet_jax.settings_base import flat, from_dict, replace, to_dict

ROOT = Path(__file__).parent.parent

# The paper's recipe on SYSU-MM01 (docs/method.md), and what else a run is made from.
PAPER = {
    "seed": 0,
    "preset": "paper",
    "method": "mpanet",
    "dtype": "auto",
    "parallel": "pmap",
    "batch_scale": "global",
    "init_from": "hf:timm/resnet50.tv_in1k",
    "dataset": {"name": "sysu_mm01", "source": "", "data_dir": "data", "validation": False},
    "data": {
        "height": 384,
        "width": 128,
        "num_ids_per_batch": 16,
        "images_per_id": 8,
        "resize": "bilinear",
        "cache": "auto",
        "resize_on": "auto",
        "num_workers": -1,
    },
    "augment": {
        "flip_probability": 0.5,
        "crop_padding": 0,
        "crop_fill": 127,
        "exchange_probability": 0.0,
        "grey_probability": 0.0,
        "mrle_probability": 0.0,
        "mrle_beta": 0.3,
        "rrle_probability": 0.0,
        "rrle_beta": 0.4,
        "rrle_area": (0.02, 0.4),
        "rrle_aspect": (0.3, 1 / 0.3),
        "erase_probability": 0.5,
        "erase_area": (0.02, 0.33),
        "erase_aspect": (0.3, 3.3),
        "erase_log_aspect": True,
        "erase_attempts": 10,
        "erase_fill": (0.0, 0.0, 0.0),
    },
    "model": {
        "backbone": "resnet50",
        "stage_sizes": (),
        "width": 64,
        "fused": "auto",
        "channel_module": "mam",
        "pattern_module": "pam",
        "num_patterns": 6,
        "reduction": 16,
    },
    "optim": {"learning_rate": 3.5e-4, "milestones": (80, 120), "decay": 0.1, "weight_decay": 5e-4},
    "train": {
        "num_epochs": 140,
        "eval_every_epochs": 20,
        "checkpoint_every_epochs": 5,
        "keep_checkpoints": 2,
        "log_every_steps": 50,
        "steps_per_call": 15,
        "on_nonfinite": "stop",
    },
    "eval": {"batch_size": 256, "best": "", "flip": False, "rerank": False},
    "loss": {
        "identity": 1.0,
        "center_cluster": 1.0,
        "separation": 0.5,
        "modality_identity": 0.5,
        "mutual_mean": 2.5,
        "margin": 0.7,
        "per_modality_identity": True,
        "student_first": False,
    },
    "mean": {"rate": 0.2, "epochs_at_full": 0},
}

# What runs wrote before there were methods, backbones by name and a fused form.
OLD_CONFIG = {
    "seed": 0,
    "preset": "paper",
    "dtype": "auto",
    "parallel": "pmap",
    "batch_scale": "global",
    "init_from": "",
    "dataset": {"name": "sysu_mm01", "source": "", "data_dir": "data", "trial": 1},
    "data": PAPER["data"],
    "augment": {
        "flip_probability": 0.5,
        "crop_padding": 0,
        "crop_fill": 127,
        "erase_probability": 0.5,
        "erase_area": [0.02, 0.33],
        "erase_aspect": [0.3, 3.3],
    },
    "model": {
        "stage_sizes": [3, 4, 6, 3],
        "width": 64,
        "channel_module": "mam",
        "pattern_module": "pam",
        "num_patterns": 6,
        "reduction": 16,
    },
    "loss": PAPER["loss"],
    "mean": PAPER["mean"],
    "optim": PAPER["optim"] | {"milestones": [80, 120]},
    "train": PAPER["train"],
    "eval": PAPER["eval"],
}

REGDB = {"dataset.name": "regdb"}
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
OTHERS = [name for name in CONFIGS if name.endswith(("_agw", "_caj"))]
OPTIONS = {name: [()] for name in ("default", *OTHERS)} | {
    name: [(), ("paper",), ("official",), ("strong",)] for name in CONFIGS if name not in ("default", *OTHERS)
}
OPTIONS["synthetic_gpu"] += [("agw",), ("caj",)]
OPTIONS["regdb"] += [("official,split=2",), *((f"split={trial}",) for trial in range(1, 11))]
ALL_CONFIGS = [(name, *options) for name in CONFIGS for options in OPTIONS[name]]


def config_settings(name, *options):
    """Those of configs/NAME.py:OPTIONS, as a script makes them."""
    return settings_of(importlib.import_module(f"configs.{name}").get_config(*options).to_dict())


def tree_of(changes):
    """{"data.height": 1} as {"data": {"height": 1}}."""
    tree = {}
    for path, value in changes.items():
        *groups, name = path.split(".")
        inner = tree
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[name] = value
    return tree


def through_json(settings):
    return json.loads(json.dumps(to_dict(settings)))


def differences(first, second):
    """{field: its value in `second`} where that is another."""
    first, second = flat(to_dict(first)), flat(to_dict(second))
    return {name: value for name, value in second.items() if name not in first or first[name] != value}


def test_the_defaults_are_the_papers_recipe():
    assert to_dict(MPANetSettings()) == PAPER
    assert list(flat(to_dict(MPANetSettings()))) == list(flat(PAPER))
    assert settings_of({}) == config_settings("default") == MPANetSettings()


def test_a_field_has_one_type_and_says_what_it_means():
    def leaves(settings):
        for field in dataclasses.fields(settings):
            value = getattr(settings, field.name)
            yield from leaves(value) if dataclasses.is_dataclass(value) else [(field, value)]

    regdb = settings_of({"dataset": {"name": "regdb"}})
    for settings in (MPANetSettings(), regdb):
        for field, value in leaves(settings):
            assert field.metadata["comment"], field.name
            # Each number and each choice has a rule; free texts and switches need none.
            assert field.metadata["rule"] is not None or type(value) in (str, bool), field.name


def test_settings_are_frozen_and_can_be_compared():
    settings = MPANetSettings()
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.seed = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.data.height = 1
    assert settings == MPANetSettings() != replace(settings, {"seed": 1})
    assert hash(settings) == hash(MPANetSettings())


def test_replace_changes_what_it_names_and_nothing_else():
    settings = MPANetSettings()
    changes = {"data.height": 288, "seed": 1, "optim.milestones": (40,), "data.width": 144}
    changed = replace(settings, changes)
    assert differences(settings, changed) == changes
    assert settings == MPANetSettings()
    assert type(changed) is MPANetSettings
    assert replace(settings, {}) == settings
    # A whole group, and a field of it beside it.
    data = DataSettings(height=64, width=32)
    assert replace(settings, {"data": data}).data == data
    assert replace(settings, {"data": data, "data.cache": "host"}).data == DataSettings(64, 32, cache="host")


CHANNELS = "'mam', 'se', 'in', 'cbam', 'none'"
BACKBONES = "'resnet18', 'resnet34', 'resnet50', 'resnet101', 'resnet152'"
BEST = "'', 'rank1', 'rank5', 'rank10', 'rank20', 'mAP', 'mINP'"
WORKERS = "expected a number of processes up to 1024, 0 for threads, or -1 to choose"
STAGES = "expected 4 numbers from 1 to 200, or none"
SHARES = "expected a smallest and a largest value, above 0 and at most 1"
MILESTONES = "expected epochs from 0 to 100000, in rising order"
RATIOS = "expected a smallest and a largest value above 0"
BAD_VALUES = [
    # one of some names, with the nearest
    ("preset", "oficial", "expected one of 'paper', 'official', 'strong'; did you mean 'official'?"),
    ("dtype", "bfloat", "expected one of 'auto', 'float32', 'bfloat16', 'float64'; did you mean 'bfloat16'?"),
    ("dtype", "half", "expected one of 'auto', 'float32', 'bfloat16', 'float64'"),
    ("parallel", "shardmap", "expected one of 'pmap', 'shard_map'; did you mean 'shard_map'?"),
    ("batch_scale", "local", "expected one of 'global', 'per_device'; did you mean 'global'?"),
    ("data.cache", "disk", "expected one of 'auto', 'device', 'host', 'none'"),
    ("data.resize_on", "gpu", "expected one of 'auto', 'device', 'host'"),
    ("model.fused", "yes", "expected one of 'auto', 'on', 'off'"),
    ("model.backbone", "resnet5", f"expected one of {BACKBONES}; did you mean 'resnet50'?"),
    ("model.channel_module", "mamm", f"expected one of {CHANNELS}; did you mean 'mam'?"),
    ("model.pattern_module", "nonlocal", "expected one of 'pam', 'non_local', 'none'; did you mean 'non_local'?"),
    ("eval.best", "rank2", f"expected one of {BEST}; did you mean 'rank20'?"),
    # numbers out of range
    ("seed", -1, "expected a number from 0 to 4294967295"),
    ("seed", 10**20, "expected a number from 0 to 4294967295"),
    ("seed", 2**32, "expected a number from 0 to 4294967295"),
    ("data.height", 1, "expected a number from 4 to 4096"),
    ("data.height", 100_000, "expected a number from 4 to 4096"),
    ("data.width", 1, "expected a number from 4 to 4096"),
    ("data.width", -5, "expected a number from 4 to 4096"),
    ("data.width", 100_000, "expected a number from 4 to 4096"),
    ("data.num_ids_per_batch", 0, "expected a number from 1 to 4096"),
    ("data.num_ids_per_batch", 100_000, "expected a number from 1 to 4096"),
    ("data.images_per_id", 0, "expected a number from 2 to 256"),
    ("data.images_per_id", 1, "expected a number from 2 to 256"),
    ("data.images_per_id", 1000, "expected a number from 2 to 256"),
    ("data.num_workers", -2, WORKERS),
    ("data.num_workers", 100_000, WORKERS),
    ("augment.flip_probability", 1.5, "expected a number from 0 to 1"),
    ("augment.erase_probability", -0.1, "expected a number from 0 to 1"),
    ("augment.crop_padding", -3, "expected a number from 0 to 4096"),
    ("augment.crop_padding", 100_000, "expected a number from 0 to 4096"),
    ("augment.crop_fill", 300, "expected a pixel's value, 0 to 255"),
    ("augment.erase_area", (0.5, 0.2), SHARES),
    ("augment.erase_area", (0.5, 1.1), SHARES),
    ("augment.erase_area", (0.0, 0.2), SHARES),
    ("augment.erase_aspect", (0.0, 3.3), RATIOS),
    ("augment.erase_aspect", (0.3, float("inf")), RATIOS),
    ("augment.erase_attempts", 0, "expected a number from 1 to 10000"),
    ("augment.erase_attempts", 10**9, "expected a number from 1 to 10000"),
    ("augment.erase_fill", (0.0, float("inf"), 0.0), "expected finite numbers"),
    ("augment.exchange_probability", 2.0, "expected a number from 0 to 1"),
    ("augment.grey_probability", -1.0, "expected a number from 0 to 1"),
    ("augment.mrle_probability", 1.1, "expected a number from 0 to 1"),
    ("augment.mrle_beta", 0.0, "expected a positive number"),
    ("augment.rrle_probability", -0.1, "expected a number from 0 to 1"),
    ("augment.rrle_beta", -0.4, "expected a positive number"),
    ("augment.rrle_area", (0.5, 0.4), SHARES),
    ("augment.rrle_aspect", (0.0, 1.0), RATIOS),
    ("model.width", 0, "expected a number from 1 to 1024"),
    ("model.width", 100_000, "expected a number from 1 to 1024"),
    ("model.num_patterns", 0, "expected a number from 1 to 256"),
    ("model.num_patterns", 100_000, "expected a number from 1 to 256"),
    ("model.reduction", 0, "expected at least 1"),
    ("model.stage_sizes", (1, 1), STAGES),
    ("model.stage_sizes", (1, 1, 1, 0), STAGES),
    ("model.stage_sizes", (1, 1, 100_000, 1), STAGES),
    ("optim.learning_rate", 0.0, "expected a positive number"),
    ("optim.learning_rate", float("inf"), "expected a positive number"),
    ("optim.decay", -1.0, "expected a positive number"),
    ("optim.weight_decay", -1e-4, "expected at least 0"),
    ("optim.milestones", (38, 29), MILESTONES),
    ("optim.milestones", (-5, 0), MILESTONES),
    ("optim.milestones", (80, 10**10), MILESTONES),
    ("optim.milestones", ("a", "b"), "expected a tuple of whole numbers"),
    ("optim.milestones", (38, 38), MILESTONES),
    ("train.num_epochs", 0, "expected a number from 1 to 100000"),
    ("train.num_epochs", 10**20, "expected a number from 1 to 100000"),
    ("train.eval_every_epochs", -1, "expected at least 0"),
    ("train.checkpoint_every_epochs", -1, "expected at least 0"),
    ("train.keep_checkpoints", 0, "expected at least 1"),
    ("train.log_every_steps", 0, "expected at least 1"),
    ("train.steps_per_call", 0, "expected at least 1"),
    ("train.on_nonfinite", "ignore", "expected one of 'stop', 'skip'"),
    ("eval.batch_size", 0, "expected a number from 1 to 65536"),
    ("loss.identity", -1.0, "expected at least 0"),
    ("loss.center_cluster", -1.0, "expected at least 0"),
    ("loss.separation", -1.0, "expected at least 0"),
    ("loss.modality_identity", -1.0, "expected at least 0"),
    ("loss.mutual_mean", float("inf"), "expected at least 0"),
    ("loss.margin", -0.7, "expected at least 0"),
    ("mean.rate", 1.2, "expected a number from 0 to 1"),
    ("mean.epochs_at_full", -1, "expected a number from 0 to 100000"),
    ("mean.epochs_at_full", 10**10, "expected a number from 0 to 100000"),
    # values of another type
    ("data.height", 384.0, "expected a whole number"),
    ("data.height", True, "expected a whole number"),
    ("data.height", "tall", "expected a whole number"),
    ("data.height", {"pixels": 384}, "expected a whole number"),
    ("optim.learning_rate", "fast", "expected a number"),
    ("optim.learning_rate", False, "expected a number"),
    ("optim.learning_rate", float("nan"), "expected a number"),
    ("optim.learning_rate", None, "expected a number"),
    ("optim.learning_rate", 10**400, "expected a number"),
    ("eval.rerank", 1, "expected True or False"),
    ("init_from", 5, "expected a text"),
    ("dtype", 32, "expected a text"),
    ("model.backbone", 50, "expected a text"),
    ("optim.milestones", 80, "expected a tuple of whole numbers"),
    ("optim.milestones", (80, 120.5), "expected a tuple of whole numbers"),
    ("model.stage_sizes", (1.5, 1, 1, 1), "expected a tuple of whole numbers"),
    ("model.stage_sizes", "3463", "expected a tuple of whole numbers"),
    ("augment.erase_area", (0.5,), "expected 2 numbers"),
    ("augment.erase_fill", (0.5, 0.5), "expected 3 numbers"),
    ("augment.erase_aspect", (0.3, 1.0, 3.3), "expected 2 numbers"),
    ("augment.erase_aspect", (0.3, "3.3"), "expected 2 numbers"),
    ("data", 5, "expected a DataSettings"),
    ("dataset", 5, "expected a DatasetSettings"),
    # fields that do not fit each other
    ("data.images_per_id", 5, "K is half visible, half infrared; use an even number such as 4"),
    ("data.images_per_id", 3, "K is half visible, half infrared; use an even number such as 2"),
    ("model.reduction", 7, "it has to divide the 1024 channels of stage 3"),
    (
        "preset",
        "official",
        "the other fields are still the paper's; choose a preset after the name of the config file: "
        "--config=configs/NAME.py:official",
    ),
]


@pytest.mark.parametrize(("field", "value", "message"), BAD_VALUES)
def test_what_cannot_be_is_named_with_what_is_expected(field, value, message):
    with pytest.raises(SettingsError) as error:
        replace(MPANetSettings(), {field: value})
    assert str(error.value) == f"{field} = {value!r}: {message}"
    assert isinstance(error.value, UserError) and "\n" not in str(error.value)
    # The same from a config or from JSON, in which a tuple is a list.
    value = list(value) if isinstance(value, tuple) else value
    with pytest.raises(SettingsError) as again:
        settings_of(tree_of({field: value}))
    assert str(again.value) == str(error.value)


@pytest.mark.parametrize(("num_workers"), [-1, 0, 12])
def test_the_settings_say_how_many_workers(num_workers):
    assert replace(MPANetSettings(), {"data.num_workers": num_workers}).data.num_workers == num_workers


@pytest.mark.parametrize(
    "changes",
    [
        {"loss.identity": 0, "loss.center_cluster": 0, "loss.separation": 0, "loss.modality_identity": 0},
        {"loss.separation": 0.0},
        {"augment.flip_probability": 0, "augment.erase_probability": 1},
        {"augment.erase_area": (0.2, 0.2), "augment.erase_aspect": (1, 1)},
        {"optim.milestones": ()},
        {"optim.learning_rate": 1},
        {"train.eval_every_epochs": 0, "train.checkpoint_every_epochs": 0},
        {"data.images_per_id": 2, "data.num_ids_per_batch": 1, "data.height": 4, "data.width": 4096},
        {"seed": 2**32 - 1, "eval.best": "mINP", "mean.rate": 1.0, "augment.crop_fill": 255},
        # A mask with whole widths is needed only where there is a mask.
        {"model.reduction": 7, "model.channel_module": "none"},
        {"model.reduction": 7, "model.channel_module": "in"},
        {"model.reduction": 7, "model.width": 7},
    ],
)
def test_values_at_the_edge_are_valid_and_survive_json(changes):
    settings = replace(MPANetSettings(), changes)
    assert settings_of(through_json(settings)) == settings


@pytest.mark.parametrize("module", ["mam", "se", "cbam"])
@pytest.mark.parametrize(
    ("backbone", "width", "channels"), [("resnet50", 64, 1024), ("resnet18", 64, 256), ("resnet50", 20, 320)]
)
def test_the_reduction_divides_the_channels_of_the_first_mask(module, backbone, width, channels):
    changes = {"model.channel_module": module, "model.backbone": backbone, "model.width": width}
    replace(MPANetSettings(), changes | {"model.reduction": channels})
    with pytest.raises(
        SettingsError, match=rf"^model\.reduction = 48: it has to divide the {channels} channels of stage 3$"
    ):
        replace(MPANetSettings(), changes | {"model.reduction": 48})


def test_something_has_to_be_learned():
    nothing = dict.fromkeys(("identity", "center_cluster", "separation", "modality_identity", "mutual_mean"), 0.0)
    message = r"^loss\.identity = 0\.0: all weights are 0, so nothing is learned; give one of them a value$"
    with pytest.raises(SettingsError, match=message):
        MPANetSettings(loss=LossSettings(**nothing))
    for term in nothing:
        MPANetSettings(loss=LossSettings(**(nothing | {term: 0.1})))


@pytest.mark.parametrize(
    "change", [{"loss.per_modality_identity": False}, {"loss.student_first": True}, {"mean.epochs_at_full": 100}]
)
def test_a_preset_that_the_other_fields_bear_out(change):
    assert replace(MPANetSettings(), {"preset": "official", **change}).preset == "official"


FIELDS = ", ".join(PAPER)
DATA_FIELDS = ", ".join(f"data.{name}" for name in PAPER["data"])
UNKNOWN = [
    ("data.heigth", f"data.heigth: unknown field; there are {DATA_FIELDS}; did you mean 'data.height'?"),
    ("modle.width", f"modle: unknown field; there are {FIELDS}; did you mean 'model'?"),
    ("zzz", f"zzz: unknown field; there are {FIELDS}"),
    (
        "mean.epochs",
        "mean.epochs: unknown field; there are mean.rate, mean.epochs_at_full; did you mean 'mean.epochs_at_full'?",
    ),
]


@pytest.mark.parametrize(("field", "message"), UNKNOWN)
def test_a_field_that_is_not_there_is_named_with_those_that_are(field, message):
    for make in (
        lambda: replace(MPANetSettings(), {field: 1}),
        lambda: settings_of(tree_of({field: 1})),
        lambda: from_dict(MPANetSettings, tree_of({field: 1})),
    ):
        with pytest.raises(SettingsError) as error:
            make()
        assert str(error.value) == message


def test_a_field_within_a_value_is_not_there():
    with pytest.raises(SettingsError, match=r"^data\.height\.pixels: unknown field; there are data\.height, "):
        replace(MPANetSettings(), {"data.height.pixels": 1})
    with pytest.raises(SettingsError, match=r"^seed\.x: unknown field; there are seed, "):
        replace(MPANetSettings(), {"seed.x": 1})


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"method": "mpanett"}, "method = 'mpanett': expected one of 'mpanet', 'agw', 'caj'; did you mean 'mpanet'?"),
        ({"method": 3}, "method = 3: expected one of 'mpanet', 'agw', 'caj'"),
        (
            {"dataset": {"name": "sysu"}},
            "dataset.name = 'sysu': expected one of 'sysu_mm01', 'regdb', 'llcm', 'own'; did you mean 'sysu_mm01'?",
        ),
        ({"dataset": {"name": 1}}, "dataset.name = 1: expected one of 'sysu_mm01', 'regdb', 'llcm', 'own'"),
        (
            {"dataset": {"sourc": "x"}},
            "dataset.sourc: unknown field; there are dataset.name, dataset.source, dataset.data_dir, "
            "dataset.validation; did you mean 'dataset.source'?",
        ),
    ],
)
def test_an_unknown_method_or_data_set_is_named(tree, message):
    with pytest.raises(SettingsError) as error:
        settings_of(tree)
    assert str(error.value) == message


def test_a_method_is_made_of_its_settings():
    settings = MPANetSettings(seed=3)
    method = make_method(settings)
    assert type(method) is MPANet and method.settings is settings
    with pytest.raises(SettingsError, match=r"^method = 'none': expected one of 'mpanet'"):
        make_method(Settings(method="none"))


def test_a_fused_form_that_is_not_there_is_refused():
    settings = replace(MPANetSettings(), {"model.fused": "on", "model.backbone": "resnet18"})
    message = r"^model\.fused = 'on': the network of method 'mpanet' with backbone 'resnet18' .*; use 'auto' or 'off'$"
    with pytest.raises(SettingsError, match=message):
        make_method(settings).build(num_ids=3)


def test_a_data_set_is_changed_with_its_own_class_of_settings_only():
    with pytest.raises(SettingsError, match=r"^dataset\.name = 'sysu': expected one of 'sysu_mm01', .*did you mean"):
        replace(MPANetSettings(), {"dataset.name": "sysu"})
    with pytest.raises(SettingsError, match=r"^dataset\.name = 'regdb': its settings are a RegdbSettings$"):
        replace(MPANetSettings(), {"dataset.name": "regdb"})
    assert replace(MPANetSettings(), {"dataset.name": "llcm"}).dataset == DatasetSettings(name="llcm")


def test_validation_needs_a_list_of_validation_identities():
    for name in ("sysu_mm01", "own"):
        assert settings_of(tree_of({"dataset.name": name, "dataset.validation": True})).dataset.validation
    for name in ("regdb", "llcm"):
        with pytest.raises(SettingsError, match=rf"^dataset\.validation = True: {name} has no list 'val'"):
            settings_of(tree_of({"dataset.name": name, "dataset.validation": True}))


def test_the_trial_is_a_field_of_regdb_only():
    regdb = settings_of(tree_of(REGDB))
    assert regdb.dataset == RegdbSettings() == RegdbSettings(name="regdb", trial=1)
    assert replace(regdb, {"dataset.trial": 4}) == settings_of(tree_of({**REGDB, "dataset.trial": 4}))
    assert to_dict(regdb)["dataset"] == {
        "name": "regdb",
        "source": "",
        "data_dir": "data",
        "validation": False,
        "trial": 1,
    }
    for trial in (0, 11):
        with pytest.raises(SettingsError, match=rf"^dataset\.trial = {trial}: expected a number from 1 to 10$"):
            settings_of(tree_of({**REGDB, "dataset.trial": trial}))
    with pytest.raises(SettingsError, match=r"^dataset\.trial = '3': expected a whole number$"):
        settings_of(tree_of({**REGDB, "dataset.trial": "3"}))
    with pytest.raises(SettingsError, match=r"^dataset\.name = 'llcm': expected one of 'regdb'$"):
        MPANetSettings(dataset=RegdbSettings(name="llcm"))
    for name in ("sysu_mm01", "llcm"):
        # A config has the field for every data set: at its default it is none of the others', and else an error.
        settings = settings_of(tree_of({"dataset.name": name, "dataset.trial": 1}))
        assert settings.dataset == DatasetSettings(name=name)
        assert settings.dataset.trial is None and "trial" not in to_dict(settings)["dataset"]
        message = rf"^dataset\.trial = 2: a field of 'regdb', not of '{name}'$"
        with pytest.raises(SettingsError, match=message):
            settings_of(tree_of({"dataset.name": name, "dataset.trial": 2}))
        with pytest.raises(SettingsError, match=r"^dataset\.trial: unknown field; there are dataset\.name, "):
            replace(settings, {"dataset.trial": 1})


def test_blocks_that_the_backbone_has_anyway_are_the_same_run():
    sizes = (3, 4, 6, 3)
    assert MPANetModelSettings(stage_sizes=sizes) == MPANetModelSettings()
    assert MPANetModelSettings(backbone="resnet34", stage_sizes=sizes).stage_sizes == ()
    assert MPANetModelSettings(backbone="resnet101", stage_sizes=sizes).stage_sizes == sizes
    assert MPANetModelSettings(stage_sizes=(1, 1, 1, 1)).stage_sizes == (1, 1, 1, 1)


@pytest.mark.parametrize("arguments", ALL_CONFIGS, ids=lambda arguments: ":".join(arguments))
def test_every_config_and_preset_is_valid_and_survives_json(arguments, tmp_path):
    settings = config_settings(*arguments)
    ends = tuple(word.rpartition("_")[2] for word in arguments)
    expected = AGWSettings if "agw" in ends else CAJSettings if "caj" in ends else MPANetSettings
    assert type(settings) is expected
    assert settings_of(through_json(settings)) == settings
    if type(settings.dataset) is DatasetSettings:
        assert from_dict(expected, through_json(settings)) == settings
    save_settings(settings, tmp_path)
    assert load_settings(tmp_path) == settings
    assert settings.preset == next((name for name in ("official", "strong") if name in arguments[-1]), "paper")
    dataset = arguments[0].partition("_")[0]
    assert settings.dataset.name == (dataset if dataset in ("regdb", "llcm", "own") else "sysu_mm01")
    trial = arguments[-1].partition("split=")[2] or 1
    assert settings.dataset.trial == (int(trial) if dataset == "regdb" else None)


def test_differences_have_both_values_and_none_for_a_field_that_one_lacks():
    regdb = replace(MPANetSettings(), {"dataset": RegdbSettings(trial=3), "data.height": 288})
    assert settings_base.differences(MPANetSettings(), MPANetSettings()) == {}
    assert settings_base.differences(MPANetSettings(), regdb) == {
        "dataset.name": ("sysu_mm01", "regdb"),
        "dataset.trial": (None, 3),
        "data.height": (384, 288),
    }


def test_changes_keep_what_was_changed_before():
    settings = MPANetSettings().replace({"seed": 3, "data.height": 256, "optim": OptimSettings(milestones=(1,))})
    assert settings == MPANetSettings(seed=3, data=DataSettings(height=256), optim=OptimSettings(milestones=(1,)))
    assert settings.replace({}) == settings
    assert settings.replace({"data.height": 384, "seed": 0, "optim.milestones": [80, 120]}) == MPANetSettings()
    for path in ("data.hight", "seed.x", "backbone"):
        with pytest.raises(SettingsError, match=path):
            settings.replace({path: 1})


def test_another_method_or_data_set_brings_its_own_recipe():
    settings = MPANetSettings(seed=3).replace({"method": "agw", "dataset.name": "regdb", "dataset.trial": 4})
    assert settings == AGWSettings(seed=3, dataset=RegdbSettings(trial=4))
    assert settings.data.height == 288
    assert settings.replace({"seed": 1}) == AGWSettings(seed=1, dataset=RegdbSettings(trial=4))
    assert settings.replace({"dataset": DatasetSettings(name="llcm")}) == AGWSettings(
        seed=3, dataset=DatasetSettings(name="llcm")
    )
    with pytest.raises(SettingsError, match=r"loss\.margin"):
        MPANetSettings(loss=LossSettings(margin=0.5)).replace({"method": "caj"})


def test_a_method_takes_its_own_settings_only():
    for settings, name in ((Settings(), "MPANetSettings"), (MPANetSettings(method="agw"), "AGWSettings")):
        with pytest.raises(SettingsError, match=rf"method = .* {name}"):
            make_method(settings)


def test_where_the_configs_differ_from_the_papers_recipe():
    assert config_settings("sysu") == MPANetSettings()
    assert differences(MPANetSettings(), config_settings("llcm")) == {"dataset.name": "llcm"}
    assert differences(MPANetSettings(), config_settings("regdb", "split=3")) == {
        "dataset.name": "regdb",
        "dataset.trial": 3,
    }
    assert differences(MPANetSettings(), config_settings("synthetic_gpu")) == {
        "init_from": "",
        "dataset.data_dir": "data/bench",
        "data.height": 192,
        "data.width": 64,
        "optim.milestones": (16, 24),
        "train.num_epochs": 28,
        "train.eval_every_epochs": 0,
        "train.checkpoint_every_epochs": 0,
    }


def test_the_other_methods_recipes_are_their_settings_on_each_data_set():
    for name, cls in (("agw", AGWSettings), ("caj", CAJSettings)):
        assert cls().init_from == "hf:timm/resnet50.tv_in1k"
        assert config_settings(f"sysu_{name}") == cls()
        assert differences(cls(), config_settings(f"llcm_{name}")) == {"dataset.name": "llcm"}
        of_trial = {"dataset.name": "regdb", "dataset.trial": 3}
        assert differences(cls(), config_settings(f"regdb_{name}", "split=3")) == of_trial
        with pytest.raises(ValueError, match="official"):
            config_settings(f"regdb_{name}", "official")
        ground = differences(cls(), config_settings("synthetic_gpu", name))
        assert (ground.pop("augment.crop_padding"), ground.pop("train.num_epochs")) == (5, 12)
        assert {name for name in ground if not name.startswith(("data", "train.", "optim."))} == {"init_from"}


def test_where_the_published_program_differs():
    official = {
        "preset": "official",
        "augment.crop_padding": 10,
        "loss.modality_identity": 1.0,
        "loss.per_modality_identity": False,
        "loss.student_first": True,
        "mean.epochs_at_full": 100,
    }
    for name in ("sysu", "llcm"):
        assert differences(config_settings(name), config_settings(name, "official")) == official
    assert differences(config_settings("regdb", "split=2"), config_settings("regdb", "split=2,official")) == {
        **official,
        "data.height": 256,
        "data.num_ids_per_batch": 12,
        "data.images_per_id": 10,
        "optim.milestones": (110,),
    }
    assert differences(config_settings("synthetic_gpu"), config_settings("synthetic_gpu", "official")) == {
        **official,
        "augment.crop_padding": 5,
        "mean.epochs_at_full": 20,
    }
    own_crop = {name: value for name, value in official.items() if name != "augment.crop_padding"}
    assert differences(config_settings("synthetic"), config_settings("synthetic", "official")) == own_crop


def test_strong_is_the_published_program_with_the_augmentations_of_rle():
    fill = [(0.4914 - 0.485) / 0.229, (0.4822 - 0.456) / 0.224, (0.4465 - 0.406) / 0.225]
    rle = {
        "preset": "strong",
        "augment.mrle_probability": 0.5,
        "augment.rrle_probability": 0.5,
        "augment.erase_area": (0.02, 0.4),
        "augment.erase_aspect": (0.3, 1 / 0.3),
        "augment.erase_log_aspect": False,
        "augment.erase_attempts": 100,
        "augment.erase_fill": pytest.approx(fill),
    }
    assert differences(config_settings("sysu", "official"), config_settings("sysu", "strong")) == rle
    for name in ("regdb", "llcm"):
        found = differences(config_settings(name, "official"), config_settings(name, "strong"))
        assert found == {**rle, "augment.grey_probability": 0.5}


def test_an_old_runs_config_is_todays_default(tmp_path):
    assert not {"method", "backbone", "fused"} & {*OLD_CONFIG, *OLD_CONFIG["model"]}
    old = OLD_CONFIG | {"init_from": MPANetSettings.init_from}
    assert settings_of(old) == MPANetSettings()
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert load_settings(tmp_path) == MPANetSettings()
    check_same_run(MPANetSettings(), tmp_path)  # a run from before can be gone on with
    with pytest.raises(UserError, match=r"other settings, model\.backbone = 'resnet101' \('resnet50' before\);"):
        check_same_run(replace(MPANetSettings(), {"model.backbone": "resnet101"}), tmp_path)


def test_an_old_run_on_regdb_keeps_its_trial():
    old = OLD_CONFIG | {"dataset": {"name": "regdb", "source": "", "data_dir": "data", "trial": 7}}
    expected = replace(MPANetSettings(), {"dataset": RegdbSettings(trial=7), "init_from": OLD_CONFIG["init_from"]})
    assert settings_of(old) == expected


def test_scripts_say_it_as_the_flag(tmp_path):
    process = subprocess.run(
        [sys.executable, ROOT / "scripts/train.py", f"--config={ROOT}/configs/synthetic.py", "--config.data.height=0"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 2
    assert process.stderr.splitlines()[-1] == "error: --config.data.height = 0: expected a number from 4 to 4096"
    assert not list(tmp_path.iterdir())
