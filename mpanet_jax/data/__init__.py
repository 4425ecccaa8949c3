"""From a prepared split to batches: the P×K plan, decoding, caches, and augmentation inside the step."""
