"""The wheel: what is in it, and the three lines in an environment that has nothing else of this repository."""

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import mpanet_jax
from mpanet_jax.methods import make_method
from mpanet_jax.methods.mpanet import MPANetSettings
from mpanet_jax.model import Model
from mpanet_jax.weights.convert import template_of

ROOT = Path(__file__).parent.parent
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
SMALL = {"model.stage_sizes": (1, 1, 1, 1), "model.width": 8, "data.height": 64, "data.width": 32, "dtype": "float32"}

THREE_LINES = """
import sys, mpanet_jax
assert "jax" not in sys.modules and "numpy" not in sys.modules
model = mpanet_jax.load("people")
embeddings = model.embed(["a.png", "b.png"])
import numpy, pathlib
numpy.save("embeddings.npy", embeddings)
print(mpanet_jax.__version__, pathlib.Path(mpanet_jax.__file__).parent)
for name in ("configs", "scripts", "benchmarks", "ablations", "tests"):
    try:
        __import__(name)
    except ImportError:
        continue
    sys.exit(f"{name} is installed")
"""


def run(*command, **options):
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def tracked(folder):
    """The files of the package as git has them, or, outside of git, all but caches."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", folder], cwd=ROOT, capture_output=True)
    if listed.returncode == 0 and listed.stdout:
        return {name for name in listed.stdout.decode().splitlines() if (ROOT / name).exists()}
    paths = (path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(ROOT).as_posix() for path in paths}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # A copy: the build leaves folders behind. What should not get in is there to get in.
    others = ("configs", "scripts", "benchmarks", "ablations", "tests")
    for name in ("pyproject.toml", "README.md", "LICENSE", *(n for f in ("mpanet_jax", *others) for n in tracked(f))):
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "wheel", *options, "-w", folder, folder / "source")
    (file,) = folder.glob("*.whl")
    return file


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    assert wheel.name == f"mpanet_jax-{VERSION}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.partition("/")[0] for name in names} == {"mpanet_jax", f"mpanet_jax-{VERSION}.dist-info"}
    assert {name for name in names if name.startswith("mpanet_jax/")} == tracked("mpanet_jax")


def test_the_three_lines_run_in_an_empty_environment(wheel, tmp_path):
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env")
    python = tmp_path / "env/bin/python"
    options = ("--no-deps", "--no-index", "--quiet", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel)
    # Its dependencies are those of this environment; .pth files in there, such as that of this repository, count not.
    (site,) = (tmp_path / "env/lib").glob("python*/site-packages")
    dependencies = {str(Path(module.__file__).parents[1]) for module in (jax, np)}
    (site / "dependencies.pth").write_text("\n".join(dependencies))

    settings, generator = MPANetSettings().replace(SMALL), np.random.default_rng(0)
    shapes = template_of(make_method(settings), 1)
    model = Model(settings, jax.tree.map(lambda leaf: np.full(leaf.shape, 0.05, leaf.dtype), shapes), "drawn")
    model.save(tmp_path / "elsewhere/people")
    for name in ("a", "b"):
        pixels = generator.integers(0, 256, (70, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"elsewhere/{name}.png")

    # As a user's shell: nothing of this one's but where the compiler's results are kept.
    kept = {name: value for name, value in os.environ.items() if name.startswith(("JAX_", "XLA_"))}
    environment = {"PATH": os.defpath, "HOME": str(tmp_path), **kept}
    output = run(python, "-c", THREE_LINES, cwd=tmp_path / "elsewhere", env=environment)
    assert output.split() == [VERSION, str(site / "mpanet_jax")]
    found = np.load(tmp_path / "elsewhere/embeddings.npy")
    expected = model.embed([tmp_path / "elsewhere/a.png", tmp_path / "elsewhere/b.png"])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_importing_the_package_imports_no_jax():
    code = "import sys, mpanet_jax; print([n for n in ('jax', 'numpy', 'flax', 'absl') if n in sys.modules])"
    assert run(sys.executable, "-c", code, cwd=ROOT).strip() == "[]"


def test_public_names_are_there():
    assert set(mpanet_jax.__all__) <= set(dir(mpanet_jax))
    for name in mpanet_jax.__all__:
        assert getattr(mpanet_jax, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        mpanet_jax.laod  # noqa: B018
    assert mpanet_jax.Settings() == MPANetSettings()
    assert callable(mpanet_jax.train) and callable(mpanet_jax.evaluate)
