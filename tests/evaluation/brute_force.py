"""The protocols and figures once more, in plain loops, written from their text; shares no code with the package.

An image is a dict with feature (list of float), pid, camid and path. Everything is a Python number.
"""

import math
import random

NAMES = ("rank1", "rank5", "rank10", "rank20", "mAP", "mINP")


def images(embeddings):
    return [
        {"feature": [float(x) for x in f], "pid": int(p), "camid": int(c), "path": str(path)}
        for f, p, c, path in zip(embeddings.features, embeddings.pids, embeddings.camids, embeddings.paths, strict=True)
    ]


def distance(a, b, metric):
    if metric == "euclidean":
        return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)))
    norm_a = math.sqrt(sum(x * x for x in a))
    norm_b = math.sqrt(sum(x * x for x in b))
    if norm_a == 0 or norm_b == 0:
        return 1.0
    return 1.0 - sum(x * y for x, y in zip(a, b, strict=True)) / norm_a / norm_b


def evaluate_query(query, gallery, may_meet, metric, cmc):
    """None if no match is left, else the six figures of one query."""
    left = [image for image in gallery if may_meet(query, image)]
    # sorted() is stable: equal distances stay in gallery order.
    ranking = sorted(left, key=lambda image: distance(query["feature"], image["feature"], metric))
    if not any(image["pid"] == query["pid"] for image in ranking):
        return None

    if cmc == "identity":
        identities = []
        for image in ranking:
            if image["pid"] not in identities:
                identities.append(image["pid"])
        rank = identities.index(query["pid"]) + 1
    else:
        rank = [image["pid"] for image in ranking].index(query["pid"]) + 1

    found = 0
    precisions = []
    last = 0
    for position, image in enumerate(ranking, start=1):
        if image["pid"] == query["pid"]:
            found += 1
            precisions.append(found / position)
            last = position
    figures = {f"rank{k}": float(rank <= k) for k in (1, 5, 10, 20)}
    figures["mAP"] = sum(precisions) / found
    figures["mINP"] = found / last
    return figures


def evaluate_trial(queries, gallery, may_meet, metric, cmc):
    results = [evaluate_query(query, gallery, may_meet, metric, cmc) for query in queries]
    results = [result for result in results if result is not None]
    return {name: 100 * sum(result[name] for result in results) / len(results) for name in NAMES}


def average(trials):
    mean = {name: sum(trial[name] for trial in trials) / len(trials) for name in NAMES}
    mean["std"] = {
        name: math.sqrt(sum((trial[name] - mean[name]) ** 2 for trial in trials) / len(trials)) for name in NAMES
    }
    return mean


def different_rooms(query, image):
    room = 2 if query["camid"] == 3 else query["camid"]
    return room != image["camid"]


def not_same_identity_and_camera(query, image):
    return not (query["pid"] == image["pid"] and query["camid"] == image["camid"])


def sysu(queries, gallery, permutation, metric="cosine", cmc="identity"):
    """`permutation[camera][pid]` is a list of ten lists, or None for the seeded random galleries."""
    results = {}
    for mode, cameras in (("all", [1, 2, 4, 5]), ("indoor", [1, 2])):
        for shots, number in (("single", 1), ("multi", 10)):
            trials = []
            for trial in range(10):
                chosen = set()
                generator = random.Random(trial)
                for pid in sorted({image["pid"] for image in gallery}):
                    for camera in cameras:
                        files = sorted(
                            image["path"] for image in gallery if image["pid"] == pid and image["camid"] == camera
                        )
                        if permutation is not None:
                            for number_in_name in permutation[camera][pid][trial][:number]:
                                chosen.add(f"cam{camera}/{pid:04d}/{number_in_name:04d}.jpg")
                        elif files and number == 1:
                            chosen.add(generator.choice(files))
                        elif files:
                            chosen.update(generator.sample(files, min(10, len(files))))
                trial_gallery = [image for image in gallery if image["path"] in chosen]
                trials.append(evaluate_trial(queries, trial_gallery, different_rooms, metric, cmc))
            results[f"sysu/{mode}/{shots}"] = average(trials)
    return results


def regdb(visible, infrared, metric="euclidean", cmc="identity"):
    return {
        name: average([evaluate_trial(queries, gallery, lambda query, image: True, metric, cmc)])
        for name, queries, gallery in (
            ("regdb/visible_to_infrared", visible, infrared),
            ("regdb/infrared_to_visible", infrared, visible),
        )
    }


def llcm(visible, infrared, metric="cosine", cmc="identity"):
    results = {}
    for name, queries, everything in (
        ("llcm/visible_to_infrared", visible, infrared),
        ("llcm/infrared_to_visible", infrared, visible),
    ):
        trials = []
        for trial in range(10):
            generator = random.Random(trial)
            chosen = set()
            for pid in sorted({image["pid"] for image in everything}):
                for camera in range(1, 10):
                    files = sorted(
                        image["path"] for image in everything if image["pid"] == pid and image["camid"] == camera
                    )
                    if files:
                        chosen.add(generator.choice(files))
            gallery = [image for image in everything if image["path"] in chosen]
            trials.append(evaluate_trial(queries, gallery, not_same_identity_and_camera, metric, cmc))
        results[name] = average(trials)
    return results


def rerank(distances, num_query, k1=20, k2=6, weight=0.3):
    """k-reciprocal re-ranking, section 3 of Zhong et al.; `distances` are squared, a numpy float32[n, n]."""
    total = len(distances)
    original = [[value / max(row) for value in row] for row in distances]  # float32, like the input
    ranks = [sorted(range(total), key=lambda j, i=i: original[i][j]) for i in range(total)]

    def reciprocal(i, k):
        return [j for j in ranks[i][: k + 1] if i in ranks[j][: k + 1]]

    vectors = []
    for i in range(total):
        own = set(reciprocal(i, k1))
        expanded = set(own)
        for candidate in own:
            candidates = set(reciprocal(candidate, round(k1 / 2)))
            if 3 * len(candidates & own) > 2 * len(candidates):
                expanded |= candidates
        weights = {j: math.exp(-float(original[i][j])) for j in expanded}
        vectors.append([weights.get(j, 0.0) / sum(weights.values()) for j in range(total)])

    averaged = []
    for i in range(total):
        neighbours = ranks[i][:k2]
        averaged.append([sum(vectors[n][j] for n in neighbours) / len(neighbours) for j in range(total)])

    result = []
    for i in range(num_query):
        row = []
        for j in range(num_query, total):
            smaller = sum(min(a, b) for a, b in zip(averaged[i], averaged[j], strict=True))
            larger = sum(max(a, b) for a, b in zip(averaged[i], averaged[j], strict=True))
            row.append((1 - weight) * (1 - smaller / larger) + weight * float(original[i][j]))
        result.append(row)
    return result
