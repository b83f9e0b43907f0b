"""Options of the commands that make and change indexes."""

import argparse

from .options import (
    found_options,
    index_options,
    label_options,
    method_options,
    network_options,
    pixel_options,
    work_options,
)
from .values import names, path, positive, whole


def build_options(one: argparse.ArgumentParser) -> None:
    """Of `embedcam build`."""
    one.add_argument("images", metavar="IMAGES", nargs="?", type=path, help="folder or CSV")
    index_options(one)
    one.add_argument(
        "--recipe",
        metavar="NAME|FILE",
        help="default, paper, unlabelled, or a TOML file; other options win over it",
    )
    label_options(one)
    found_options(one)
    pixel_options(one)
    one.add_argument("--refit", action="store_true", help="redo a finished index")
    network_options(one)
    group = one.add_argument_group("weights")
    group.add_argument(
        "--method",
        metavar="NAME",
        help="gradcam (default), gradcam++, scorecam, ...: any that yields channel weights",
    )
    group.add_argument(
        "--layers",
        metavar="NAMES",
        type=names,
        help="of a method of several layers, such as layer2,layer3,layer4; the last is the one "
        "the network explains, named as a build prints it",
    )
    method_options(group)
    group.add_argument(
        "--target",
        metavar="NAME",
        help="auto (default: distinctive where it has a closed form, else margin), margin, "
        "distinctive, discriminant or centred",
    )
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
    group.add_argument("--no-trust", action="store_true", help="calibrate neither trust nor match")
    work_options(one)
    group = one.add_argument_group(
        "from features instead of images", "the layer's HxW is given by --grid"
    )
    group.add_argument("--embeddings", metavar="FILE", help=".npy [N D]")
    group.add_argument("--pooled", metavar="FILE", help=".npy [N K]: mean activations")
    group.add_argument("--positive-pooled", metavar="FILE", help=".npy [N K]: mean of max(A, 0)")
    group.add_argument("--ids", metavar="FILE", help="CSV with id[,label], a row an embedding")


def add_options(one: argparse.ArgumentParser) -> None:
    """Of `embedcam add`."""
    index_options(one)
    one.add_argument("images", metavar="IMAGES", type=path, help="folder or CSV")
    one.add_argument(
        "--skip-existing", action="store_true", help="leave out images that INDEX holds already"
    )
    one.add_argument(
        "--update",
        action="store_true",
        help="IMAGES is all that INDEX was built from: take in what is new, changed and vanished",
    )
    label_options(one)
    found_options(one)
    pixel_options(one)
    network_options(one)
    work_options(one)


def remove_options(one: argparse.ArgumentParser) -> None:
    """Of `embedcam remove`."""
    index_options(one)
    one.add_argument("ids", metavar="ID", nargs="*", help="ids of images")
    one.add_argument("--from", dest="file", metavar="FILE", help="ids, one a line; - for stdin")


def calibrate_options(one: argparse.ArgumentParser) -> None:
    """Of `embedcam calibrate`."""
    index_options(one)
    one.add_argument("--no-trust", action="store_true", help="match alone: no pictures, no network")
    one.add_argument("--images", metavar="FOLDER", help="where the indexed images lie now")
    network_options(one)
    work_options(one)


def compact_options(one: argparse.ArgumentParser) -> None:
    """Of `embedcam compact`."""
    index_options(one)
    one.add_argument(
        "--rebuild-faiss",
        metavar="FACTORY",
        nargs="?",
        const="",
        help="make the FAISS file again; FACTORY another one than it had",
    )


def compress_options(one: argparse.ArgumentParser) -> None:
    """Of `embedcam compress`."""
    index_options(one)
    one.add_argument("output", metavar="OUTPUT", type=path, help="folder of the new index")
    one.add_argument(
        "--prototypes",
        type=positive,
        metavar="N",
        required=True,
        help="how many, at most the number of images",
    )
    one.add_argument(
        "--per-class", action="store_true", help="N for each label, each with its label"
    )
    one.add_argument(
        "--replace",
        action="store_true",
        help="swap an index of prototypes that OUTPUT holds for the new one",
    )
    one.add_argument(
        "--seed",
        type=whole,
        metavar="N",
        default=0,
        help="of k-means and of the images that the loss is measured on (default 0)",
    )
