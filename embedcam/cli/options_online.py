"""Options of the commands that ask an index."""

import argparse

from .options import (
    found_options,
    index_options,
    label_options,
    method_options,
    network_options,
    online_options,
    pixel_options,
    transfer_options,
)
from .values import amount, names, path, positive, whole


def compare_options(one: argparse.ArgumentParser) -> None:
    """Of `embedcam compare`."""
    index_options(one)
    one.add_argument("query", metavar="IMAGE", type=path, help="query picture")
    one.add_argument("result", metavar="RESULT", help="id of an image of the index")
    one.add_argument("--above", metavar="ID", help="why the result came above this image")
    one.add_argument("-o", "--output", metavar="PNG", type=path, help="picture")
    one.add_argument(
        "--lines", type=positive, default=10, metavar="N", help="channels listed (default 10)"
    )
    one.add_argument(
        "--not-centred",
        action="store_true",
        help="do not put apart what the average image of the index shares",
    )
    online_options(one)
    pixel_options(one)
    network_options(one)


def explain_options(one: argparse.ArgumentParser) -> None:
    """Of `embedcam explain`."""
    index_options(one)
    one.add_argument("queries", metavar="IMAGE", nargs="+", type=path, help="query pictures")
    one.add_argument(
        "-o", "--output", metavar="PNG", type=path, help="picture; a folder for many queries"
    )
    one.add_argument(
        "--html", metavar="FILE", type=path, help="one self-contained page with all queries"
    )
    one.add_argument(
        "--report",
        metavar="FOLDER",
        type=path,
        help="all queries (IMAGE may be a folder or a CSV) as FOLDER/index.html and JSON lines",
    )
    one.add_argument(
        "--features",
        action="store_true",
        help="the activations averaged under each map, K numbers: with --json in its records; with "
        "--report in its lines, and as FOLDER/features.npy, a row a line",
    )
    one.add_argument(
        "--batch-size", type=positive, metavar="N", help="of a report: queries a pass (default 16)"
    )
    label_options(one, "of a report, which begins with results of another label: ")
    one.add_argument(
        "-n", "--n-neighbors", type=positive, metavar="N", help="results a query (default 5)"
    )
    transfer_options(one)
    one.add_argument("--result", metavar="ID", help="explain by this one image of the index")
    one.add_argument(
        "--detail",
        type=int,
        choices=(1, 2),
        default=1,
        help="2 draws a finer map: the query is shown once more at twice the side, for about four "
        "more embeddings",
    )
    one.add_argument(
        "--above",
        metavar="ID",
        help="with --result: what speaks for the result rather than for this image",
    )
    one.add_argument(
        "--method",
        metavar="NAME",
        help="compute the query's map itself, by any method (scorecam, rise, ...), in place of "
        "transferred weights",
    )
    method_options(one)
    one.add_argument(
        "--neighbors",
        metavar="IDS",
        action="append",
        help="ids found elsewhere, comma-separated or repeated, instead of a search",
    )
    one.add_argument(
        "--exclude-query",
        action="store_true",
        help="where INDEX holds IMAGE, the same file and not a copy, leave it out of the results",
    )
    one.add_argument(
        "--scale",
        choices=("joint", "each"),
        default="joint",
        help="of the results' colours (default joint)",
    )
    online_options(one)
    found_options(one)
    pixel_options(one)
    network_options(one)


def serve_options(one: argparse.ArgumentParser) -> None:
    """Of `embedcam serve`."""
    index_options(one)
    one.add_argument(
        "--host", metavar="NAME", type=path, default="127.0.0.1", help="default 127.0.0.1"
    )
    one.add_argument(
        "--port", metavar="N", type=whole, default=8000, help="0 takes a free one (default 8000)"
    )
    one.add_argument(
        "--allow-host",
        metavar="NAME",
        type=path,
        action="append",
        help="a name that requests may call this service by, such as a proxy's; may be repeated",
    )
    one.add_argument(
        "-n", "--n-neighbors", type=positive, metavar="N", help="results a query (default 5)"
    )
    transfer_options(one)
    online_options(one)
    group = one.add_argument_group(
        "limits",
        "Besides: 10 s for the head of a request, of 64 KiB at most; 20 s for a client to read\n"
        "64 KiB of its answer, or the rest; 512 connections.",
    )
    group.add_argument(
        "--max-body", metavar="BYTES", type=positive, help="of a request (default 20000000)"
    )
    group.add_argument(
        "--max-pixels", metavar="N", type=positive, help="of a picture (default 25000000)"
    )
    group.add_argument(
        "--max-neighbors", metavar="N", type=positive, help="of a request (default 100)"
    )
    group.add_argument(
        "--timeout", metavar="SECONDS", type=amount, help="for the body, and for the answer (30)"
    )
    group.add_argument(
        "--concurrency", metavar="N", type=positive, help="requests at a time (default 16)"
    )
    group.add_argument(
        "--batch", metavar="N", type=positive, help="pictures a pass of the network (default 8)"
    )
    network_options(one)


def evaluate_options(one: argparse.ArgumentParser) -> None:
    """Of `embedcam evaluate`."""
    index_options(one)
    one.add_argument(
        "--images", metavar="IMAGES", type=path, required=True, help="query images: folder or CSV"
    )
    one.add_argument("--indexed", metavar="FOLDER", help="where the indexed images lie now")
    label_options(one)
    found_options(one)
    pixel_options(one)
    one.add_argument("--boxes", metavar="CSV", type=path, help="where the objects are")
    one.add_argument("--masks", metavar="FOLDER", type=path, help="the same, as masks")
    one.add_argument("--html", metavar="FILE", type=path, help="one self-contained page")
    one.add_argument("--csv", metavar="FILE", type=path, help="the numbers of each image")
    group = one.add_argument_group("what is measured")
    group.add_argument(
        "--measures",
        metavar="NAMES",
        type=names,
        help="of retrieval, localisation, faithfulness, objects, fidelity, sanity (default all)",
    )
    group.add_argument(
        "--methods",
        metavar="NAMES",
        type=names,
        help="methods that draw on the query itself, a column each, such as gradcam,xgradcam",
    )
    group.add_argument(
        "--recipes",
        metavar="FILES",
        type=names,
        help="TOML recipes, a column each; weights are computed for the index's own pictures",
    )
    group.add_argument(
        "--no-controls", action="store_true", help="leave out what the maps are held against"
    )
    group.add_argument("--limit", type=positive, metavar="N", help="images queried, a sample")
    group.add_argument(
        "--faithfulness",
        type=whole,
        metavar="N",
        help="images whose pixels are removed and whose controls are drawn (default 50)",
    )
    group.add_argument(
        "--scenes", type=whole, metavar="N", help="pairs of pictures, side by side (default 100)"
    )
    group.add_argument(
        "--fidelity",
        type=whole,
        metavar="N",
        help="images whose own map is computed and held against transferred ones (default 100)",
    )
    group.add_argument(
        "-n", "--n-neighbors", type=positive, metavar="N", help="neighbours a map (default 5)"
    )
    group.add_argument(
        "--transfer", choices=("mean", "distance"), help="how neighbours count (default mean)"
    )
    group.add_argument(
        "--steps", type=positive, metavar="N", help="of deletion and insertion (default 20)"
    )
    group.add_argument(
        "--removed",
        type=amount,
        metavar="SHARE",
        help="of the pixels, for the rank drop (default 0.2)",
    )
    group.add_argument(
        "--threshold",
        type=amount,
        metavar="SHARE",
        help="of a map's largest value, for IoU and boxes (default 0.2)",
    )
    group.add_argument(
        "--fill",
        choices=("mean", "black", "blur"),
        help="in place of removed pixels (default mean)",
    )
    group.add_argument(
        "--examples", type=whole, metavar="N", help="best and worst on the page (default 3 each)"
    )
    group.add_argument("--seed", type=whole, metavar="N", help="of every sample (default 0)")
    network_options(one)
    group = one.add_argument_group("work")
    group.add_argument(
        "--batch-size", type=positive, metavar="N", help="images a pass (default 8 on a CPU)"
    )
    group.add_argument("--workers", type=whole, metavar="N", help="threads that decode images")
    group.add_argument(
        "--on-unreadable",
        choices=("fail", "skip"),
        help="what to do with an image that cannot be read or embedded (default fail)",
    )


def export_options(one: argparse.ArgumentParser) -> None:
    """Of `embedcam export`."""
    index_options(one)
    one.add_argument(
        "-o", "--output", metavar="FILE", type=path, required=True, help="ONNX file to write"
    )
    network_options(one)
