"""How good an index's maps are, measured on query images; and whether the network retrieves at all.

    images -> one forward -> neighbours, transferred weights, map -> numbers an image -> summary

settings.py      what is measured, on how many images; the measures by name
queries.py       which images are queried, and which of them the index holds itself
gallery.py       the index as what is ranked: labels, exact ranks, mAP@R
regions.py       boxes and masks, brought onto the map's grid
maps.py          from network inputs to maps: transferred, and of any other weights
controls.py      random weights, the weights of wrong images, a network of shuffled parameters
measures.py      retrieval, localisation and two objects, map by map
work.py          what every group of measures reads, a batch of images at a time
explained.py     group: every image explained; retrieval and localisation
compared.py      group: a sample beside its controls, and its pixels removed
faithfulness.py  masked images through the network: deletion, insertion, rank drop, ROAD
scenes.py        group: two pictures side by side, and boxes of several labels
fidelity.py      group: transferred weights beside an image's own
summary.py       means with intervals, and flags for what does not beat its controls
evaluation.py    what comes out; report.py draws it, with examples.py
run.py           the groups, one after another, from rows to rows

An image that lies in the index never explains itself. (An index of prototypes does not know which
images were merged into it, and the findings say so.)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .settings import Settings

if TYPE_CHECKING:
    from .evaluation import Evaluation
    from .run import evaluate_index

__all__ = ["Evaluation", "Settings", "evaluate_index"]


def __getattr__(name: str) -> Any:
    modules = {"Evaluation": "evaluation", "evaluate_index": "run"}
    if name not in modules:
        raise AttributeError(f"module 'embedcam.evaluate' has no attribute {name!r}")
    return getattr(import_module(f".{modules[name]}", __name__), name)
