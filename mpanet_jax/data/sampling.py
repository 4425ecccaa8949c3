"""The P×K plan: which images make up every batch of an epoch, as a pure function of (seed, epoch).

The rule is in docs/method.md, "Epoch".
"""

import bisect
import functools
import zlib
from dataclasses import dataclass

import numpy as np

from mpanet_jax.errors import SettingsError, UserError
from mpanet_jax.modality import INFRARED, VISIBLE


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """Batches of P identities with K/2 visible and K/2 infrared images each.

    In every epoch the longer of an identity's two image lists is cut at random to the length of the shorter. Both are
    shuffled and paired, and the pairs are put into groups of K/2. A batch takes one group from each of P identities. An
    identity that cannot fill a group gets one of K/2 pairs drawn with replacement; no other image comes twice in an
    epoch.

    The P identities of a batch are drawn from those that have a group left. A plain draw would strand a few groups at
    the end of the epoch, a different number each time (181 to 183 batches on SYSU-MM01). So the number of batches is
    fixed to the most that the counts allow: the greatest T with Σ_i min(groups_i, T) ≥ P·T (183 on SYSU-MM01, 34 on
    RegDB). The draw is uniform, except that an identity is taken if T could not be reached without it.

    Attributes:
      labels: int[N], the identity of every image.
      modality: int[N], VISIBLE or INFRARED.
      num_ids_per_batch: P.
      images_per_id: K, even.
      seed: of all draws.

    Raises:
      UserError: there are fewer than P identities, or one has no image in one of the modalities.
    """

    labels: np.ndarray
    modality: np.ndarray
    num_ids_per_batch: int
    images_per_id: int
    seed: int

    def __post_init__(self):
        p = self.num_ids_per_batch
        num_ids = len(np.unique(self.labels))
        if not 1 <= p <= num_ids:
            raise SettingsError(
                f"data.num_ids_per_batch = {p} must be between 1 and the {num_ids} training identities; "
                f"the largest that fits is {num_ids}"
            )
        self.images_by_identity  # noqa: B018 - raises for an identity without a partner

    @functools.cached_property
    def images_by_identity(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """The rows of each identity's visible images and of its infrared ones, by ascending label."""
        labels = np.unique(self.labels)
        visible, infrared = (self._images_of_modality(m, labels) for m in (VISIBLE, INFRARED))
        for label, *lists in zip(labels, visible, infrared, strict=True):
            for name, images in zip(("visible", "infrared"), lists, strict=True):
                if not len(images):
                    raise UserError(
                        f"identity {label} has no {name} image, so it can't be paired across modalities; "
                        "complete it in the data set or remove it from the list of training identities"
                    )
        return list(zip(visible, infrared, strict=True))

    def _images_of_modality(self, modality: int, labels: np.ndarray) -> list[np.ndarray]:
        """Each identity's images of a modality: sorted once, for as many identities as there may be."""
        rows = np.flatnonzero(self.modality == modality)
        rows = rows[np.argsort(self.labels[rows], kind="stable")]
        return np.split(rows, np.searchsorted(self.labels[rows], labels[1:]))

    @functools.cached_property
    def num_resampled(self) -> int:
        """How many identities have too few images for one group, so that some are drawn twice."""
        half = self.images_per_id // 2
        return sum(min(len(visible), len(infrared)) < half for visible, infrared in self.images_by_identity)

    @functools.cached_property
    def groups_by_identity(self) -> np.ndarray:
        """int[num_ids]: how many groups of K/2 pairs each identity has in an epoch."""
        pairs = np.array([min(len(v), len(i)) for v, i in self.images_by_identity])
        return np.maximum(pairs // (self.images_per_id // 2), 1)

    @functools.cached_property
    def steps_per_epoch(self) -> int:
        """The number of batches in every epoch, for every seed."""
        return most_batches(self.groups_by_identity, self.num_ids_per_batch)

    @functools.cached_property
    def signature(self) -> str:
        """Differs between plans of different batches; a checkpoint holds it, so that it resumes the same plan only."""
        images = zlib.crc32(np.stack([self.labels, self.modality]).astype("<i8").tobytes())
        return f"P={self.num_ids_per_batch} K={self.images_per_id} seed={self.seed} images={images:08x}"

    def epoch(self, epoch: int) -> np.ndarray:
        """int32[steps_per_epoch, P·K]: the rows of the images of every batch of an epoch (from 0).

        Position b of a batch belongs to identity slot b // K; the first K/2 images of a slot are visible.
        """
        return _draw_epoch(self, epoch)


def most_batches(groups: np.ndarray, num_ids_per_batch: int) -> int:
    """The most batches of P distinct identities that can be formed, if identity i has `groups[i]` groups.

    T batches are possible exactly if Σ_i min(groups_i, T) ≥ P·T: an identity is in a batch at most once, and taking the
    P identities with the most groups left always succeeds then.
    """

    def possible(steps: int) -> bool:
        return bool(np.minimum(groups, steps).sum() >= num_ids_per_batch * steps)

    # Once impossible, always impossible: each batch more adds no more groups to the sum than the one before it did.
    return bisect.bisect_left(range(1, int(groups.sum()) // num_ids_per_batch + 1), True, key=lambda t: not possible(t))


@functools.lru_cache(maxsize=4)  # prefetching threads ask for two epochs in turn where one ends
def _draw_epoch(plan: BatchPlan, epoch: int) -> np.ndarray:
    generator = np.random.default_rng(np.random.SeedSequence([plan.seed, epoch]))
    groups = [_draw_groups(v, i, plan.images_per_id // 2, generator) for v, i in plan.images_by_identity]
    identities = _draw_identities(plan.groups_by_identity, plan.num_ids_per_batch, plan.steps_per_epoch, generator)
    left = [list(g) for g in groups]
    batches = np.array([[left[i].pop() for i in batch] for batch in identities], np.int32)
    batches = batches.reshape(plan.steps_per_epoch, plan.num_ids_per_batch * plan.images_per_id)
    batches.setflags(write=False)  # the cache hands out the same array again
    return batches


def _draw_groups(visible: np.ndarray, infrared: np.ndarray, half: int, generator: np.random.Generator) -> np.ndarray:
    """int[groups, K]: an identity's groups of an epoch, each of K/2 visible images and then K/2 infrared ones."""
    pairs = min(len(visible), len(infrared))
    drawn = [generator.permutation(images)[:pairs] for images in (visible, infrared)]
    if pairs < half:
        drawn = [generator.choice(images, half) for images in drawn]
    count = len(drawn[0]) // half
    return np.concatenate([images[: count * half].reshape(count, half) for images in drawn], axis=1)


def _draw_identities(groups: np.ndarray, size: int, steps: int, generator: np.random.Generator) -> list[np.ndarray]:
    """Draws the identities of `steps` batches: `size` distinct ones with a group left, so that `steps` is reached.

    With t batches to go and c_i groups left, the rest is possible exactly if s = Σ_i min(c_i, t) − size·t ≥ 0. Only
    leaving out an identity with c_i ≥ t lowers s, by one. So at most s of them may be left out; the draw is uniform
    otherwise.
    """
    left = groups.copy()
    batches = []
    for to_go in range(steps, 0, -1):
        spare = np.minimum(left, to_go).sum() - size * to_go
        order = generator.permutation(np.flatnonzero(left))
        needed = np.flatnonzero(left[order] >= to_go)
        forced = needed[: max(0, len(needed) - spare)]
        batch = np.concatenate([order[forced], np.delete(order, forced)])[:size]
        left[batch] -= 1
        batches.append(generator.permutation(batch))
    return batches
