"""The Euclidean norms of embeddings, and embeddings divided by them: one L2 normalisation for the whole package."""

import numpy as np
from jaxtyping import Bool, Float32


def squared_norms(features: Float32[np.ndarray, "n d"]) -> Float32[np.ndarray, " n"]:
    """‖row‖² of each row, by numpy's pairwise sums; infinite where it exceeds float32."""
    squares = np.empty(len(features), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, len(features), 256):
            np.sum(np.square(features[start : start + 256]), axis=1, out=squares[start : start + 256])
    return squares


def in_safe_range(squares: Float32[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """Which squared norms float32 holds with all its digits, and their products with one another too."""
    return (squares > 1e-25) & (squares < 1e37)


def l2_normalize(features: np.ndarray) -> Float32[np.ndarray, "n d"]:
    """Divide each row of `features` float[n, d] by its Euclidean norm.

    A row of zeros stays zero, so its cosine similarity to every other row is 0. Any other finite row gets length 1:
    where its squares overflow or vanish in float32, its norm is computed in float64.
    """
    features = np.asarray(features, np.float32)
    squares = squared_norms(features)
    safe = in_safe_range(squares)
    normalized = features / np.sqrt(np.where(safe, squares, 1))[:, None]
    for row in np.flatnonzero(~safe):
        exact = features[row].astype(np.float64)
        normalized[row] = exact / (np.linalg.norm(exact) or 1.0)
    return normalized
