"""The index of a gallery: what it finds, what an update embeds again, and what a kill or a mistake leaves behind."""

import hashlib
import json
import os
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from mpanet_jax.errors import ArgumentError, UserError
from mpanet_jax.evaluation import index_files
from mpanet_jax.evaluation.given_images import SkippedImage
from mpanet_jax.evaluation.search import Index

SIZE = 5


class Colours:
    """In a model's place: an image's embedding is drawn from its bytes; it remembers what it has embedded."""

    source, size = "colours", SIZE

    def __init__(self, seed=0, dtype="float32"):
        self.fingerprint, self.dtype, self.seed, self.embedded = f"colours {seed}", dtype, seed, []

    def embed(self, images, *, modality=None, errors="raise"):
        rows, skipped = [], []
        for place, path in enumerate(images):
            try:
                pixels = np.asarray(Image.open(path)).tobytes()
            except Exception as error:
                skipped.append(SkippedImage(place, os.fspath(path), type(error).__name__))
                continue
            self.embedded.append(os.path.basename(path))
            digest = int.from_bytes(hashlib.sha256(pixels).digest()[:8], "little")
            rows.append(np.random.default_rng([self.seed, digest]).standard_normal(SIZE).astype(np.float32))
        rows = np.array(rows, np.float32).reshape(-1, SIZE)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True), skipped


def draw(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 4, 3), np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def gallery(tmp_path):
    folder = tmp_path / "gallery"
    for number in range(12):
        draw(folder / f"cam{number % 3}" / f"{number:02}.png", number)
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != ".lock"}


def brute_force(model, gallery, query, top):
    """Paths and cosine distances, in float64, one image at a time."""
    rows = {}
    for path in sorted(gallery.rglob("*.png")):
        rows[path.relative_to(gallery).as_posix()] = model.embed([path])[0][0].astype(np.float64)
    (row,) = model.embed([query])[0].astype(np.float64)
    distance = {p: 1 - r @ row / (np.linalg.norm(r) * np.linalg.norm(row)) for p, r in rows.items()}
    return sorted(distance.items(), key=lambda item: item[1])[:top]


def test_finds_what_brute_force_finds(gallery, tmp_path):
    draw(tmp_path / "query.png", 99)
    index = Index.build(Colours(), gallery)
    results = index.search([tmp_path / "query.png", gallery / "cam1/07.png"], top=5)
    assert index.folder == tmp_path / "gallery.index" and len(index) == 12
    for ranking, query in zip(results.queries, (tmp_path / "query.png", gallery / "cam1/07.png"), strict=True):
        assert ranking.path == str(query)
        expected = brute_force(Colours(), gallery, query, 5)
        assert [match.path for match in ranking.matches] == [path for path, _ in expected]
        np.testing.assert_allclose([m.distance for m in ranking.matches], [d for _, d in expected], atol=1e-9)
    assert results.queries[1].matches[0].path == "cam1/07.png"  # it finds itself
    assert len(index.search([tmp_path / "query.png"], top=50).queries[0].matches) == 12
    with pytest.raises(ArgumentError, match="top"):
        index.search([tmp_path / "query.png"], top=0)


def test_update_embeds_what_changed_alone(gallery):
    model = Colours()
    assert Index.build(model, gallery).num_embedded == 12
    before = contents(gallery.with_name("gallery.index"))
    model.embedded.clear()
    assert Index.build(model, gallery).num_embedded == 0 and model.embedded == []
    assert contents(gallery.with_name("gallery.index")) == before

    draw(gallery / "new.png", 100)
    draw(gallery / "cam0/03.png", 101)
    os.utime(gallery / "cam0/03.png", ns=(1, 1))
    (gallery / "cam2/05.png").unlink()
    index = Index.build(model, gallery)
    assert sorted(model.embedded) == ["03.png", "new.png"] and index.num_embedded == 2
    fresh = Index.build(Colours(), gallery, index=gallery.with_name("fresh"))
    assert (
        sorted(index.paths) == fresh.paths == sorted(p.relative_to(gallery).as_posix() for p in gallery.rglob("*.png"))
    )
    rows = dict(zip(index.paths, index.features, strict=True))
    for path, row in zip(fresh.paths, fresh.features, strict=True):
        np.testing.assert_array_equal(rows[path], row)


def test_same_size_and_time_cannot_be_seen_but_rebuilt(gallery):
    path = gallery / "cam0/00.png"
    path = path.rename(path.with_suffix(".bmp"))  # of one size, whatever its pixels
    Image.open(path).save(path, "BMP")
    Index.build(Colours(), gallery)
    status = path.stat()
    Image.fromarray(np.full((6, 4, 3), 7, np.uint8)).save(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert Index.build(Colours(), gallery).num_embedded == 0
    index = Index.build(Colours(), gallery, rebuild=True)
    assert index.num_embedded == 12
    row = dict(zip(index.paths, index.features, strict=True))["cam0/00.bmp"]
    np.testing.assert_array_equal(row, Colours().embed([path])[0][0])


@pytest.mark.parametrize("moment", ["rows", "index.json", "removal"])
def test_killed_update_leaves_an_index(gallery, monkeypatch, moment):
    model, folder = Colours(), gallery.with_name("gallery.index")
    Index.build(model, gallery)
    old = set(Index.load(model, folder).paths)
    draw(gallery / "new.png", 100)

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if moment == "rows":
            patch.setattr(Colours, "embed", killed)
        elif moment == "index.json":
            patch.setattr(index_files.json, "dump", killed)
        else:
            calls = iter([index_files._remove_rows, killed])
            patch.setattr(index_files, "_remove_rows", lambda *a, **k: next(calls)(*a, **k))
        Index.build(model, gallery)
    expected = old | {"new.png"} if moment == "removal" else old
    assert set(Index.load(model, folder).paths) == expected
    assert set(Index.build(model, gallery).paths) == old | {"new.png"}


def test_rows_of_a_killed_process_are_removed(gallery):
    folder = gallery.with_name("gallery.index")
    Index.build(Colours(), gallery)
    (folder / f"features-{'0' * 32}.npy").write_bytes(b"half")
    (folder / "features-of-mine.npy").write_bytes(b"the user's")
    draw(gallery / "new.png", 100)
    Index.build(Colours(), gallery)
    assert len(list(folder.glob("features-*"))) == 2
    assert (folder / "features-of-mine.npy").read_bytes() == b"the user's"


def test_unreadable_images_are_named_and_tried_again(gallery):
    bad = gallery / "cam0/00.png"
    whole = bad.read_bytes()
    bad.write_bytes(b"no image")
    model = Colours()
    index = Index.build(model, gallery)
    assert [path for path, _ in index.skipped] == ["cam0/00.png"] and len(index) == 11
    before = contents(index.folder)
    assert Index.build(model, gallery).skipped == index.skipped
    assert contents(index.folder) == before
    bad.write_bytes(whole)
    index = Index.build(model, gallery)
    assert not index.skipped and index.num_embedded == 1 and len(index) == 12
    with pytest.raises(UserError, match=r"missing\.png"):
        index.search([gallery / "missing.png"])
    results = index.search([gallery / "missing.png", bad], errors="skip")
    assert [image.name for image in results.skipped] == [str(gallery / "missing.png")]
    assert [ranking.path for ranking in results.queries] == [str(bad)]


def test_nothing_readable_writes_nothing(tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.png").write_bytes(b"")
    with pytest.raises(UserError, match="bad: none of its 1"):
        Index.build(Colours(), tmp_path / "bad")
    assert not contents(tmp_path / "bad.index")


def test_refuses_another_model_and_another_gallery(gallery, tmp_path):
    folder = Index.build(Colours(), gallery).folder
    before = contents(folder)
    for call in (lambda m: Index.build(m, gallery), lambda m: Index.load(m, folder)):
        with pytest.raises(UserError, match="another model"):
            call(Colours(seed=1))
    shutil.copytree(gallery, tmp_path / "copy")
    with pytest.raises(UserError, match=re.escape(str(gallery))):
        Index.build(Colours(), tmp_path / "copy", index=folder)
    assert contents(folder) == before
    assert Index.build(Colours(seed=1), gallery, rebuild=True).num_embedded == 12
    with pytest.raises(UserError, match="no index"):
        Index.load(Colours(), tmp_path / "nothing")


def test_refuses_another_precision(gallery):
    folder = Index.build(Colours(dtype="bfloat16"), gallery).folder
    before = contents(folder)
    for call in (lambda m: Index.build(m, gallery), lambda m: Index.load(m, folder)):
        with pytest.raises(UserError, match=r"gallery\.index.*in bfloat16.*in float32.*rebuild"):
            call(Colours())
        assert len(call(Colours(dtype="bfloat16"))) == 12
    assert contents(folder) == before
    assert Index.build(Colours(), gallery, rebuild=True).num_embedded == 12
    with pytest.raises(UserError, match="in float32"):
        Index.load(Colours(dtype="bfloat16"), folder)


def test_an_index_that_does_not_say_its_precision_is_rebuilt(gallery):
    folder = Index.build(Colours(), gallery).folder
    tree = json.loads((folder / "index.json").read_text())
    del tree["dtype"]
    (folder / "index.json").write_text(json.dumps(tree | {"version": 1}))
    for call in (lambda: Index.build(Colours(), gallery), lambda: Index.load(Colours(), folder)):
        with pytest.raises(UserError, match=r"index\.json.*version 1.*rebuild"):
            call()
    assert Index.build(Colours(), gallery, rebuild=True).num_embedded == 12
    assert len(Index.load(Colours(), folder)) == 12


def test_gallery_and_index_may_move_together(gallery, tmp_path):
    Index.build(Colours(), gallery)
    (tmp_path / "elsewhere").mkdir()
    for name in ("gallery", "gallery.index"):
        (tmp_path / name).rename(tmp_path / "elsewhere" / name)
    assert Index.build(Colours(), tmp_path / "elsewhere/gallery").num_embedded == 0


@pytest.mark.parametrize("damage", ["cut", "gone", "json", "foreign"])
def test_damaged_index_is_named(gallery, damage):
    folder = Index.build(Colours(), gallery).folder
    (rows,) = folder.glob("features-*.npy")
    if damage == "cut":
        os.truncate(rows, rows.stat().st_size - 4)
    elif damage == "gone":
        rows.unlink()
    else:
        (folder / "index.json").write_text("{" if damage == "json" else json.dumps({"paths": []}))
    with pytest.raises(UserError, match=r"gallery\.index.*rebuild"):
        Index.build(Colours(), gallery)
    assert Index.build(Colours(), gallery, rebuild=True).num_embedded == 12


def test_names_that_are_no_text(gallery):
    odd = [b"not utf-8 \xff.png", b"two\nlines.png", "Größe 人.png".encode()]
    for number, name in enumerate(odd):
        draw(gallery / "a.png", 200 + number)
        os.rename(os.fsencode(gallery / "a.png"), os.path.join(os.fsencode(gallery), name))
    index = Index.build(Colours(), gallery)
    assert {os.fsencode(path) for path in index.paths} >= set(odd)
    assert Index.build(Colours(), gallery).num_embedded == 0
    results = index.search([gallery / os.fsdecode(name) for name in odd], top=1)
    assert [os.fsencode(ranking.matches[0].path) for ranking in results.queries] == odd
    results.write(gallery.with_name("results.json"))
    tree = json.loads(gallery.with_name("results.json").read_text())
    assert [os.fsencode(query["matches"][0]["path"]) for query in tree["queries"]] == odd


def test_lists_and_modalities(tmp_path):
    for number, name in enumerate(("Visible/1/a.bmp", "Thermal/1/b.bmp", "Visible/2/c.bmp")):
        draw(tmp_path / name, number)
    (tmp_path / "list.txt").write_text("Visible/1/a.bmp\nThermal/1/b.bmp\nVisible/1/a.bmp\n")
    index = Index.build(Colours(), tmp_path / "list.txt")
    assert index.paths == ["Visible/1/a.bmp", "Thermal/1/b.bmp"]
    results = index.search([tmp_path / "Visible/1/a.bmp"])
    assert {match.path: match.modality for match in results.queries[0].matches} == {
        "Visible/1/a.bmp": "visible",
        "Thermal/1/b.bmp": "infrared",
    }
    assert Index.build(Colours(), tmp_path / "list.txt", modality="infrared").paths == ["Thermal/1/b.bmp"]


def test_results_file_says_all_that_a_page_needs(gallery, tmp_path):
    results = Index.build(Colours(), gallery).search([gallery / "cam1/07.png"], top=2)
    results.write(tmp_path / "results.json")
    tree = json.loads((tmp_path / "results.json").read_text())
    assert (tree["format"], tree["version"], tree["metric"]) == ("mpanet_jax search", 1, "cosine")
    assert (tree["model"], tree["fingerprint"], tree["num_gallery"]) == ("colours", "colours 0", 12)
    assert (tree["gallery"], tree["folder"], tree["skipped"]) == (str(gallery), str(gallery), [])
    (query,) = tree["queries"]
    assert query["path"] == str(gallery / "cam1/07.png")
    assert set(query["matches"][0]) == {"path", "distance", "similarity", "modality"}
    assert (tmp_path / "gallery" / query["matches"][0]["path"]).exists()


def test_one_writer_at_a_time(gallery):
    folder = gallery.with_name("gallery.index")
    with index_files.locked_index(folder), pytest.raises(UserError, match="another process"):
        Index.build(Colours(), gallery)
