"""The tables: their rows, what each row changes in the settings, and the published figures."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """A row of a table; it is trained with several seeds.

    Attributes:
      name: its name in folders and in the flag --rows.
      title: its name in the table.
      changes: {field: value} of the settings that it changes, as `settings.replace` takes them.
      preset: the preset of the config file that it starts from; None: the one given on the command line.
      published: published Rank-1 and mAP on SYSU-MM01, all-search, single-shot, in percent; None if there are none.
    """

    name: str
    title: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    preset: str | None = None
    published: tuple[float, float] | None = None


@dataclass(frozen=True)
class Table:
    """A table: the rows after the first are compared with the first; `note` is printed below the table."""

    title: str
    rows: tuple[Row, ...]
    note: str = ""


_CLUSTER = {"loss.center_cluster": 0.0}
_MUTUAL = {"loss.modality_identity": 0.0, "loss.mutual_mean": 0.0}
_CHANNEL = {"model.channel_module": "none"}
_PATTERN = {"model.pattern_module": "none"}

_NO_ERASING = {"augment.erase_probability": 0.0}

MPANET = Row("mpanet", "MPANet", published=(70.58, 68.24))

TABLES = {
    "3": Table(
        "Table 3: the parts of MPANet",
        (
            Row("baseline", "baseline", {**_CLUSTER, **_MUTUAL, **_CHANNEL, **_PATTERN}, published=(54.50, 51.84)),
            Row("cc", "+ CC", {**_MUTUAL, **_CHANNEL, **_PATTERN}, published=(57.56, 56.59)),
            Row("ml", "+ ML", {**_CLUSTER, **_CHANNEL, **_PATTERN}, published=(58.55, 55.06)),
            Row("ml_cc", "+ ML + CC", {**_CHANNEL, **_PATTERN}, published=(64.24, 61.39)),
            Row("pam", "+ ML + CC + PAM", _CHANNEL, published=(68.27, 64.98)),
            Row("mpanet", "+ ML + CC + PAM + MAM (MPANet)", published=MPANET.published),
        ),
    ),
    "4": Table(
        "Table 4: what MAM and PAM are replaced by",
        (
            MPANET,
            Row("se", "MAM → SE", {"model.channel_module": "se"}, published=(65.83, 63.29)),
            Row("in", "MAM → IN", {"model.channel_module": "in"}, published=(61.32, 58.35)),
            Row("nl", "PAM → NL", {"model.pattern_module": "non_local"}, published=(63.87, 60.39)),
            Row("cbam", "MAM + PAM → CBAM", {"model.channel_module": "cbam", **_PATTERN}, published=(63.72, 61.54)),
        ),
    ),
    "methods": Table(
        "Methods and recipes",
        (
            Row("paper", "MPANet, paper", preset="paper", published=MPANET.published),
            Row("official", "MPANet, official", preset="official", published=MPANET.published),
            Row("strong", "MPANet, strong (official + RLE)", preset="strong"),
            Row("agw", "AGW", preset="agw", published=(47.50, 47.65)),
            Row("caj", "CAJ", preset="caj", published=(69.88, 66.89)),
            Row("agw_one_rate", "AGW, one rate for all", {"optim.body_rate": 1.0}, preset="agw"),
            Row("caj_one_rate", "CAJ, one rate for all", {"optim.body_rate": 1.0}, preset="caj"),
        ),
        "AGW and CAJ have their own batches, 8 identities × 8 images, and about as many training images as MPANet; "
        "CAJ's network sees every visible image twice. All layers but neck and classifier learn at a tenth of the "
        "rate, which was chosen for a start from ImageNet; the last two rows have the same rate everywhere.",
    ),
    "augmentations": Table(
        "Augmentations of MPANet",
        (
            Row("none", "none", _NO_ERASING, published=(64.5, 62.9)),
            Row("erasing", "erasing", {"augment.erase_probability": 0.5}, published=(71.0, 69.5)),
            Row(
                "exchange",
                "channel exchange",
                {**_NO_ERASING, "augment.exchange_probability": 0.5},
                published=(68.3, 65.3),
            ),
            Row("rle", "RLE", {**_NO_ERASING, "augment.mrle_probability": 0.5, "augment.rrle_probability": 0.5}),
            Row("strong", "RLE + its erasing (strong)", preset="strong", published=(75.4, 72.4)),
        ),
        "All rows have the config's flip and crop. The published figures are those of RLE's authors, measured with "
        "their own network at 384×192.",
    ),
}
