"""The model card, README.md, of a saved model: what it is, what it was trained on, and how accurate it is."""

from collections.abc import Mapping
from typing import Any

from mpanet_jax.datasets import make_dataset
from mpanet_jax.evaluation.metrics_output import describe_measurement
from mpanet_jax.settings import Settings
from mpanet_jax.settings_base import differences

HEADER = """---
library_name: mpanet_jax
pipeline_tag: image-feature-extraction
tags:
- person-re-identification
- visible-infrared
- jax
- flax
---
"""
FIGURES = {"rank1": "Rank-1", "rank5": "Rank-5", "rank10": "Rank-10", "rank20": "Rank-20", "mAP": "mAP", "mINP": "mINP"}


def model_card(
    name: str,
    settings: Settings,
    *,
    source: str,
    size: int,
    needs_modality: bool,
    fingerprint: str,
    metrics: Mapping[str, Mapping[str, Any]] | None,
) -> str:
    """Writes the text of a model card, in Markdown.

    Args:
      name: the title.
      settings: of the run that trained the model.
      source: what to pass to `load` to get the model.
      size: D, the length of an embedding.
      needs_modality: whether the method needs each image's modality.
      fingerprint: of the model.
      metrics: the figures of the weights, in the form of metrics.json; None: unknown.
    """
    data, dataset = settings.data, make_dataset(settings.dataset)
    modality = ', modality=["visible", "infrared"]' if needs_modality else ""
    return f"""{HEADER}
# {name}

This model turns images of people, visible or infrared, into vectors of {size:,} numbers. The cosine of two vectors says
how much the people look alike. It was trained with mpanet_jax, by the method `{settings.method}`. Images of any size
are resized to {data.height}×{data.width} pixels.

## Use

```python
import mpanet_jax

model = mpanet_jax.load({source!r})
embeddings = model.embed(["a.jpg", "b.jpg"]{modality})  # float32[2, {size}], rows of length 1
similarity = embeddings @ embeddings.T
```

## Data

The model was trained on the data set that its settings call `{dataset.title}`. {dataset.licence}
What may be done with the weights depends on the terms of that data set.

## Figures

{_figures(metrics)}

## Recipe

{_recipe(settings)}

## File

`model.safetensors` holds the arrays by the names of the published program, without the classifiers of the training
identities, and the settings in its metadata. `model.fingerprint` is `{fingerprint}`.
"""


def _figures(metrics: Mapping[str, Mapping[str, Any]] | None) -> str:
    if not metrics:
        return "No figures are stored with these weights."
    titles = list(FIGURES.values())
    lines, described = [], None
    for setting, values in metrics.items():
        if described != (described := describe_measurement(values)):
            head = ["", *titles, "queries", "gallery"]
            lines += ["", described[:1].upper() + described[1:] + ":", "", _row(head), _row(["---"] * len(head))]
        cells = [f"{values[key]:.2f} ± {values['std'][key]:.2f}" for key in FIGURES]
        scored = values["num_query"] - values["num_query_without_match"]
        lines.append(_row([setting, *cells, str(scored), str(values["num_gallery"])]))
    return "\n".join(lines[1:])


def _recipe(settings: Settings) -> str:
    default = type(settings)()
    changed = differences(default, settings)
    what = f"The defaults of `{type(settings).__name__}()`, the published recipe of `{settings.method}` on SYSU-MM01"
    if not changed:
        return f"{what}."
    rows = [_row([f"`{name}`", f"`{there!r}`", f"`{here!r}`"]) for name, (there, here) in changed.items()]
    return "\n".join([f"{what}, but for:", "", _row(["", "default", "here"]), _row(["---"] * 3), *rows])


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
