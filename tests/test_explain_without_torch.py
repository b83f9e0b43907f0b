"""`explain_features` where torch cannot be imported, as in a service that never installed it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from photo_samples import build, network_of, picture, tensor_of, write_photos
from rounding import same_arrays

from embedcam import Explainer, Explanation, Recipe

KEPT = ("cam", "weights", "distances", "similarities", "neighbor_cams", "neighbor_norms")

REFUSING = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision", "timm", "sklearn", "scipy"):
            raise ImportError(f"{name} must not be imported here")

sys.meta_path.insert(0, Refuse())
"""

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

folder = sys.argv[1]
data = np.load(f"{folder}/features.npz")
vector, maps = data["embedding"], data["activations"]
explainer = Explainer(f"{folder}/index")
found = ask(explainer, vector, maps)
found["batched"] = explainer.explain_features(vector[None], maps[None])[0]
assert found["searched"].trust is not None
remove(f"{folder}/index", found["searched"].ids[:1])
assert explainer.reload() and not explainer.reload()
found["reloaded"] = explainer.explain_features(vector, maps)
if hasattr(os, "fork"):
    pid = os.fork()
    if pid == 0:
        again = explainer.explain_features(vector, maps)
        os._exit(int(not np.allclose(again.cam, found["reloaded"].cam, rtol=1e-5)))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
found["searched"].save(f"{folder}/why.png")
kept = {}
for name, why in found.items():
    kept |= {f"{name}.{field}": getattr(why, field) for field in KEPT}
    trust = np.float64("nan" if why.trust is None else why.trust)
    kept |= {f"{name}.ids": why.ids, f"{name}.trust": trust, f"{name}.explained": why.explained}
np.savez(f"{folder}/found.npz", **kept)
"""


def test_everything_a_service_asks_for(tmp_path: Path) -> None:
    network = network_of()
    photos = write_photos(tmp_path / "photos", each=14)
    build(photos, tmp_path / "index", network, Recipe(encoding="top-m", m=3))
    features = network.forward(tensor_of(picture(1, 77))[None])
    vector, maps = features.embedding[0].numpy(), features.activations[0].numpy()
    np.savez(tmp_path / "features.npz", embedding=vector, activations=maps)
    explainer = Explainer(tmp_path / "index", network)
    scope: dict[str, Any] = {}
    exec(ASK, scope)
    expected = scope["ask"](explainer, vector, maps)
    expected["batched"] = expected["searched"]
    script = f"{REFUSING}\nKEPT = {KEPT!r}\n{ASK}{SERVICE}"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert explainer.reload()  # the service removed an image
    expected["reloaded"] = explainer.explain_features(vector, maps)
    found = np.load(tmp_path / "found.npz")
    for name, why in expected.items():
        assert isinstance(why, Explanation)
        for field in KEPT:
            assert same_arrays(found[f"{name}.{field}"], np.asarray(getattr(why, field)))
        assert found[f"{name}.ids"].tolist() == why.ids
        assert found[f"{name}.explained"].tolist() == why.explained
        trust = float(found[f"{name}.trust"])
        assert np.isnan(trust) if why.trust is None else trust == why.trust
    assert expected["reloaded"].ids[0] == expected["searched"].ids[1]
    assert (tmp_path / "why.png").stat().st_size > 0
