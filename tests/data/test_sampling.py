import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpanet_jax.data.sampling import BatchPlan, most_batches
from mpanet_jax.errors import UserError

# SYSU-MM01's 395 training identities, counted in its rand_perm_cam.mat: {min(visible, infrared) images: identities}.
SYSU_PAIRS = {10: 7, 18: 1, 19: 2, 20: 188, 40: 183, 41: 7, 42: 3, 43: 3, 46: 1}


def arrays(counts):
    labels = np.repeat(np.arange(len(counts)), [v + i for v, i in counts])
    modality = np.concatenate([np.repeat([0, 1], pair) for pair in counts])
    return labels, modality


def make_plan(counts, p, k, seed=0):
    return BatchPlan(*arrays(counts), num_ids_per_batch=p, images_per_id=k, seed=seed)


SYSU = [(pairs + 30, pairs) for pairs, ids in SYSU_PAIRS.items() for _ in range(ids)]
REGDB = [(10, 10)] * 206


def check_epoch(plan, batches, *, resampled=()):
    p, k = plan.num_ids_per_batch, plan.images_per_id
    assert batches.shape == (plan.steps_per_epoch, p * k)
    assert batches.dtype == np.int32
    for batch in batches:
        labels = plan.labels[batch].reshape(p, k)
        assert (labels == labels[:, :1]).all()
        assert len(set(labels[:, 0])) == p
        modality = plan.modality[batch].reshape(p, k)
        assert (modality[:, : k // 2] == 0).all()
        assert (modality[:, k // 2 :] == 1).all()
    seen = Counter(batches.ravel().tolist())
    assert all(plan.labels[i] in resampled for i, times in seen.items() if times > 1)


def test_the_real_data_sets_epochs():
    sysu, regdb = make_plan(SYSU, 16, 8), make_plan(REGDB, 12, 10)
    assert sum(SYSU_PAIRS.values()) == 395
    # 2,937 groups of four pairs are 183.56 batches of 16; 412 groups of five pairs are 34.3 of 12.
    assert sysu.groups_by_identity.sum() == 2937
    assert sysu.steps_per_epoch == 183
    assert regdb.steps_per_epoch == 34
    check_epoch(sysu, sysu.epoch(0))
    check_epoch(regdb, regdb.epoch(0))


def test_same_length_and_rules_in_50_epochs_of_several_seeds():
    counts = [(4, 7), (6, 5), (13, 30), (2, 2), (9, 4), (8, 8), (20, 4)]
    for seed in range(5):
        plan = make_plan(counts, 3, 4, seed)
        assert plan.steps_per_epoch == make_plan(counts, 3, 4).steps_per_epoch
        for epoch in range(50):
            check_epoch(plan, plan.epoch(epoch))


def test_a_pure_function_of_seed_and_epoch():
    first, again, other = (make_plan(REGDB, 12, 10, seed) for seed in (7, 7, 8))
    expected = [first.epoch(epoch).copy() for epoch in range(6)]
    for epoch in (5, 0, 3, 0):  # in any order, however many were asked for in between
        np.testing.assert_array_equal(again.epoch(epoch), expected[epoch])
    for a, b in itertools.combinations([*expected, other.epoch(0), other.epoch(1)], 2):
        assert (a != b).any()


def brute_force_most_batches(groups, p):
    """Try every choice of identities for every batch."""
    best = 0
    for chosen in itertools.combinations(range(len(groups)), p):
        if all(groups[i] for i in chosen):
            left = tuple(g - (i in chosen) for i, g in enumerate(groups))
            best = max(best, 1 + brute_force_most_batches(left, p))
    return best


@pytest.mark.parametrize(
    ("groups", "p"),
    [((1, 1, 1), 2), ((5, 1, 1), 2), ((3, 3, 0), 2), ((2, 2, 2), 3), ((4, 1, 1, 1), 3), ((2, 1, 2, 1), 2)],
)
def test_the_most_batches_by_brute_force(groups, p):
    assert most_batches(np.array(groups), p) == brute_force_most_batches(groups, p)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=3, max_size=8), st.integers(0, 99))
def test_any_counts_give_a_whole_epoch(counts, seed):
    plan = make_plan(counts, 3, 4, seed)
    resampled = {i for i, pair in enumerate(counts) if min(pair) < 2}
    check_epoch(plan, plan.epoch(0), resampled=resampled)
    groups = [max(1, min(pair) // 2) for pair in counts]
    used = Counter(plan.labels[plan.epoch(0)[:, ::4]].ravel().tolist())  # one image a slot
    assert all(used[i] <= groups[i] for i in used)


def test_an_identity_with_too_few_images_is_resampled_to_one_group():
    counts = [(3, 9), (8, 8), (8, 8)]
    plan = make_plan(counts, 3, 8)
    assert plan.groups_by_identity.tolist() == [1, 2, 2]
    drawn = set()
    for epoch in range(30):
        (batch,) = plan.epoch(epoch)
        slot = batch.reshape(3, 8)[plan.labels[batch[::8]] == 0][0]
        assert len(set(slot[:4])) <= 3  # four out of its three visible images
        assert len(set(slot[4:])) <= 3  # and out of three of its nine infrared images
        drawn |= set(slot.tolist())
    assert drawn == set(range(12))  # another three each epoch


def test_every_image_has_its_turn_and_partners_change():
    plan = make_plan([(12, 4), (4, 12), (8, 8)], 2, 4)
    epochs = [plan.epoch(epoch) for epoch in range(60)]
    assert set(np.concatenate(epochs).ravel().tolist()) == set(range(48))
    partners = {(s[0], s[2]) for e in epochs for s in e.reshape(-1, 4) if plan.labels[s[0]] == 0}
    assert len(partners) > 24  # of 12 x 4


def test_identities_are_drawn_evenly():
    plan = make_plan([(4, 4)] * 10, 4, 4)  # 20 groups of two pairs, 5 batches of 4
    first = Counter(label for e in range(500) for label in plan.labels[plan.epoch(e)[0, ::4]].tolist())
    # 200 of 500 first batches each, standard deviation 11.
    assert all(150 < first[label] < 250 for label in range(10))


@pytest.mark.parametrize(
    ("counts", "p", "k", "message"),
    [
        ([(4, 4)] * 3, 4, 4, r"data\.num_ids_per_batch = 4 .* largest that fits is 3"),
        ([(4, 4)] * 3, 0, 4, r"data\.num_ids_per_batch = 0 "),
        ([(4, 4), (4, 0), (4, 4)], 2, 4, "identity 1 has no infrared image"),
        ([(4, 4), (4, 4), (0, 4)], 2, 4, "identity 2 has no visible image"),
    ],
)
def test_what_does_not_fit_is_named(counts, p, k, message):
    with pytest.raises(UserError, match=message):
        make_plan(counts, p, k)
