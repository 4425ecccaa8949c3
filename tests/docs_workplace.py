"""A folder in which the commands and snippets of the pages find what they name, small: drawn people, weights, runs.

Names that a new page brings are added here: data to `draw_data`, weights to `save_weights`, runs to `make_ready`, and
to `smaller` the flags that make a script quick.
"""

import json
import os
import shutil
from pathlib import Path

from mpanet_jax.datasets.synthetic import write_dataset
from tests.datasets.by_name import list_images
from tests.docs_pages import ROOT, Block, blocks, commands
from tests.scripts_in_process import Refused, folder, run

NETWORK = ("--config.model.stage_sizes=(1,1,1,1)", "--config.model.width=8")
TRAINING = (
    "--config.model.backbone=resnet18",
    "--config.model.fused=off",
    "--config.data.height=48",
    "--config.data.width=48",
    "--config.data.num_ids_per_batch=3",
    "--config.data.images_per_id=4",
    "--config.optim.milestones=()",  # no number of steps in the program
    "--config.train.num_epochs=1",
    "--config.eval.batch_size=32",
)
REAL_DATA = {"/path/to/SYSU-MM01": "SYSU-MM01"}


class Workplace:
    """Runs blocks of the pages in a folder of its own, each command once, however many pages have it."""

    def __init__(self, root: Path):
        self.root = root
        self.done: dict[str, str] = {}
        self.names: dict[Path, dict] = {}  # what the snippets of a page have defined, for its later ones
        self.ready = False

    def make_ready(self) -> None:
        """Draws the data, and makes the runs that all pages speak of by the commands of data.md and training.md."""
        if self.ready:
            return
        self.ready = True
        for name in ("configs", "scripts", "benchmarks", "tests"):
            (self.root / name).symlink_to(ROOT / name)
        draw_data(self.root)
        save_weights(self.root)
        for page in ("data", "training"):
            for block in blocks(ROOT / f"docs/{page}.md"):
                if not block.needs and (block.is_python if page == "data" else block.is_commands):
                    self.run_block(block)
        for seed in (0, 1):
            self.copy_run(f"sysu_seed{seed}", seed=seed)
        for trial in (1, 2):
            self.copy_run(f"regdb_{trial}", dataset={"name": "regdb", "source": "RegDB", "trial": trial})
        self.run_words(["scripts/prepare_data.py", "--dataset=regdb", "--source=RegDB"])  # another data set to test on
        # The gallery that belongs to the queries of list.txt.
        self.run_words(["scripts/extract.py", "--weights=model.pth", "--images=gallery.txt", "--out=gallery.npz"])

    def copy_run(self, name: str, **changes) -> None:
        """A copy of runs/sysu with other settings, as if it were another run."""
        target = self.root / "runs" / name
        shutil.copytree(self.root / "runs/sysu", target)
        settings = json.loads((target / "config.json").read_text())
        for key, value in changes.items():
            settings[key] = {**settings[key], **value} if isinstance(value, dict) else value
        (target / "config.json").write_text(json.dumps(settings))

    def run_block(self, block: Block) -> None:
        """Runs a block of Python, or of commands."""
        if block.is_python:
            with folder(self.root):
                names = self.names.setdefault(block.page, {"__name__": "snippet"})
                exec(compile(block.text, str(block), "exec"), names)
            return
        for command in commands(block.text):
            assert command.words[0] == "python" and command.words[1].startswith("scripts/"), (
                f"{block}: {command}: only scripts are run here; mark the block"
            )
            try:
                self.run_words(list(command.words[1:]))
            except Refused as refused:
                raise AssertionError(f"{block}: {command}: {refused}") from refused

    def run_words(self, words: list[str]) -> None:
        for real, drawn in REAL_DATA.items():
            words = [word.replace(real, drawn) for word in words]
        words += smaller(words)
        key = " ".join(words)
        if key not in self.done:
            with folder(self.root):
                self.done[key] = run(words)


def smaller(words: list[str]) -> list[str]:
    """Flags that make a command quick: a small network, small images, one epoch."""
    script, text = Path(words[0]).name, " ".join(words)
    if script == "train.py":
        cache = f"--compilation_cache={os.environ.get('JAX_COMPILATION_CACHE_DIR', '')}"
        start = () if "--config.init_from" in text else ("--config.init_from=",)
        return [*NETWORK, *TRAINING, *start, cache]
    if script == "convert_weights.py" and ".pth" in words[1]:
        return list(NETWORK) if "--config" in text else ["--stage_sizes=1,1,1,1", "--width=8"]
    if script == "extract.py" and "--weights" in text:
        return ["--config=configs/sysu.py", *NETWORK, "--height=48", "--width=48", "--batch_size=32"]
    return []


def draw_data(root: Path) -> None:
    """SYSU-MM01, RegDB and own images in DIR, of drawn people; lists of the test images, and their permutation."""
    # Of twenty people data.md's snippet trains on sixteen too: with as many classes, one program does for both.
    size = {"num_train_ids": 16, "num_test_ids": 4, "images_per_camera": (2, 3), "height": (32, 40)}
    write_dataset("sysu_mm01", root / "SYSU-MM01", **size)
    write_dataset("regdb", root / "RegDB", num_train_ids=3, num_test_ids=3, images_per_camera=(2, 2))
    shutil.copy(root / "SYSU-MM01/exp/rand_perm_cam.mat", root)
    lists: dict[str, list[str]] = {"list.txt": [], "gallery.txt": []}
    for split in ("train", "test"):
        for record in list_images("sysu_mm01", root / "SYSU-MM01", split):
            modality = ("visible", "infrared")[record.modality]
            own = root / "DIR" / modality / f"{record.pid:04d}"
            own.mkdir(parents=True, exist_ok=True)
            (own / record.path.replace("/", "_")).symlink_to(root / "SYSU-MM01" / record.path)
            if split == "test":
                lists["list.txt" if record.modality else "gallery.txt"].append(f"SYSU-MM01/{record.path}")
    for name, paths in lists.items():
        (root / name).write_text("\n".join(paths) + "\n")
    (root / "photos").mkdir()
    for number, path in enumerate(lists["gallery.txt"][:6]):
        (root / f"photos/{number}.jpg").symlink_to(root / path)
    (root / "day.jpg").symlink_to(root / lists["gallery.txt"][0])
    for name, path in zip(("a", "person", "another", "b", "query", "night"), lists["list.txt"], strict=False):
        (root / f"{name}.jpg").symlink_to(root / path)
    (root / "my_cameras").symlink_to(root / "DIR")


def save_weights(root: Path) -> None:
    """The PyTorch files that the pages name, of the reference network at toy size."""
    import torch

    from tests.reference.compare import NUM_IDS, SMALL
    from tests.reference.model import MPANet

    small = {**SMALL, "stage_sizes": (1, 1, 1, 1)}
    published = MPANet(NUM_IDS, **small).state_dict()
    for name in ("published_mpanet.pth", "model.pth"):
        torch.save(published, root / name)
    torch.save(MPANet(NUM_IDS, mam="se", **small).state_dict(), root / "se.pth")
    backbone = {n.removeprefix("backbone."): w for n, w in published.items() if n.startswith("backbone.")}
    resnet = {name: weight for name, weight in backbone.items() if "MAM" not in name}
    torch.save(resnet | {"fc.weight": torch.zeros(10, 8), "fc.bias": torch.zeros(10)}, root / "resnet50.pth")
