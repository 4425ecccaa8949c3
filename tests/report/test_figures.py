"""What the figures show: labels, counts, order and values, read back from what is drawn and from the SVG files."""

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from tensorboardX import SummaryWriter

from mpanet_jax.datasets import make_protocol
from mpanet_jax.errors import ArgumentError, UserError
from mpanet_jax.report.curves import draw_curves
from mpanet_jax.report.distances import EDGES, KINDS, distance_distributions, draw_distances
from mpanet_jax.report.patterns import draw_patterns
from mpanet_jax.report.people import choose_people, named_people, people_with_both
from mpanet_jax.report.query import SHOWN, choose_query, draw_query
from mpanet_jax.report.retrieval import rank_queries
from mpanet_jax.report.tsne import draw_tsne
from tests.report.sources import known, source

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """The figures that a test draws."""
    seen, save = [], Figure.savefig

    def save_and_note(figure, *arguments, **options):
        if figure not in seen:
            seen.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", save_and_note)
    return seen


def check_legible(figure, paths):
    """85 mm wide in both files, and no text below 6 points."""
    png, svg = paths
    assert (png.suffix, svg.suffix) == (".png", ".svg")
    assert abs(Image.open(png).width - 85 / 25.4 * 300) <= 1
    root = ElementTree.parse(svg).getroot()
    assert float(root.get("width").removesuffix("pt")) == pytest.approx(85 / 25.4 * 72, rel=1e-3)
    texts = [text for text in figure.findobj(lambda a: hasattr(a, "get_fontsize")) if text.get_text()]
    assert texts and min(text.get_fontsize() for text in texts) >= 6
    sizes = re.findall(r"font-size: ([\d.]+)px", svg.read_text())
    assert sizes and min(map(float, sizes)) >= 6  # matplotlib's user unit is a point


def words(svg):
    return ["".join(node.itertext()).strip() for node in ElementTree.parse(svg).iter(f"{SVG}text")]


def test_patterns_have_a_row_an_image_and_a_column_a_pattern(drawn, tmp_path):
    people = source()
    pids = np.array([2, 0])
    paths = draw_patterns(people, pids, tmp_path, seed=3)
    (figure,) = drawn
    check_legible(figure, paths)
    cells = np.array(figure.axes, object).reshape(4, 7)
    # The visible image of a person, then the infrared one, in neighbouring rows.
    assert [cell.get_ylabel() for cell in cells[:, 0]] == [
        *("person 2\nvisible, camera 1", "person 2\ninfrared, camera 2"),
        *("person 0\nvisible, camera 1", "person 0\ninfrared, camera 2"),
    ]
    assert [cell.get_title() for cell in cells[0]] == ["image", *"123456"]
    first = np.asarray(cells[0, 0].images[0].get_array())
    assert any(np.array_equal(first, np.asarray(people.photo(f"2/v{n}.png"))) for n in range(2))
    # A column a pattern: the plain maps are those that the network gives.
    drawn.clear()
    plain = draw_patterns(people, pids, tmp_path, seed=3, plain=True)
    assert [path.name for path in plain] == ["patterns_plain.png", "patterns_plain.svg"]
    cells = np.array(drawn[0].axes, object).reshape(4, 7)
    shown = [np.asarray(cell.images[1].get_array()) for cell in cells[0, 1:]]
    photo = Image.fromarray(np.asarray(cells[0, 0].images[0].get_array()))
    for heat, one in zip(shown, people.model.pattern_maps([photo])[0], strict=True):
        np.testing.assert_allclose(heat, (one - one.min()) / (one.max() - one.min()), atol=1e-5)
    # The same seed, the same picture; another shows other images.
    again = draw_patterns(people, pids, tmp_path / "again", seed=3)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in paths]


def test_a_query_stands_beside_its_first_results_and_above_its_maps(drawn, tmp_path):
    people = source()
    images = people.images
    rows = [np.flatnonzero((images.modality == modality) & (images.pids < 4)) for modality in (0, 1)]
    query, gallery = (images.take(part) for part in rows)
    ranking = rank_queries(query, gallery, protocol=make_protocol("own"), top=SHOWN)
    path = str(query.paths[3])
    paths = draw_query(people, ranking, choose_query(ranking, path, seed=0), tmp_path)
    (figure,) = drawn
    check_legible(figure, paths)
    cells = np.array(figure.axes, object).reshape(2, 6)
    assert [cell.get_title() for cell in cells[1]] == [f"pattern {n}" for n in range(1, 7)]
    assert (cells[0, 0].get_title(), cells[0, 0].get_xlabel()) == ("query", "person 1")
    np.testing.assert_array_equal(cells[0, 0].images[0].get_array(), np.asarray(people.photo(path)))
    # The nearest first, by all distances computed here.
    unit = [part.features / np.linalg.norm(part.features, axis=1, keepdims=True) for part in (query, gallery)]
    distances = 1 - unit[0][3].astype(float) @ unit[1].astype(float).T
    for place, row in enumerate(np.argsort(distances)[:5]):
        cell, right = cells[0, 1 + place], gallery.pids[row] == 1
        np.testing.assert_array_equal(cell.images[0].get_array(), np.asarray(people.photo(str(gallery.paths[row]))))
        name, number = cell.get_xlabel().split("\n")
        assert name == f"person {gallery.pids[row]}" and float(number) == pytest.approx(distances[row], abs=1e-3)
        assert cell.get_title() == f"{place + 1} {'✓' if right else '✗'}"
        assert (cell.spines["left"].get_linestyle() == "-") == right
    with pytest.raises(ArgumentError, match=r"query = nobody\.png: no query .* has this path"):
        choose_query(ranking, "nobody.png", seed=0)
    assert choose_query(ranking, None, seed=1) == choose_query(ranking, None, seed=1)


def test_tsne_has_a_panel_a_source_and_a_marker_an_image(drawn, tmp_path):
    generator = np.random.default_rng(0)
    pids, modality = np.arange(40) % 5, np.arange(40) // 5 % 2
    features = (generator.normal(size=(5, 8))[pids] + generator.normal(size=(40, 8))).astype(np.float32)
    people = known(features, pids, modality)
    options = {"num_identities": 3, "seed": 1, "titles": ["untrained", "trained"]}
    paths = draw_tsne([people, people], tmp_path, **options)
    check_legible(drawn[0], paths)
    assert {"untrained", "trained", "visible", "infrared"} <= set(words(paths[1]))
    pids = choose_people(people_with_both(people), 3, 1, "tests")
    groups = {node.get("id"): node for node in ElementTree.parse(paths[1]).iter(f"{SVG}g") if node.get("id")}
    for pid in pids:
        for modality in ("visible", "infrared"):
            marks = [node for node in groups[f"{modality} {pid}"].iter(f"{SVG}use")]
            assert len(marks) == 4
    left, right = drawn[0].axes[:2]
    for one, other in zip(left.collections[:6], right.collections[:6], strict=True):
        np.testing.assert_array_equal(one.get_offsets(), other.get_offsets())  # same embeddings, seed and perplexity
    colours = {tuple(c.get_facecolor()[0]) for c in left.collections[:6]}
    shapes = {len(c.get_paths()[0].vertices) for c in left.collections[:6]}
    assert len(colours) == 3 and len(shapes) == 2


def test_too_few_people_are_named(tmp_path):
    with pytest.raises(UserError, match=r"has 4 identities .* 10 .*at most 4"):
        draw_tsne([source()], tmp_path)
    with pytest.raises(ArgumentError, match="person 9"):
        named_people(source(), ["person 1", "person 9"])
    assert named_people(source(), ["person 1", "person 0"]).tolist() == [1, 0]
    assert not list(tmp_path.iterdir())


def test_distances_are_those_of_all_pairs(drawn, tmp_path):
    generator = np.random.default_rng(0)
    pids, modality = np.arange(60) % 6, np.arange(60) // 6 % 2
    features = (generator.normal(size=(6, 8))[pids] + generator.normal(size=(60, 8))).astype(np.float32)
    found = distance_distributions(features, pids, modality)
    pairs = {kind: ([], []) for kind in KINDS}
    for i in range(60):
        for j in range(i):
            a, b = features[i].astype(float), features[j].astype(float)
            distance = 1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b)
            pairs[KINDS[int(modality[i] == modality[j])]][int(pids[i] != pids[j])].append(distance)
    for kind, (intra, inter) in pairs.items():
        counts = [np.histogram(values, EDGES)[0] for values in (intra, inter)]
        # A distance at an edge may fall to either side of it.
        assert np.abs(found[kind].intra - counts[0]).sum() <= 2 and found[kind].intra.sum() == len(intra)
        assert np.abs(found[kind].inter - counts[1]).sum() <= 2 and found[kind].inter.sum() == len(inter)
        overlap = np.minimum(counts[0] / len(intra), counts[1] / len(inter)).sum()
        assert found[kind].overlap == pytest.approx(overlap, abs=2e-2) and 0 < overlap < 1
    paths = draw_distances(known(features, pids, modality), tmp_path)
    check_legible(drawn[0], paths)
    for kind, (intra, inter) in pairs.items():
        title = f"{kind}: {100 * found[kind].overlap:.1f} % overlap ({len(intra)} and {len(inter):,} pairs)"
        assert title in words(paths[1])
    with pytest.raises(UserError, match=r"no pairs of one identity \(cross-modality\)"):
        draw_distances(known(features, pids, np.zeros(60, int)), tmp_path)


def write_log(folder, first, values, purge=None):
    with SummaryWriter(str(folder / "logs"), purge_step=purge, filename_suffix=f".{first}") as writer:
        for step, value in values.items():
            writer.add_scalar("train/epoch", step / 10, step)
            writer.add_scalar("train/loss", value, step)
            writer.add_scalar("train/identity", value / 2, step)
            writer.add_scalar("train/learning_rate", 0.1 * value, step)
            writer.add_scalar("train/accuracy", 0.5, step)
        writer.add_scalar("eval/sysu/all/single/rank1", 10.0 * first, max(values))
        writer.add_scalar("eval/sysu/all/single/mAP", 9.0 * first, max(values))


def test_curves_are_those_of_the_logs(drawn, tmp_path):
    write_log(tmp_path, 1, {10: 8.0, 20: 4.0, 30: 100.0})
    # Resumed from step 20: what the killed run wrote behind it does not count.
    for path in (tmp_path / "logs").iterdir():
        path.rename(path.with_name("events.out.tfevents.0000000001.host"))
    write_log(tmp_path, 3, {30: 2.0, 40: 1.0}, purge=21)
    paths = draw_curves(tmp_path, tmp_path / "figures")
    check_legible(drawn[0], paths)
    lines = {line.get_gid(): line for axes in drawn[0].axes for line in axes.lines}
    assert set(lines) == {
        *("train/loss", "train/identity", "train/learning_rate"),
        *("eval/sysu/all/single/rank1", "eval/sysu/all/single/mAP"),
    }
    np.testing.assert_allclose(lines["train/loss"].get_xydata(), [(1, 8), (2, 4), (3, 2), (4, 1)])
    np.testing.assert_allclose(lines["train/identity"].get_ydata(), [4, 2, 1, 0.5])
    np.testing.assert_allclose(lines["train/learning_rate"].get_ydata(), [0.8, 0.4, 0.2, 0.1], rtol=1e-6)
    np.testing.assert_allclose(lines["eval/sysu/all/single/rank1"].get_xydata(), [(4, 30)])
    assert {"loss", "identity", "Rank-1", "mAP", "epoch"} <= set(words(paths[1]))
    styles = [(line.get_color(), line.get_linestyle()) for line in drawn[0].axes[0].lines]
    assert len({colour for colour, _ in styles}) == len({style for _, style in styles}) == 2


def test_missing_or_damaged_logs_are_named(tmp_path):
    with pytest.raises(UserError, match="logs: no logs"):
        draw_curves(tmp_path, tmp_path / "figures")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/events.out.tfevents.1").write_bytes(b"\x05" + bytes(11) + b"\xff" * 9)
    with pytest.raises(UserError, match=r"tfevents\.1: damaged"):
        draw_curves(tmp_path, tmp_path / "figures")
    assert not (tmp_path / "figures").exists()


def test_a_package_that_is_not_installed_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"matplotlib.*pip install .*matplotlib"):
        draw_patterns(source(), np.array([0]), tmp_path)
