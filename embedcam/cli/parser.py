"""What can be said on the command line. Nothing heavy is imported until a command runs."""

import argparse
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from difflib import get_close_matches
from importlib import import_module
from typing import Any, NoReturn

from .. import __version__

EPILOG = """\
examples:
  embedcam demo                                  everything at work on handwritten digits
  embedcam build photos/ my.index --network torchvision:resnet50
  embedcam explain my.index query.jpg -o why.png
  embedcam info my.index

exit codes: 0 done, 2 wrong arguments, 3 an image, 4 the network, 5 the index,
            6 a file or folder that cannot be read or written, 130 interrupted
"""
BUILD = """\
examples:
  embedcam build photos/ my.index --network torchvision:resnet50
  embedcam build list.csv my.index --network torchvision:mobilenet_v2 \\
      --weights mobilenet.safetensors --head head.safetensors --resize squash
  embedcam build photos/ my.index --network mypackage.models:make --recipe index/recipes/paper.toml
  embedcam build my.index --embeddings e.npy --pooled p.npy --grid 7x7 --ids ids.csv
  embedcam build my.index --refit                fit again on all images, also those added later

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
examples:
  embedcam compact my.index
  embedcam compact my.index --rebuild-faiss              from the embeddings; the file is not read
  embedcam compact my.index --rebuild-faiss HNSW32       with another factory, or none
"""
COMPRESS = """\
examples:
  embedcam compress my.index small.index --prototypes 500
  embedcam compress my.index small.index --prototypes 5 --per-class

Near images are merged into one prototype with the mean of their weights, shown by the picture of
the image in their middle. What that loses is measured and printed; `embedcam info` repeats it.
"""
EXPLAIN = """\
examples:
  embedcam explain my.index query.jpg -o why.png
  embedcam explain my.index queries/*.jpg -o pictures/ --html why.html -n 10
  embedcam explain my.index query.jpg --result owls/1.jpg -o match.png
  embedcam explain my.index query.jpg --neighbors owls/1.jpg,owls/2.jpg --json
  embedcam explain my.index query.jpg --method scorecam -o slow.png
  embedcam explain my.index queries/ --report out/        a folder or a CSV, on one page

The network is loaded as it was for the build; where its files have moved, say so with --weights
and --head. Pictures are written for queries where -o or --html asks for them. A report that was
stopped goes on when the same command is run again.
"""
COMPARE = """\
examples:
  embedcam compare my.index query.jpg owls/1.jpg -o receipt.png
  embedcam compare my.index query.jpg owls/1.jpg --above hawks/3.jpg -o above.png
  embedcam compare my.index query.jpg owls/1.jpg --json --lines 20

RESULT is the id of an image of the index. What adds up to the similarity is printed; -o draws where
in both pictures it is, and which cells match. What the average image shares is put apart.
"""
EVALUATE = """\
examples:
  embedcam evaluate my.index --images queries/ --html report.html
  embedcam evaluate my.index --images queries/ --boxes boxes.csv --csv numbers.csv
  embedcam evaluate my.index --images queries/ --masks masks/ --limit 500 --faithfulness 20
  embedcam evaluate my.index --images list.csv --measures retrieval,objects --json

boxes.csv has the columns path,x0,y0,x1,y1[,label][,width,height], a line a box; masks are named as
the images are, white on the object. An image that the index holds is explained by others only.
"""
SERVE = """\
examples:
  embedcam serve my.index
  embedcam serve my.index --onnx network.onnx
  embedcam serve my.index --port 9000 --max-neighbors 20 --timeout 10
  curl -F image=@query.jpg http://127.0.0.1:8000/explain

One process, on this machine alone unless --host says otherwise. /openapi.json describes the
addresses. SIGTERM and Ctrl-C end it once what was begun is finished; SIGHUP serves a changed index.
"""
EXPORT = """\
examples:
  embedcam export my.index -o network.onnx
  embedcam export my.index -o network.onnx --weights resnet50.safetensors
  embedcam explain my.index query.jpg --onnx network.onnx -o why.png      without torch

One file with the activations and the embedding as outputs, for batches of any size, held against
torch before it is put in place. The network is loaded as it was for the build; where its files
have moved, say so with --weights and --head. Needs pip install "embedcam[onnx]".
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

COMMANDS = {
    "build": "offline.build",
    "add": "offline.add",
    "remove": "offline.remove",
    "compact": "offline.compact",
    "compress": "offline.compress",
    "explain": "online.explain",
    "serve": "serving.serve",
    "compare": "pairs.compare",
    "evaluate": "evaluation.evaluate",
    "export": "exporting.export",
    "info": "report.info",
    "verify": "report.verify",
    "demo": "offline.demo",
}
"""Each command's module and function."""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and names the nearest option there is."""

    def __init__(self, **settings: Any) -> None:
        # An abbreviation that works today means something else once an option is added.
        super().__init__(
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see `{self.prog} --help`\n")

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        if action.nargs == argparse.PARSER and arg_strings:
            known = list(action.choices or ())
            if arg_strings[0] not in known:
                hint = _nearest(arg_strings[0], known) or f"known: {', '.join(known)}"
                self.error(f"there is no command {arg_strings[0]!r}; {hint}")
        return super()._get_values(action, arg_strings)


class _Command(_Parser):
    """A command; its options may stand before, between and behind its arguments."""

    _mixing = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but refuses what it does not know, and takes options anywhere."""
        if self._mixing:  # called back by argparse's own two passes
            return super().parse_known_args(args, namespace)
        self._mixing = True
        try:
            found, unknown = self.parse_known_intermixed_args(args, namespace)
        finally:
            self._mixing = False
        if unknown:
            options = [name for action in self._actions for name in action.option_strings]
            hint = _nearest(unknown[0].partition("=")[0], options)
            self.error(f"{' '.join(unknown)!r} means nothing here" + (hint and f"; {hint}"))
        return found, []


def _nearest(given: str, known: Sequence[str]) -> str:
    near = get_close_matches(given, known, 1)
    return f"did you mean {near[0]}?" if near else ""


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = _Parser(
        prog="embedcam",
        description="Why did this image come back? Class activation maps for embedding networks.",
        epilog=EPILOG,
    )
    top.add_argument("--version", action="version", version=f"embedcam {__version__}")
    commands = top.add_subparsers(metavar="COMMAND", dest="command", parser_class=_Command)
    _build(_command(commands, "build", "[IMAGES] INDEX", BUILD, "build an index of CAM weights"))
    _add(_command(commands, "add", "INDEX IMAGES", ADD, "add images to an index"))
    _remove(_command(commands, "remove", "INDEX ID ...", REMOVE, "remove images by id"))
    _compact(_command(commands, "compact", "INDEX", COMPACT, "drop removed images' bytes"))
    _compress(
        _command(commands, "compress", "INDEX OUTPUT", COMPRESS, "merge an index into prototypes")
    )
    _explain(_command(commands, "explain", "INDEX IMAGE ...", EXPLAIN, "explain query images"))
    _serve(_command(commands, "serve", "INDEX", SERVE, "explain over HTTP"))
    _compare(_command(commands, "compare", "INDEX IMAGE RESULT", COMPARE, "why two images match"))
    _evaluate(
        _command(
            commands, "evaluate", "INDEX --images IMAGES", EVALUATE, "measure how good the maps are"
        )
    )
    _export(
        _command(commands, "export", "INDEX -o FILE", EXPORT, "write the network as an ONNX file")
    )
    _index(_command(commands, "info", "INDEX", INFO, "say what an index holds"))
    _index(_command(commands, "verify", "INDEX", VERIFY, "check every promise of an index"))
    one = _command(commands, "demo", "[FOLDER]", DEMO, "the main job on handwritten digits")
    one.add_argument(
        "folder",
        metavar="FOLDER",
        nargs="?",
        type=_path,
        default="demo-output",
        help="where everything is written (default demo-output)",
    )
    one.add_argument("--seed", type=_whole, metavar="N", default=0, help="of scenes and training")
    return top


def _command(
    commands: Any, name: str, positionals: str, epilog: str, summary: str
) -> argparse.ArgumentParser:
    one = commands.add_parser(
        name,
        usage=f"embedcam {name} [options] {positionals}",
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=epilog,
    )
    one.add_argument("--json", action="store_true", help="print JSON for machines")
    one.add_argument("--quiet", action="store_true", help="no progress bars, no notes")
    one.add_argument("--debug", action="store_true", help="show the traceback of an error")
    one.set_defaults(run=_deferred(COMMANDS[name]), resumes=name in ("build", "add", "demo"))
    return one


def _deferred(where: str) -> Callable[[argparse.Namespace], None]:
    module, function = where.split(".")

    def run(options: argparse.Namespace) -> None:
        getattr(import_module(f"{__package__}.{module}"), function)(options)

    return run


def _network(one: argparse.ArgumentParser) -> None:
    group = one.add_argument_group("network")
    group.add_argument(
        "--network", metavar="NAME", help="torchvision:NAME, timm:NAME or package.module:factory"
    )
    group.add_argument("--weights", metavar="FILE", help=".safetensors or .pt file, or 'random'")
    group.add_argument("--head", metavar="FILE", help="affine map, safetensors weight [D K], bias")
    group.add_argument("--layer", metavar="NAME", help="dotted name of the layer to explain")
    group.add_argument(
        "--no-normalize", action="store_true", help="leave embeddings without their L2 norm"
    )
    group.add_argument("--size", type=_size, metavar="HxW", help="input side, or HxW, in pixels")
    group.add_argument(
        "--resize", choices=("squash", "crop"), help="whole picture squashed, or centre cropped"
    )
    group.add_argument("--device", metavar="NAME", help="torch device, e.g. cpu or cuda")
    group.add_argument(
        "--autocast", choices=("bf16", "fp16", "off"), help="compute in half precision"
    )


def _work(one: argparse.ArgumentParser) -> None:
    group = one.add_argument_group("work")
    group.add_argument(
        "--batch-size", type=_positive, metavar="N", default=32, help="images a pass (default 32)"
    )
    group.add_argument("--workers", type=_whole, metavar="N", help="threads that decode images")
    group.add_argument(
        "--on-unreadable",
        choices=("fail", "skip"),
        help="what to do with a broken image (default fail)",
    )
    group.add_argument(
        "--scratch-gb",
        type=_amount,
        metavar="GB",
        default=50.0,
        help="disk for activations kept meanwhile (default 50)",
    )


def _online(one: argparse.ArgumentParser) -> None:
    one.add_argument("--images", metavar="FOLDER", help="where the indexed images lie now")
    one.add_argument(
        "--onnx",
        metavar="FILE",
        type=_path,
        help="the network as `embedcam export` wrote it, run without torch",
    )


def _index(one: argparse.ArgumentParser) -> None:
    one.add_argument("index", metavar="INDEX", type=_path, help="folder of the index")


def _build(one: argparse.ArgumentParser) -> None:
    one.add_argument("images", metavar="IMAGES", nargs="?", type=_path, help="folder or CSV")
    _index(one)
    one.add_argument("--recipe", metavar="FILE", help="TOML file; other options win over it")
    one.add_argument("--labels", choices=("auto", "folders", "none"), help="where labels are")
    one.add_argument("--refit", action="store_true", help="redo a finished index")
    _network(one)
    group = one.add_argument_group("weights")
    group.add_argument(
        "--method",
        metavar="NAME",
        help="gradcam (default), gradcam++, scorecam, ...: any that yields channel weights",
    )
    group.add_argument(
        "--layers",
        metavar="NAMES",
        type=_names,
        help="of a method of several layers, such as layer2,layer3,layer4; the last is the one "
        "the network explains, named as a build prints it",
    )
    _method_options(group)
    group.add_argument("--target", metavar="NAME", help="margin (default), discriminant or centred")
    group.add_argument("--norm", metavar="WAY", help="through (default) or around the L2 norm")
    group.add_argument(
        "--sampling", metavar="NAME", help="auto (default), all, random, semihard or hard"
    )
    group.add_argument(
        "--triplets", metavar="S|FILE", help="S for each image (default 50), or a .npy file [N S 2]"
    )
    group.add_argument(
        "--hinge",
        action="store_true",
        default=None,
        help="leave out triplets that the margin satisfies",
    )
    group.add_argument(
        "--margin", type=float, metavar="X", help="of hinge and semihard (default 0.2)"
    )
    group.add_argument("--seed", type=int, metavar="N", help="of all sampling (default 0)")
    group = one.add_argument_group("storage")
    group.add_argument("--encoding", metavar="NAME", help="low-rank (default), top-m or dense")
    group.add_argument("--rank", type=int, metavar="R", help="R of low-rank (default 128)")
    group.add_argument("--top-m", dest="m", type=int, metavar="M", help="M of top-m (default 50)")
    group.add_argument("--by", metavar="WHAT", help="top-m by signed (default) or magnitude")
    group.add_argument("--dtype", metavar="NAME", help="float16 (default) or float32")
    group.add_argument(
        "--faiss", metavar="FACTORY", help="FAISS factory string (default Flat), or none"
    )
    group.add_argument("--metric", metavar="NAME", help="l2 (default) or ip")
    group.add_argument("--no-own-maps", action="store_true", help="keep no maps of the images")
    group.add_argument(
        "--no-trust", action="store_true", help="calibrate no trust in the index's transfers"
    )
    _work(one)
    group = one.add_argument_group("from features instead of images")
    group.add_argument("--embeddings", metavar="FILE", help=".npy [N D]")
    group.add_argument("--pooled", metavar="FILE", help=".npy [N K]: mean activations")
    group.add_argument("--positive-pooled", metavar="FILE", help=".npy [N K]: mean of max(A, 0)")
    group.add_argument("--grid", type=_size, metavar="HxW", help="HxW of the layer")
    group.add_argument("--ids", metavar="FILE", help="CSV with id[,label], a row an embedding")


def _add(one: argparse.ArgumentParser) -> None:
    _index(one)
    one.add_argument("images", metavar="IMAGES", type=_path, help="folder or CSV")
    one.add_argument("--labels", choices=("auto", "folders", "none"), help="where labels are")
    _network(one)
    _work(one)


def _remove(one: argparse.ArgumentParser) -> None:
    _index(one)
    one.add_argument("ids", metavar="ID", nargs="*", help="ids of images")
    one.add_argument("--from", dest="file", metavar="FILE", help="ids, one a line; - for stdin")


def _compact(one: argparse.ArgumentParser) -> None:
    _index(one)
    one.add_argument(
        "--rebuild-faiss",
        metavar="FACTORY",
        nargs="?",
        const="",
        help="make the FAISS file again; FACTORY another one than it had",
    )


def _compress(one: argparse.ArgumentParser) -> None:
    _index(one)
    one.add_argument("output", metavar="OUTPUT", type=_path, help="folder of the new index")
    one.add_argument(
        "--prototypes",
        type=_positive,
        metavar="N",
        required=True,
        help="how many, at most the number of images",
    )
    one.add_argument(
        "--per-class", action="store_true", help="N for each label, each with its label"
    )
    one.add_argument(
        "--seed",
        type=_whole,
        metavar="N",
        default=0,
        help="of k-means and of the images that the loss is measured on (default 0)",
    )


def _compare(one: argparse.ArgumentParser) -> None:
    _index(one)
    one.add_argument("query", metavar="IMAGE", type=_path, help="query picture")
    one.add_argument("result", metavar="RESULT", help="id of an image of the index")
    one.add_argument("--above", metavar="ID", help="why the result came above this image")
    one.add_argument("-o", "--output", metavar="PNG", type=_path, help="picture")
    one.add_argument(
        "--lines", type=_positive, default=10, metavar="N", help="channels listed (default 10)"
    )
    one.add_argument(
        "--not-centred",
        action="store_true",
        help="do not put apart what the average image of the index shares",
    )
    _online(one)
    _network(one)


def _explain(one: argparse.ArgumentParser) -> None:
    _index(one)
    one.add_argument("queries", metavar="IMAGE", nargs="+", type=_path, help="query pictures")
    one.add_argument(
        "-o", "--output", metavar="PNG", type=_path, help="picture; a folder for many queries"
    )
    one.add_argument(
        "--html", metavar="FILE", type=_path, help="one self-contained page with all queries"
    )
    one.add_argument(
        "--report",
        metavar="FOLDER",
        type=_path,
        help="all queries (IMAGE may be a folder or a CSV) as FOLDER/index.html and JSON lines",
    )
    one.add_argument(
        "--batch-size", type=_positive, metavar="N", help="of a report: queries a pass (default 16)"
    )
    one.add_argument(
        "-n", "--n-neighbors", type=_positive, metavar="N", help="results a query (default 5)"
    )
    one.add_argument(
        "--transfer",
        choices=("mean", "distance"),
        default="mean",
        help="how neighbours count (default mean)",
    )
    one.add_argument(
        "--trusted-from",
        type=_share,
        metavar="T",
        help="trust from which a transfer counts, 0 to 1 (default 0.5)",
    )
    one.add_argument(
        "--fallback",
        action="store_true",
        help="where the transfer is not trusted, compute the weights on the query itself",
    )
    one.add_argument("--result", metavar="ID", help="explain by this one image of the index")
    one.add_argument(
        "--method",
        metavar="NAME",
        help="compute the query's map itself, by any method (scorecam, rise, ...), in place of "
        "transferred weights",
    )
    _method_options(one)
    one.add_argument(
        "--neighbors",
        metavar="IDS",
        action="append",
        help="ids found elsewhere, comma-separated or repeated, instead of a search",
    )
    one.add_argument(
        "--scale",
        choices=("joint", "each"),
        default="joint",
        help="of the results' colours (default joint)",
    )
    _online(one)
    _network(one)


def _serve(one: argparse.ArgumentParser) -> None:
    _index(one)
    one.add_argument(
        "--host", metavar="NAME", type=_path, default="127.0.0.1", help="default 127.0.0.1"
    )
    one.add_argument(
        "--port", metavar="N", type=_whole, default=8000, help="0 takes a free one (default 8000)"
    )
    one.add_argument(
        "--allow-host",
        metavar="NAME",
        type=_path,
        action="append",
        help="a name that requests may call this service by, such as a proxy's; may be repeated",
    )
    one.add_argument(
        "-n", "--n-neighbors", type=_positive, metavar="N", help="results a query (default 5)"
    )
    one.add_argument(
        "--transfer",
        choices=("mean", "distance"),
        default="mean",
        help="how neighbours count (default mean)",
    )
    one.add_argument(
        "--trusted-from",
        type=_share,
        metavar="T",
        help="trust from which a transfer counts, 0 to 1 (default 0.5)",
    )
    one.add_argument(
        "--fallback",
        action="store_true",
        help="where the transfer is not trusted, compute the weights on the query itself",
    )
    _online(one)
    group = one.add_argument_group("limits")
    group.add_argument(
        "--max-body", metavar="BYTES", type=_positive, help="of a request (default 20000000)"
    )
    group.add_argument(
        "--max-pixels", metavar="N", type=_positive, help="of a picture (default 25000000)"
    )
    group.add_argument(
        "--max-neighbors", metavar="N", type=_positive, help="of a request (default 100)"
    )
    group.add_argument(
        "--timeout", metavar="SECONDS", type=_amount, help="for the body, and for the answer (30)"
    )
    group.add_argument(
        "--concurrency", metavar="N", type=_positive, help="requests at a time (default 16)"
    )
    group.add_argument(
        "--batch", metavar="N", type=_positive, help="pictures a pass of the network (default 8)"
    )
    _network(one)


def _evaluate(one: argparse.ArgumentParser) -> None:
    _index(one)
    one.add_argument(
        "--images", metavar="IMAGES", type=_path, required=True, help="query images: folder or CSV"
    )
    one.add_argument("--indexed", metavar="FOLDER", help="where the indexed images lie now")
    one.add_argument("--labels", choices=("auto", "folders", "none"), help="where labels are")
    one.add_argument("--boxes", metavar="CSV", type=_path, help="where the objects are")
    one.add_argument("--masks", metavar="FOLDER", type=_path, help="the same, as masks")
    one.add_argument("--html", metavar="FILE", type=_path, help="one self-contained page")
    one.add_argument("--csv", metavar="FILE", type=_path, help="the numbers of each image")
    group = one.add_argument_group("what is measured")
    group.add_argument(
        "--measures",
        metavar="NAMES",
        type=_names,
        help="of retrieval, localisation, faithfulness, objects, fidelity, sanity (default all)",
    )
    group.add_argument(
        "--no-controls", action="store_true", help="leave out what the maps are held against"
    )
    group.add_argument("--limit", type=_positive, metavar="N", help="images queried, a sample")
    group.add_argument(
        "--faithfulness",
        type=_whole,
        metavar="N",
        help="images whose pixels are removed and whose controls are drawn (default 50)",
    )
    group.add_argument(
        "--scenes", type=_whole, metavar="N", help="pairs of pictures, side by side (default 100)"
    )
    group.add_argument(
        "--fidelity",
        type=_whole,
        metavar="N",
        help="indexed images whose own weights are compared with transferred ones (default 100)",
    )
    group.add_argument(
        "-n", "--n-neighbors", type=_positive, metavar="N", help="neighbours a map (default 5)"
    )
    group.add_argument(
        "--transfer", choices=("mean", "distance"), help="how neighbours count (default mean)"
    )
    group.add_argument(
        "--steps", type=_positive, metavar="N", help="of deletion and insertion (default 20)"
    )
    group.add_argument(
        "--removed",
        type=_amount,
        metavar="SHARE",
        help="of the pixels, for the rank drop (default 0.2)",
    )
    group.add_argument(
        "--threshold",
        type=_amount,
        metavar="SHARE",
        help="of a map's largest value, for IoU and boxes (default 0.2)",
    )
    group.add_argument(
        "--fill",
        choices=("mean", "black", "blur"),
        help="in place of removed pixels (default mean)",
    )
    group.add_argument(
        "--examples", type=_whole, metavar="N", help="best and worst on the page (default 3 each)"
    )
    group.add_argument("--seed", type=_whole, metavar="N", help="of every sample (default 0)")
    _network(one)
    group = one.add_argument_group("work")
    group.add_argument(
        "--batch-size", type=_positive, metavar="N", help="images a pass (default 8 on a CPU)"
    )
    group.add_argument("--workers", type=_whole, metavar="N", help="threads that decode images")
    group.add_argument(
        "--on-unreadable",
        choices=("fail", "skip"),
        help="what to do with a broken image (default fail)",
    )


def _export(one: argparse.ArgumentParser) -> None:
    _index(one)
    one.add_argument(
        "-o", "--output", metavar="FILE", type=_path, required=True, help="ONNX file to write"
    )
    _network(one)


def _method_options(group: Any) -> None:
    group.add_argument(
        "--fill",
        metavar="WHAT",
        help="what a masking method puts in place of masked pixels: mean (default), black or blur",
    )
    group.add_argument(
        "--option",
        metavar="NAME=VALUE",
        type=_option,
        action="append",
        help="an option of the method, such as samples=50; may be repeated",
    )


def _option(text: str) -> tuple[str, Any]:
    name, given, value = text.partition("=")
    if not name or not given:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE, such as samples=50")
    words = {"true": True, "false": False, "none": None}
    for kind in (int, float):
        with suppress(ValueError):
            return name, kind(value)
    return name, words.get(value.lower(), value)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def _path(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("an empty name was given")
    return text


def _positive(text: str) -> int:
    return _number(text, int, 1, "a whole number of at least 1")


def _whole(text: str) -> int:
    return _number(text, int, 0, "a whole number of at least 0")


def _amount(text: str) -> float:
    return _number(text, float, 0, "a number of at least 0")


def _share(text: str) -> float:
    value = _number(text, float, 0, "a number from 0 to 1")
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def _number(text: str, kind: Callable[[str], Any], least: int, expected: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = -math.inf
    if not least <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
    return value


def _size(text: str) -> tuple[int, int]:
    try:
        sides = [_positive(side) for side in text.lower().split("x")]
    except argparse.ArgumentTypeError:
        sides = []
    if len(sides) not in (1, 2):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; give 224 or 224x320")
    return sides[0], sides[-1]
