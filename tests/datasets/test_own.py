"""images.csv: what it says arrives in the arrays, and each way it is wrong in practice is named with its line."""

import csv

import numpy as np
import pytest
from PIL import Image

from mpanet_jax import datasets
from mpanet_jax.data.decode import pixels_of, read_image_file, resized_pixels
from mpanet_jax.datasets.prepared import _warn_of_another_source
from mpanet_jax.errors import UserError
from mpanet_jax.settings import DataSettings
from tests.datasets.by_name import load_split, prepare, settings, verify
from tests.evaluation.by_name import evaluate_embeddings
from tests.evaluation.cases import embeddings

HEADER = ["path", "pid", "camid", "modality", "split"]
ROWS = [  # line 2 on
    ["a/1.png", "anna", "3", "infrared", "train"],
    ["a/2.png", "anna", "1", "visible", "train"],
    ["b/1 größe.png", "人 b", "", "visible", "train"],
    ["b/2.png", "人 b", "", "infrared", "train"],
    ["c/1.png", "carl", "1", "visible", "val"],
    ["c/2.png", "carl", "3", "infrared", "val"],
    ["d/1.png", "7", "1", "visible", "test"],
    ["d/2.png", "7", "3", "infrared", "test"],
    ["e/1.png", "eve", "", "visible", "test"],  # a distractor: visible only
    ["d/3.png", "7", "2", "visible", "query"],
    ["d/4.png", "7", "2", "visible", "gallery"],
    ["d/5.png", "7", "5", "infrared", "gallery"],
]


def write(root, rows, header=HEADER, images=True):
    root.mkdir(exist_ok=True)
    for number, row in enumerate(rows if images else []):
        path = root / row[0]
        if row[0] and ".." not in row[0]:
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (6, 12), (number * 10 % 256, 0, 0)).save(path)
    with open(root / "images.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return root


def faults_of(root, **own):
    return verify("own", root, **own).faults


def test_every_column_arrives(tmp_path):
    root = write(tmp_path / "raw", ROWS)
    prepare("own", root, tmp_path / "data")
    numbers = {name: number for number, name in enumerate(sorted({row[1] for row in ROWS}))}
    for name, parts in (("train", ("train", "val")), ("test", ("test", "query", "gallery"))):
        split = load_split("own", tmp_path / "data", name)
        found = {
            path: [path, pid_name, camid, modality, part, pid, pixels]
            for path, pid_name, camid, modality, part, pid, pixels in zip(
                split.paths,
                split.pid_names,
                split.camids,
                split.modality,
                split.parts,
                split.pids,
                split.encoded,
                strict=True,
            )
        }
        expected = {
            path: [
                path,
                pid,
                int(camid or -1),
                int(modality == "infrared"),
                part,
                numbers[pid],
                (root / path).read_bytes(),
            ]
            for path, pid, camid, modality, part in ROWS
            if part in parts
        }
        assert found == expected


def test_byte_order_mark_other_columns_quotes_and_blank_lines_are_read(tmp_path):
    rows = [[*row, "a, note", "", ""] for row in ROWS]
    root = write(tmp_path / "raw", rows, [*HEADER, "remark", "", ""])  # as spreadsheets leave empty columns behind
    text = (root / "images.csv").read_text(encoding="utf-8").replace("\r\n", "\n\n")
    (root / "images.csv").write_text("\ufeff" + text, encoding="utf-8")
    assert faults_of(root) == []


def test_tests_are_both_directions_and_query_to_gallery(tmp_path):
    root = write(tmp_path / "raw", ROWS)
    tested = datasets.open_evaluation(settings("own", tmp_path / "data", root))
    paths = tested.split.paths
    found = [(e.protocol.name, sorted(paths[e.query]), sorted(paths[e.gallery])) for e in tested.evaluations]
    assert found == [
        ("own", ["d/1.png", "e/1.png"], ["d/2.png"]),
        ("query_gallery", ["d/3.png"], ["d/4.png", "d/5.png"]),
    ]
    watched = datasets.open_evaluation(settings("own", tmp_path / "data", validation=True), validation=True)
    assert [sorted(watched.split.paths[e.query]) for e in watched.evaluations] == [["c/1.png"]]
    train = datasets.open_split(settings("own", tmp_path / "data", validation=True), "train")
    assert set(train.pid_names) == {"anna", "人 b"}
    assert (
        len({watched.split.fingerprint, train.fingerprint, load_split("own", tmp_path / "data", "train").fingerprint})
        == 3
    )
    np.testing.assert_array_equal(train.labels, np.unique(train.pids, return_inverse=True)[1])
    assert [train.encoded[i] for i in range(len(train))] == [(root / path).read_bytes() for path in train.paths]


@pytest.mark.parametrize("camids, num_matches", [((2, 2), 0), ((2, 3), 1), ((-1, -1), 1), ((2, -1), 1)])
def test_a_query_never_meets_its_own_known_camera(camids, num_matches):
    query = embeddings([(1, camids[0], "q"), (2, 9, "r")], np.eye(2))
    gallery = embeddings([(1, camids[1], "g"), (2, 8, "h")], np.eye(2))
    values = evaluate_embeddings(query, gallery, protocol="query_gallery")["own/query_to_gallery"]
    assert values["num_query_without_match"] == 1 - num_matches
    assert values["rank1"] == 100


@pytest.mark.parametrize(
    "line, row, fault",
    [
        (1, ["path", "pid", "modality", "split"], "no column camid"),
        (1, [*HEADER, "pid"], "column pid comes twice"),
        (1, ["path;pid;camid;modality;split"], "with commas between the columns"),
        (3, ["a/2.png", "anna", "1", "thermal", "train"], "modality 'thermal'; expected visible or infrared"),
        (3, ["a/2.png", "anna", "1", "visible", "training"], "split 'training'; expected one of train, val, test"),
        (3, ["a/2.png", "anna", "1", "visi\nble", "train"], r"modality 'visi\nble'"),
        (3, ["a/2.png", "an\nna", "1", "visible", "train"], r"pid 'an\nna' holds a line break"),
        (3, ["a/2.png", "anna\0", "1", "visible", "train"], r"pid 'anna\x00' holds"),
        (3, ["a\\2.png", "anna", "1", "visible", "train"], "write '/' between the parts"),
        (3, ["a/2.png", "anna", "one", "visible", "train"], "camid 'one'"),
        (3, ["a/2.png", "anna", "-2", "visible", "train"], "camid '-2'"),
        (3, ["a/2.png", "anna", "9" * 5000, "visible", "train"], "camid '999"),
        (3, ["a/2.png", "", "1", "visible", "train"], "pid is empty"),
        (3, ["", "anna", "1", "visible", "train"], "path is empty"),
        (3, ["a/2.png", "anna", "1", "visible"], "4 fields, but the header has 5"),
        (3, ["../x.png", "anna", "1", "visible", "train"], "'../x.png' points outside"),
        (3, ["/etc/x.png", "anna", "1", "visible", "train"], "'/etc/x.png' points outside"),
        (3, ["a/none.png", "anna", "1", "visible", "train"], "there is no image"),
        (8, ["d/1.png", "anna", "1", "visible", "test"], "pid 'anna' is in test, and in train (line 2)"),
        (6, ["c/1.png", "7", "1", "visible", "val"], "pid '7' is in test, and in val (line 6)"),
        (4, ["a/./1.png", "人 b", "1", "visible", "train"], "path 'a/1.png' is in line 2 too"),
        (5, ["b/2.png", "人 b", "", "visible", "train"], "training identity '人 b' has visible images only"),
    ],
)
def test_a_faulty_line_is_named_and_nothing_is_built(tmp_path, line, row, fault):
    rows = [HEADER, *ROWS]
    root = write(tmp_path / "raw", ROWS)
    rows[line - 1] = row
    with open(root / "images.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    # Of two lists that share an identity the later line is named, of an identity without a modality the first.
    named = {"and in val": 8, "training identity": 4}
    line = next((number for text, number in named.items() if text in fault), line)
    assert [f for f in faults_of(root) if f.startswith(f"{root}/images.csv:{line}: ") and fault in f], faults_of(root)
    assert all("\n" not in f for f in faults_of(root))
    with pytest.raises(UserError, match=r"images\.csv:\d+: "):
        prepare("own", root, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_one_name_in_two_spellings_of_unicode_is_named(tmp_path):
    """An é is one character or two; as two identities, one person would be in training and in the test."""
    composed, decomposed = "Zo\u00e9", "Zoe\u0301"
    rows = [
        *ROWS,
        *[[f"z/{n}.png", composed, "1", modality, "train"] for n, modality in enumerate(("visible", "infrared"))],
        ["z/2.png", decomposed, "2", "visible", "test"],
    ]
    (fault,) = faults_of(write(tmp_path / "raw", rows))
    assert "images.csv:16: pid" in fault and "looks like that of line 14" in fault and r"'Zoe\u0301'" in fault


def test_all_faulty_lines_are_listed_once(tmp_path):
    root = write(tmp_path / "raw", ROWS)
    (root / "a/1.png").write_bytes(b"")
    (root / "d/1.png").write_bytes(b"no image")
    (root / "c/1.png").unlink()
    faults = faults_of(root)
    assert len(faults) == 5
    assert [f for f in faults if "a/1.png: empty file" in f and "line 2 of images.csv" in f]
    assert [f for f in faults if "d/1.png: not an image" in f and "line 8 of images.csv" in f]
    assert [f for f in faults if "images.csv:6: there is no image" in f]
    assert [f for f in faults if "no identity of split val has images of both modalities" in f]


@pytest.mark.parametrize(
    "keep, fault",
    [
        (lambda row: row[4] != "train", "no image of split train"),
        (lambda row: row[4] in ("train", "val"), "no image of split test, nor of query and gallery"),
        (lambda row: row[4] != "gallery", "images of split query but none of gallery"),
        (lambda row: row[:1] != ["d/2.png"], "no identity of split test has images of both modalities"),
    ],
)
def test_empty_splits_are_named(tmp_path, keep, fault):
    root = write(tmp_path / "raw", [row for row in ROWS if keep(row)])
    assert [f for f in faults_of(root) if f.startswith(f"{root}/images.csv: ") and fault in f], faults_of(root)


def test_tests_whose_images_all_come_from_one_camera_are_named(tmp_path):
    """A query meets no image of its own camera: training would fail at its first evaluation."""
    one_camera = {"d/1.png": "4", "d/2.png": "4", "d/3.png": "6", "d/4.png": "6", "d/5.png": "6", "c/2.png": "1"}
    root = write(tmp_path / "raw", [[*row[:2], one_camera.get(row[0], row[2]), *row[3:]] for row in ROWS])
    faults = faults_of(root)
    assert len(faults) == 3 and all("meets no image of its own identity and camera" in fault for fault in faults)
    for what in (
        "split test has images of both modalities from two",
        "split val has",
        "query and, from another camera",
    ):
        assert [fault for fault in faults if what in fault], faults
    for path in ("d/2.png", "d/5.png", "c/2.png"):  # of a camera that is unknown
        one_camera[path] = ""
    write(root, [[*row[:2], one_camera.get(row[0], row[2]), *row[3:]] for row in ROWS])
    assert faults_of(root) == []


@pytest.mark.parametrize(
    "kind, file_format",
    [
        (np.uint16, "PNG"),
        (np.uint16, "TIFF"),
        (">u2", "TIFF"),
        (np.uint8, "TIFF"),
        (np.uint8, "WEBP"),
        (np.uint8, "GIF"),
    ],
)
def test_prepared_pixels_are_those_of_the_file(tmp_path, kind, file_format):
    root, data = write(tmp_path / "raw", ROWS), DataSettings(8, 4)
    grey = np.random.default_rng(0).integers(0, np.iinfo(kind).max, (12, 6)).astype(kind)
    image = Image.fromarray(grey) if kind != ">u2" else Image.frombytes("I;16B", (6, 12), grey.tobytes())
    image.save(root / "d/2.png", file_format)
    prepare("own", root, tmp_path / "data")
    split = load_split("own", tmp_path / "data", "test")
    (row,) = np.flatnonzero(split.paths == "d/2.png")
    pixels = pixels_of(split, row, data)
    np.testing.assert_array_equal(pixels, resized_pixels(read_image_file(root / "d/2.png"), data))
    assert len(np.unique(pixels)) > 10


def test_images_of_32_bits_are_refused_before_anything_is_built(tmp_path):
    root = write(tmp_path / "raw", ROWS)
    Image.fromarray(np.ones((12, 6), np.float32)).save(root / "d/2.png", "TIFF")
    (fault,) = faults_of(root)
    assert "d/2.png: cannot be decoded (pixels of 32 bits" in fault and "line 9 of images.csv" in fault


def test_files_that_are_no_csv(tmp_path):
    root = write(tmp_path / "raw", ROWS)
    for content, fault in (
        (b"", "images.csv:1: empty; expected the header path,pid,camid,modality,split"),
        ("path,pid".encode("utf-16"), "not a UTF-8 text file; save it as UTF-8"),
        (b'path,pid,camid,modality,split\n"' + b"x" * 200_000 + b'"\n', "not CSV"),
    ):
        (root / "images.csv").write_bytes(content)
        assert len([f for f in faults_of(root) if ":1: empty" in f]) == (content == b"")
        assert [f for f in faults_of(root) if fault in f], faults_of(root)
        assert not [f for f in faults_of(root) if "no image of split" in f]  # which is no fault of its own
    (root / "images.csv").unlink()
    assert faults_of(root)[0].startswith(f"{root}/images.csv: file missing")


@pytest.mark.parametrize("part", ["train", "val"])  # without validation those of val are trained on
def test_unpaired_training_identities_are_left_out_by_name(tmp_path, part):
    root = write(tmp_path / "raw", [*ROWS, ["f/1.png", "fred", "3", "infrared", part]])
    (fault,) = faults_of(root)
    assert "images.csv:14: training identity 'fred' has infrared images only" in fault and "drop_unpaired" in fault
    found = verify("own", root, drop_unpaired=True)
    assert found.faults == [] and "'fred' has infrared images only and is left out" in found.warnings[0]
    for path in ("a/1.png", "b/1 größe.png"):
        (root / path).write_bytes(b"")
    with pytest.raises(UserError, match=r"2 faults; .* --dataset own .* --drop_unpaired --check lists them all"):
        prepare("own", root, tmp_path / "data", drop_unpaired=True)
    write(root, [*ROWS, ["f/1.png", "fred", "3", "infrared", part]])
    prepare("own", root, tmp_path / "data", drop_unpaired=True)
    assert set(load_split("own", tmp_path / "data", "train").pid_names) == {"anna", "人 b", "carl"}


def test_a_csv_that_has_changed_is_said_not_to_be_read(tmp_path, capsys):
    root = write(tmp_path / "raw", ROWS)
    prepare("own", root, tmp_path / "data")
    prepare("own", root, tmp_path / "data")
    assert not capsys.readouterr().err
    write(root, ROWS[:-1])
    _warn_of_another_source.cache_clear()  # it speaks once in a program
    prepare("own", root, tmp_path / "data")
    assert "images.csv has changed since" in capsys.readouterr().err
