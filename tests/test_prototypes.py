"""Prototypes: what is merged, what is measured, and what is refused, against literal loops."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build_samples import everything
from index_samples import CHANNELS, GRID, WIDTH, encoding_of, header_of, make, part
from test_index_corrupt import at, forge
from test_public import loaded_after

from embedcam import Explainer, Index
from embedcam.errors import IndexFormatError, InputError
from embedcam.index import append, compact, create, remove
from embedcam.index.encoding import TopM
from embedcam.offline import indexed_images
from embedcam.prototypes import compress, compression
from embedcam.prototypes import groups as groups_module
from embedcam.prototypes.groups import group

KINDS = ["top-m", "low-rank", "embedding", "dense", "dense32"]


pytestmark = pytest.mark.usefixtures("quick_disk")
ABOUT = dict(rtol=0, atol=1e-6)


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def clustered(
    path: Path, kind: str = "dense32", n: int = 30, *, metric: str = "l2", normalized: bool = True,
    labels: Any = None, **more: Any,
) -> Path:  # fmt: skip
    """An index of vectors around six centres; every third row's neighbours share its label."""
    rng = np.random.default_rng(11)
    encoding = encoding_of(kind)
    vectors = rng.standard_normal((6, WIDTH))[np.arange(n) % 6]
    vectors = vectors + 0.2 * rng.standard_normal((n, WIDTH))
    if normalized:
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    made = part(0, n, encoding)
    made.embeddings = vectors.astype(np.float32)
    made.labels = [f"class {row % 3}" for row in range(n)] if labels is None else labels
    more["embedding"] = {"width": WIDTH, "normalized": normalized}
    header = header_of(encoding, metric=metric, **more)
    shared = {"embedding_mean": vectors.mean(0).astype(np.float32), "probe_pooled": np.ones(3)}
    return create(path, header, [encoding.fitted], shared, made)


def members_of(index: Index, wanted: int, *, per_class: bool = False, seed: int = 0) -> list[Any]:
    """Positions of each group, by the same k-means."""
    live = index.live_positions()
    labels = index.labels[live] if per_class else None
    of = group(index.embeddings(live), labels, wanted, seed, lambda n: None).of
    return [live[of == number] for number in range(of.max() + 1)]


def merged_of(index: Index, members: Any, layer: int = 0) -> np.ndarray:
    """The mean of decoded weights in a literal loop, as the index keeps it."""
    if len(members) == 1:
        return index.weights(members, layer)[0].astype(np.float64)
    mean = np.mean([index.weights([m], layer)[0].astype(np.float64) for m in members], axis=0)
    encoding = index.encoding(layer)
    if isinstance(encoding, TopM):
        mean = encoding.decode(encoding.encode(mean[None]))[0].astype(np.float64)
    return mean


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalized", [True, False])
def test_embeddings_and_weights_are_means_of_their_members(tmp_path, kind, normalized) -> None:
    source = clustered(tmp_path / "a", kind, normalized=normalized)
    remove(source, ["image-0003", "image-0010", "image-0029"])
    report = compress(source, tmp_path / "b", 6)
    with Index.open(source) as index, Index.open(tmp_path / "b") as small:
        groups = members_of(index, 6)
        assert (report.n_images, report.n_prototypes, len(small)) == (27, 6, len(groups))
        assert sum(map(len, groups)) == 27
        small.verify()
        if kind == "embedding":  # the mean made a unit vector has other codes
            assert small.encoding().codes == ("stored" if normalized else "embedding")
        for row, members in enumerate(groups):
            expected = index.embeddings(members).astype(np.float64).mean(0)
            expected = unit(expected) if normalized else expected
            np.testing.assert_allclose(small.embeddings([row])[0], expected, **ABOUT)
            expected = merged_of(index, members)
            scale = max(np.abs(expected).max(), np.abs(index.weights(members)).max())
            half = 2e-3 if small.encoding().dtype == "float16" else 1e-5
            np.testing.assert_allclose(small.weights([row])[0], expected, rtol=0, atol=half * scale)
            apart = index.embeddings(members) - small.embeddings([row])
            medoid = members[int(np.argmin(np.linalg.norm(apart, axis=1)))]
            assert small.paths[row] == index.paths[medoid]
            assert small.triplets_used([row])[0] == index.triplets_used(members).sum()
            labels = {index.labels[int(m)] for m in members}
            assert small.labels[row] == (labels.pop() if len(labels) == 1 else None)
            # Drawn by pictures, which divide by the length of the weights: the medoid's own map.
            found, own = (
                of.coarse([at])[0] / np.linalg.norm(of.weights([at])[0])
                for of, at in ((small, row), (index, medoid))
            )
            np.testing.assert_allclose(found, own, rtol=5e-3, atol=1e-6)
        assert list(small.ids) == [f"prototype-{n:04d}" for n in range(1, 7)]
        for old, new in ((index.encoding().fitted, small.encoding().fitted),
                         (index.shared(), small.shared())):  # fmt: skip
            assert all(new[name].tobytes() == array.tobytes() for name, array in old.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_as_many_prototypes_as_images_are_the_images(tmp_path, kind, metric) -> None:
    source = clustered(tmp_path / "a", kind, metric=metric)
    remove(source, ["image-0004"])
    about = 1e-3 if kind == "embedding" else 0
    found = compress(source, tmp_path / "b", 29).compressed["fidelity"]
    for one in (*found["cosine"].values(), found["recall_at_1"]):
        assert abs(one["loss"]) <= about
    rng = np.random.default_rng(0)
    query = unit(rng.standard_normal(WIDTH)).astype(np.float32)
    maps = rng.random((CHANNELS, *GRID), np.float32)

    def close(found: np.ndarray, expected: np.ndarray) -> None:
        np.testing.assert_allclose(found, expected, rtol=0, atol=about * np.abs(expected).max())

    with Index.open(source) as index, Index.open(tmp_path / "b") as small:
        live = index.live_positions()
        assert small.manifest.metric == metric
        np.testing.assert_array_equal(small.embeddings(range(29)), index.embeddings(live))
        close(small.weights(range(29)), index.weights(live))
        old, new = (Explainer(one).explain_features(query, maps) for one in (index, small))
        assert live[small.positions(new.ids)].tolist() == index.positions(old.ids).tolist()
        close(new.cam, old.cam)
        close(new.neighbor_cams, old.neighbor_cams)
        assert (new.paths, new.labels) == (old.paths, old.labels)


def test_signed_top_m_of_one_image_keeps_its_negative_values(tmp_path: Path) -> None:
    encoding = TopM(CHANNELS, 3, "signed", "float32")
    made = part(0, 8, encoding)
    made.fields = [encoding.encode(-1 - np.random.default_rng(1).random((8, CHANNELS)))]
    create(tmp_path / "a", header_of(encoding), [{}], {}, made)
    compress(tmp_path / "a", tmp_path / "b", 8)
    with Index.open(tmp_path / "a") as index, Index.open(tmp_path / "b") as small:
        assert (index.weights(range(8)) <= 0).all()
        np.testing.assert_array_equal(small.weights(range(8)), index.weights(range(8)))


def test_prototypes_of_each_label(tmp_path: Path) -> None:
    labels = ["owl"] * 12 + ["gull/a"] * 2 + [None] * 5 + ["crane"] * 11
    source = clustered(tmp_path / "a", labels=labels)
    remove(source, ["image-0000"])
    report = compress(source, tmp_path / "b", 3, per_class=True)
    assert report.compressed["rows"] == report.n_prototypes == 3 + 2 + 3 + 3
    with Index.open(source) as index, Index.open(tmp_path / "b") as small:
        small.verify()
        assert list(small.ids) == [
            *(f"crane/{n:04d}" for n in (1, 2, 3)), "gull/a/0001", "gull/a/0002",
            *(f"owl/{n:04d}" for n in (1, 2, 3)), *(f"prototype-{n:04d}" for n in (1, 2, 3)),
        ]  # fmt: skip
        assert list(small.labels) == ["crane"] * 3 + ["gull/a"] * 2 + ["owl"] * 3 + [None] * 3
        groups = members_of(index, 3, per_class=True)
        assert len(groups) == 11
        for row, members in enumerate(groups):
            assert {index.labels[int(m)] for m in members} == {small.labels[row]}
            np.testing.assert_allclose(small.weights([row])[0], merged_of(index, members), **ABOUT)


def test_several_layers(tmp_path: Path) -> None:
    first, second = encoding_of("low-rank"), encoding_of("top-m")
    one, two = part(0, 20, first), part(0, 20, second)
    header = header_of(first)
    header["layers"].append({**header_of(second)["layers"][0], "name": "b", "coarse_grid": None})
    one.fields.append(two.fields[0])
    one.coarse.append(None)
    create(tmp_path / "a", header, [first.fitted, second.fitted], {}, one)
    report = compress(tmp_path / "a", tmp_path / "b", 5)
    with Index.open(tmp_path / "a") as index, Index.open(tmp_path / "b") as small:
        small.verify()
        assert small.coarse([0], 1) is None
        for row, members in enumerate(members_of(index, 5)):
            for layer, about in ((0, 1e-2), (1, 1e-6)):
                found, expected = small.weights([row], layer)[0], merged_of(index, members, layer)
                np.testing.assert_allclose(found, expected, rtol=0, atol=about)
        assert literal_fidelity(index, 5) == close_to(report.compressed["fidelity"])
        maps = [np.random.default_rng(2).random((CHANNELS, *GRID), np.float32)] * 2
        why = Explainer(small).explain_features(small.embeddings([2])[0], maps)
        assert why.ids[0] == "prototype-0003"


def literal_fidelity(
    index: Index, wanted: int, *, per_class: bool = False, seed: int = 0
) -> dict[str, Any]:
    """Each image in turn: the whole index and the prototypes again, without it."""
    live = index.live_positions().tolist()
    groups = [g.tolist() for g in members_of(index, wanted, per_class=per_class, seed=seed)]
    layers = range(len(index.layers))
    stored = {p: index.embeddings([p])[0].astype(np.float64) for p in live}
    cosines: dict[tuple[int, str], list[float]] = {}
    hits: dict[str, list[bool]] = {"index": [], "prototypes": []}
    images = 0
    for image in live:
        rests = [[m for m in members if m != image] for members in groups]
        rests = [rest for rest in rests if rest]
        sides = {"index": [[p] for p in live if p != image], "prototypes": rests}
        own = [index.weights([image], layer)[0].astype(np.float64) for layer in layers]
        if not all(w.any() for w in own):
            continue
        images += 1
        for side, candidates in sides.items():
            places = []
            for members in candidates:
                mean = np.mean([stored[m] for m in members], axis=0)
                places.append(unit(mean) if index.normalized and len(members) > 1 else mean)
            near = sorted(range(len(places)), key=lambda c: apart(index, places[c], stored[image]))
            if index.labels[image] is not None:
                names = {index.labels[m] for m in candidates[near[0]]}
                hits[side].append(names == {index.labels[image]})
            for count in (1, 5):
                found = []
                for layer in layers:
                    taken = [merged_of(index, candidates[c], layer) for c in near[:count]]
                    if len(taken) > 1:
                        taken = [unit(w) for w in taken if w.any()] or [np.zeros(1)]
                    drawn = np.mean(taken, axis=0)
                    found.append(float(unit(drawn) @ unit(own[layer])) if drawn.any() else 0.0)
                cosines.setdefault((count, side), []).append(float(np.mean(found)))

    def compared(*sides: list[Any]) -> dict[str, float] | None:
        if not all(sides):
            return None
        a, b = (float(np.mean(side)) for side in sides)
        return {"index": a, "prototypes": b, "loss": a - b}

    cosine = {str(k): compared(cosines[k, "index"], cosines[k, "prototypes"]) for k in (1, 5)}
    return {"images": images, "cosine": cosine, "recall_at_1": compared(*hits.values())}


def apart(index: Index, place: np.ndarray, query: np.ndarray) -> float:
    return -float(place @ query) if index.metric == "ip" else float(((place - query) ** 2).sum())


def close_to(found: dict[str, Any], by: float = 2e-3) -> Any:
    """Fidelity within half precision of stored codes."""
    return {
        "images": found["images"],
        "cosine": {k: one and pytest.approx(one, abs=by) for k, one in found["cosine"].items()},
        "recall_at_1": found["recall_at_1"] and pytest.approx(found["recall_at_1"], abs=1e-5),
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("wanted", [1, 4])
def test_fidelity_is_what_a_literal_loop_measures(tmp_path, kind, per_class, wanted) -> None:
    labels = [None if row % 7 == 6 else f"class {row % 3}" for row in range(30)]
    source = clustered(tmp_path / "a", kind, labels=labels)
    remove(source, ["image-0007", "image-0020"])
    report = compress(source, tmp_path / "b", wanted, per_class=per_class, seed=3)
    with Index.open(source) as index:
        expected = literal_fidelity(index, wanted, per_class=per_class, seed=3)
    assert expected == close_to(report.compressed["fidelity"])
    if not per_class:
        source = clustered(tmp_path / "c", kind, metric="ip", normalized=False)
        report = compress(source, tmp_path / "d", wanted + 1)
        with Index.open(source) as index:
            assert literal_fidelity(index, wanted + 1) == close_to(report.compressed["fidelity"])


def test_images_without_weights_tell_nothing(tmp_path: Path) -> None:
    encoding = encoding_of("dense32")
    made = part(0, 9, encoding)
    made.fields[0]["values"][[2, 5]] = 0
    made.labels = [None] * 9
    create(tmp_path / "a", header_of(encoding), [{}], {}, made)
    found = compress(tmp_path / "a", tmp_path / "b", 3).compressed["fidelity"]
    assert (found["images"], found["recall_at_1"]) == (7, None)
    with Index.open(tmp_path / "a") as index:
        assert literal_fidelity(index, 3) == close_to(found)
    made.fields[0]["values"][:] = 0
    create(tmp_path / "c", header_of(encoding), [{}], {}, made)
    make(tmp_path / "one", 1)
    for name, wanted in (("c", 3), ("one", 1)):
        small = compress(tmp_path / name, tmp_path / f"small {name}", wanted)
        found = small.compressed["fidelity"]
        assert found == {"images": 0, "cosine": {"1": None, "5": None}, "recall_at_1": None}


@pytest.mark.parametrize(
    ("signs", "wanted", "rows"), [([1] * 12, 5, 2), ([1, -1] * 6, 1, 1)], ids=["alike", "opposed"]
)
def test_images_that_are_all_alike_or_cancel(tmp_path, signs, wanted, rows) -> None:
    encoding = encoding_of("dense32")
    made = part(0, 12, encoding)
    of = np.repeat([0, 1], 6) if rows == 2 else np.zeros(12, int)
    made.embeddings = np.array(signs, np.float32)[:, None] * made.embeddings[of]
    create(tmp_path / "a", header_of(encoding), [{}], {}, made)
    report = compress(tmp_path / "a", tmp_path / "b", wanted)
    assert (report.compressed["prototypes"], report.compressed["rows"]) == (wanted, rows)
    with Index.open(tmp_path / "b") as small:
        small.verify()
        np.testing.assert_array_equal(small.embeddings([0])[0], made.embeddings[0])
        assert small.paths[0] == made.paths[0]
        expected = made.fields[0]["values"][of == 0].mean(0)
        np.testing.assert_allclose(small.weights([0])[0], expected, rtol=1e-5)


def test_the_same_seed_gives_the_same_bytes_and_the_same_sample(tmp_path, monkeypatch) -> None:
    assert compression.SAMPLE == 1000
    monkeypatch.setattr(compression, "SAMPLE", 10)
    source = clustered(tmp_path / "a", n=60)
    b, _, d = (
        compress(source, tmp_path / name, 7, seed=seed).compressed["fidelity"]
        for name, seed in (("b", 5), ("c", 5), ("d", 6))
    )
    assert everything(tmp_path / "b") == everything(tmp_path / "c")
    assert everything(tmp_path / "b") != everything(tmp_path / "d")
    assert b["images"] == d["images"] == 10
    assert b != d


@pytest.mark.parametrize("full", [4e9, 0])
def test_groups_are_those_of_k_means(full: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups_module, "_FULL", full)
    rng = np.random.default_rng(0)
    which = rng.permutation(np.arange(90) % 3)
    vectors = (10 * np.eye(3)[which] + 0.1 * rng.standard_normal((90, 3))).astype(np.float32)
    groups = group(vectors, None, 3, 1, lambda n: None)
    means = [vectors[groups.of == number].mean(0) for number in range(3)]
    for row, vector in enumerate(vectors):
        assert np.argmin([((vector - mean) ** 2).sum() for mean in means]) == groups.of[row]
    assert len({(a, b) for a, b in zip(which, groups.of, strict=True)}) == 3
    assert groups.firsts.tolist() == [np.flatnonzero(groups.of == g)[0] for g in range(3)]
    assert (np.diff(groups.firsts) > 0).all()


def test_blocks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = clustered(tmp_path / "a", n=60)
    compress(source, tmp_path / "b", 4)
    monkeypatch.setattr(groups_module, "_BLOCK_ROWS", 7)
    monkeypatch.setattr(compression, "_ROWS", 3)
    monkeypatch.setattr(compression, "_STEP", 4)
    compress(source, tmp_path / "c", 4)
    with Index.open(tmp_path / "b") as one, Index.open(tmp_path / "c") as other:
        for rows in ("weights", "embeddings"):
            both = (getattr(index, rows)(range(4)) for index in (one, other))
            np.testing.assert_allclose(*both, rtol=1e-6)
        assert one.paths[range(4)] == other.paths[range(4)]
        found = one.manifest.to_dict()["compressed"]["fidelity"]
        assert other.manifest.to_dict()["compressed"]["fidelity"] == close_to(found, 1e-5)


def test_nothing_else_is_changed_and_what_is_said_is_true(tmp_path: Path) -> None:
    images = {"root": "pictures", "files_sha256": "0" * 64, "more": 1}
    source = clustered(tmp_path / "a", "low-rank", recipe={"faiss": "IVF4,Flat"}, images=images)
    append(source, part(30, 33, encoding_of("low-rank")))
    before = everything(source)
    report = compress(source, tmp_path / "b", 5)
    assert everything(source) == before
    with Index.open(source) as index, Index.open(tmp_path / "b") as small:
        old, new = index.manifest.to_dict(), small.manifest.to_dict()
        for key in ("recipe", "recipe_sha256", "network", "embedding", "metric", "method", "target",
                    "norm", "triplets", "layers", "sign"):  # fmt: skip
            assert new[key] == old[key]
        assert new["images"] == {"root": "pictures", "files_sha256": None, "more": 1}
        assert new["fit"] == {"images": 30, "rows": 5}
        assert new["faiss"]["factory"] == "Flat"
        assert new["compressed"] == report.compressed
        assert report.compressed["from_rows"] == 33
        for path, size in ((source, report.compressed["from_bytes"]), (small.path, report.bytes)):
            files = [f for f in path.rglob("*") if f.is_file() and f.name != "manifest.json"]
            assert sum(f.stat().st_size for f in files) == size


def test_it_is_changed_and_kept_as_prototypes(tmp_path: Path) -> None:
    compress(clustered(tmp_path / "a"), tmp_path / "b", 6)
    with Index.open(tmp_path / "b") as small:
        said = small.manifest.compressed
    remove(tmp_path / "b", ["prototype-0002"])
    compact(tmp_path / "b")
    with Index.open(tmp_path / "b") as small:
        assert small.manifest.compressed == said
        assert list(small.ids)[:2] == ["prototype-0001", "prototype-0003"]


def test_prototypes_are_swapped_for_others_where_asked(tmp_path: Path) -> None:
    source = clustered(tmp_path / "a")
    compress(source, tmp_path / "b", 6)
    with pytest.raises(InputError, match=r"b: holds a finished index of prototypes; --replace"):
        compress(source, tmp_path / "b", 3)
    compress(source, tmp_path / "b", 3, replace=True)
    with Index.open(tmp_path / "b") as new:
        assert (len(new), new.manifest.generation) == (3, 2)


def test_pictures_call_prototypes_what_they_are(tmp_path: Path) -> None:
    labels = ["owl"] * 15 + ["jay"] * 14 + [None]
    source = clustered(tmp_path / "a", labels=labels)
    compress(source, tmp_path / "each", 2, per_class=True)
    compress(source, tmp_path / "all", 30)
    maps = np.ones((CHANNELS, *GRID), np.float32)
    for name, ids, captions in (
        ("each", ["owl/0002", "jay/0001"], [("owl", "prototype 0002"), ("jay", "prototype 0001")]),
        ("all", ["prototype-0030"], [("prototype 0030", None)]),
    ):
        with Index.open(tmp_path / name) as small:
            query = small.embeddings([small.position(ids[0])])[0]
            why = Explainer(small).explain_features(query, maps, neighbors=ids)
        tiles = why.tiles()[1]
        shown = [(tile.caption, tile.subcaption.split("\n")[0]) for tile in tiles]
        assert shown == [(one, two or f"distance {why.distances[0]:.3f}") for one, two in captions]


def test_what_cannot_be_compressed_is_refused(tmp_path: Path) -> None:
    source = clustered(tmp_path / "a", "low-rank", labels=[None] * 30)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/letter.txt").touch()

    def refuse(message: str, wanted: int = 3, *, into: str = "b", **options: Any) -> None:
        with pytest.raises((InputError, IndexFormatError), match=message):
            compress(source, tmp_path / into, wanted, **options)
        assert not (tmp_path / "b").exists()

    refuse("prototypes = 0; give a whole number from 1 to 30", 0)
    refuse("prototypes = 31; give", 31, per_class=True)
    refuse("seed = 4294967296; give a whole number from 0 to 4,294,967,295", seed=1 << 32)
    refuse(r"no image has a label.*leave out --per-class", per_class=True)
    for replace in (False, True):
        refuse("a: holds an index of images, which prototypes do no", into="a", replace=replace)
    refuse(r"holds 'letter.txt', which is no part of an index", into="full")
    for file in ("embeddings.f32", "layer0.codes.f16", "layer0.basis.f32"):
        (damaged,) = source.rglob(file)
        whole = damaged.read_bytes()
        damaged.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
        refuse(f"{file}: does not match its checksum")
        damaged.write_bytes(whole)
    vectors = np.fromfile(source / "parts/000001/embeddings.f32", np.float32)
    vectors[3] = np.nan
    forge("parts/000001/embeddings.f32", vectors)(source)
    refuse(r"a: of the embeddings, row 0 holds a NaN")
    remove(source, [f"image-{n:04d}" for n in range(30)])
    refuse("every image was removed")
    source = tmp_path / "nothing"
    refuse("there is no index here")


def test_prototypes_take_no_images_and_are_not_compressed_again(tmp_path: Path) -> None:
    compress(clustered(tmp_path / "a"), tmp_path / "b", 5)
    before = everything(tmp_path / "b")
    with Index.open(tmp_path / "b") as small:
        for what, attempt in (
            ("add images to", lambda: append(small.path, part(40, 41, encoding_of("dense32")))),
            ("compress", lambda: compress(small.path, tmp_path / "c", 2)),
            ("refit", lambda: indexed_images(small)),
        ):
            with pytest.raises(InputError, match=rf"holds prototypes, .*; {what} the index it was"):
                attempt()
    assert everything(tmp_path / "b") == before


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ((), [1], "compressed is .1., not of type dict"),
        (("from_rows",), 0, "compressed.from_rows = 0 is impossible"),
        (("prototypes",), 31, "compressed.prototypes is 31, of 30 images"),
        (("fidelity", "cosine"), {"many": None}, "expected numbers of neighbours"),
        (("fidelity", "recall_at_1", "index"), 7.5, "compressed.fidelity.recall_at_1.index is 7.5"),
    ],
)
def test_what_a_manifest_says_of_prototypes_is_checked(tmp_path, place, value, message) -> None:
    compress(clustered(tmp_path / "a"), tmp_path / "b", 5)
    at("compressed", *place, value=value)(tmp_path / "b")
    with pytest.raises(IndexFormatError, match=message):
        Index.open(tmp_path / "b")


def test_ids_are_all_different() -> None:
    names = ["a", "a", "a/0001", None, "prototype-", "", None]
    ids = compression.ids_of(names, True)
    assert len(set(ids)) == 7
    assert ids[3:] == ["prototype-0001", "prototype-/0001", "/0001", "prototype-0002"]
    assert compression.ids_of(names, False)[-1] == "prototype-0007"


def test_torch_is_not_needed() -> None:
    assert not loaded_after("import embedcam.prototypes") & {"torch", "torchvision", "sklearn"}
