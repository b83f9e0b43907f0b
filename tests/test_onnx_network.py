"""`OnnxNetwork`: whose file it admits, what it says to others; threads, forks, hostile files."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx_samples import model_of, pooled_model, save
from photo_samples import CHANNELS, SIDE, SQUASH, build, network_of, picture, tensor_of

from embedcam import EmbeddingNetwork, Explainer, Index, Preprocess, build_from_features
from embedcam.errors import EmbeddingError, InputError, NetworkError, NetworkMismatch
from embedcam.index.identity import NetworkWarning
from embedcam.onnx import Described, Head, OnnxNetwork
from embedcam.preprocess import custom

IMAGES = np.random.default_rng(0).standard_normal((3, 3, SIDE, SIDE)).astype(np.float32)


@pytest.fixture(scope="module")
def index(photos, network, tmp_path_factory) -> Path:
    return build(photos, tmp_path_factory.mktemp("built") / "index", network)


def described(network: EmbeddingNetwork, **changed: Any) -> dict[str, str]:
    bias = network.module.get_parameter("linear.bias").detach().numpy()
    said = {**network.identity().to_dict(), **changed}
    return Described("0.1.0", said, (said["layer"],), Head("affine", bias)).to_props()


@pytest.fixture
def file(network: EmbeddingNetwork, tmp_path: Path) -> Path:
    return save(pooled_model(network, props=described(network)), tmp_path / "network.onnx")


def test_a_run_gives_what_torch_gives(network: EmbeddingNetwork, file: Path) -> None:
    ours = OnnxNetwork(file)
    expected = network.forward(IMAGES)
    for images in (IMAGES, torch.from_numpy(IMAGES), IMAGES.astype(np.float64)):
        embedding, _, (maps,) = ours.embed(images)
        np.testing.assert_allclose(embedding, expected.embedding, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(maps, expected.activations, rtol=1e-4, atol=1e-6)
        assert embedding.dtype == maps.dtype == np.float32
    assert (ours.layer, ours.layers, ours.normalize) == ("relu", ("relu",), True)
    assert ours.preprocess == SQUASH
    assert ours.describe() == network.identity().to_dict()
    np.testing.assert_array_equal(ours.probe_images(2), network.probe_images(2))
    mine, torchs = ours.identity(), network.identity()
    assert mine.to_dict() == torchs.to_dict()
    np.testing.assert_allclose(mine.probe_embedding, torchs.probe_embedding, rtol=1e-5)
    np.testing.assert_allclose(mine.probe_pooled, torchs.probe_pooled, rtol=1e-5)


def test_threads_change_nothing(file: Path) -> None:
    ours = OnnxNetwork(file, threads=2)
    assert ours.threads == 2
    expected = ours.embed(IMAGES)
    with ThreadPoolExecutor(8) as pool:
        for embedding, _, (maps,) in pool.map(lambda _: ours.embed(IMAGES), range(64)):
            np.testing.assert_allclose(embedding, expected.embedding, atol=1e-6)
            np.testing.assert_allclose(maps, expected.activations[0], atol=1e-6)


def test_onnx_runtime_tells_nobody_of_it(file: Path, tmp_path: Path) -> None:
    """What it would tell its maker lies in the user's cache first."""
    home = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    told = {name: os.environ[name] for name in os.environ if name != "ORT_DISABLE_TELEMETRY"} | home
    code = "import sys; from embedcam.onnx import OnnxNetwork; OnnxNetwork(sys.argv[1]).identity()"
    subprocess.run([sys.executable, "-c", code, str(file)], env=told, check=True)
    assert [one.name for one in tmp_path.iterdir()] == [file.name]


FORKED = """
import os, signal, sys
import numpy as np
from embedcam.errors import NetworkError
from embedcam.onnx import OnnxNetwork

path, replaced = sys.argv[1:]
network = OnnxNetwork(path, threads=2)
images = np.random.default_rng(0).standard_normal((16, 3, 32, 32)).astype(np.float32)
expected = network.embed(images)
if replaced == "yes":
    data = open(path, "rb").read()
    os.unlink(path)
    open(path, "wb").write(data + b"\\x00")
child = os.fork()
if child == 0:
    signal.alarm(60)
    try:
        found = network.embed(images)
    except NetworkError as error:
        os._exit(7 if "was replaced after it was opened" in str(error) else 8)
    same = np.allclose(found.embedding, expected.embedding, rtol=1e-5)
    os._exit(0 if same and np.isfinite(found.activations).all() else 9)
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
network.embed(images)
sys.exit(code)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(("replaced", "code"), [("no", 0), ("yes", 7)])
def test_a_forked_child_opens_the_file_again(file: Path, replaced: str, code: int) -> None:
    arguments = [sys.executable, "-c", FORKED, str(file), replaced]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr


def test_the_index_s_own_is_admitted_silently(index: Path, file: Path) -> None:
    explainer = Explainer(index, onnx=file)
    with pytest.raises(InputError, match="give the network, or onnx, the same as a file; not both"):
        Explainer(index, network_of(), onnx=file)
    expected = Explainer(explainer.index, network_of()).explain(picture(1, 30))
    for found in (
        explainer.explain(picture(1, 30)),
        Explainer(explainer.index, OnnxNetwork(file)).explain(picture(1, 30)),
        Explainer(explainer.index, onnx=str(file)).explain(tensor_of(picture(1, 30))),
    ):
        assert found.ids == expected.ids
        np.testing.assert_allclose(found.cam, expected.cam, atol=1e-5 * expected.cam.max())
    explainer.index.close()


@pytest.mark.parametrize(("unit", "batch"), [(True, "n"), (False, 1)])
def test_another_program_s_file_is_admitted_by_its_probe(index, network, tmp_path, unit, batch):
    """Without a word of itself, its outputs named otherwise, of one picture, not normalised."""
    model = pooled_model(network, unit=unit, names=("input", "layer4", "output"), batch=batch)
    path = save(model, tmp_path / "theirs.onnx")
    theirs = OnnxNetwork(path)
    assert (theirs.described, theirs.layer, theirs.preprocess, theirs.head) == (None,) * 4
    with pytest.raises(NetworkError, match="was not written by `embedcam export`"):
        theirs.identity()
    with pytest.warns(NetworkWarning, match=r"\(ONNX\) given: not the same computation, admitted"):
        explainer = Explainer(index, onnx=theirs)
    assert theirs.layer is None  # the caller's object stays as it was
    queries = [picture(0, 20), picture(2, 21)]
    expected = Explainer(explainer.index, network).explain_batch(queries)
    for found, one in zip(explainer.explain_batch(queries), expected, strict=True):
        assert found.ids == one.ids
        np.testing.assert_allclose(found.cam, one.cam, atol=1e-5 * one.cam.max())
    explainer.index.close()


def test_another_network_is_refused(index: Path, network: EmbeddingNetwork, tmp_path: Path) -> None:
    forged = pooled_model(network, props=described(network), scale=1.01)
    with pytest.raises(NetworkMismatch, match=r"where 0\.001 is allowed"):
        Explainer(index, onnx=save(forged, tmp_path / "forged.onnx"))
    theirs = save(pooled_model(network, scale=1.1), tmp_path / "theirs.onnx")
    with pytest.raises(NetworkMismatch, match=r"differ by 0\.\d+ in the .*, where 0\.02 is allow"):
        Explainer(index, onnx=theirs)
    other = pooled_model(network, props=described(network, layer="conv"))
    with pytest.raises(NetworkMismatch, match="its layer is 'relu', given is one with 'conv'"):
        Explainer(index, onnx=save(other, tmp_path / "other.onnx"))


def test_a_file_that_lacks_a_layer_of_the_index_is_refused(index, network, file) -> None:
    with Index.open(index) as opened:
        stored = opened.identity
    with pytest.raises(NetworkMismatch, match="the activations of relu, and the index draws with"):
        OnnxNetwork(file).for_index(stored, ["relu", "conv"])
    with pytest.raises(InputError, match="gives the activations of relu; asked for"):
        OnnxNetwork(file).embed(IMAGES, ["conv"])


def test_a_transform_of_the_callers_own_is_asked_for(photos, network, tmp_path) -> None:
    own = custom(SQUASH, name="mine")
    ours = network_of(preprocess=own)
    path = build(photos, tmp_path / "index", ours)
    file = save(pooled_model(network, props=described(ours)), tmp_path / "network.onnx")
    with pytest.raises(InputError, match=r"'mine' is a transform of the caller's own.*pass the"):
        Explainer(path, onnx=file)
    explainer = Explainer(path, onnx=OnnxNetwork(file, preprocess=own))
    assert explainer.explain(picture(0, 0)).ids
    explainer.index.close()


def test_an_index_that_does_not_know_its_network_takes_none(file: Path, tmp_path: Path) -> None:
    pooled = np.random.default_rng(0).random((8, CHANNELS), np.float32)
    build_from_features(pooled, pooled, tmp_path / "index", grid=(8, 8), progress=False)
    with pytest.raises(InputError, match="was built from features alone"):
        Explainer(tmp_path / "index", onnx=file)


def test_what_a_file_says_of_itself_is_not_believed_blindly(network, tmp_path) -> None:
    def head(kind: str, bias: object) -> str:
        return json.dumps({"kind": kind, "bias": bias})

    zero, infinite = "AAAAAA==", "AADAfw=="
    good = {"matrix": zero * 3, "bias": zero, "epsilon": 1e-5, "centered": True, "pooled": True}
    bad = {
        "matrix": [infinite, None, "?"],
        "bias": [zero + "AAAA", None],
        "epsilon": [0.0, 10**400],
    }
    normed = [good | {key: value} for key, values in bad.items() for value in values]
    normed += [3, {}, good | {"more": 1}]
    layers = ["[]", "3", '["relu", "relu"]', '["conv"]', '["relu", 5]']
    heads = [head("affine", bias) for bias in ("AAAA", "?", infinite, "")]
    for key, texts, message in (
        ("network", ["{"], "Expecting property name"),
        ("network", ["[" * 100_000], "nested too deeply"),
        ("network", ["[]"], "the network is no object"),
        ("network", ["{}"], "parameters_sha256 is missing"),
        ("network", ["x" * (17 << 20)], "more than 16,777,216 characters"),
        ("layers", [None], "embedcam.layers is missing"),
        ("layers", layers, "do not begin with the network's own"),
        ("head", ["3", head("affine", None), head("affine", 5)], "none of identity, affine, other"),
        (
            "head",
            [json.dumps(json.loads(head("other", None)) | {"normed": one}) for one in normed],
            "the head is {",
        ),
        ("head", [head("other", zero), head("round", zero), *heads], "the head is {"),
    ):
        for text in texts:
            props = {**described(network), f"embedcam.{key}": text}
            kept = {key: text for key, text in props.items() if text is not None}
            path = save(pooled_model(network, props=kept), tmp_path / "network.onnx")
            with pytest.raises(NetworkError, match="cannot be believed") as caught:
                OnnxNetwork(path)
            assert message in str(caught.value)
            assert str(caught.value).startswith(f"{path}: ")


def identity_node(source: str, target: str) -> Any:
    return helper.make_node("Identity", [source], [target])


SHAPE = ["n", 3, 8, 8]
IN, OUT = [("images", SHAPE)], [("activations", SHAPE)]


def external() -> onnx.ModelProto:
    outputs = [("activations", None), ("embedding", None)]
    model = model_of([identity_node("w", "activations")], IN, outputs)
    tensor = model.graph.initializer.add(name="w", data_type=1, dims=[2])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../../../etc/passwd")
    return model


def two_inputs() -> onnx.ModelProto:
    nodes = [identity_node("a", "activations"), identity_node("b", "embedding")]
    return model_of(nodes, [("a", SHAPE), ("b", ["n", 5])], [*OUT, ("embedding", ["n", 5])])


def one_node(name: str, kind: int = TensorProto.FLOAT, **attributes: Any) -> onnx.ModelProto:
    node = helper.make_node(name, ["images"], ["activations"], **attributes)
    return model_of([node], IN, OUT, kind=kind)


HOSTILE: dict[str, tuple[Callable[[], bytes | onnx.ModelProto], str]] = {
    "empty": (lambda: b"", "is not a regular file of 1 to"),
    "text": (lambda: b"hello" * 100, "cannot read it ("),
    "cut": (lambda: pooled_model(network_of()).SerializeToString()[:700], "cannot read it"),
    "unknown operator": (lambda: one_node("Evil"), "cannot read it"),
    "data elsewhere": (external, "keeps numbers in other files"),
    "two inputs": (
        two_inputs,
        "its inputs are a tensor(float) ['n', 3, 8, 8], b tensor(float) ['n', 5]; expected one",
    ),
    "half precision": (
        lambda: one_node("Cast", TensorProto.FLOAT16, to=1),
        "its inputs are images tensor(float16)",
    ),
    "one output": (
        lambda: one_node("Identity"),
        "its outputs are activations (4 dimensions); expected activations [B K H W] and embedding",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_files_that_are_no_network(tmp_path, name, capfd) -> None:
    make, message = HOSTILE[name]
    path = tmp_path / "network.onnx"
    model = make()
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    with pytest.raises(NetworkError) as caught:
        OnnxNetwork(path)
    said = str(caught.value)
    assert message in said
    assert said.startswith(f"{path}: ")
    assert "\n" not in said
    assert len(said) < 600 + len(str(path))
    assert capfd.readouterr() == ("", "")


def test_places_that_hold_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.onnx")
    for path, error, message in (
        (tmp_path / "none.onnx", NetworkError, "there is no such ONNX file .*; write it with `em"),
        (tmp_path, NetworkError, "is not a regular file"),
        (tmp_path / "pipe.onnx", NetworkError, "is not a regular file"),
        ("a\0b", InputError, "is not a path"),
        (5, InputError, "expected the path of an ONNX file, given int"),
    ):
        with pytest.raises(error, match=message):
            OnnxNetwork(path)  # type: ignore[arg-type]


def test_settings_that_cannot_be_used(file: Path) -> None:
    for threads in (0, -1, 1.5, True, "two", 5000):
        with pytest.raises(InputError, match="from 1 to 1,024"):
            OnnxNetwork(file, threads=threads)
    for providers in ("CPUExecutionProvider", [], ["Quantum"]):
        with pytest.raises(InputError, match=r"has: .*CPUExec"):
            OnnxNetwork(file, providers=providers)


def test_a_network_that_asks_for_all_memory_fails_in_words(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("ConstantOfShape", ["size"], ["activations"]),
        helper.make_node("Flatten", ["images"], ["embedding"]),
    ]
    model = model_of(nodes, IN, [("activations", ["m"]), ("embedding", ["n", 192])])
    model.graph.initializer.append(helper.make_tensor("size", TensorProto.INT64, [1], [1 << 44]))
    path = save(model, tmp_path / "bomb.onnx")
    with pytest.raises(NetworkError, match=r"ONNX Runtime cannot (run|read) it.*memory"):
        OnnxNetwork(path).embed(IMAGES[:, :, :8, :8])


def test_outputs_that_are_none(tmp_path: Path) -> None:
    node = helper.make_node
    copy, flat = identity_node("images", "activations"), node("Flatten", ["images"], ["embedding"])
    number = node("ReduceMean", ["images"], ["embedding"], keepdims=0)
    flat_maps = node("Flatten", ["images"], ["activations"])
    shape = node("Shape", ["images"], ["activations"])
    zero = [node("Flatten", ["images"], ["flat"]), node("Sub", ["flat", "flat"], ["0"])]
    for nodes, message in (
        ([copy, number], r"gives \[3, 3, 8, 8\], \[\] for 3 images"),
        ([flat_maps, flat], r"gives \[3, 192\], \[3, 192\] for 3 images; expected activations"),
        ([shape, flat], "cannot read it|output 'activations' is int64; expected floats"),
        (
            [copy, *zero, node("Div", ["0", "0"], ["embedding"])],
            "the embedding is zero or not fini",
        ),
    ):
        model = model_of(nodes, IN, [("activations", None), ("embedding", None)])
        path = save(model, tmp_path / "network.onnx")
        with pytest.raises(NetworkError, match=message):
            OnnxNetwork(path).embed(IMAGES[:, :, :8, :8])


def test_the_length_before_normalization_by_a_literal_mean(file: Path) -> None:
    network, embedding = OnnxNetwork(file), np.array([[0.6, 0.8]], np.float32)
    network.head = Head("identity", np.array([1.0, -2.0], np.float32))
    maps = np.random.default_rng(0).standard_normal((1, 2, 3, 4)).astype(np.float32)
    for given in (maps, np.full_like(maps, 2e38)):  # numbers whose sums leave float32
        first, second = (math.fsum(one.ravel().tolist()) / 12 for one in given[0])
        _, norm = network._lengths(IMAGES[:1], given, embedding)
        assert norm == pytest.approx([math.hypot(first + 1, second - 2)], rel=1e-6)
    maps[0, 1, 2, 3] = np.nan
    with pytest.raises(EmbeddingError, match="the layer's activations hold NaN or infinity"):
        network._lengths(IMAGES[:1], maps, embedding)


def test_a_length_that_the_file_tells_hides_nothing_unusable(file: Path) -> None:
    network, told = OnnxNetwork(file), np.full(1, 3, np.float32)
    maps, embedding = np.ones((1, 2, 3, 4), np.float32), np.array([[0.6, 0.8]], np.float32)
    _, norm = network._lengths(IMAGES[:1], maps, embedding, told)
    assert norm is told
    for given, of, message in (
        (maps * np.nan, embedding, "the layer's activations hold NaN or infinity"),
        (maps, embedding * 0, "the embedding is zero or not finite"),
        (maps, embedding * np.inf, "the embedding is zero or not finite"),
    ):
        with pytest.raises(EmbeddingError, match=message):
            network._lengths(IMAGES[:1], given, of, told)


def test_images_that_are_none(file: Path) -> None:
    network = OnnxNetwork(file)
    for images, message in (
        (IMAGES[0], r"images are \[3, 32, 32\] of float32; expected preprocessed floats"),
        (IMAGES[:0], r"images are \[0, 3, 32, 32\]"),
        ((IMAGES * 100).astype(np.uint8), "of uint8; expected preprocessed floats"),
        (IMAGES[:, :, :16], r"images are \[3, 3, 16, 32\] of float32; .* takes \[B 3 32 32\]"),
        (IMAGES[:, :2], r"images are \[3, 2, 32, 32\] of float32; .* takes \[B 3 32 32\]"),
        ([[1], [1, 2]], "the images cannot be read as an array"),
        (np.where(IMAGES > 3, np.nan, IMAGES), "the images hold NaN or infinity"),
    ):
        with pytest.raises(InputError, match=message):
            network.embed(images)


def test_without_onnxruntime_it_says_what_to_install(file, index, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(NetworkError, match=r'not installed; run pip install "embedcam\[onnx\]"'):
        Explainer(index, onnx=file)


def test_a_description_comes_back(network: EmbeddingNetwork) -> None:
    props = described(network)
    again = Described.from_props({**props, "their.own": "x"}, "a.onnx")
    assert again is not None
    assert again.to_props() == props
    assert Described.from_props({"their.own": "x"}, "a.onnx") is None


def test_a_graph_that_does_not_end_is_stopped(network, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("embedcam.onnx.network.PROBE_SECONDS", 0.2)
    node, value = helper.make_node, helper.make_tensor_value_info
    go, on = (value(name, TensorProto.BOOL, []) for name in ("go", "on"))
    x, y = (value(name, TensorProto.FLOAT, None) for name in ("x", "y"))
    again = [identity_node("go", "on"), identity_node("x", "y")]
    body = helper.make_graph(again, "body", [value("n", TensorProto.INT64, []), go, x], [on, y])
    nodes = [
        node("Constant", [], ["always"], value=helper.make_tensor("a", 9, [], [True])),
        node("Loop", ["", "always", "images"], ["activations"], body=body),
        node("Flatten", ["activations"], ["embedding"]),
    ]
    outputs = [("activations", SHAPE), ("embedding", ["n", 192])]
    model = model_of(nodes, IN, outputs, props=described(network))
    endless = OnnxNetwork(save(model, tmp_path / "endless.onnx"), preprocess=Preprocess((8, 8)))
    with pytest.raises(NetworkError, match=r"was not at its end after 0\.2 s on the probe picture"):
        endless.identity()
