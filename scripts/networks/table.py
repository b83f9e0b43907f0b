"""The page of networks: what was found for each, by library and family."""

from collections.abc import Mapping, Sequence

from .cases import SOURCES
from .trial import Tried

_INTRO = """# Networks by name

{summary}

```python
from embedcam import load_network

# --network and --weights on the command line; without weights the published ones
network = load_network("timm:convnext_atto", weights="random")
```

Every network below was made with random weights and given nothing but its name: an index of eight
pictures was built, a query explained, and receipts of its three nearest asked for. {exported}

The layer is where the library's own trunk ends, if what follows reads its positions. Else it is
found by running the network once: the last layer that all of the picture still goes through, if
one is late in the network (CaiT and XCiT, whose class token joins after the blocks), and without
one the norm before the last attention, where positions last count. Of several streams of
positions side by side (CoaT, CrossViT) the finest is explained; loading says so to the logger
`embedcam`, with the names of the others. `layer=` (`--layer`) takes another.

- **what follows** the layer: *pooled, affine* is linear in the mean over positions; *pooled, norm,
  affine* is so around a LayerNorm or RMSNorm, which a receipt holds without a gradient; *pooled*
  does something else with that mean; *other* reads positions, as attention does.
- **receipt**: *exact*, perhaps with parts of what follows *held* as they are, or of *first order*.
- **positions, parts**: the shares of the similarity that positions have, and parts that are none,
  such as the class token before the last attention or an MLP behind it; what is left to 100% is
  the head's biases, or not of first order. Medians of three receipts, nothing put apart.
- **seconds** for all of it, on one core of a machine that others use, too; **ONNX** for writing
  the file and holding it against torch, empty where it was not tried.

Random weights say nothing about how good a map is, and with trained ones remainders are others.
Written by `python -m scripts.networks --export --output docs/networks.md`.
"""
_REFUSED = "refused: "
_HEAD = """\
| family | network | layer | grid, channels | what follows | receipt | positions | parts | seconds \
| ONNX |
|---|---|---|---|---|---|---|---|---|---|"""


def page(tried: Mapping[str, Tried]) -> str:
    """Return the page in Markdown of networks that were tried, by their names."""
    all_of = list(tried.values())
    exported = [one for one in all_of if one.onnx]
    files = sum(not one.onnx.startswith(_REFUSED) for one in exported)
    words = f"{files} of {len(exported)} could be written as ONNX files, too." if exported else ""
    parts = [_INTRO.format(summary=f"**{summary(all_of)}.**", exported=words)]
    for library, (prefix, families) in SOURCES.items():
        rows = [
            _row(family, name, tried[f"{prefix}:{name}"])
            for family, names in families.items()
            for name in names
            if f"{prefix}:{name}" in tried
        ]
        if rows:
            parts.append("\n".join([f"## {library}\n", _HEAD, *rows]))
    no_file = {one.name: one.onnx for one in exported if one.onnx.startswith(_REFUSED)}
    said = {
        "Refused": {one.name: one.said for one in all_of if not one.works},
        "No ONNX file": {name: words.removeprefix(_REFUSED) for name, words in no_file.items()},
    }
    for title, sentences in said.items():
        if sentences:
            lines = [f"- `{name}`: {sentence}" for name, sentence in sentences.items()]
            parts.append("\n".join([f"## {title}\n", *lines]))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def summary(tried: Sequence[Tried]) -> str:
    """Return how many networks are explained without any option."""
    works = sum(one.works for one in tried)
    crashed = sum(one.crashed for one in tried)
    said = f"{works} of {len(tried)} networks are explained by one line, without any option"
    return f"{said}; {crashed} ended in a traceback" if crashed else said


def _row(family: str, name: str, one: Tried) -> str:
    if not one.works:
        return f"| {family} | {name} | `{one.layer}` | | refused, see below | | | | | |"
    grid = one.grid or (0, 0)
    file = f"{one.seconds.get('export', 0):.0f}" if one.onnx else ""
    file = "refused" if one.onnx.startswith(_REFUSED) else file
    held = f"exact; held: {', '.join(one.held)}" if one.held else "exact"
    cells = (
        family,
        name,
        f"`{one.layer}`",
        f"{grid[0]} x {grid[1]}, {one.channels}",
        one.kind,
        held if one.exact else "first order",
        f"{one.positions:.0%}",
        f"{one.parts:.0%}" if one.parts else "",
        f"{sum(one.seconds.values()) - one.seconds.get('export', 0):.0f}",
        file,
    )
    return f"| {' | '.join(cells)} |"
