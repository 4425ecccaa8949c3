"""`scripts/benchmark.py`: every sub-command on a tiny config, and the arithmetic behind its figures."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import evaluation, growth, measure, page, tables
from benchmarks.provenance import commit
from benchmarks.step import forward_work
from benchmarks.train import _timed_calls
from configs import sysu
from mpanet_jax.datasets.synthetic import write_dataset
from mpanet_jax.errors import UserError
from mpanet_jax.methods import METHODS, Entry, settings_of
from mpanet_jax.settings import Settings
from mpanet_jax.settings_base import to_dict
from tests import scripts_in_process
from tests.growth_process import in_this_process
from tests.methods_in_tests import LinenMethod

ROOT = Path(__file__).parent.parent
TINY = [f"--config={ROOT}/configs/synthetic.py", "--config.data.height=32", "--config.data.width=16"]
TINY += ["--config.data.num_ids_per_batch=3", "--config.train.steps_per_call=2", "--config.eval.batch_size=8"]
TINY += ["--config.model.backbone=resnet18", "--config.model.width=4", "--config.model.fused=off"]
TINY += ["--config.model.channel_module=none", "--config.model.pattern_module=none"]
TINY += [f"--config.loss.{term}=0" for term in ("center_cluster", "separation", "modality_identity", "mutual_mean")]
TINY += ["--config.augment.crop_padding=0", "--config.augment.flip_probability=0"]
LINEN = [f"--config={ROOT}/tests/linen_config.py", "--config.train.steps_per_call=2", "--config.eval.batch_size=8"]
RATES = {"images_per_second", "median_ms", "p10_ms", "p90_ms", "peak_gib"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    write_dataset(
        "sysu_mm01", folder / "raw", num_train_ids=6, num_test_ids=2, images_per_camera=(3, 5), height=(48, 56)
    )
    return [f"--config.dataset.source={folder}/raw", f"--config.dataset.data_dir={folder}/prepared"]


@pytest.fixture
def linen(monkeypatch):
    """The flags of a method whose network compiles in a moment, for what does not depend on the network."""
    monkeypatch.setitem(METHODS, "linen", Entry(LinenMethod, Settings))
    return LINEN


@pytest.fixture
def one_process(monkeypatch):
    """All sizes of a table in this process; test_growth_with_the_gallery_re_ranked has processes of its own."""
    monkeypatch.setattr(growth, "in_new_process", in_this_process)


def run(folder, name, *arguments, out=None, alone=False):
    """The process, and what it wrote; `alone`: one of its own, not the tests'."""
    arguments = [name, f"--compilation_cache={os.environ['JAX_COMPILATION_CACHE_DIR']}", *arguments]
    if alone:
        process = subprocess.run(
            [sys.executable, str(ROOT / "scripts/benchmark.py"), *arguments],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
    else:
        process = scripts_in_process.process("benchmark.py", *arguments, cwd=folder)
    path = folder / f"runs/benchmark/{out or name}.json"
    return process, json.loads(path.read_text()) if path.exists() else None


def check(process, report, name, *figures):
    assert process.returncode == 0, process.stderr
    assert {"date", "commit", "device", "versions", "config", "results"} <= set(report)
    assert report["device"]["kind"] and report["versions"]["jax"] == jax.__version__
    for figure in figures:
        assert report["results"][figure] > 0, figure
        assert figure in process.stdout
    return report["results"]


def test_step(tmp_path):
    profile = tmp_path / "profile"
    process, report = run(tmp_path, "step", *TINY, "--steps=6", "--images=16", f"--profile={profile}", alone=True)
    results = check(process, report, "step", *RATES, "tflops", "copy_ceiling_gb_per_second", "matmul_ceiling_tflops")
    assert report["config"]["data"]["height"] == 32
    assert (results["timed_steps"], results["batch_size"]) == (6, 12)
    assert results["p10_ms"] <= results["median_ms"] <= results["p90_ms"]
    np.testing.assert_allclose(results["images_per_second"], 12 / results["median_ms"] * 1e3)
    assert np.isfinite(results["first_loss"])
    assert list(profile.rglob("*.xplane.pb"))


def test_tries_take_turns_with_the_step_as_it_is(linen, tmp_path):
    both = "xla_llvm_disable_expensive_passes=true xla_backend_optimization_level=1"
    process, report = run(
        tmp_path, "step", *linen, "--steps=5", "--images=16", f"--try={both}", "--try=xla_no_such=1", out="tries"
    )
    assert process.returncode == 0, process.stderr
    none, tried, failed = report["results"]["rows"]
    assert [row["try"] for row in (none, tried, failed)] == ["none", both, "xla_no_such=1"]
    for row in (none, tried):
        assert row["error"] == "" and len(row["rounds_ms"]) == 3 and row["images_per_second"] > 0
    assert abs(none["first_loss"] - tried["first_loss"]) < 1e-3 * none["first_loss"]
    assert "xla_no_such" in failed["error"] and failed["median_ms"] is None
    assert f"| {both} |" in process.stdout


@pytest.mark.parametrize("cache", ["device", "none"])
def test_train(cache, data, linen, tmp_path):
    arguments = ["--steps=9", f"--config.data.cache={cache}", "--config.train.checkpoint_every_epochs=1"]
    arguments += ["--config.train.steps_per_call=1"]  # one program less to compile
    process, report = run(tmp_path, "train", *linen, *data, *arguments)
    results = check(process, report, "train", *RATES, "share_of_step", "seconds_to_first_step")
    assert results["cache"] == cache
    assert results["checkpoints"] == 9 // results["steps_per_epoch"] == 1
    assert 0 < results["timed_steps"] < 9
    np.testing.assert_allclose(results["recipe_minutes"], 3_279_360 / results["images_per_second"] / 60)
    assert os.listdir(tmp_path / "runs/benchmark") == ["train.json"]


def test_extract(data, tmp_path):
    process, report = run(tmp_path, "extract", *TINY, *data, "--steps=4", "--images=20", "--files", "--num_files=500")
    figures = ("fetched_images_per_second", "files_images_per_second", "read_images_per_second", "tflops")
    results = check(process, report, "extract", *RATES, *figures)
    assert (results["timed_batches"], results["batch_size"], results["dimension"]) == (4, 8, 32)
    assert results["files"] == 500  # more than there are


def test_evaluate(tmp_path, monkeypatch):
    # A seventh of SYSU-MM01's test images; tests/evaluation/test_benchmarks.py counts all of them.
    fewer = {camera: (images // 7, ids) for camera, (images, ids) in evaluation.CAMERA_IMAGES.items()}
    monkeypatch.setattr(evaluation, "CAMERA_IMAGES", fewer)
    process, report = run(tmp_path, "evaluate", "--dimensions=8")
    results = check(process, report, "evaluate", "8_seconds", "8_peak_gib")
    assert (results["8_num_query"], results["8_num_gallery"]) == (543, 967)


@pytest.mark.parametrize("rerank", [False, True])
def test_gallery(rerank, tmp_path):
    arguments = ["--gallery=400", "--queries=30", "--dimension=64", *(["--rerank"] if rerank else [])]
    process, report = run(tmp_path, "gallery", *arguments)
    results = check(process, report, "gallery", "seconds", "peak_gib", "features_gib", "mAP")
    assert (results["num_gallery"], results["num_query"], results["num_ids"]) == (400, 30, 40)
    assert results["rerank"] == rerank
    assert 100 / 40 < results["rank1"] < 100  # clusters that overlap


def test_save(tmp_path):
    process, report = run(tmp_path, "save", *TINY, "--steps=2")
    figures = [f"{kind}_{name}" for kind in ("with", "without") for name in ("seconds", "cpu_seconds", "waits_seconds")]
    results = check(process, report, "save", *figures, "stored_mib")
    # Random numbers are hardly compressed: four bytes each, where the kind of the others is not many.
    assert results["stored_mib"] == pytest.approx(4 * results["numbers"] / 2**20, rel=0.15)
    slower = results["with_seconds"] / results["without_seconds"] - 1
    np.testing.assert_allclose(results["slower_percent"], 100 * slower)
    assert os.listdir(tmp_path / "runs/benchmark") == ["save.json"]


def test_data(data, tmp_path):
    process, report = run(tmp_path, "data", *TINY, *data, "--images=20")
    results = check(process, report, "data", "pillow_loop", "streaming", "cache_build", "host_cache")
    assert "drawn" not in results["data_set"]


@pytest.mark.parametrize("cache", ["host", "device"])
def test_precision_of_bfloat16_against_float32(cache, data, linen, tmp_path):
    # More steps than the five of the one epoch of the run; in one call, or from the host one by one.
    arguments = ["--steps=50", "--config.train.num_epochs=1", f"--config.data.cache={cache}"]
    arguments += ["--config.train.steps_per_call=5"]
    arguments += ["--config.optim.learning_rate=1e-6", "--config.augment.flip_probability=0.5", "--starts=2"]
    process, report = run(tmp_path, "precision", *linen, *data, *arguments)
    # Starts next to each other: their curves differ, but by little.
    results = check(process, report, "precision", "largest_difference", "spread_float32", "spread_bfloat16")
    assert results["spread_float32"] < 1e-3 and results["spread_bfloat16"] < 0.01
    # So slow a training leaves the network as it was: the curves differ by the precision of the forward pass.
    assert results["final_difference"] <= results["largest_difference"] < 0.01
    assert results["steps"] == 5
    np.testing.assert_allclose(results["loss_float32"], results["loss_bfloat16"], rtol=0.01)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["fast"], "step, train, extract, evaluate, gallery, search, save, data, precision, growth"),
        (["growth"], "--over"),
        (["growth", "--over=gallery", "--sizes=100"], "--sizes=100"),
        (["growth", "--over=gallery", "--sizes=100,many"], "--sizes=100,many"),
        (["growth", *TINY, "--over=batch", "--sizes=5,8"], "--sizes"),
        (["step", "--compiler_option=fast"], "--compiler_option=fast: expected NAME=VALUE"),
        (["step", "--try=xla_gpu_autotune_level=0 faster"], "--try=faster: expected NAME=VALUE"),
        (["step", "--try=a=1", "--try="], "--try=: expected NAME=VALUE"),
        (["evaluate", "--dimensions=many"], "--dimensions"),
        (["evaluate", "--permutation=nowhere/rand_perm_cam.mat"], "test_id.txt"),
    ],
)
def test_bad_input_is_one_line(arguments, named, tmp_path, one_process):
    process, report = run(tmp_path, *arguments, alone=arguments == ["fast"])
    assert process.returncode == 2 and report is None
    assert len(process.stderr.splitlines()) == 1 and named in process.stderr


def test_convolution_work_by_hand():
    @jax.custom_vjp
    def product(x):
        return jax.jit(jnp.matmul)(x, jnp.ones((5, 6)))

    product.defvjp(lambda x: (product(x), None), lambda _, gradient: (gradient @ jnp.ones((6, 5)),))

    def network(image, x):
        kernel = jnp.ones((3, 3, 4, 16))
        convolved = jax.lax.conv_general_dilated(
            image, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
        )
        return convolved.sum() + product(x).sum()

    operations, outputs = measure.convolution_work(network, jnp.ones((1, 8, 8, 8)), jnp.ones((4, 5)))
    assert outputs == 4 * 4 * 16 + 4 * 6
    # 3 x 3 places and 4 of the 8 channels for each of the convolution's outputs, 5 terms for each of the product's.
    assert operations == 2 * (4 * 4 * 16 * 3 * 3 * 4 + 4 * 6 * 5)


def test_convolution_work_counts_one_of_several_branches():
    def network(x):
        return jax.lax.platform_dependent(x, cpu=lambda x: x @ x, default=lambda x: x @ x)

    assert measure.convolution_work(network, jnp.ones((4, 4))) == (2 * 4**3, 4**2)


def test_forward_work_is_resnet_50s():
    # ResNet-50's 4.09 G multiply-adds at 224 x 224 are 3.8 G in stages with 1/2 … 1/16 and 0.81 G in the last, which
    # here stays at 1/16 and so does four times as much: about 6.2 G at 384 x 128.
    operations, outputs = forward_work(settings_of(sysu.get_config().to_dict()))
    assert 11.8e9 < operations < 12.8e9
    assert 12e6 < outputs < 13e6


def test_the_first_call_and_those_that_compile_are_left_out():
    finished = [(8, 9.0), (16, 10.0), (17, 14.0), (18, 14.5)]
    timed, compiling = _timed_calls(finished, compiled=[8.0, 13.0])
    assert timed.tolist() == [[8, 1.0], [1, 0.5]]
    assert compiling == 4.0
    for few, compiled in ((finished[:1], [8.0]), (finished[1:3], [13.0])):
        with pytest.raises(UserError, match="--steps: too few"):
            _timed_calls(few, compiled)


def test_seconds_per_call_and_rates():
    # Results that take the device a while, one after the other.
    result = SimpleNamespace(block_until_ready=lambda: time.sleep(0.02))
    seconds = measure.seconds_per_call(lambda: result, 4, warm_up=1)
    assert len(seconds) == 4 and (seconds >= 0.019).all()
    rates = measure.rates(np.arange(1.0, 12.0), 12)
    assert rates == {"images_per_second": 2.0, "median_ms": 6000.0, "p10_ms": 2000.0, "p90_ms": 10000.0}


def test_reports_as_tables(tmp_path):
    settings = settings_of({"dtype": "float32", "data": {"height": 288}})
    environment = {**measure.environment(), "date": "2026-01-02", "commit": "abcdef012"}
    results = {"images_per_second": 5818.2, "median_ms": 22.0}
    report = {"name": "step", **environment, "config": to_dict(settings), "results": results}
    measure.write_report(tmp_path / "step.json", report)
    text = tables.page([tmp_path / "step.json"])
    assert "## step: mpanet, `data.height=288`, `dtype=float32`\n" in text
    assert "2026-01-02, commit abcdef012; " in text and f"jax {jax.__version__}" in text
    assert "| images_per_second | 5,818 |\n| median_ms | 22 |\n" in text
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UserError, match=r"other\.json"):
        tables.page([tmp_path / "step.json", tmp_path / "other.json"])


@pytest.fixture(scope="module")
def step_tables(tmp_path_factory):
    """The process that measures how the step grows, on two devices, and its folder."""
    folder = tmp_path_factory.mktemp("growth")
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    process = subprocess.run(
        # The last program of either table is the same.
        [sys.executable, "-m", "tests.growth_process", "batch=8+12,devices=1+2", *LINEN, "--steps=5"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert sorted(os.listdir(folder / "runs/benchmark")) == ["growth_batch.json", "growth_devices.json"], process.stderr
    return process, folder


@pytest.mark.xdist_group("growth of the step")
@pytest.mark.parametrize("over", ["batch", "devices"])
def test_growth_of_the_step(over, step_tables):
    process, folder = step_tables
    report = json.loads((folder / f"runs/benchmark/growth_{over}.json").read_text())
    sizes = {"batch": [8, 12], "devices": [1, 2]}[over]
    results = check_growth(process, report, over, sizes, {"images_per_second", "median_ms", "host_cpu_ms"})
    # Images a step, by the rate and the time of one.
    images = [row["images_per_second"] * row["median_ms"] / 1e3 for row in results["rows"]]
    devices, batch = [2, 2] if over == "batch" else sizes, sizes if over == "batch" else [12, 12]
    np.testing.assert_allclose(images, [d * b for d, b in zip(devices, batch, strict=True)])


@pytest.mark.parametrize("over", ["images", "ids"])
def test_growth_of_the_data(over, tmp_path, one_process):
    sizes, columns = {
        "images": ([200, 400], {"prepare_cpu_seconds", "cache_cpu_seconds", "host_batch_cpu_ms"}),
        "ids": ([10, 40], {"plan_cpu_seconds", "plan_batch_ms"}),
    }[over]
    options = [f"--over={over}", f"--sizes={sizes[0]},{sizes[1]}"]
    process, report = run(tmp_path, "growth", *TINY, *options, out=f"growth_{over}")
    results = check_growth(process, report, over, sizes, columns)
    assert over != "images" or all("device_start_gib" in row for row in results["rows"])
    assert os.listdir(tmp_path / "runs/benchmark") == [f"growth_{over}.json"]


GALLERY = ["--over=gallery", "--sizes=200,400", "--queries=20", "--dimension=16"]


def test_growth_with_the_gallery(tmp_path, one_process):
    process, report = run(tmp_path, "growth", *GALLERY, out="growth_gallery")
    check_growth(process, report, "gallery", [200, 400], {"evaluate_cpu_seconds", "search_cpu_seconds"})


def test_growth_with_the_gallery_re_ranked(tmp_path):
    programs, cache = Path(os.environ["JAX_COMPILATION_CACHE_DIR"]), tmp_path / "xla"
    programs.mkdir(parents=True, exist_ok=True)
    cache.symlink_to(programs)  # the suite's, by another name
    options = [*GALLERY, "--rerank", f"--compilation_cache={cache}"]
    process, report = run(tmp_path, "growth", *options, out="growth_gallery", alone=True)
    check_growth(process, report, "gallery", [200, 400], {"rerank_cpu_seconds"})
    assert report["compilation_cache"] == str(cache)


def check_growth(process, report, over, sizes, columns):
    results = check(process, report, "growth")
    assert [row[over] for row in results["rows"]] == sizes and over in process.stdout
    assert all(row[name] > 0 for row in results["rows"] for name in columns)
    assert columns <= set(results["exponents"])
    return results


def test_exponents_of_powers():
    sizes = (10, 30, 100, 300)
    rows = [{"size": n, "square": 3 * n**2, "root": n**0.5, "constant": 7.0, "none": 0.0} for n in sizes]
    assert growth.exponents(rows) == pytest.approx({"square": 2, "root": 0.5, "constant": 0})


PART = "<!-- measured: {} -->\n{}<!-- end -->\n"


def written_report(path, results, **fields):
    report = {"name": "step", "command": "python scripts/benchmark.py step --out=there.json", **measure.environment()}
    measure.write_report(
        path, report | {"date": "2026-01-02", "config": to_dict(settings_of(fields)), "results": results}
    )


def test_the_page_is_filled_from_reports(tmp_path):
    written_report(tmp_path / "step.json", {"images_per_second": 5818.2, "median_ms": 22.0})
    written_report(tmp_path / "slow.json", {"images_per_second": 2700.0, "median_ms": 47.5}, dtype="float32")
    rows = [{"ids": 10, "seconds": 0.5}, {"ids": 1000, "seconds": 50.0}]
    written_report(tmp_path / "growth.json", {"over": "ids", "rows": rows, "exponents": {"seconds": 1.0}})
    several = "step, slow | median_ms: ms a step; images_per_second: images/s"
    growing, later = "growth | ids: identities; seconds: s", "later | seconds: s"
    before = (
        "# Page\n" + PART.format(several, "old\n") + "text\n" + PART.format(growing, "") + PART.format(later, "kept\n")
    )
    text, missing = page.filled(before, tmp_path)
    assert (
        "| | ms a step | images/s |\n|---|---|---|\n| `step` | 22 | 5,818 |\n| `step`, `dtype=float32` | 47.5 | 2,700 |"
        in text
    )
    assert "| identities | s |\n|---|---|\n| 10 | 0.5 |\n| 1,000 | 50 |\n| exponent | 1.00 |" in text
    assert text.count("`python scripts/benchmark.py step`: 2026-01-02, commit ") == 2 and "old" not in text
    assert missing == ["later"] and PART.format(later, "kept\n") in text
    assert page.filled(text, tmp_path) == (text, missing)
    with pytest.raises(UserError, match=r"step\.json.*speed"):
        page.filled(PART.format("step | speed: km/h", ""), tmp_path)


def test_the_performance_page_is_that_of_its_reports():
    text = page.PAGE.read_text()
    assert page.filled(text)[0] == text


def test_commit_is_that_of_git():
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert head.startswith(commit().split()[0]) or (not head and commit() == "unknown")


def test_the_default_recipe_is_found_from_anywhere(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.run(
        [sys.executable, str(ROOT / "scripts/benchmark.py"), "nothing"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert process.returncode == 2
    assert process.stderr.startswith("error: benchmark.py nothing: expected one of step, train")
