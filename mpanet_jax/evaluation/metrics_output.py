"""Metrics for people and programs: a table for the terminal, a line that says how they were measured, metrics.json."""

import json
import os
from collections.abc import Mapping

from mpanet_jax.evaluation.bootstrap import LEVEL, RESAMPLES
from mpanet_jax.evaluation.metrics import FIGURES
from mpanet_jax.files import write_whole


def format_table(metrics: Mapping[str, Mapping]) -> str:
    """Lay out metrics as a table for the terminal.

    Args:
      metrics: {setting: what `evaluate_embeddings` gives for it}.

    Returns:
      A heading that says how the figures were measured, then two lines for each setting: the figures with their
      standard deviations, and the bootstrap intervals. Metrics without 'interval' (averages over models, files of
      version 0.1) have the first line only.
    """
    titles = ("Rank-1", "Rank-5", "Rank-10", "Rank-20", "mAP", "mINP")
    interval_title = f"  {LEVEL} % interval"
    width = max(
        map(len, ["setting", *metrics, *([interval_title] if any("interval" in v for v in metrics.values()) else [])])
    )
    lines, described = [], None  # the column "queries" counts those with a match: only they are averaged
    for name, values in metrics.items():
        description = describe_measurement(values)
        if description != described:
            described = description
            lines += ["", description] if lines else [description]
            lines.append(
                f"{'setting':<{width}}" + "".join(f"{title:>15}" for title in titles) + f"{'queries':>9}{'gallery':>9}"
            )
        cells = [f"{values[key]:.2f} ± {values['std'][key]:.2f}" for key in FIGURES]
        scored = values["num_query"] - values["num_query_without_match"]
        lines.append(f"{name:<{width}}" + "".join(f"{c:>15}" for c in cells) + f"{scored:>9}{values['num_gallery']:>9}")
        if "interval" in values:
            ends = ["{:.2f}–{:.2f}".format(*values["interval"][key]) for key in FIGURES]
            lines.append(f"{interval_title:<{width}}" + "".join(f"{e:>15}" for e in ends))
    left_out = [
        f"{name} {values['num_query_without_match']} of {values['num_query']}"
        for name, values in metrics.items()
        if values["num_query_without_match"]
    ]
    if left_out:
        lines.append(f"queries left out because the gallery has no match: {', '.join(left_out)}")
    return "\n".join(lines)


def describe_measurement(values: Mapping) -> str:
    """One line that says how the figures of a setting were measured.

    Args:
      values: what `evaluate_embeddings` gives for a setting; further keys that it mentions are 'seeds', 'dataset' with
        'trained_on', 'checkpoint' and 'flip'.
    """
    trials = "1 trial" if values["trials"] == 1 else f"mean ± standard deviation of {values['trials']} trials"
    if "seeds" in values:
        number = values["trials"]
        trials = f"mean ± standard deviation of {len(values['seeds'])} seeds, {number} trial{'s' * (number > 1)} each"
    dataset = f" · tested on {values['dataset']}, trained on {values['trained_on']}" if "trained_on" in values else ""
    split = dataset + (f" · trial {values['trial']}" if "trial" in values else "")
    checkpoint = f" · {values['checkpoint']} checkpoint" if "checkpoint" in values else ""
    flip = " · flip ON (mean of image and mirror image)" if values.get("flip") else ""
    interval = f" · bootstrap over query identities, {RESAMPLES} resamples" if "interval" in values else ""
    return (
        f"protocol {values['protocol']}{split}{checkpoint} · metric {values['metric']} · CMC by {values['cmc']} · "
        f"re-ranking {'ON (k-reciprocal)' if values['rerank'] else 'off'}{flip} · {trials}{interval} · percent"
    )


def write_metrics(path: str | os.PathLike, metrics: Mapping[str, Mapping]) -> None:
    """Write metrics as JSON; the file appears whole or not at all."""
    with write_whole(path) as file:
        json.dump(metrics, file, indent=2)
        file.write("\n")
