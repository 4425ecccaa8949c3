"""The page of a search: its order and its photos; damaged files."""

import json

import pytest

from mpanet_jax.errors import UserError
from mpanet_jax.evaluation.search import Match, Ranking, SearchResults
from mpanet_jax.report.retrieval_page import write_page
from mpanet_jax.report.search_page import page_of_search
from tests.report.page_cases import WICKED, photo


@pytest.fixture
def results(tmp_path):
    (tmp_path / "gallery").mkdir()
    for name in ("a.jpg", "b.jpg"):
        photo(name).save(tmp_path / "gallery" / name)
    photo("q").save(tmp_path / "query.jpg")
    matches = (Match("b.jpg", 0.1, 0.9, "visible"), Match("a.jpg", 0.3, 0.7), Match(f"{WICKED}.jpg", 0.8, 0.2))
    found = SearchResults(
        model="m",
        fingerprint="f",
        gallery=str(tmp_path / "gallery"),
        folder=str(tmp_path / "gallery"),
        num_gallery=3,
        queries=(Ranking(str(tmp_path / "query.jpg"), matches),),
    )
    found.write(tmp_path / "results.json")
    return tmp_path / "results.json"


def test_page_shows_what_was_found_in_its_order(results, tmp_path):
    page, photos = page_of_search(results)
    assert [page.images[image].path for image in page.queries[0].top] == ["b.jpg", "a.jpg", f"{WICKED}.jpg"]
    assert list(page.queries[0].distances) == [0.1, 0.3, 0.8] and page.queries[0].matches is None
    written = write_page(tmp_path / "report.html", page, photos)
    assert (written.num_images, written.missing) == (4, [f"{WICKED}.jpg"])
    text = (tmp_path / "report.html").read_text()
    assert WICKED not in text and '"scored":false' in text


def test_images_outside_the_gallery_s_folder_are_shown_unless_another_folder_is_named(results, tmp_path):
    (tmp_path / "far").mkdir()
    photo("far").save(tmp_path / "far/1.jpg")
    tree = json.loads(results.read_text())
    for match, path in zip(tree["queries"][0]["matches"], (str(tmp_path / "far/1.jpg"), "../far/1.jpg"), strict=False):
        match["path"] = path
    results.write_text(json.dumps(tree))
    _, photos = page_of_search(results)
    assert photos(str(tmp_path / "far/1.jpg")) is not None and photos("../far/1.jpg") is not None
    assert photos("../query.jpg") is None  # which the file does not name
    _, photos = page_of_search(results, tmp_path / "gallery")
    assert photos(str(tmp_path / "far/1.jpg")) is None and photos("../far/1.jpg") is None
    assert photos(str(tmp_path / "query.jpg")) is not None


@pytest.mark.parametrize("change", [{"version": 99}, {"queries": [{"path": "q"}]}, {"queries": 3}, {"folder": None}])
def test_other_files_are_refused_by_name(results, change):
    results.write_text(json.dumps(json.loads(results.read_text()) | change))
    with pytest.raises(UserError, match=r"results\.json"):
        page_of_search(results)
    results.write_text("{")
    with pytest.raises(UserError, match=r"results\.json: not readable"):
        page_of_search(results)
