"""A transformer's query explained from its last attention, beside its forward pass alone."""

from contextlib import closing
from pathlib import Path

from embedcam import EmbeddingNetwork, Similarity, cam_for, load_network
from embedcam.network import read_by

from .cases import SIZE, index_of, query_input
from .explaining import Query
from .timing import alternate, compared, section

BAR = 1.05
METHODS = {"Grad-ECLIP": "gradeclip", "MaskCLIP": "value"}


def report(name: str, rounds: int, folder: Path) -> str:
    """The online cost of weights transferred to a reading, one picture at a time."""
    network = load_network(name, weights="random", size=SIZE)
    rows = []
    for title, reading in METHODS.items():
        read = read_by(network, reading)
        with closing(Query(read, index_of(read, folder / reading), query_input())) as query:
            image = query.image[None]
            cases = {
                "forward alone": query.embed,
                "forward with its activations": lambda image=image, of=read: of.forward(image),
                "search apart": query.explain,
                "search, trust, match": query.explain_and_search,
            }
            took = alternate(cases, rounds, warmup=2, control=True)
            rows += compared(took, f"{title}: ", {"search apart": BAR})
    target = Similarity(network.forward(query_input(1)[None]).embedding[0].numpy())
    rows += compared(alternate(_on_the_query(network, target), max(2, rounds // 4)), "computed: ")
    note = f"{name}, batch of one. `search apart`: forward, transferred weights, map at {SIZE} px."
    head = ("case", "ms", "of the forward alone", "bar")
    return section("A transformer's last attention", note, head, rows)


def _on_the_query(network: EmbeddingNetwork, target: Similarity) -> dict[str, object]:
    image = query_input()
    methods = ("gradeclip", "maskclip", "rollout", "genericattention", "legrad")
    each = {
        method: lambda method=method: cam_for(network, image, target, method, progress=False)
        for method in methods
    }
    return {"forward": lambda: network.forward(image[None]), **each}
