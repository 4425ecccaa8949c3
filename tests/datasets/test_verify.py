"""Each way a copy of a data set is broken in practice: one damaged file or list, one line that names it."""

import shutil

import pytest

from mpanet_jax.datasets.verify import format_counts
from mpanet_jax.errors import UserError
from tests.datasets.by_name import load_split, prepare, verify

LAYOUTS = ("sysu_mm01", "regdb", "llcm")


def found_title(layout):
    return "regdb trial 1" if layout == "regdb" else layout


def an_image(source, layout):
    pattern = {"sysu_mm01": "cam4/*/*.jpg", "regdb": "Thermal/*/*.bmp", "llcm": "test_vis/cam*/*/*.jpg"}[layout]
    pids = {int(p) for f in ("train", "val", "test") for p in _ids(source, f)} if layout == "sysu_mm01" else None
    return next(p for p in sorted(source.glob(pattern)) if pids is None or int(p.parent.name) in pids)


def _ids(source, name):
    return (source / "exp" / f"{name}_id.txt").read_text().split(",")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sound_sets_have_no_faults_and_a_warning_with_both_numbers(tiny_sources, layout):
    found = verify(layout, tiny_sources / layout)
    assert found.faults == []
    train = found.images[found_title(layout)]["train"]
    published = {
        "sysu_mm01": "395, 22,258 and 11,909",
        "regdb": "206, 2,060 and 2,060",
        "llcm": "713, 16,946 and 13,975",
    }
    assert f"train has {len({i.pid for i in train})} identities" in found.warnings[0]
    assert published[layout] in found.warnings[0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "damage, fault", [("truncated", "cannot be decoded"), ("empty", "empty file"), ("text", "not an image")]
)
def test_damaged_image_files(copy_of, tmp_path, layout, damage, fault):
    source = copy_of(layout)
    path = an_image(source, layout)
    data = path.read_bytes()
    path.write_bytes({"truncated": data[: len(data) * 2 // 3], "empty": b"", "text": b"no image\n" * 99}[damage])
    faults = verify(layout, source).faults
    assert len(faults) == 1 and faults[0].startswith(f"{path}: {fault}") and "restore" in faults[0]
    with pytest.raises(UserError, match=fault):
        prepare(layout, source, tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    "layout, folder",
    [
        ("sysu_mm01", "cam1"),
        ("sysu_mm01", "cam3"),
        ("regdb", "Thermal"),
        ("llcm", "test_nir/cam4"),
        ("llcm", "test_vis/cam3"),
    ],
)
def test_missing_camera(copy_of, layout, folder):
    source = copy_of(layout)
    shutil.rmtree(source / folder)
    faults = verify(layout, source).faults
    assert [f for f in faults if f.startswith(f"{source / folder}: ") and "missing" in f]
    others = [f for f in faults if "folder missing" not in f]
    assert all("images only" in f or "has no images" in f for f in others)  # what follows from it, and no more


@pytest.mark.parametrize(
    "layout, file",
    [
        ("sysu_mm01", "exp/val_id.txt"),
        ("sysu_mm01", "exp/rand_perm_cam.mat"),
        ("regdb", "idx/test_thermal_1.txt"),
        ("llcm", "idx/train_nir.txt"),
        ("llcm", "idx/test_id.txt"),
    ],
)
def test_missing_list(copy_of, layout, file):
    source = copy_of(layout)
    (source / file).unlink()
    assert any(f.startswith(f"{source / file}: file missing") for f in verify(layout, source).faults)


@pytest.mark.parametrize("layout, file", [("sysu_mm01", "exp/train_id.txt"), ("llcm", "idx/test_id.txt")])
def test_repeated_and_unknown_identities(copy_of, layout, file):
    source = copy_of(layout)
    path = source / file
    first = path.read_text().split(",")[0].strip()
    path.write_text(path.read_text().strip() + f",{first},520\n")
    repeated, unknown = verify(layout, source).faults
    assert repeated.startswith(f"{path}: identity {int(first)} is listed twice")
    assert unknown.startswith(f"{path}: identity 520 has no images")


def test_identity_in_two_lists(copy_of):
    source = copy_of("sysu_mm01")
    train, val, test = (_ids(source, name)[0].strip() for name in ("train", "val", "test"))
    (source / "exp/val_id.txt").write_text(f"{val},{train},{test}\n")
    faults = verify("sysu_mm01", source).faults
    assert len(faults) == 2
    assert f"identity {train} is in exp/train_id.txt too" in faults[0]
    assert f"identity {test} is in both the training and the test lists" in faults[1]


def test_train_and_test_of_regdb_share_an_identity(copy_of):
    source = copy_of("regdb")
    for word in ("visible", "thermal"):
        train, test = (source / "idx" / f"{split}_{word}_1.txt" for split in ("train", "test"))
        pid = train.read_text().splitlines()[0].split("/")[1]
        lines = [
            line.rpartition(" ")[0] + " 99" for line in train.read_text().splitlines() if line.split("/")[1] == pid
        ]
        test.write_text("\n".join([*test.read_text().splitlines(), *lines]))
    assert [f for f in verify("regdb", source).faults] == [
        f"{source} trial 1: identity {pid} is in both the training and the test lists; remove it from one"
    ]


def test_permutation_for_more_images_than_exist(copy_of):
    source = copy_of("sysu_mm01")
    pid = int(_ids(source, "test")[0])
    path = next(p for p in sorted(source.glob(f"cam[1245]/{pid:04d}/*.jpg")))
    number = len(list(path.parent.iterdir()))
    path.unlink()
    (fault,) = verify("sysu_mm01", source).faults
    assert fault.startswith(f"{source / 'exp/rand_perm_cam.mat'}: it permutes {number} images of")
    assert f"which has {number - 1}" in fault


def test_training_identity_with_visible_images_only(copy_of):
    source = copy_of("sysu_mm01")
    pid = int(_ids(source, "train")[0])
    for camid in (3, 6):
        shutil.rmtree(source / f"cam{camid}" / f"{pid:04d}", ignore_errors=True)
    (fault,) = verify("sysu_mm01", source).faults
    assert f"training identity {pid} has visible images only" in fault and "restore its infrared images" in fault


def test_index_line_outside_the_root_is_not_read(copy_of):
    source = copy_of("regdb")
    (source.parent / "secret.bmp").write_bytes(an_image(source, "regdb").read_bytes())
    path = source / "idx" / "train_thermal_1.txt"
    path.write_text(path.read_text() + "../secret.bmp 77\n")
    (fault,) = verify("regdb", source).faults
    assert "'../secret.bmp' points outside" in fault


@pytest.mark.parametrize("layout", LAYOUTS)
def test_spaces_other_letters_and_upper_case_suffixes_work(copy_of, tmp_path, layout):
    source = copy_of(layout)
    path = an_image(source, layout)
    data = path.read_bytes()
    renamed = path.with_name(f"{path.stem} – größe 人{path.suffix.upper()}")
    path.rename(renamed)
    for index in source.glob("idx/*.txt"):
        old, new = str(path.relative_to(source)), str(renamed.relative_to(source))
        index.write_text(index.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    assert verify(layout, source).faults == []
    prepare(layout, source, tmp_path / "data")
    splits = [load_split(layout, tmp_path / "data", split) for split in ("train", "test")]
    (stored,) = [
        s.encoded[list(s.paths).index(str(renamed.relative_to(source)))]
        for s in splits
        if str(renamed.relative_to(source)) in s.paths
    ]
    assert layout == "regdb" or stored == data


def test_all_faults_are_listed(copy_of):
    source = copy_of("sysu_mm01")
    images = sorted(source.glob(f"cam*/{int(_ids(source, 'train')[0]):04d}/*.jpg"))[:3]
    for path in images:
        path.write_bytes(b"")
    shutil.rmtree(source / "cam5")
    faults = verify("sysu_mm01", source).faults
    assert len([f for f in faults if "empty file" in f]) == 3 - sum("cam5" in str(p) for p in images)
    assert [f for f in faults if "cam5: camera folder missing" in f]


def test_unknown_folder_and_data_set(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        verify("llcm", tmp_path / "none")
    with pytest.raises(UserError, match="expected one of 'sysu_mm01', 'regdb', 'llcm', 'own'"):
        verify("market", tmp_path)


def test_counts_table(tiny_sources):
    table = format_counts(verify("regdb", tiny_sources / "regdb").images["regdb trial 1"])
    rows = [line.split() for line in table.splitlines() if not line.startswith("-")]
    assert rows[1:] == [  # 4 + 3 identities with ten images a modality
        ["1", "visible", "4", "40", "3", "30"],
        ["2", "infrared", "4", "40", "3", "30"],
        ["all", "visible", "4", "40", "3", "30"],
        ["all", "infrared", "4", "40", "3", "30"],
        ["all", "both", "4", "80", "3", "60"],
    ]
