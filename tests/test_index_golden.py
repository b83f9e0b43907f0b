"""An index of format version 1 that was committed once and must open for ever."""

import base64
import json
from pathlib import Path

import numpy as np

from embedcam.index import Index
from embedcam.index.in_memory import index_of_rows

GOLDEN = Path(__file__).parent / "data" / "golden-format-1"


def test_the_golden_index_opens_for_ever() -> None:
    with Index.open(GOLDEN) as index:
        assert (len(index), index.n_rows, index.width, index.metric) == (6, 7, 4, "l2")
        names = ["owl", "crane", "åland", "猫", "owl 2", "none", "late"]
        assert list(index.ids) == [f"{name}.jpg" for name in names]
        assert list(index.labels) == ["bird", "bird", "other", "other", "bird", None, "other"]
        assert index.paths[3] == "pictures/猫.jpg"
        assert index.position("猫.jpg") == 3
        assert index.live_positions().tolist() == [0, 2, 3, 4, 5, 6]
        assert index.triplets_used([6]).tolist() == [60]
        assert index.embeddings([2, 6]).tolist() == [[0, 0, 1, 0], [0, 0, -1, 0]]
        # codes (4, -2) in the basis (0 .. 5) / 4 and (6 .. 11) / 4, offset 0.5
        expected = [[-2.5, -2, -1.5, -1, -0.5, 0]]
        np.testing.assert_allclose(index.weights([4]), expected, rtol=0, atol=2e-3)
        np.testing.assert_array_equal(index.weights([2], layer=1), [[0, 0, 0, 0, 2.5, 2.625]])
        np.testing.assert_allclose(index.coarse([5]), [[[5, 0, 0], [0, 0, 1]]], atol=1e-6)
        assert index.coarse([5], layer=1) is None
        assert index.fitted("embedding_mean").tolist() == [0.25] * 4
        assert sorted(index.probe()) == ["probe_embedding", "probe_pooled"]
        assert index.manifest.to_dict()["counts"] == {"rows": 7, "live": 6, "added_after_fit": 1}
        found = index.search(np.array([[0, 0.6, 0.8, 0]], np.float32), 2)
        assert index.ids[found.positions[0]] == ["åland.jpg", "owl.jpg"]
        np.testing.assert_allclose(found.distances, [[0.4, 2.0]], rtol=1e-6)
        np.testing.assert_allclose(found.similarities, [[0.8, 0]], rtol=1e-6)
        assert len(index.verify()) == 8


def test_the_golden_index_of_weights_by_position_opens_for_ever() -> None:
    with Index.open(GOLDEN.with_name("golden-positions-1")) as index:
        # codes (4, -2) in the basis (0 .. 35) / 4 and (36 .. 71) / 4, offset 0.5; [6 channels 2 3]
        expected = np.arange(36).reshape(6, 2, 3) / 2 - 17.5
        np.testing.assert_allclose(index.weights([4])[0], expected, rtol=0, atol=3e-2)
        spec = {"name": "by-position", "rank": 2, "dtype": "float16"}
        assert index.manifest.to_dict()["layers"][0]["encoding"] == spec
        np.testing.assert_array_equal(index.weights([2], layer=1), [[0, 0, 0, 0, 2.5, 2.625]])
        assert len(index.verify()) == 8


def test_golden_concepts_and_exemplars_open_for_ever() -> None:
    with Index.open(GOLDEN.with_name("golden-concepts-1")) as index:
        concepts = index.concepts()
        assert concepts is not None
        assert concepts.parts.tolist() == [[0.25, 0.5, 0.25, 0, 0, 0], [0, 0, 0.5, 0.25, 0.5, 0]]
        assert index.fitted("text_mean").tolist() == [0.5, 0, -0.25, 0.125]
        # 4 of part 0 and 2 of part 1, in channel 2 as much of the one as of the other
        picture = np.array([1, 2, 2, 0.5, 1, 0])[:, None, None] * np.ones((6, 2, 3)) / 6
        shares = [concepts.divide(channel, picture)[0] for channel in np.eye(6)]
        expected = [[1, 0], [1, 0], [0.5, 0.5], [0, 1], [0, 1], [0, 0]]
        np.testing.assert_allclose(shares, expected, atol=1e-6)
        # "late.jpg" came behind the fit, "crane.jpg" was removed, channel 5 is dead
        shown = [[tuple(one) for one in index.exemplars("channel", k)] for k in range(6)]
        assert shown == [
            [("owl.jpg", 0, 0, 6)], [], [("åland.jpg", 0, 2, 4)], [("猫.jpg", 1, 0, 3)],
            [("owl 2.jpg", 1, 1, 2)], [],
        ]  # fmt: skip
        assert index.exemplar_ids("channel", 1) == ["crane.jpg", "late.jpg"]
        assert index.exemplars("concept", 0) == [("owl.jpg", 1, 1, 3)]
        assert index.exemplars("concept", 1) == [("猫.jpg", 0, 0, 2), ("åland.jpg", 1, 0, 1)]
        assert index.generation == "9f7d02ef5941deaa"  # as without them
        assert len(index.verify()) == 9


def test_golden_rows_and_their_model_open_for_ever() -> None:
    rows = json.loads((GOLDEN.with_name("golden-rows-1") / "rows.json").read_text("utf-8"))
    with (
        Index.open(GOLDEN.with_name("golden-marks-1")) as index,
        Index.open(GOLDEN.with_name("golden-rows-1") / "model.embedcam") as model,
    ):
        assert model.generation == index.generation == "9f7d02ef5941deaa"
        kept, live = index_of_rows(model, rows), index.live_positions()
        every = np.arange(len(live))
        assert list(kept.ids) == [
            "owl.jpg",
            "åland.jpg",
            "猫.jpg",
            "owl 2.jpg",
            "none.jpg",
            "late.jpg",
        ]
        for layer in (0, 1):
            expected = index.weights(live, layer)
            np.testing.assert_array_equal(kept.weights(every, layer), expected)
        np.testing.assert_array_equal(kept.coarse(every), index.coarse(live))
        np.testing.assert_array_equal(kept.select(every).marks, index.select(live).marks)
        np.testing.assert_array_equal(kept.embeddings(every), index.embeddings(live))
        written = [row for batch in index.rows() for row in batch.to_pylist()]
        codes = [base64.b64encode(row.pop("codes")).decode() for row in written]
        assert codes == [row.pop("codes") for row in rows]
        assert written == rows
