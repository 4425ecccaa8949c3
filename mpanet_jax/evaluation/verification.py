"""Verification: do two images show the same person? Makes pairs of embeddings, and measures how well similarity tells.

Two images from one place (`Protocol.places`: the camera, in SYSU-MM01 the room) are not paired. They often show one
background within the same second, and the field's protocols leave such matches out too.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int

from mpanet_jax.embeddings import Embeddings
from mpanet_jax.errors import UserError
from mpanet_jax.modality import UNKNOWN
from mpanet_jax.protocol import check_pair
from mpanet_jax.row_norms import l2_normalize

CROSS, SAME = "cross_modality", "same_modality"
KINDS = (CROSS, SAME)
FALSE_POSITIVE_RATES = (1e-2, 1e-3, 1e-4)
MOST_DIFFERENT = 10_000_000  # pairs of different people that are used of each kind, at most
FEWEST_FALSE = 10  # false positives that a rate must allow for to be measured
_ROWS = 1024  # images whose pairs are made at once


@dataclass(frozen=True)
class Pairs:
    """Pairs of images of one kind.

    Attributes:
      similarity: the cosine of the two embeddings of each pair.
      same: whether the two show the same person.
      share: the share of all pairs of different people that was drawn, from 0 to 1.
    """

    similarity: Float32[np.ndarray, " n"]
    same: Bool[np.ndarray, " n"]
    share: float = 1.0


def join_embeddings(sets: Sequence[Embeddings]) -> Embeddings:
    """Join several sets; an image that is in several of them is taken once.

    Two rows are the same image if path, identity, camera, modality and features are all equal.

    Raises:
      UserError: the sets have vectors of different lengths, or an identity is unknown.
    """
    for embeddings in sets:
        check_pair(sets[0], embeddings)
    columns = ("features", "pids", "camids", "paths", "modality")
    joined = Embeddings(
        *(np.concatenate([getattr(each, name) for each in sets]) for name in columns),
        source=", ".join(each.source for each in sets),
    )
    first_of: dict[tuple[Any, ...], int] = {}
    kept = []
    assert joined.modality is not None  # `check_embeddings` gave every set one
    for row, said in enumerate(zip(joined.paths, joined.pids, joined.camids, joined.modality, strict=True)):
        first = first_of.setdefault(tuple(said), row)
        # Two folders may each have an image of that name, and nothing else tells the two apart.
        if first == row or not np.array_equal(joined.features[first], joined.features[row]):
            kept.append(row)
    return joined.take(np.array(kept))


def kind_of(first: int, second: int) -> str | None:
    """The kind of a pair of images of modalities `first` and `second`; None if one is unknown (-1)."""
    if UNKNOWN in (first, second):
        return None
    return SAME if first == second else CROSS


def split_identities(pids: Int[np.ndarray, " n"], seed: int) -> tuple[Bool[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """Split the identities at random into halves: two masks bool[n], the images of each half."""
    known = np.unique(pids)
    half = np.random.default_rng(seed).permutation(known)[: len(known) // 2]
    first = np.isin(pids, half)
    return first, ~first


def make_pairs(
    embeddings: Embeddings, places: Int[np.ndarray, " n"], kind: str, *, seed: int = 0, most: int = MOST_DIFFERENT
) -> Pairs:
    """Make all pairs of one kind, each once.

    Args:
      embeddings: images of known modality and identity.
      places: where each image was taken, -1 unknown; two images from one place are not paired.
      kind: one of KINDS.
      seed: seeds the draw of pairs.
      most: how many pairs of different people to use at most; of more, about that many are drawn at random.

    Raises:
      UserError: the modality of an image is unknown.
    """
    assert embeddings.modality is not None  # `check_embeddings` gave it one
    for row in np.flatnonzero(embeddings.modality == UNKNOWN)[:1]:
        raise UserError(
            f"{embeddings.source}: nothing says whether image {row} ({embeddings.paths[row]}) is visible or infrared; "
            f"store an array modality int[{len(embeddings)}]"
        )
    number = sum(int(np.count_nonzero(wanted & ~same)) for _, wanted, same in _blocks(embeddings, places, kind))
    share, generator = min(1.0, most / max(number, 1)), np.random.default_rng(seed)
    rows, similarity, labels = l2_normalize(embeddings.features), [], []
    for part, wanted, same in _blocks(embeddings, places, kind):
        if share < 1:
            wanted &= same | (generator.random(wanted.shape, np.float32) < share)
        similarity.append((rows[part] @ rows.T)[wanted])
        labels.append(same[wanted])
    return Pairs(np.concatenate(similarity), np.concatenate(labels), share)


def _blocks(
    embeddings: Embeddings, places: np.ndarray, kind: str
) -> Iterator[tuple[slice, Bool[np.ndarray, "r n"], Bool[np.ndarray, "r n"]]]:
    """Blocks of (rows, which later images make a pair with each row, which images show the same person)."""
    pids, modality, images = embeddings.pids, np.asarray(embeddings.modality), np.arange(len(embeddings))
    for start in range(0, len(images), _ROWS):
        part = slice(start, start + _ROWS)
        wanted = (modality[part, None] == modality) == (kind == SAME)
        wanted &= (places[part, None] != places) | (places == UNKNOWN)
        wanted &= images[part, None] < images
        yield part, wanted, pids[part, None] == pids


@dataclass(frozen=True)
class Curve:
    """The receiver operating characteristic: a pair is accepted if its similarity is at least the threshold.

    Pairs of equal similarity are accepted together, in one step of the curve. The curve begins at (0, 0), with an
    infinite threshold, and ends at (1, 1).

    Attributes:
      thresholds: descending.
      false_positives: how many pairs of different people are accepted at each threshold.
      true_positives: how many pairs of the same person are.
    """

    thresholds: Float64[np.ndarray, " t"]
    false_positives: Int[np.ndarray, " t"]
    true_positives: Int[np.ndarray, " t"]

    @property
    def false_positive_rate(self) -> Float64[np.ndarray, " t"]:
        """The share of pairs of different people that is accepted at each threshold."""
        return self.false_positives / self.false_positives[-1]

    @property
    def true_positive_rate(self) -> Float64[np.ndarray, " t"]:
        """The share of pairs of the same person that is accepted at each threshold."""
        return self.true_positives / self.true_positives[-1]


def make_curve(pairs: Pairs) -> Curve:
    """Compute the curve of some pairs.

    Raises:
      ValueError: there are no pairs of the same person, or none of different people.
    """
    if not pairs.same.any() or pairs.same.all():
        raise ValueError("a curve needs pairs of the same person and pairs of different ones")
    order = np.argsort(-pairs.similarity, kind="stable")
    similarity, same = pairs.similarity[order].astype(np.float64), pairs.same[order]
    last = np.flatnonzero(np.append(np.diff(similarity) != 0, True))  # of each run of equal ones
    true = np.cumsum(same)[last]
    return Curve(
        np.concatenate([[np.inf], similarity[last]]),
        np.concatenate([[0], last + 1 - true]),
        np.concatenate([[0], true]),
    )


def area_under(curve: Curve) -> float:
    """The area under the curve, from 0 to 1.

    It is the probability that a pair of the same person is more similar than one of different people; ties count half.
    """
    return float(np.trapezoid(curve.true_positive_rate, curve.false_positive_rate))


def equal_error_rate(curve: Curve) -> float:
    """The rate, from 0 to 1, at which false positives and false negatives are equally frequent.

    Between two points the curve is a straight line.
    """
    false, missed = curve.false_positive_rate, 1 - curve.true_positive_rate
    difference = false - missed  # rises from −1 to 1
    after = int(np.argmax(difference >= 0))
    share = -difference[after - 1] / (difference[after] - difference[after - 1])
    return float(false[after - 1] + share * (false[after] - false[after - 1]))


def true_positive_rate_at(curve: Curve, rate: float) -> float | None:
    """The largest true positive rate whose false positive rate is at most `rate`; nothing is interpolated.

    None if `rate` allows for fewer than FEWEST_FALSE of the pairs of different people, too few to measure it.
    """
    if rate * curve.false_positives[-1] < FEWEST_FALSE:
        return None
    allowed = curve.false_positive_rate <= rate
    return float(curve.true_positive_rate[allowed][-1])
