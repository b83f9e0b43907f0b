"""What can be said on the command line. Nothing heavy is imported until a command runs."""

import argparse
from collections.abc import Callable
from importlib import import_module
from typing import Any

from .. import __version__

EPILOG = """\
examples:
  embedcam demo                                  everything at work on handwritten digits
  embedcam build photos/ my.index --network torchvision:resnet50
  embedcam explain my.index query.jpg -o why.png
  embedcam info my.index

exit codes: 0 done, 2 wrong arguments, 3 an image, 4 the network, 5 the index, 130 interrupted
"""
BUILD = """\
examples:
  embedcam build photos/ my.index --network torchvision:resnet50
  embedcam build list.csv my.index --network torchvision:mobilenet_v2 \\
      --weights mobilenet.safetensors --head head.safetensors --resize squash
  embedcam build photos/ my.index --network mypackage.models:make --recipe index/recipes/paper.toml
  embedcam build my.index --embeddings e.npy --pooled p.npy --grid 7x7 --ids ids.csv
  embedcam build photos/ my.index --network torchvision:resnet50 --refit

A killed build goes on where it stopped when the same command is run again.
IMAGES is a folder with a folder per class, a flat folder, or a CSV with path,label[,id].
"""
ADD = """\
example:
  embedcam add my.index more-photos/

What the first build fitted stays as it is; weights of old images are not computed again.
"""
REMOVE = """\
examples:
  embedcam remove my.index owls/1.jpg owls/2.jpg
  embedcam remove my.index --from ids.txt        one id a line; - reads standard input

Removed images are never returned; `embedcam compact` then drops their bytes.
"""
COMPACT = """\
example:
  embedcam compact my.index
"""
EXPLAIN = """\
examples:
  embedcam explain my.index query.jpg -o why.png
  embedcam explain my.index queries/*.jpg --html why.html -n 10
  embedcam explain my.index query.jpg --result owls/1.jpg -o match.png
  embedcam explain my.index query.jpg --neighbors owls/1.jpg,owls/2.jpg --json
"""
INFO = """\
examples:
  embedcam info my.index
  embedcam info my.index --json
"""
VERIFY = """\
example:
  embedcam verify my.index && echo whole
"""
DEMO = """\
examples:
  embedcam demo
  embedcam demo out/ --seed 1
"""


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(
        prog="embedcam",
        description="Why did this image come back? Class activation maps for embedding networks.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"embedcam {__version__}")
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    _build(_command(commands, "build", "offline.build", BUILD, "build an index of CAM weights"))
    _add(_command(commands, "add", "offline.add", ADD, "add images to an index"))
    _remove(_command(commands, "remove", "offline.remove", REMOVE, "remove images by id"))
    one = _command(commands, "compact", "offline.compact", COMPACT, "drop removed images' bytes")
    one.add_argument("index", metavar="INDEX")
    _explain(_command(commands, "explain", "online.explain", EXPLAIN, "explain query images"))
    one = _command(commands, "info", "report.info", INFO, "say what an index holds")
    one.add_argument("index", metavar="INDEX")
    one = _command(commands, "verify", "report.verify", VERIFY, "check every promise of an index")
    one.add_argument("index", metavar="INDEX")
    one = _command(commands, "demo", "offline.demo", DEMO, "the main job on handwritten digits")
    one.add_argument("folder", metavar="FOLDER", nargs="?", default="demo-output")
    one.add_argument("--seed", type=int, default=0, help="of scenes and training")
    return top


def _command(
    commands: Any, name: str, where: str, epilog: str, summary: str
) -> argparse.ArgumentParser:
    one = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    one.add_argument("--json", action="store_true", help="print JSON for machines")
    one.add_argument("--quiet", action="store_true", help="no progress bars, no notes")
    one.add_argument("--debug", action="store_true", help="show the traceback of an error")
    one.set_defaults(run=_deferred(where))
    return one


def _deferred(where: str) -> Callable[[argparse.Namespace], None]:
    module, function = where.split(".")

    def run(options: argparse.Namespace) -> None:
        getattr(import_module(f"{__package__}.{module}"), function)(options)

    return run


def _network(one: argparse.ArgumentParser) -> None:
    group = one.add_argument_group("network")
    group.add_argument("--network", help="torchvision:NAME, timm:NAME or package.module:factory")
    group.add_argument("--weights", metavar="FILE", help=".safetensors or .pt file, or 'random'")
    group.add_argument("--head", metavar="FILE", help="affine map, safetensors weight [D K], bias")
    group.add_argument("--layer", help="dotted name of the layer to explain")
    group.add_argument(
        "--no-normalize", action="store_true", help="leave embeddings without their L2 norm"
    )
    group.add_argument("--size", type=_size, help="input side, or HxW, in pixels")
    group.add_argument(
        "--resize", choices=("squash", "crop"), help="whole picture squashed, or centre cropped"
    )
    group.add_argument("--device", help="torch device, e.g. cpu or cuda")
    group.add_argument("--autocast", choices=("bf16", "fp16"), help="compute in half precision")


def _work(one: argparse.ArgumentParser) -> None:
    group = one.add_argument_group("work")
    group.add_argument("--batch-size", type=_positive, default=32, help="images a forward pass")
    group.add_argument("--workers", type=int, help="threads that decode images")
    group.add_argument(
        "--on-unreadable", choices=("fail", "skip"), help="what to do with a broken image"
    )
    group.add_argument(
        "--scratch-gb", type=float, default=50.0, help="disk for activations kept while building"
    )


def _build(one: argparse.ArgumentParser) -> None:
    one.add_argument("images", metavar="IMAGES", nargs="?", help="folder or CSV")
    one.add_argument("index", metavar="INDEX", help="folder of the index")
    one.add_argument("--recipe", metavar="FILE", help="TOML file; other options win over it")
    one.add_argument("--labels", choices=("auto", "folders", "none"), help="where labels are")
    one.add_argument("--refit", action="store_true", help="redo a finished index")
    _network(one)
    group = one.add_argument_group("weights")
    group.add_argument("--method", help="gradcam (default) or gradcam++")
    group.add_argument("--target", help="margin (default) or centred")
    group.add_argument("--norm", help="through (default) or around the L2 norm")
    group.add_argument("--sampling", help="random (default), semihard, hard or all")
    group.add_argument("--triplets", help="S for each image (default 50), or a .npy file [N S 2]")
    group.add_argument("--hinge", action="store_true", default=None, help="leave out satisfied")
    group.add_argument("--margin", type=float, help="of hinge and semihard (default 0.2)")
    group.add_argument("--seed", type=int, help="of all sampling (default 0)")
    group = one.add_argument_group("storage")
    group.add_argument("--encoding", help="low-rank (default), top-m or dense")
    group.add_argument("--rank", type=int, help="R of low-rank (default 128)")
    group.add_argument("--top-m", dest="m", type=int, help="M of top-m (default 50)")
    group.add_argument("--by", help="top-m by signed (default) or magnitude")
    group.add_argument("--dtype", help="float16 (default) or float32")
    group.add_argument("--faiss", help="FAISS factory string (default Flat), or none")
    group.add_argument("--metric", help="l2 (default) or ip")
    group.add_argument("--no-own-maps", action="store_true", help="keep no maps of the images")
    _work(one)
    group = one.add_argument_group("from features instead of images")
    group.add_argument("--embeddings", metavar="FILE", help=".npy [N D]")
    group.add_argument("--pooled", metavar="FILE", help=".npy [N K]: mean activations")
    group.add_argument("--positive-pooled", metavar="FILE", help=".npy [N K]: mean of max(A, 0)")
    group.add_argument("--grid", type=_size, help="HxW of the layer")
    group.add_argument("--ids", metavar="FILE", help="CSV with id[,label], a row an embedding")


def _add(one: argparse.ArgumentParser) -> None:
    one.add_argument("index", metavar="INDEX")
    one.add_argument("images", metavar="IMAGES", help="folder or CSV")
    one.add_argument("--labels", choices=("auto", "folders", "none"), help="where labels are")
    _network(one)
    _work(one)


def _remove(one: argparse.ArgumentParser) -> None:
    one.add_argument("index", metavar="INDEX")
    one.add_argument("ids", metavar="ID", nargs="*")
    one.add_argument("--from", dest="file", metavar="FILE", help="ids, one a line; - for stdin")


def _explain(one: argparse.ArgumentParser) -> None:
    one.add_argument("index", metavar="INDEX")
    one.add_argument("queries", metavar="IMAGE", nargs="+")
    one.add_argument("-o", "--output", metavar="PNG", help="picture; a folder for many queries")
    one.add_argument("--html", metavar="FILE", help="one self-contained page with all queries")
    one.add_argument("-n", "--n-neighbors", type=_positive, default=5)
    one.add_argument("--transfer", choices=("mean", "distance"), default="mean")
    one.add_argument("--result", metavar="ID", help="explain by this one result")
    one.add_argument("--neighbors", metavar="IDS", help="ids found elsewhere, comma-separated")
    one.add_argument("--scale", choices=("joint", "each"), default="joint")
    one.add_argument("--images", metavar="FOLDER", help="where the indexed images lie now")
    _network(one)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return value


def _size(text: str) -> tuple[int, int]:
    try:
        sides = [_positive(side) for side in text.lower().split("x")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; give 224 or 224x320")
    return sides[0], sides[-1]
