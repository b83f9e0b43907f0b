"""POST /compare says what `PairExplainer` says, and its sums add up."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from build_samples import dense, pictures, quicken, toy
from service_client import ask, built, data_of, explainer, form, picture, post

from embedcam import EmbeddingNetwork, Explainer, PairExplainer, build_index
from embedcam.export import export_onnx
from embedcam.service import create_app
from embedcam.service.schemas import CompareAnswer

QUERY = data_of(picture(3))


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        yield built(tmp_path_factory.mktemp("compare"))


@pytest.fixture(scope="module")
def app(index: Path) -> Iterator[Any]:
    made = create_app(explainer(index))
    yield made
    made.state.pipeline.close()


def test_receipts_are_those_of_python_and_add_up(app: Any, index: Path) -> None:
    found = post(app, "/compare?result=c1%2F004.png&result=c0%2F000.png&lines=3&links=2", QUERY)
    body = found.json()
    CompareAnswer.model_validate(body)
    assert body["picture"] == {"width": 40, "height": 30}
    assert body["above"] is None
    expected = PairExplainer(explainer(index)).receipts(QUERY, ["c1/004.png", "c0/000.png"])
    for one, receipt in zip(body["receipts"], expected, strict=True):
        said = receipt.to_dict(3, 2)
        said["query"]["id"] = None
        assert {**said, "matched": None, "matrix": None} == one
        lines = sum(line["contribution"] for line in one["channels"])
        total = lines + one["other_channels"] + one["shared"] + one["remainder"]
        assert total == pytest.approx(one["similarity"], abs=1e-6)
        for side in ("query", "result"):
            of_cells = np.sum(one[side]["cells"]) + one[side]["shared"] + one[side]["remainder"]
            assert of_cells == pytest.approx(one["similarity"], abs=1e-5)
        assert one["query"]["extent"] == [0, 0, 40, 30]
        assert len(one["channels"]) == 3
    assert [one["result"]["id"] for one in body["receipts"]] == ["c1/004.png", "c0/000.png"]


def test_points(app: Any, index: Path) -> None:
    target = "/compare?result=c1%2F004.png&matrix=true&cell=2,1&centred=false&links=0"
    (one,) = post(app, target, QUERY).json()["receipts"]
    receipt = PairExplainer(explainer(index)).receipt(QUERY, "c1/004.png", centred=False)
    np.testing.assert_allclose(one["matrix"], receipt.matrix(), rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(one["matched"], receipt.point(2, 1), rtol=1e-5, atol=1e-12)
    assert one["links"] == []
    assert one["centred"] is False


def test_why_one_came_above_another(app: Any, index: Path) -> None:
    body = post(app, "/compare?result=c1%2F004.png&rival=c0%2F000.png", QUERY).json()
    CompareAnswer.model_validate(body)
    expected = PairExplainer(explainer(index)).above(QUERY, "c1/004.png", "c0/000.png").to_dict()
    expected["query"]["id"] = None
    assert body["above"] == expected
    above = body["above"]
    lines = sum(line["contribution"] for line in above["channels"])
    total = lines + above["other_channels"] + above["remainder"]
    assert total == pytest.approx(above["score"], abs=1e-6)
    first, second = above["similarities"]
    assert above["score"] == pytest.approx(first - second, abs=1e-5)
    assert len(body["receipts"]) == 1


def test_a_head_that_is_not_affine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quicken(monkeypatch)
    source, network = pictures(tmp_path / "photos"), toy("pooled").network
    build_index(source, network, tmp_path / "i", recipe=dense(), progress=False)
    made = create_app(Explainer(tmp_path / "i", network))
    (one,) = post(made, "/compare?result=c1%2F004.png", QUERY).json()["receipts"]
    assert one["exact"] is False
    CompareAnswer.model_validate(post(made, "/compare?result=c1%2F004.png&matrix=1", QUERY).json())
    made.state.pipeline.close()


def test_an_onnx_file_answers_as_its_network_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    quicken(monkeypatch)
    index = built(tmp_path, recipe=None)  # which keeps the head's matrix
    own = explainer(index)
    module = own.network.module
    # Without what counts the batches of a toy, which no exporter can follow.
    plain = EmbeddingNetwork.from_parts(*module, module=module, preprocess=own.preprocess)
    export_onnx(own.index, plain, tmp_path / "network.onnx")
    apps = [create_app(Explainer(index, onnx=tmp_path / "network.onnx")), create_app(own)]
    target = "/compare?result=c1%2F004.png&matrix=true"
    (one,), (other,) = (post(each, target, QUERY).json()["receipts"] for each in apps)
    assert one["exact"]
    np.testing.assert_allclose(one["matrix"], other["matrix"], atol=1e-5)
    found, wanted = (post(each, "/explain", QUERY).json() for each in apps)
    assert [a["id"] for a in found["neighbors"]] == [a["id"] for a in wanted["neighbors"]]
    np.testing.assert_allclose(found["cam"], wanted["cam"], atol=1e-4 * np.max(wanted["cam"]))
    for each in apps:
        each.state.pipeline.close()


def test_a_network_whose_head_is_not_to_be_had(index: Path) -> None:
    """An ONNX file: it gives arrays, and nothing but activations and embeddings."""
    why = explainer(index)
    forward = why.network.forward

    def arrays(images: Any) -> Any:
        found = forward(images)
        return SimpleNamespace(embedding=found.embedding.numpy())

    why._opened = replace(why._opened, network=SimpleNamespace(forward=arrays))
    made = create_app(why)
    found = post(made, "/compare?result=c1%2F004.png", QUERY)
    assert found.error == (501, "no_receipts")
    same = post(create_app(explainer(index)), "/search", QUERY).json()
    assert post(made, "/search", QUERY).json() == same
    made.state.pipeline.close()


@pytest.mark.parametrize(
    ("query", "refused"),
    [
        ("", (422, "unusable_parameter")),
        ("result=nothing", (404, "unknown_image")),
        ("result=c1%2F004.png&rival=nothing", (404, "unknown_image")),
        ("result=..%2F..%2Fetc%2Fpasswd", (404, "unknown_image")),
        ("result=c1%2F004.png&result=c1%2F004.png", (422, "repeated_parameter")),
        ("result=c1%2F004.png&rival=c1%2F004.png", (422, "same_image")),
        ("result=c1%2F004.png&result=c0%2F000.png&rival=c0%2F003.png", (422, "several_results")),
        ("result=c1%2F004.png&rival=a&rival=b", (422, "repeated_parameter")),
        ("result=c1%2F004.png&cell=1", (422, "unusable_parameter")),
        ("result=c1%2F004.png&cell=4,0", (404, "unknown_cell")),
        ("result=c1%2F004.png&cell=-1,0", (422, "unusable_parameter")),
        ("result=c1%2F004.png&cell=nan,0", (422, "unusable_parameter")),
        ("result=c1%2F004.png&cell=1000000,0", (422, "unusable_parameter")),
        ("result=c1%2F004.png&cell=%D9%A3,0", (422, "unusable_parameter")),
        ("result=c1%2F004.png&lines=1000000", (422, "unusable_parameter")),
        ("result=c1%2F004.png&links=inf", (422, "unusable_parameter")),
        ("result=c1%2F004.png&centred=maybe", (422, "unusable_parameter")),
        ("&".join(f"result={number}" for number in range(11)), (422, "unusable_parameter")),
        ("result=c1%2F004.png&size=3", (422, "unknown_parameter")),
    ],
)
def test_what_is_refused(app: Any, query: str, refused: tuple[int, str]) -> None:
    assert post(app, f"/compare?{query}", QUERY).error == refused


def test_a_result_whose_picture_is_gone_or_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quicken(monkeypatch)
    made = create_app(explainer(built(tmp_path)))
    file = tmp_path / "photos" / "c1" / "004.png"
    for spoil in (
        lambda: picture(9).point(lambda value: 255 - value // 9).save(file),
        lambda: file.write_bytes(b"no picture"),
        file.unlink,
    ):
        spoil()
        found = post(made, "/compare?result=c1%2F004.png", QUERY)
        assert found.error == (404, "no_picture")
        assert str(tmp_path) not in found.message
    assert post(made, "/compare?result=c0%2F000.png", QUERY).status == 200
    made.state.pipeline.close()


def test_too_many_pairs(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedcam.service.compare.MAX_PAIRS", 2 * 16 * 16 - 1)
    target = "/compare?result=c1%2F004.png&result=c0%2F000.png"
    found = post(app, f"{target}&matrix=true", QUERY)
    assert found.error == (422, "too_many_pairs")
    assert "have 512 pairs of cells, the limit is 511" in found.message
    assert post(app, target, QUERY).status == 200


def test_bad_pictures_and_forms_are_refused_as_elsewhere(app: Any) -> None:
    target = "/compare?result=c1%2F004.png"
    assert post(app, target, b"no picture").error == (422, "unreadable_image")
    assert ask(app, "POST", target, form(QUERY), content_type="text/plain").error == (
        415,
        "unusable_type",
    )
