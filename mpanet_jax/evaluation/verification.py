"""Verification: do two images show the same person? Pairs of embeddings, and how well their similarity tells.

Two images of one place (`Protocol.places`: the camera, in SYSU-MM01 the room) are no pair: a person who stands before
the same background, often in the same second, is what no protocol of this field asks for.
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
MOST_DIFFERENT = 10_000_000  # pairs of different people, of one kind, that are looked at
FEWEST_FALSE = 10  # false positives that a rate is told by, at the least
_ROWS = 1024  # images whose pairs are made at once


@dataclass(frozen=True)
class Pairs:
    """Pairs of images of one kind.

    Attributes:
      similarity: the cosine of their embeddings.
      same: whether they show the same person.
      share: of the pairs of different people that were there, the share that was drawn.
    """

    similarity: Float32[np.ndarray, " n"]
    same: Bool[np.ndarray, " n"]
    share: float = 1.0


def join_embeddings(sets: Sequence[Embeddings]) -> Embeddings:
    """Several sets as one; an image that is in several of them, by all that is said of it, is taken once.

    Raises:
      UserError: vectors of different lengths, or an identity that is not known.
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
    assert joined.modality is not None  # as every set's; see `check_embeddings`
    for row, said in enumerate(zip(joined.paths, joined.pids, joined.camids, joined.modality, strict=True)):
        first = first_of.setdefault(tuple(said), row)
        # Two folders may each have an image of that name, with nothing said that tells them apart.
        if first == row or not np.array_equal(joined.features[first], joined.features[row]):
            kept.append(row)
    return joined.take(np.array(kept))


def kind_of(first: int, second: int) -> str | None:
    """The kind of a pair of two modalities; None where one is not known."""
    if UNKNOWN in (first, second):
        return None
    return SAME if first == second else CROSS


def split_identities(pids: Int[np.ndarray, " n"], seed: int) -> tuple[Bool[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """Which images show a person of the one half of the identities, and which of the other, drawn by `seed`."""
    known = np.unique(pids)
    half = np.random.default_rng(seed).permutation(known)[: len(known) // 2]
    first = np.isin(pids, half)
    return first, ~first


def make_pairs(
    embeddings: Embeddings, places: Int[np.ndarray, " n"], kind: str, *, seed: int = 0, most: int = MOST_DIFFERENT
) -> Pairs:
    """All pairs of one kind, each once.

    Args:
      embeddings: with known modality and identities.
      places: where each image was taken, -1 unknown; two of one place are no pair.
      kind: one of KINDS.
      seed, most: of more than `most` pairs of different people about so many are drawn, by `seed`.

    Raises:
      UserError: the modality of an image is not known.
    """
    assert embeddings.modality is not None  # see `check_embeddings`
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
    """(rows, which images behind each of them make a pair with it, which show its person)."""
    pids, modality, images = embeddings.pids, np.asarray(embeddings.modality), np.arange(len(embeddings))
    for start in range(0, len(images), _ROWS):
        part = slice(start, start + _ROWS)
        wanted = (modality[part, None] == modality) == (kind == SAME)
        wanted &= (places[part, None] != places) | (places == UNKNOWN)
        wanted &= images[part, None] < images
        yield part, wanted, pids[part, None] == pids


@dataclass(frozen=True)
class Curve:
    """The receiver operating characteristic: accept a pair where its similarity is at least the threshold.

    Pairs of equal similarity are accepted together, so they are one step of the curve. It begins at (0, 0), with an
    infinite threshold, and ends at (1, 1).

    Attributes:
      thresholds: descending.
      false_positives, true_positives: how many pairs of either sort are accepted.
    """

    thresholds: Float64[np.ndarray, " t"]
    false_positives: Int[np.ndarray, " t"]
    true_positives: Int[np.ndarray, " t"]

    @property
    def false_positive_rate(self) -> Float64[np.ndarray, " t"]:
        """Of the pairs of different people, those accepted."""
        return self.false_positives / self.false_positives[-1]

    @property
    def true_positive_rate(self) -> Float64[np.ndarray, " t"]:
        """Of the pairs of the same person, those accepted."""
        return self.true_positives / self.true_positives[-1]


def make_curve(pairs: Pairs) -> Curve:
    """The curve of pairs, among which there is one of either sort.

    Raises:
      ValueError: there is not.
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
    """The probability that a pair of the same person is more similar than one of different people; ties count half."""
    return float(np.trapezoid(curve.true_positive_rate, curve.false_positive_rate))


def equal_error_rate(curve: Curve) -> float:
    """Where false positives and false negatives are equally frequent; between two points the curve is straight."""
    false, missed = curve.false_positive_rate, 1 - curve.true_positive_rate
    difference = false - missed  # rises from −1 to 1
    after = int(np.argmax(difference >= 0))
    share = -difference[after - 1] / (difference[after] - difference[after - 1])
    return float(false[after - 1] + share * (false[after] - false[after - 1]))


def true_positive_rate_at(curve: Curve, rate: float) -> float | None:
    """The largest rate of true positives at which that of false positives is at most `rate`; nothing is interpolated.

    None where so few pairs of different people are there that `rate` is less than FEWEST_FALSE of them: then it cannot
    be told.
    """
    if rate * curve.false_positives[-1] < FEWEST_FALSE:
        return None
    allowed = curve.false_positive_rate <= rate
    return float(curve.true_positive_rate[allowed][-1])
