"""Draws the course of a training run from its logs: losses, learning rate, Rank-1 and mAP by epoch."""

import os
from pathlib import Path

import numpy as np

from mpanet_jax.errors import UserError
from mpanet_jax.report.figures import BLUE, COLOURS, DASHES, VERMILION, new_figure, plain_numbers, save_figure
from mpanet_jax.report.logs import Series, read_scalars

# Scalars under train/ that are not losses.
NOT_LOSSES = ("accuracy", "learning_rate", "epoch", "images_per_second", "skipped")


def steps_per_epoch(scalars: dict[str, Series]) -> float:
    """Steps per epoch, from the last logged epoch.

    Args:
      scalars: what `read_scalars` gives.

    Raises:
      UserError: the logs have no training step yet.
    """
    if "train/epoch" not in scalars:
        raise UserError("the logs have no training steps yet; expected train/epoch in them")
    steps, epochs = scalars["train/epoch"]
    return float(steps[-1] / epochs[-1])


def draw_curves(workdir: str | Path, folder: str | os.PathLike) -> list[Path]:
    """Draw curves.png and .svg from the logs of a run: three panels over a common axis of epochs.

    If the protocol has several settings, the first one logged is shown, and the panel's title names it.

    Args:
      workdir: the run's folder.
      folder: the folder to write to.

    Returns:
      The paths of the two files.

    Raises:
      UserError: the run has no logs, or matplotlib is not installed.
    """
    scalars = read_scalars(workdir)
    per_epoch = steps_per_epoch(scalars)
    losses = [name.removeprefix("train/") for name in scalars if name.startswith("train/")]
    losses = [name for name in losses if name not in NOT_LOSSES]
    evaluated = [name.removeprefix("eval/") for name in scalars if name.startswith("eval/")]
    settings = list(dict.fromkeys(name.rpartition("/")[0] for name in evaluated))
    with new_figure(112) as figure:
        top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1.3, 2))
        for number, name in enumerate(losses):
            steps, values = scalars[f"train/{name}"]
            style = {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number % len(DASHES)]}
            top.plot(steps / per_epoch, values, label=name.replace("_", " "), gid=f"train/{name}", **style)
        top.set(yscale="log" if _positive(scalars, losses) else "linear", ylabel="losses")
        top.legend(ncols=2)
        if "train/learning_rate" in scalars:
            steps, values = scalars["train/learning_rate"]
            middle.plot(steps / per_epoch, values, color="black", gid="train/learning_rate")
        middle.set(ylabel="learning rate", yscale="log")
        for panel in (top, middle):
            if panel.get_yscale() == "log":
                plain_numbers(panel.yaxis)
        for figure_name, label, colour, marker, dash in (
            ("rank1", "Rank-1", BLUE, "o", "-"),
            ("mAP", "mAP", VERMILION, "^", "--"),
        ):
            for setting in settings[:1]:
                steps, values = scalars[f"eval/{setting}/{figure_name}"]
                bottom.plot(
                    *(steps / per_epoch, values),
                    *(dash,),
                    **{"color": colour, "marker": marker, "markersize": 3, "label": label},
                    gid=f"eval/{setting}/{figure_name}",
                )
        bottom.set(xlabel="epoch", ylabel="%", title=settings[0] if settings else "not evaluated yet")
        if settings:
            bottom.legend()
        return save_figure(figure, folder, "curves")


def _positive(scalars: dict[str, Series], losses: list[str]) -> bool:
    values = np.concatenate([scalars[f"train/{name}"][1] for name in losses] or [np.zeros(1)])
    return bool((values > 0).all())
