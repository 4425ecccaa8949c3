"""Small test sets for the evaluator's tests: the data sets' structure, and features whose ties are exact."""

import numpy as np
import scipy.io

from mpanet_jax.embeddings import Embeddings


def embeddings(images, features, source="embeddings"):
    """`images`: list of (pid, camid, path)."""
    pids, camids, paths = zip(*images, strict=True)
    return Embeddings(
        np.asarray(features, np.float32),
        np.array(pids),
        np.array(camids),
        np.array(paths, dtype=np.str_),
        source=source,
    )


def exact_features(generator, number, metric):
    """Vectors in R⁴ whose distances float32 holds exactly, so that ties are ties; duplicates and zeros are common."""
    if metric == "euclidean":
        return generator.integers(-2, 3, (number, 4))
    features = generator.choice([-1, 1], (number, 4))  # norm 2
    single = generator.random(number) < 0.4
    features[single] = np.eye(4)[generator.integers(0, 4, single.sum())]  # norm 1
    features = features * generator.choice([0.25, 1, 8], (number, 1))
    features[generator.random(number) < 0.15] = 0
    return features


def sysu_images(counts):
    """`counts`: {(camera, pid): images} → (query, gallery) lists of (pid, camid, path)."""
    everything = [
        (pid, camera, f"cam{camera}/{pid:04d}/{n + 1:04d}.jpg")
        for (camera, pid), number in sorted(counts.items())
        for n in range(number)
    ]
    return [i for i in everything if i[1] in (3, 6)], [i for i in everything if i[1] not in (3, 6)]


def sysu_permutation(generator, counts, num_pids):
    """{camera: {pid: ten lists}} for every camera and identity."""
    return {
        camera: {
            pid: [(generator.permutation(counts.get((camera, pid), 0)) + 1).tolist() for _ in range(10)]
            for pid in range(1, num_pids + 1)
        }
        for camera in range(1, 7)
    }


def write_permutation(path, permutation):
    """Write rand_perm_cam.mat as SYSU-MM01 has it: a 6x1 cell of Nx1 cells of uint8 10xn matrices."""
    cell = np.empty((6, 1), object)
    for camera, identities in permutation.items():
        column = np.empty((len(identities), 1), object)
        for row, pid in enumerate(sorted(identities)):
            column[row, 0] = np.array(identities[pid], np.uint8).reshape(10, -1)
        cell[camera - 1, 0] = column
    scipy.io.savemat(path, {"rand_perm_cam": cell})
    return path
