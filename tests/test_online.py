"""The torch-free deployment: requirements-online.txt is all that answering a query takes."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_samples import pooled_model, save
from photo_samples import build, network_of, picture, tensor_of, write_photos
from rounding import same_arrays

from embedcam import Explainer, Index
from embedcam.onnx import Described, Head

ROOT = Path(__file__).parents[1]
REQUIREMENTS = [
    line
    for line in (ROOT / "requirements-online.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]


def name_of(requirement: str) -> str:
    return re.match(r"[A-Za-z0-9._-]+", requirement)[0].lower().replace("_", "-")


def installed_with(names: list[str]) -> set[str]:
    """These packages and all that they need, by the names they are installed under."""
    found, ahead = set(), list(names)
    while ahead:
        name = ahead.pop()
        if name not in found:
            found.add(name)
            with suppress(PackageNotFoundError):
                ahead += [name_of(one) for one in requires(name) or [] if "extra ==" not in one]
    return found


def allowed() -> list[str]:
    """What may be imported: what those packages bring, the standard library and embedcam."""
    wanted = installed_with([name_of(line) for line in REQUIREMENTS])
    of_modules = packages_distributions().items()
    brought = [module for module, names in of_modules if wanted & set(map(name_of, names))]
    return [*brought, *sys.stdlib_module_names, "embedcam"]


ALONE = """
import json, sys

told = json.load(sys.stdin)
allowed = set(told["allowed"])


class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in allowed:
            raise ModuleNotFoundError(f"{name} is not installed for serving", name=name)


sys.meta_path.insert(0, Refuse())
"""


def alone(code: str, **told: object) -> tuple[str, str]:
    """What code prints in a process that has nothing but what serving takes."""
    given = json.dumps({"allowed": allowed(), **told})
    command = [sys.executable, "-W", "error", "-c", ALONE + code]
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an index, its network as an ONNX file, and a query."""
    folder = tmp_path_factory.mktemp("served")
    network = network_of()
    build(write_photos(folder / "photos", each=14), folder / "my.index", network)
    bias = network.module.get_parameter("linear.bias").detach().numpy()
    said = Described("0", network.identity().to_dict(), ("relu",), Head("affine", bias))
    save(pooled_model(network, props=said.to_props()), folder / "network.onnx")
    picture(1, 30).save(folder / "query.png")
    return folder


def places(served: Path) -> dict[str, str]:
    names = ("index", "my.index"), ("network", "network.onnx"), ("query", "query.png")
    return {what: str(served / name) for what, name in names}


def test_the_requirements_are_few_and_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = ["numpy", "pillow", "faiss-cpu", "onnxruntime", "jinja2"]
    assert [name_of(line) for line in REQUIREMENTS] == names
    known = [*project["dependencies"], *project["optional-dependencies"]["onnx"]]
    assert set(REQUIREMENTS) <= set(known)


EXPLAIN = """
from embedcam import Explainer

explainer = Explainer(told["index"], onnx=told["network"])
why = explainer.explain(told["query"])
why.save(told["out"])
(batched,) = explainer.explain_batch([told["query"]], result=why.ids[0])
print(json.dumps({
    "cam": why.cam.tolist(), "ids": why.ids, "html": len(why._repr_html_()),
    "matched": batched.explained, "body": why.to_dict((4, 4))["cam"],
}))
assert not {"torch", "scipy", "matplotlib"} & set(sys.modules)
"""


def test_a_query_is_explained_and_drawn_without_anything_else(served: Path, tmp_path: Path) -> None:
    said, errors = alone(EXPLAIN, **places(served), out=str(tmp_path / "why.png"))
    assert errors == ""
    told = json.loads(said)
    with Index.open(served / "my.index") as index:
        expected = Explainer(index, network_of()).explain(served / "query.png")
    assert told["ids"] == expected.ids
    np.testing.assert_allclose(told["cam"], expected.cam, atol=1e-5 * expected.cam.max())
    assert expected.cam.max() > 0
    assert told["matched"] == expected.ids[:1]
    assert np.shape(told["body"]) == (4, 4)
    assert told["html"] > 10_000
    assert (tmp_path / "why.png").stat().st_size > 10_000


WORDS = """
from embedcam import Explainer

explainer = Explainer(told["index"], onnx=told["network"])
why = explainer.explain_text("a red car", texts=told["text"], n_neighbors=3)
why.save(told["out"])
print(json.dumps(why.to_dict()))
try:
    explainer.explain_text("a red car")
except Exception as error:
    print(error, file=sys.stderr)
assert not {"torch", "scipy", "matplotlib"} & set(sys.modules)
"""


def test_words_are_explained_without_anything_else(served: Path, tmp_path: Path) -> None:
    text = np.random.default_rng(0).normal(size=5).tolist()
    told, errors = alone(WORDS, **places(served), text=text, out=str(tmp_path / "why.png"))
    assert "network.onnx embeds pictures alone; give texts=" in errors
    with Index.open(served / "my.index") as index:
        expected = Explainer(index, network_of()).explain_text("a red car", texts=text)
    results = json.loads(told)["results"]
    assert [one["id"] for one in results] == expected.ids[:3]
    for one, cam in zip(results, expected.signed_cams, strict=False):
        np.testing.assert_allclose(one["signed_cam"], cam, atol=1e-5)
    assert (tmp_path / "why.png").stat().st_size > 10_000


COMMAND = """
from embedcam.cli import main

codes = [main(words) for words in told["commands"]]
assert not {"torch", "scipy", "matplotlib"} & set(sys.modules)
print(codes)
"""


def test_the_command_line_explains_without_torch(served: Path, tmp_path: Path) -> None:
    index, onnx, query = places(served).values()
    picture, page, report = (str(tmp_path / name) for name in ("why.png", "why.html", "report"))
    asked = ["explain", index, query]
    told, errors = alone(
        COMMAND,
        commands=[
            [*asked, "--onnx", onnx, "-o", picture, "--html", page],
            [*asked, "--onnx", onnx, "--report", report, "--quiet"],
            ["info", index],
            ["verify", index],
            [*asked, "--network", "torchvision:resnet18"],
            ["export", index, "-o", str(tmp_path / "other.onnx")],
        ],
    )
    assert told.startswith(f"{query} -> {picture}\n")
    assert told.endswith("\n[0, 0, 0, 0, 4, 4]\n")
    said, *refused = errors.splitlines()
    assert said == f"page: {page}"
    assert len(refused) == 2
    for line in refused:
        assert re.match(r"embedcam: this takes torch\w*, which is not installed; run pip", line)
    for file in (picture, f"{report}/index.html"):
        assert Path(file).stat().st_size > 10_000


SERVE = """
import importlib.util, threading
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

spec = importlib.util.spec_from_file_location("onnx_service", told["example"])
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)
from embedcam import Explainer

explainer = Explainer(told["index"], onnx=example.OnnxNetwork(told["network"], threads=1))
picture = Path(told["query"]).read_bytes()
answers = []
with example.Service(explainer) as service:
    threading.Thread(target=service.serve_forever, daemon=True).start()
    where = f"http://127.0.0.1:{service.server_port}"

    def ask(path, data):
        try:
            with urlopen(Request(where + path, data=data), timeout=30) as reply:
                answers.append([reply.status, json.load(reply)])
        except HTTPError as error:
            with error:
                answers.append([error.code, json.load(error)])

    ask("/explain?neighbors=3", picture)
    ask("/explain", b"no picture")
    ask("/explain", b"")
    ask("/elsewhere", picture)
    ask("/explain", picture)
    service.shutdown()
print(json.dumps(answers))
assert not {"torch", "scipy", "matplotlib"} & set(sys.modules)
"""


def test_the_example_is_a_service_without_torch(served: Path) -> None:
    told, errors = alone(SERVE, **places(served), example=str(ROOT / "examples/onnx_service.py"))
    assert errors == ""
    few, none, empty, lost, usual = json.loads(told)
    with Index.open(served / "my.index") as index:
        expected = Explainer(index, network_of()).explain(served / "query.png")
    assert few[0] == usual[0] == 200
    assert [one["id"] for one in few[1]["neighbors"]] == expected.ids[:3]
    assert [one["id"] for one in usual[1]["neighbors"]] == expected.ids
    drawn = expected.to_dict((14, 14))["cam"]
    np.testing.assert_allclose(usual[1]["cam"], drawn, atol=1e-4 * np.max(drawn))
    assert none[0] == 400
    assert "is not an image of a known kind" in none[1]["error"]
    assert empty[0] == 413
    assert lost == [404, {"error": "there is only POST /explain"}]


KEPT = ("cam", "weights", "distances", "similarities", "neighbor_cams", "neighbor_norms")
ASK = """
def ask(explainer, vector, maps):
    named = {"size": (20, 30), "neighbors": ["0/1.png", "2/2.png"]}
    rival = {"result": "1/3.png", "above": "0/1.png"}
    return {
        "searched": explainer.explain_features(vector, maps),
        "named": explainer.explain_features(vector, maps, **named),
        "result": explainer.explain_features(vector, maps, result="1/3.png"),
        "rival": explainer.explain_features(vector, maps, **rival),
    }
"""
SERVICE = """
import os
import numpy as np
from embedcam import Explainer
from embedcam.index import remove

data = np.load(told["folder"] + "/features.npz")
vector, maps = data["embedding"], data["activations"]
explainer = Explainer(told["folder"] + "/index")
found = ask(explainer, vector, maps)
found["batched"] = explainer.explain_features(vector[None], maps[None])[0]
remove(told["folder"] + "/index", found["searched"].ids[:1])
assert explainer.reload() and not explainer.reload()
found["reloaded"] = explainer.explain_features(vector, maps)
if pid := os.fork():
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
else:
    again = explainer.explain_features(vector, maps)
    os._exit(int(not np.allclose(again.cam, found["reloaded"].cam, rtol=1e-5)))
kept = {}
for name, why in found.items():
    kept |= {f"{name}.{field}": getattr(why, field) for field in told["kept"]}
    said = why.ids, why.explained, why.trust
    kept[name] = json.dumps(said)
np.savez(told["folder"] + "/found.npz", **kept)
"""


def test_features_are_explained_without_torch(served: Path, tmp_path: Path) -> None:
    """However asked, after a reload and in a forked child: what is explained with torch."""
    network = network_of()
    shutil.copytree(served / "my.index", tmp_path / "index")
    features = network.forward(tensor_of(picture(1, 77))[None])
    vector, maps = features.embedding[0].numpy(), features.activations[0].numpy()
    np.savez(tmp_path / "features.npz", embedding=vector, activations=maps)
    explainer = Explainer(tmp_path / "index", network)
    scope: dict[str, Any] = {}
    exec(ASK, scope)
    expected = scope["ask"](explainer, vector, maps)
    expected["batched"] = expected["searched"]
    assert expected["searched"].trust is not None
    alone(ASK + SERVICE, folder=str(tmp_path), kept=KEPT)
    assert explainer.reload()  # the service removed an image
    expected["reloaded"] = explainer.explain_features(vector, maps)
    assert expected["reloaded"].ids[0] == expected["searched"].ids[1]
    found = np.load(tmp_path / "found.npz")
    for name, why in expected.items():
        for field in KEPT:
            assert same_arrays(found[f"{name}.{field}"], np.asarray(getattr(why, field)))
        assert json.loads(str(found[name])) == [why.ids, why.explained, why.trust]
