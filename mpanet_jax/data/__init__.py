"""From a prepared split to batches: the P×K plan, decoding, caches, and the augmentation inside the step."""
