"""What an evaluation found: numbers of each image, their summary, and files of them."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .._files import write_whole
from ..render import Row, drawn_blocks


@dataclass(frozen=True, repr=False)
class Evaluation:
    """How good the maps of an index are.

    Attributes:
        summary: means with 95% intervals, comparisons with controls, curves, notes, flags and the
            settings; plain numbers and lists.
        rows: a dict for each image that was read, in the source's order; controls' numbers are in
            columns "CONTROL: MEASURE", and None stands where a measure does not apply.
        scenes: a dict for each question about a picture of two objects.
        examples: the best and the worst, as small pictures.
        grid: a row for each of a few questions, a picture for each way of drawing; of evaluations
            with methods or recipes.
    """

    summary: dict[str, Any]
    rows: list[dict[str, Any]]
    scenes: list[dict[str, Any]] = field(default_factory=list)
    examples: Sequence[Row] = ()
    grid: Sequence[Row] = ()

    def __repr__(self) -> str:
        done, flags = len(self.rows), len(self.summary["flags"])
        return f"<Evaluation of {self.summary['index']}: {done} images, {flags} flags>"

    def _repr_html_(self) -> str:
        """The verdict and the tables of `html`, for notebooks."""
        from .report import notices, tables

        return "\n".join(drawn_blocks([*notices(self.summary), *tables(self.summary)]))

    def to_dict(self) -> dict[str, Any]:
        """The summary, ready for JSON."""
        copied: dict[str, Any] = json.loads(json.dumps(self.summary))
        return copied

    def save_csv(self, path: str | Path) -> Path:
        """A line for each image.

        Raises:
            InputError: it cannot be written.
        """
        names: dict[str, None] = {}
        for row in self.rows:
            names.update(dict.fromkeys(row))
        text = io.StringIO()
        writer = csv.DictWriter(text, list(names), lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(self.rows)
        return write_whole(path, text.getvalue())

    def html(self) -> str:
        """The whole report as one self-contained page."""
        from .report import report

        return report(self)

    def save_html(self, path: str | Path) -> Path:
        """Write the report.

        Raises:
            InputError: it cannot be written.
        """
        return write_whole(path, self.html())
