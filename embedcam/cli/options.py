"""The options of each command: a function of its name for each."""

from argparse import ArgumentParser, ArgumentTypeError, BooleanOptionalAction, _ActionsContainer
from collections.abc import Callable
from typing import Any

from .._options import Setting, add_options
from ..errors import Plain
from .networks import ImageSettings, NetworkSettings

WHOLE = Setting(kind=int, least=0).from_text
POSITIVE = Setting(kind=int, least=1).from_text
AMOUNT = Setting(kind=float, least=0).from_text
SHARE = Setting(kind=float, least=0, most=1).from_text
NAMES = Setting(kind=tuple).from_text
INDEX = "index INDEX", "folder of the index"
JOB = "job JOB", "folder of the job"
NAMED = "--concept-names FILE", 'TOML of names: [concepts], then lines such as 3 = "wheel"'
MOVED = "--images FOLDER", "where the indexed images lie now, also an address"
COLLECTION = "folder, CSV, tar shards or tables, here or at an address (docs/inputs.md)"


def _name(text: str) -> str:
    if not text:
        raise ArgumentTypeError("an empty name was given")
    return text


def _adder(group: _ActionsContainer) -> Callable[..., None]:
    """Return what adds options "-o --output PNG", and arguments "images IMAGES", to a parser.

    Without a word for its value an option is true where it is given.
    """

    def add(names: str, text: str, read: Callable[[str], Plain] = _name, **more: Any) -> None:
        *flags, last = names.split()
        if flags and not last.startswith("-"):
            more |= {"metavar": last, "type": read}
        else:
            flags.append(last)
            # The first choice is the default.
            more |= {"default": more["choices"][0]} if "choices" in more else {}
            more = more or {"action": "store_true"}
        group.add_argument(*flags, help=text, **more)

    return add


def _common(command: ArgumentParser, *arguments: tuple[str, str]) -> Callable[..., None]:
    add = _adder(command)
    add("--json", "print JSON for machines; > FILE keeps it")
    # False shows no progress, None shows it where it is seen.
    add("--quiet", "no progress, no notes", dest="progress", action="store_const", const=False)
    add("--debug", "show the traceback of an error")
    for argument in arguments:
        add(*argument)
    return add


def _network(command: ArgumentParser) -> None:
    add_options(command.add_argument_group("network"), NetworkSettings)


def _work(command: ArgumentParser) -> _ActionsContainer:
    group = command.add_argument_group("work")
    add = _adder(group)
    add("--batch-size N", "images a pass (default by the device)", POSITIVE)
    add("--workers N", "threads that decode images", WHOLE)
    add_options(group, ImageSettings, "on_unreadable")
    add("--scratch-gb GB", "disk for activations kept meanwhile (default 50)", AMOUNT, default=50.0)
    return group


def _engine(command: ArgumentParser) -> None:
    group = command.add_argument_group("engine", "what looks at the images")
    text = "workers of a Ray cluster, in place of this process"
    group.add_argument("--engine", choices=("ray",), help=text)
    add = _adder(group)
    add("--ray-address ADDRESS", "of a running cluster (default RAY_ADDRESS, else one of its own)")
    add("--ray-workers N", "how many (default one for each 4 CPUs, or for each GPU)", POSITIVE)
    add("--num-gpus X", "GPUs of a worker, also a share (default 1 where --device is one)", AMOUNT)
    add("--job FOLDER", "for the job, where workers see another folder than INDEX")


def _online(add: Callable[..., None]) -> None:
    add(*MOVED)
    add("--onnx FILE", "the network as `embedcam export` wrote it, run without torch")


def _stored(add: Callable[..., None]) -> None:
    add("--model FILE", "in place of INDEX: what `embedcam model` wrote, with --store")
    add("--store URL", "where the rows are that `embedcam rows` wrote")


def _runtime(group: _ActionsContainer, onnx: bool = True) -> None:
    text = "what runs the forward passes (default torch, of an index as it was built)"
    group.add_argument("--runtime", choices=("torch", "onnx"), help=text)
    if onnx:
        _adder(group)("--onnx FILE", "the network as `embedcam export` wrote it, for those passes")


def _words(add: Callable[..., None], text: str) -> None:
    add("--text TEXT", text, str, action="append")
    text = "with --text: which places speak for that, and which for these words"
    add("--above-text TEXT", text, str)
    text = ".npy [n D]: the words' embeddings, for networks without a tower for texts"
    add("--text-embedding FILE", f"{text}; --above-text's is the last")


def _transfer(add: Callable[..., None]) -> None:
    add("--transfer", "how neighbours count (default mean)", choices=("mean", "distance"))
    text = "correlation that nine in ten such maps must reach to count as trusted (default 0.5)"
    add("--trusted-from T", text, SHARE)
    add("--fallback", "where the transfer is not trusted, compute the weights on the query itself")


def build(command: ArgumentParser) -> None:
    """Declare the options of `embedcam build`."""
    add = _common(command)
    add("images IMAGES", COLLECTION, nargs="?")
    add(*INDEX)
    _built(command, ("--refit", "redo a finished index"))
    _engine(command)
    title = "from features instead of images", "the layer's HxW is given by --grid"
    add = _adder(command.add_argument_group(*title))
    add("--embeddings FILE", ".npy [N D]")
    add("--pooled FILE", ".npy [N K]: mean activations")
    add("--positive-pooled FILE", ".npy [N K]: mean of max(A, 0)")
    add("--ids FILE", "CSV with id[,label], or tables; a row an embedding")


def _built(command: ArgumentParser, *more: tuple[str, str]) -> None:
    """Declare what is built, and how."""
    from ..recipe.choices import Choices

    add = _adder(command)
    text = "default, paper, unlabelled, or a TOML file; other options win over it"
    add("--recipe NAME|FILE", text)
    add_options(command, ImageSettings, "labels", "exclude", "max_pixels")
    text = "captions, one a line, whose mean stands for any text, of a network that embeds words"
    add("--prompts FILE", f"{text} (default 221 that come along)")
    for option in more:
        add(*option)
    _network(command)
    group = command.add_argument_group("weights")
    add_options(group, Choices, "method", "layers", "fill", "options")
    add_options(group, Choices, tables=("weights",))
    group = command.add_argument_group("storage")
    add_options(group, Choices)
    _adder(group)("--no-own-maps", "keep no maps of the images")
    _adder(group)("--no-trust", "calibrate neither trust nor match")
    _runtime(_work(command))


def plan(command: ArgumentParser) -> None:
    """Declare the options of `embedcam plan`."""
    add = _common(command)
    add("images IMAGES", COLLECTION, nargs="?")
    add(*JOB)
    text = "how many (default: one of each 256 images, at most 1000)"
    add("--pieces P", text, POSITIVE)
    onto = _adder(command.add_mutually_exclusive_group())
    onto("--add INDEX", "the images are added to this index, by its recipe", dest="add_to")
    onto("--refit INDEX", "this index is built again; without IMAGES, on those that it knows")
    add("--skip-existing", "with --add: leave out images that INDEX holds already")
    _built(command)


def shard(command: ArgumentParser) -> None:
    """Declare the options of `embedcam shard`."""
    add = _common(command, JOB)
    add("piece I", "number of the piece, from 0", WHOLE)
    add("--of N", "of N pieces, whatever the plan has", POSITIVE)
    add("--workers N", "threads that decode images", WHOLE)
    _network(command)


def merge(command: ArgumentParser) -> None:
    """Declare the options of `embedcam merge`."""
    _common(command, JOB, INDEX)("--workers N", "threads that decode images", WHOLE)
    _network(command)


def add(command: ArgumentParser) -> None:
    """Declare the options of `embedcam add`."""
    _common(command, INDEX, ("images IMAGES", COLLECTION))
    add = _adder(command.add_mutually_exclusive_group())
    add("--skip-existing", "leave out images that INDEX holds already")
    text = "IMAGES is all that INDEX was built from: take in what is new, changed and vanished"
    add("--update", text)
    add_options(command, ImageSettings, "labels", "exclude", "max_pixels")
    _network(command)
    _runtime(_work(command))
    _engine(command)


def remove(command: ArgumentParser) -> None:
    """Declare the options of `embedcam remove`."""
    add = _common(command, INDEX)
    add("ids ID", "ids of images", nargs="*")
    add("--from FILE", "ids, one a line; - for stdin", dest="file")


def calibrate(command: ArgumentParser) -> None:
    """Declare the options of `embedcam calibrate`."""
    _common(command, INDEX, ("--no-trust", "match alone: no pictures, no network"), MOVED)
    _network(command)
    _work(command)


def compact(command: ArgumentParser) -> None:
    """Declare the options of `embedcam compact`."""
    text = "make the FAISS file again; FACTORY another one than it had"
    _common(command, INDEX)("--rebuild-faiss FACTORY", text, nargs="?", const=True, default=False)


def compress(command: ArgumentParser) -> None:
    """Declare the options of `embedcam compress`."""
    add = _common(command, INDEX, ("output OUTPUT", "folder of the new index"))
    add("--prototypes N", "how many, at most the number of images", POSITIVE, required=True)
    add("--per-class", "N for each label, each with its label")
    add("--replace", "swap an index of prototypes that OUTPUT holds for the new one")
    text = "of k-means and of the images that the loss is measured on (default 0)"
    add("--seed N", text, WHOLE, default=0)


def compare(command: ArgumentParser) -> None:
    """Declare the options of `embedcam compare`."""
    add = _common(command, INDEX)
    add("query IMAGE", "query picture; left out with --text")
    add("result RESULT", "id of an image of the index", nargs="?")
    add("--above ID", "why the result came above this image")
    _words(add, "with words in place of IMAGE: why the result answers them")
    add("-o --output PNG", "picture")
    text = "what this part of the query matches, in its pixels: left, top, right, bottom"
    ends = ("X0", "Y0", "X1", "Y1")
    command.add_argument("--box", help=text, type=float, nargs=4, metavar=ends)
    add("--lines N", "channels listed (default 10)", POSITIVE, default=10)
    add(*NAMED)
    add("--not-centred", "do not put apart what the average image of the index shares")
    add("--store URL", "where the rows are, INDEX being the file of their model")
    _online(add)
    add_options(command, ImageSettings, "max_pixels")
    _network(command)


def rows(command: ArgumentParser) -> None:
    """Declare the options of `embedcam rows`."""
    from ..index.row_batches import EMBEDDINGS

    add = _common(command, INDEX)
    text = "postgresql://..., FOLDER.lance, qdrant:FOLDER or FILE.parquet"
    add("--to URL", text, required=True)
    text = "how embeddings are written (default full); none where the store has them"
    add("--embedding", text, choices=tuple(EMBEDDINGS))
    add("--prune", "remove rows of images that INDEX does not know")
    add("--drop-generation G", "remove all rows of an old generation")


def model(command: ArgumentParser) -> None:
    """Declare the options of `embedcam model`."""
    _common(command, INDEX)("-o --output FILE", "file to write, model.embedcam", required=True)


def explain(command: ArgumentParser) -> None:
    """Declare the options of `embedcam explain`."""
    from ..recipe.choices import Choices

    add = _common(command, INDEX)
    add("queries IMAGE", "query pictures", nargs="*")
    _stored(add)
    add("-o --output PNG", "picture; a folder for many queries")
    add("--html FILE", "one self-contained page with all queries")
    text = "all queries (IMAGE may be a folder or a CSV) as FOLDER/index.html and JSON lines"
    add("--report FOLDER", text)
    text = "the activations averaged under each map, K numbers: with --json in its records; with "
    add("--features", f"{text}--report in its lines, and as FOLDER/features.npy, a row a line")
    text = "of a report: why each first result matches (default: up to 100 queries)"
    add("--receipts", text, action=BooleanOptionalAction)
    add("--batch-size N", "of a report: queries a pass (default by the device)", POSITIVE)
    text = "of a report, which begins with results of another label: {}"
    add_options(command, ImageSettings, "labels", help=text)
    text = "ask with words in place of a picture, or of IMAGE where they are; may be repeated"
    _words(add, text)
    one_way = _adder(command.add_mutually_exclusive_group())
    one_way("-n --n-neighbors N", "results a query (default 5)", POSITIVE)
    _transfer(add)
    add("--result ID", "explain by this one image of the index")
    text = "2 draws a finer map: the query is shown once more at twice the side, for about four "
    add("--detail", f"{text}more embeddings", type=int, choices=(1, 2))
    add("--above ID", "with --result: what speaks for the result rather than for this image")
    text = "compute the query's map itself, by any method (scorecam, rise, ...), in place of "
    add("--method NAME", f"{text}transferred weights")
    add_options(command, Choices, "fill", "options")
    text = "ids found elsewhere, comma-separated or repeated, instead of a search"
    one_way("--neighbors IDS", text, action="append")
    text = "where INDEX holds IMAGE, the same file and not a copy, leave it out of the results"
    add("--exclude-query", text)
    add("--scale", "of the results' colours (default joint)", choices=("joint", "each"))
    _online(add)
    add_options(command, ImageSettings, "exclude", "max_pixels")
    _network(command)


def serve(command: ArgumentParser) -> None:
    """Declare the options of `embedcam serve`."""
    from ..service.limits import Limits

    command.set_defaults(detail=1)
    add = _common(command)
    add(*INDEX, nargs="?")
    _stored(add)
    add("--host NAME", "default 127.0.0.1", default="127.0.0.1")
    add("--port N", "0 takes a free one (default 8000)", WHOLE, default=8000)
    text = "a name that requests may call this service by, such as a proxy's; may be repeated"
    add("--allow-host NAME", text, action="append")
    add("-n --n-neighbors N", "results a query (default 5)", POSITIVE)
    _transfer(add)
    add(*NAMED)
    _online(add)
    _runtime(command, onnx=False)
    group = command.add_argument_group(
        "limits",
        "Besides: 10 s for the head of a request, of 64 KiB at most; 20 s for a client to read\n"
        "64 KiB of its answer, or the rest; 512 connections.",
    )
    add_options(group, Limits)
    _network(command)


def evaluate(command: ArgumentParser) -> None:
    """Declare the options of `embedcam evaluate`."""
    from ..evaluate.settings import Settings

    add = _common(command, INDEX)
    add("--images IMAGES", "query images, as for build", required=True)
    add("--indexed FOLDER", "where the indexed images lie now")
    add_options(command, ImageSettings, "labels", "exclude", "max_pixels")
    objects = _adder(command.add_mutually_exclusive_group())
    objects("--boxes CSV", "where the objects are")
    objects("--masks FOLDER", "the same, as masks")
    add("--html FILE", "one self-contained page")
    add("--csv FILE", "the numbers of each image")
    group = command.add_argument_group("what is measured")
    add_options(group, Settings, "measures")
    add = _adder(group)
    text = "methods that draw on the query itself, a column each, such as gradcam,xgradcam"
    add("--methods NAMES", text, NAMES, default=())
    text = "TOML recipes, a column each; weights are computed for the index's own pictures"
    add("--recipes FILES", text, NAMES, default=())
    add_options(group, Settings, "controls", "limit", "faithfulness", "scenes", "fidelity")
    add_options(group, Settings, tables=("",))
    _network(command)
    group = command.add_argument_group("work")
    add_options(group, Settings)
    _adder(group)("--workers N", "threads that decode images", WHOLE)
    add_options(group, ImageSettings, "on_unreadable")
    _runtime(group)


def export(command: ArgumentParser) -> None:
    """Declare the options of `embedcam export`."""
    _common(command, INDEX)("-o --output FILE", "ONNX file to write", required=True)
    _network(command)


def info(command: ArgumentParser) -> None:
    """Declare the options of `embedcam info`."""
    add = _common(command, INDEX)
    add("--ids", "list the ids of its images, one a line")
    text = "print a concepts.toml of the words in this file, one a line, by a network's text tower"
    add("--suggest-names FILE", text)
    _network(command)


def verify(command: ArgumentParser) -> None:
    """Declare the options of `embedcam verify`."""
    _common(command, INDEX)


def demo(command: ArgumentParser) -> None:
    """Declare the options of `embedcam demo`."""
    add = _common(command)
    text = "where everything is written (default demo-output)"
    add("folder FOLDER", text, nargs="?", default="demo-output")
    add("--seed N", "of scenes and training", WHOLE, default=0)
