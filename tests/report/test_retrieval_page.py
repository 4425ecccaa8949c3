"""The retrieval page: what is in the file, and what a headless Chromium shows of it, filters and sorts."""

import dataclasses
import json
import re

import numpy as np
import pytest

from mpanet_jax.errors import UserError
from mpanet_jax.report import retrieval_page
from mpanet_jax.report.page_content import page_of_ranking
from mpanet_jax.report.retrieval import rank_queries
from mpanet_jax.report.retrieval_page import write_page
from mpanet_jax.report.thumbnails import photos_of_folder
from tests.report.browser import browser_context
from tests.report.page_cases import WICKED, CamerasProtocol, people, photo

MISSING = ("query/003/00003.jpg", "gallery/001/00009.jpg")


def maps_of(paths):
    return np.random.default_rng(0).random((len(paths), 6, 4, 2)).astype(np.float32)


@pytest.fixture(scope="module")
def ranking():
    return rank_queries(*people(8, 50, 60, spread=1.6), protocol=CamerasProtocol(), trial=3)


@pytest.fixture(scope="module")
def small(ranking, tmp_path_factory):
    """(the page's file, what `write_page` returned)."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    page = page_of_ranking(ranking, f"Retrieval of {WICKED}")
    return path, write_page(path, page, lambda name: None if name in MISSING else photo(name), maps_of)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A page of as many queries as SYSU-MM01 has."""
    path = tmp_path_factory.mktemp("large") / "report.html"
    ranking = rank_queries(*people(96, 3803, 301, spread=1.6), protocol=CamerasProtocol())
    write_page(path, page_of_ranking(ranking, "Large"), photo)
    return path


def data_of(path):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text())[1])


def test_file_holds_the_ranking_and_nothing_that_could_run(small, ranking):
    path, written = small
    text = path.read_text()
    assert WICKED not in text and text.count("<script") == 2 and "http://" not in text and "https://" not in text
    data = data_of(path)
    assert len(data["queries"]["image"]) == len(ranking.query)
    np.testing.assert_allclose(data["queries"]["ap"], ranking.scores.average_precision, atol=1e-6)
    assert data["queries"]["rank"] == ranking.rank.tolist()
    for query, shown in enumerate(data["queries"]["top"]):
        paths = [data["images"]["path"][image] for image in shown]
        assert paths == [str(p) for p in ranking.gallery.paths[ranking.top[query][ranking.top[query] >= 0]]]
    assert sorted(written.missing) == sorted(set(MISSING) & set(data["images"]["path"])) and written.missing
    assert sum(data["images"]["missing"]) == len(written.missing)
    assert f"{len(written.missing)} of {written.num_images} images are not there" in text


def test_two_people_of_one_name_are_told_apart(ranking, tmp_path):
    names = np.full(len(ranking.query), "Kim"), np.full(len(ranking.gallery), "Kim")
    query, gallery = (
        dataclasses.replace(of, pid_names=name)
        for of, name in zip((ranking.query, ranking.gallery), names, strict=True)
    )
    page = page_of_ranking(dataclasses.replace(ranking, query=query, gallery=gallery), "Kim")
    write_page(tmp_path / "report.html", page, lambda _: None)
    data = data_of(tmp_path / "report.html")
    of = dict(zip(data["images"]["path"], data["images"]["person"], strict=True))
    known = {**dict(zip(query.paths, query.pids, strict=True)), **dict(zip(gallery.paths, gallery.pids, strict=True))}
    assert of == {path: known[path] for path in of} and len(set(of.values())) == 8


def test_one_path_of_two_images_is_refused(ranking):
    paths = ranking.gallery.paths.copy()
    paths[0] = ranking.query.paths[3]
    with pytest.raises(UserError, match=str(paths[0])):
        page_of_ranking(dataclasses.replace(ranking, gallery=dataclasses.replace(ranking.gallery, paths=paths)), "Page")


def test_a_name_that_is_no_utf_8_is_written(ranking, tmp_path):
    strange = b"query/\xff.jpg".decode("utf-8", "surrogateescape")
    paths = ranking.query.paths.copy()
    paths[0] = strange
    query = dataclasses.replace(ranking.query, paths=paths)
    page = page_of_ranking(dataclasses.replace(ranking, query=query), f"Page of {strange}")
    write_page(tmp_path / "report.html", page, lambda _: None)
    assert strange in data_of(tmp_path / "report.html")["images"]["path"]


def test_names_are_sorted_by_the_numbers_in_them_however_long(ranking, tmp_path):
    long = [digit * 5000 for digit in "21"]
    names = np.array(["10", "9", *long, "b", "a"])[np.arange(len(ranking.query)) % 6]
    query = dataclasses.replace(ranking.query, pid_names=names)
    page = page_of_ranking(dataclasses.replace(ranking, query=query), "Numbers")
    write_page(tmp_path / "report.html", page, lambda _: None)
    identities = [name for name in data_of(tmp_path / "report.html")["identities"] if name in names]
    assert identities == ["9", "10", *reversed(long), "a", "b"]


def test_pictures_of_a_large_set_lie_beside_the_page(large):
    images = large.parent / "report_images"
    assert large.stat().st_size < 5_000_000
    data = data_of(large)
    assert data["folder"] == "report_images" and len(list(images.iterdir())) == len(data["images"]["path"])


def test_folder_of_images_takes_the_place_of_its_own_kind_only(tmp_path):
    images = tmp_path / "report_images"
    retrieval_page._write_folder(images, ["a", "b"], {"a": b"jpeg", "b": b"jpeg"}, {})
    (images / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes\.txt"):
        retrieval_page._write_folder(images, ["a"], {"a": b"jpeg"}, {})
    assert (images / "000001.jpg").exists()
    (images / "notes.txt").unlink()
    retrieval_page._write_folder(images, ["a"], {"a": b"jpeg"}, {"a": b"png"})
    assert sorted(p.name for p in images.iterdir()) == ["000000.jpg", "000000_maps.png"]
    assert [p.name for p in tmp_path.iterdir()] == ["report_images"]


def test_a_path_that_leads_out_of_the_folder_has_no_image(tmp_path):
    (tmp_path / "images/a").mkdir(parents=True)
    photo("x").save(tmp_path / "secret.jpg")
    photo("x").save(tmp_path / "images/a/1.jpg")
    (tmp_path / "images/broken.jpg").write_bytes(b"no image")
    photos = photos_of_folder(tmp_path / "images")
    assert photos("a/1.jpg").size == (48, 128)
    assert photos(f"{tmp_path}/images/a/1.jpg").size == (48, 128)
    for path in ("../secret.jpg", f"{tmp_path}/secret.jpg", "a/../../secret.jpg", "broken.jpg", "none.jpg", "a", "\0"):
        assert photos(path) is None, path


def cards(page):
    return [int(card.get_attribute("data-query")) for card in page.query_selector_all("article")]


def expected_order(ranking, chosen, key):
    scored = ranking.scores.matches > 0
    return sorted(chosen, key=lambda query: (not scored[query], key(query) if scored[query] else 0, query))


def test_page_in_a_browser(small, large, ranking, tmp_path):
    path, _ = small
    precision, rank, camids = ranking.scores.average_precision, ranking.rank, ranking.query.camids
    everything = range(len(ranking.query))
    failures_first = expected_order(ranking, everything, lambda query: (rank[query] == 1, precision[query]))
    with browser_context(1280, 900) as context:
        page, messages, requests = context.new_page(), [], []
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())

        # The order is the one that the metrics say, over all pages.
        seen = cards(page)
        assert len(seen) == 20 and page.is_disabled("#previous")
        while page.is_enabled("#next"):
            page.click("#next")
            seen += cards(page)
        assert seen == failures_first
        page.reload()

        # A card: its marks, its words, the first right image where it is not among the ten.
        card = page.query_selector("article")
        query = failures_first[0]
        tiles = card.query_selector_all("li")
        right = ranking.gallery.pids[ranking.top[query]] == ranking.query.pids[query]
        assert [tile.get_attribute("class") for tile in tiles[:10]] == ["right" if r else "wrong" for r in right]
        assert [tile.query_selector(".mark").inner_text() for tile in tiles[:10]] == ["✓" if r else "✗" for r in right]
        if not right.any():
            assert "later" in tiles[10].get_attribute("class")
            assert (
                tiles[10].query_selector("figcaption").inner_text().startswith(f"✓ {ranking.scores.image_rank[query]}.")
            )
        result = card.query_selector(".result").inner_text()
        assert f"rank {ranking.scores.image_rank[query]}" in result and f"AP {100 * precision[query]:.1f} %" in result
        borders = {
            page.evaluate("e => getComputedStyle(e).borderStyle", tile.query_selector(".picture")) for tile in tiles[:1]
        }
        assert borders == {"dashed" if not right[0] else "solid"}

        # Sorts.
        for value, key in (
            ("ap", lambda query: precision[query]),
            ("-ap", lambda query: -precision[query]),
            ("-rank", lambda query: -rank[query]),
            ("listed", lambda query: 0),
        ):
            page.select_option("#sort", value)
            assert cards(page) == expected_order(ranking, everything, key)[:20], value

        # Filters, alone and together.
        camera = int(camids[0])
        page.select_option("#camera", str(camera))
        assert cards(page) == expected_order(ranking, np.flatnonzero(camids == camera).tolist(), lambda _: 0)[:20]
        page.select_option("#rank", ">1")
        both = np.flatnonzero((camids == camera) & (rank > 1)).tolist()
        assert cards(page) == both[:20] and f"of {len(both)} quer" in page.inner_text("#status")
        page.click("button[type=reset]")
        page.fill("#identity", "person 2")
        page.select_option("#sort", "listed")
        named = np.flatnonzero(ranking.query.pids == 2).tolist()
        assert sorted(cards(page)) == named  # not "person 20" or so
        page.fill("#identity", WICKED)
        assert set(cards(page)) == set(np.flatnonzero(ranking.query.pids == 0).tolist())
        assert WICKED in page.inner_text("article h2")
        page.fill("#identity", "nobody of this name")
        assert cards(page) == [] and page.inner_text("#status").startswith("0–0 of 0 queries")
        page.click("button[type=reset]")
        # Not by wait_for_function, which asks again by `eval` where the first answer is no: the page forbids it.
        page.locator("article").nth(19).wait_for()
        assert page.locator("article").count() == 20

        # By keyboard alone: to the second card, its details with pattern maps, the next page and back.
        page.evaluate("document.activeElement.blur()")
        page.keyboard.press("ArrowDown")
        page.keyboard.press("ArrowDown")
        focused = "document.activeElement.dataset.query"
        assert page.evaluate(focused) == str(failures_first[1])
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        page.keyboard.press("Enter")
        assert page.evaluate(focused) == str(failures_first[1])
        open_card = page.query_selector_all("article")[1]
        assert ranking.query.paths[failures_first[1]] in open_card.query_selector(".details").inner_text()
        assert len(open_card.query_selector(".query").query_selector_all("img.map")) == 6
        page.keyboard.press("Enter")
        assert page.query_selector(".details") is None and page.query_selector("img.map") is None
        page.keyboard.press("ArrowRight")
        assert cards(page) == failures_first[20:40] and page.evaluate(focused) == str(failures_first[20])
        page.keyboard.press("ArrowLeft")
        assert cards(page) == failures_first[:20]
        # No page before the first: the place stays. After a click the keys act on the card that was clicked.
        page.keyboard.press("ArrowDown")
        page.keyboard.press("ArrowLeft")
        assert page.evaluate(focused) == str(failures_first[1])
        page.click("article:nth-of-type(4) h2")
        page.keyboard.press("Enter")
        assert page.query_selector("article:nth-of-type(4) .details") and len(page.query_selector_all(".details")) == 1
        page.keyboard.press("Enter")
        page.keyboard.press("ArrowDown")
        assert page.evaluate(focused) == str(failures_first[4])
        tab_comes_to = "[...document.querySelectorAll('article[tabindex=\"0\"]')].map((a) => a.dataset.query)"
        assert page.evaluate(tab_comes_to) == [str(failures_first[4])]
        page.check("#maps")
        assert len(page.query_selector_all("article .query img.map")) == 6 * sum(
            str(ranking.query.paths[query]) not in MISSING for query in failures_first[:20]
        )

        # Nothing from the files runs, nothing asks the network, nothing is said.
        assert page.evaluate("window.hacked === undefined")
        assert {url.split(":")[0] for url in requests} <= {"file", "data"} and not messages
        page.evaluate(
            "const s = document.createElement('script'); s.textContent = 'window.hacked = 1'; document.body.append(s)"
        )
        assert page.evaluate("window.hacked === undefined")
        messages.clear()  # of the policy, which has just refused that

        # Narrow: nothing sticks out.
        page.set_viewport_size({"width": 400, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= 400

        # Large: in time (three seconds and 200 ms, which only a machine that stands still could miss).
        page.goto(large.as_uri())
        opened = page.evaluate("performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd")
        assert page.inner_text("#status").startswith("1–20 of 3,803 queries")
        filtering = page.evaluate(
            "() => { const rank = document.getElementById('rank'), start = performance.now(); rank.value = '>5';"
            " rank.dispatchEvent(new Event('change')); return performance.now() - start; }"
        )
        print(f"opened in {opened:.0f} ms, filtered in {filtering:.0f} ms")
        assert 0 < len(cards(page)) <= 20 and not messages
        # Lazily: what is out of sight is not loaded yet.
        loaded = page.evaluate("[...document.querySelectorAll('img.photo')].filter((i) => i.complete).length")
        assert 0 < loaded < page.evaluate("document.querySelectorAll('img.photo').length")
