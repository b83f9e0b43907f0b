"""The tables of the paper: which weights, of which target, stored and carried over how.

    python scripts/paper_tables.py DATA/birds20 DATA/objects24 \\
        --weights mobilenet_v2_imagenet.safetensors --output docs/results/paper.md --cache CACHE
    python scripts/paper_tables.py DATA/birds20 --weights FILE --sections averaging top-m

A data folder is as scripts/prepare_data.py makes it, CUB-200-2011 among others. The protocol, the
reference embedding, the pictures and the scenes are those of scripts/truth.py. With `--cache`, the
frozen features and the trained head are kept as .npy files, named by a digest of the network and of
the pictures: a killed run begins again where it stopped, and later runs are NumPy alone.

- *single*: one object; pixel AUC of its box or mask against the rest, of the signed map that its
  own weights draw; no change of contrast moves it. *Energy*: share of the map as drawn inside;
- *pasted*: two objects side by side; AUC of the side of the explained one against the other, of the
  signed map that the weights of the nearest other picture of its class draw. *Share*: of the map as
  drawn on that side; *right*: how often it is more. Two photographs side by side flatter every row:
  [frontier.md](frontier.md) has rows on real pictures of several objects;
- *mean activation*: the plain mean of the channels, no explanation at all;
- *- base*: difference to the row that the section names, picture by picture: its mean, and how many
  of the pictures have more, ties counted half;
- a map without any energy scores chance: the share of the area;
- brackets: 95% bootstrap intervals over pictures, or over scenes with their mirror images.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from paper.bench import Bench, read_bench
from paper.report import markdown
from paper.sections import SECTIONS

from embedcam import EmbedcamError

BASES = {
    "averaging": "Weights of the triplet margin through the norm (one encoding around it), random "
    "triplets, S = 1 to 100, and the exact mean over all. Base: one triplet in the same encoding.",
    "top-m": "All triplets, through the norm. Base of a top-M row: the low-rank weights of as many "
    "bytes (R = 2 M), or of full rank where that takes fewer; of a low-rank row: dense weights. "
    "Bytes: an image, own map included, as in truth.md. *Components*: principal components of the "
    "weights; *head's own*: dy/dz in the head's matrix.",
    "target": "Dense weights. Base: the margin over all triplets by the same way of the norm; of "
    "the hinge: the same 50 triplets without it. Nearness of positives: y = -mean D(f, f_p); "
    "distance of negatives: y = mean D(f, f_n).",
    "method": "Dense weights, the same random triplets. Base of Grad-CAM: the mean activation; of "
    "Grad-CAM++: Grad-CAM.",
    "sampling": "Dense Grad-CAM weights through the norm. Base: random negatives, as many "
    "triplets; of all triplets: 50 random ones.",
    "transfer": "Five folds: each picture is a query once, the other four folds are the index. The "
    "direct map has the query as its anchor and the index's pictures of its label as positives, "
    "and the method, target, norm and encoding of the index; the default's is whitened by the "
    "index and has the query's own part, as where a map is computed on a query itself. "
    "*Correlation*: of the two signed maps. *Kept*: mean energy (share) over that of the direct "
    "maps. *Distance*: neighbours weigh as 1 / distance. *Prototypes*: k-means over "
    "the index's embeddings, the mean of each group's unit weights. Second table, two-object "
    "scenes: drawn with weights of the explained picture's nearest others of its class, beside "
    "weights whose cotangent is those results' own target, differentiated in the scene itself; "
    "around the norm these are the same weights, and no row.",
}


def main() -> None:
    options = arguments()
    try:
        benches = [read_bench(folder, options.weights, options.cache) for folder in options.data]
    except EmbedcamError as error:
        sys.exit(f"paper_tables: {error}")
    print(report(benches, options.sections, options.output))
    if options.output:
        print(f"written to {options.output}")


def report(benches: Sequence[Bench], sections: Sequence[str], output: Path | None) -> str:
    """Every section's tables, figure and findings, behind the bars; written where wanted."""
    texts, bars = [], []
    for name in sections:
        section = SECTIONS[name]
        found = {bench.name: section.measure(bench) for bench in benches}
        lines = [f"## {section.title}", "", BASES[name], "", section.said(found), ""]
        if output:
            picture = Path("figures") / f"paper-{name}.png"
            section.draw(found, output.parent / picture)
            lines += [f"![{section.title}]({picture.as_posix()})", ""]
        for data, rows in found.items():
            lines += [f"### {data}", "", section.table(rows)]
        texts.append("\n".join(lines))
        bars += section.bars(found)
        print(f"{name}: measured", file=sys.stderr, flush=True)
    names = [bench.name for bench in benches]
    parts = [_preface(benches, sections)]
    if bars:
        head = markdown(["bar", "of", *names], []) + "\n".join(bar.line() for bar in bars)
        parts.append(f"## The bars\n\n{head}\n")
    text = "\n".join([*parts, *texts])
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
    return text


def _preface(benches: Sequence[Bench], sections: Sequence[str]) -> str:
    names = " ".join(f"DATA/{bench.name}" for bench in benches)
    chosen = "" if list(sections) == list(SECTIONS) else f" --sections {' '.join(sections)}"
    rules = (__doc__ or "").partition("NumPy alone.\n\n")[2]
    made = "\n\n".join(bench.said() for bench in benches)
    return (
        "# The paper's tables\n\n"
        f"Made by `python scripts/paper_tables.py {names} --weights "
        f"mobilenet_v2_imagenet.safetensors --output docs/results/paper.md{chosen}`, seeds 0; the "
        "protocol is that of [truth.md](truth.md). Where two figures stand with a stroke between "
        f"them, they are of {' / '.join(bench.name for bench in benches)}. The figures in "
        "sentences are this run's; the words around them were written for birds20 and objects24."
        f"\n\n{made}\n\n{rules}"
    )


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", nargs="+", type=Path, help="folders with annotations.csv")
    parser.add_argument("--weights", required=True, help="ImageNet weights of MobileNetV2")
    parser.add_argument("--output", type=Path,
                        help="Markdown file to write, figures beside it in figures/")  # fmt: skip
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS),
                        help="only these")  # fmt: skip
    parser.add_argument("--cache", type=Path, help="folder where frozen features are kept")
    return parser.parse_args(given)


if __name__ == "__main__":
    main()
