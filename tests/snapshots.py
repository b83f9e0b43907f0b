"""What users hold on to: python tests/snapshots.py writes it, test_snapshots.py compares it."""

import contextlib
import inspect
import io
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cli_samples
from cli_samples import TRUSTED
from photo_samples import picture

from embedcam.cli import main
from embedcam.cli.parser import COMMANDS

FOLDER = Path(__file__).parent / "snapshots"
PICTURE = "photos/2/1.png"
ANSWERS: dict[str, list[str]] = {
    "build": ["build", "photos", "fresh", *TRUSTED, "--layer", "relu"],
    "info": ["info", "i"],
    "verify": ["verify", "i"],
    "calibrate": ["calibrate", "i", "--no-trust"],
    "add": ["add", "i", "more", *TRUSTED],
    "explain": ["explain", "i", PICTURE, *TRUSTED],
    "explain by result": ["explain", "i", PICTURE, "--result", "1/0.png", *TRUSTED],
    "explain by method": ["explain", "i", PICTURE, "--method", "gradcam++", *TRUSTED],
    "explain features": ["explain", "i", PICTURE, "--features", *TRUSTED],
    "compare": ["compare", "i", PICTURE, "1/0.png", *TRUSTED],
    "evaluate": ["evaluate", "i", "--images", "photos", "--fidelity", "2", *TRUSTED],
    "remove": ["remove", "i", "0/0.png"],
    "compact": ["compact", "i"],
    "export": ["export", "i", "-o", "n.onnx", *TRUSTED],
    "compress": ["compress", "i", "p", "--prototypes", "3"],
}
WRONG: dict[str, list[str]] = {
    "no command": [],
    "an unknown command": ["bild"],
    "an unknown option": ["info", "i", "--jsn"],
    "no such folder": ["build", "nowhere", "x", *TRUSTED],
    "an unknown method": ["build", "photos", "x", "--method", "gradcan", *TRUSTED],
    "a number out of range": ["build", "photos", "x", "--rank", "0", *TRUSTED],
    "no picture": ["explain", "i", "cli_toy_network.py", *TRUSTED],
    "no such picture": ["explain", "i", "nowhere.png", *TRUSTED],
    "no such network": ["build", "photos", "x", "--network", "torchvision:resnet51"],
    "no such layer": ["build", "photos", "x", "--layer", "reluu", *TRUSTED],
    "code that is not loaded unasked": ["explain", "i", PICTURE],
    "no index": ["info", "photos"],
    "an index that is there": ["build", "photos", "i", *TRUSTED, "--layer", "relu", "--rank", "2"],
    "where nothing can be written": ["explain", "i", PICTURE, "-o", f"{PICTURE}/x.png", *TRUSTED],
}


def shape_of(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: shape_of(one) for key, one in sorted(value.items())}
    if isinstance(value, list):
        return [shape_of(value[0])] if value else []
    if isinstance(value, bool) or value is None:
        return "null" if value is None else "truth value"
    return "text" if isinstance(value, str) else "number"


def run(words: list[str]) -> tuple[int, str]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        code = main(words)
    return code, out.getvalue()


def help_texts() -> dict[str, Any]:
    texts = {}
    for command in ("", *COMMANDS):
        text = " ".join(run([command, "--help"] if command else ["--help"])[1].split())
        # Python 3.13 names an option's value once.
        texts[command or "embedcam"] = re.sub(r"(-\w) [A-Z|]+, (--)", r"\1, \2", text)
    return texts


def answers() -> dict[str, Any]:
    shapes: dict[str, Any] = {}
    for name, words in ANSWERS.items():
        code, out = run([*words, "--json", *(["--quiet"] if words[0] in ("build", "add") else [])])
        try:
            shape = shape_of(json.loads(out))
        except ValueError:
            shape = [shape_of(json.loads(line)) for line in out.splitlines()[:1]]
        shapes[name] = [code, shape]
    return shapes


def exit_codes() -> dict[str, Any]:
    return {name: run(words)[0] for name, words in WRONG.items()}


def public_names() -> dict[str, Any]:
    """Return the public names; of functions the parameters, of classes what can be called."""
    import embedcam

    def parameters(thing: Any) -> str:
        words = []
        for one in inspect.signature(thing).parameters.values():
            default = "" if one.default is one.empty else f"={one.default!r}"
            kind = {one.VAR_POSITIONAL: "*", one.VAR_KEYWORD: "**"}.get(one.kind, "")
            words += ["*"] if one.kind is one.KEYWORD_ONLY and "*" not in words else []
            words.append(f"{kind}{one.name}{default}")
        return re.sub(r" at 0x[0-9a-f]+", "", ", ".join(words))

    def told(thing: Any) -> Any:
        if inspect.isclass(thing) and issubclass(thing, Exception):
            return [kind.__name__ for kind in thing.__mro__]
        if inspect.isclass(thing):
            return {"": parameters(thing)} | {
                method: parameters(value)
                if inspect.isfunction(value) or inspect.ismethod(value)
                else "attribute"
                for method, value in inspect.getmembers(thing)
                if not method.startswith("_")
            }
        if callable(thing):
            return parameters(thing)
        return sorted(thing) if isinstance(thing, dict) else type(thing).__name__

    return {name: told(getattr(embedcam, name)) for name in embedcam.__all__}


def openapi() -> dict[str, Any]:
    from embedcam import Explainer, load_network
    from embedcam.service import create_app

    app = create_app(Explainer("i", load_network(TRUSTED[1], layer="relu")))
    description: dict[str, Any] = app.openapi()
    app.state.pipeline.close()
    return description


COLLECTED: dict[str, Callable[[], Any]] = {
    "help": help_texts,
    "public": public_names,
    "json": answers,
    "exit_codes": exit_codes,
    "openapi": openapi,
}


@contextlib.contextmanager
def working_folder() -> Iterator[None]:
    columns = os.environ.get("COLUMNS", "")
    with tempfile.TemporaryDirectory() as name, cli_samples.working_folder(Path(name), each=8):
        os.environ["COLUMNS"] = "100"
        for label in range(3):
            Path("more", str(label)).mkdir(parents=True)
            picture(label, 8).save(f"more/{label}/8.png")
        try:
            run(["build", "photos", "i", "--quiet", *TRUSTED, "--layer", "relu"])
            yield
        finally:
            os.environ["COLUMNS"] = columns


def saved(name: str) -> Any:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for part, collect in COLLECTED.items():
        with working_folder():
            text = json.dumps(collect(), indent=1, ensure_ascii=False)
        (FOLDER / f"{part}.json").write_text(f"{text}\n", encoding="utf-8")
