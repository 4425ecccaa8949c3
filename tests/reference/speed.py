"""How fast AGW's step is in PyTorch, for comparison with `scripts/benchmark.py step --config=configs/sysu_agw.py`.

python -m tests.reference.speed

Forward pass, both losses, backward pass and SGD on 64 images of 288×144, already normalised and on the card: no
augmentation, which favours PyTorch. bfloat16 by autocast, channels last, `torch.compile`, and the whole step in one
CUDA graph.
"""

import argparse
import time

import torch
from torch import Tensor

from tests.reference.agw import AGW, make_optimizer

HALF, NUM_IDS = 32, 395


def triplet(features: Tensor, labels: Tensor) -> Tensor:
    """`tests.reference.agw.triplet` of all anchors at once."""
    squared = features.square().sum(1)
    distance = (squared[:, None] + squared - 2 * features @ features.T).clamp(min=1e-12).sqrt()
    same = labels[:, None] == labels
    positive = torch.where(same, distance, 0)
    weights = torch.where(same, torch.exp(positive - positive.amax(1, keepdim=True)), 0)
    near = (positive * weights).sum(1) / (weights.sum(1) + 1e-6)
    weights = torch.where(same, 0, torch.exp(-distance))
    far = (distance * weights).sum(1) / (weights.sum(1) + 1e-6)
    return torch.nn.functional.softplus(near - far).mean()


def measure(steps: int, device: str, height: int, width: int, *, compile_it: bool = True) -> list[float]:
    """Milliseconds of each of `steps` steps after the warm-up."""
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    model = AGW(NUM_IDS).to(device, memory_format=torch.channels_last).train()
    optimizer = make_optimizer(model, 0.1)
    images = torch.randn(2, HALF, 3, height, width, device=device)
    visible, infrared = (half.contiguous(memory_format=torch.channels_last) for half in images)
    labels = torch.arange(8, device=device).repeat_interleave(4).repeat(2)

    def loss() -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            pooled, _, logits = model(visible, infrared)
        return torch.nn.functional.cross_entropy(logits.float(), labels) + triplet(pooled.float(), labels)

    compiled = torch.compile(loss) if compile_it else loss

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        compiled().backward()
        optimizer.step()

    if device == "cuda":
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(11):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        run, wait = graph.replay, torch.cuda.synchronize
    else:
        run, wait = step, lambda: None
    times = []
    for number in range(steps + 10):
        wait()
        start = time.perf_counter()
        run()
        wait()
        if number >= 10 or device != "cuda":
            times.append(1e3 * (time.perf_counter() - start))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=240)
    steps = parser.parse_args().steps
    if not torch.cuda.is_available():
        raise SystemExit("needs a GPU and a PyTorch with CUDA")
    times = sorted(measure(steps, "cuda", 288, 144))
    median = times[len(times) // 2]
    print(f"{torch.cuda.get_device_name()}: median {median:.2f} ms, {2 * HALF / median * 1e3:,.0f} images/s")


if __name__ == "__main__":
    main()
