"""NHWC arrays as PyTorch's NCHW leaves, and back."""

import numpy as np
import torch


def to_torch(x):
    return torch.tensor(np.asarray(x)).permute(0, 3, 1, 2).requires_grad_()


def from_torch(x):
    return x.detach().permute(0, 2, 3, 1).numpy()
