"""Passes of an offline job go side by side: in order, each by itself, the same numbers."""

import threading
import time

import numpy as np
import pytest
import torch
from build_samples import dense, everything, pictures, quicken
from test_images import PLAIN, image_threads, numbered
from threadpoolctl import threadpool_info, threadpool_limits
from torch import Tensor, nn
from toys import seeded

from embedcam.errors import ImageError, InputError
from embedcam.images import ImageSource, map_batches
from embedcam.network import EmbeddingNetwork
from embedcam.network.module import one_thread
from embedcam.offline import build_index
from embedcam.preprocess import Preprocess
from embedcam.recipe.recipe import Recipe


class Remembering(nn.Module):
    """Keeps its input on itself for later, as some modules do; slow enough to be interrupted."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, stride=2), head
        self.alive = self.most = 0

    def forward(self, images: Tensor) -> Tensor:
        self.kept = images
        time.sleep(0.002)
        return self.head(torch.relu(self.stem(self.kept)))


POOLED = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
FLAT = (nn.Flatten(), nn.Linear(8 * 49, 5), nn.Tanh())


def network(head: tuple[nn.Module, ...] = POOLED, **settings) -> EmbeddingNetwork:
    module = seeded(lambda: Remembering(nn.Sequential(*head)), 3)
    return EmbeddingNetwork(module.eval(), "stem", preprocess=Preprocess((16, 16)), **settings)


@pytest.mark.parametrize("head", [POOLED, FLAT], ids=["pooled", "flat"])
def test_an_index_is_the_same_whatever_the_workers_and_the_threads(tmp_path, monkeypatch, head):
    quicken(monkeypatch)
    source, before = pictures(tmp_path / "images", 13), torch.get_num_threads()
    for name, workers, threads in (("one", 0, 1), ("three", 3, 1), ("two", 2, 2)):
        torch.set_num_threads(threads)
        try:
            given = source, network(head), tmp_path / name, dense(encoding="low-rank")
            build_index(*given, batch_size=2, workers=workers)
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
    assert everything(tmp_path / "one") == everything(tmp_path / "three")
    assert everything(tmp_path / "one") == everything(tmp_path / "two")
    assert image_threads() == []


def test_a_method_that_looks_again_does_so_side_by_side(tmp_path, monkeypatch):
    quicken(monkeypatch)
    source = pictures(tmp_path / "images", 9)
    for name, workers in (("one", 1), ("three", 3)):
        recipe = Recipe(method="scorecam", target="margin", encoding="dense")
        build_index(source, network(), tmp_path / name, recipe, batch_size=2, workers=workers)
    assert everything(tmp_path / "one") == everything(tmp_path / "three")


def test_networks_side_by_side_share_parameters_and_nothing_else() -> None:
    first, *others = network().side_by_side(3)
    assert len(others) == 2
    for other in others:
        assert other.module is not first.module
        pairs = zip(first.module.parameters(), other.module.parameters(), strict=True)
        assert all(a is b for a, b in pairs)
        assert other.runner.lock is not first.runner.lock
        assert other.runner.part is other.module.stem


def test_a_network_of_functions_goes_alone() -> None:
    trunk, head = nn.Conv2d(3, 8, 3).eval(), nn.Sequential(*POOLED).eval()
    parts = EmbeddingNetwork.from_parts(trunk, head, preprocess=Preprocess((16, 16)))
    assert parts.side_by_side(4) == [parts]

    class Single(nn.Conv2d):
        def __deepcopy__(self, memo: object) -> "Single":
            raise RuntimeError("there is one of me")

    module = nn.Sequential(Single(3, 8, 3), *POOLED).eval()
    single = EmbeddingNetwork(module, "0", preprocess=Preprocess((16, 16)))
    assert single.side_by_side(4) == [single]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with single.one_thread_each():
            assert torch.get_num_threads() == 2
        with network().one_thread_each():
            assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


class Keeper:
    """A hook that keeps a module's features for its forward."""

    def __init__(self, owner: nn.Module, copies: bool) -> None:
        self.owner, self.copies = owner, copies

    def __call__(self, module: nn.Module, given: object, out: Tensor) -> None:
        self.owner.kept = out

    def __deepcopy__(self, memo: dict[int, object]) -> "Keeper":
        copied = memo[id(self.owner)] if self.copies else self.owner
        return Keeper(copied, self.copies)


class Keeping(nn.Module):
    """Its forward reads what a hook kept, or calls a function that was made with the module."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.stem, self.relu, self.head = nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Linear(8, 5)
        self.kept = self.top = None
        if kind == "function":
            self.top = lambda maps: self.head(maps.mean((2, 3)))
        elif kind == "closure":
            self.relu.register_forward_hook(lambda *given: setattr(self, "kept", given[2]))
        else:
            self.relu.register_forward_hook(Keeper(self, kind != "one keeper"))

    def forward(self, images: Tensor) -> Tensor:
        maps = self.relu(self.stem(images))
        return self.top(maps) if self.top else self.head(self.kept.mean((2, 3)))


class Itself(Keeping):
    def __deepcopy__(self, memo: object) -> "Itself":
        return self


@pytest.mark.parametrize(
    ("module", "number"),
    [
        (lambda: Keeping("a keeper each"), 3),
        (lambda: Keeping("one keeper"), 1),
        (lambda: Keeping("closure"), 1),
        (lambda: Keeping("function"), 1),
        (lambda: Itself("a keeper each"), 1),
    ],
    ids=["a keeper each", "one keeper", "closure", "function", "itself"],
)
def test_a_module_that_keeps_things_elsewhere_goes_alone(tmp_path, monkeypatch, module, number):
    monkeypatch.setattr("embedcam.offline.plan.usable_cores", lambda: 3)
    quicken(monkeypatch)
    source = pictures(tmp_path / "images", 9)
    for name, workers in (("one", 0), ("three", 3)):
        made = EmbeddingNetwork(seeded(module, 3).eval(), "stem", preprocess=Preprocess((16, 16)))
        assert len(made.side_by_side(3)) == number
        build_index(source, made, tmp_path / name, dense(), batch_size=2, workers=workers)
    assert everything(tmp_path / "one") == everything(tmp_path / "three")


def test_more_workers_than_cores_read_and_do_not_compute(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("embedcam.offline.plan.usable_cores", lambda: 2)
    quicken(monkeypatch)
    threads, asked = set(), []
    opened, beside = ImageSource.open, EmbeddingNetwork.side_by_side

    def noted(source, position):
        threads.add(threading.current_thread().name)
        time.sleep(0.01)
        return opened(source, position)

    monkeypatch.setattr(ImageSource, "open", noted)
    monkeypatch.setattr(
        EmbeddingNetwork, "side_by_side", lambda net, n: asked.append(n) or beside(net, n)
    )
    source = pictures(tmp_path / "images", 9)
    build_index(source, network(), tmp_path / "index", dense(), batch_size=1, workers=5)
    assert set(asked) == {2}
    assert len(threads) == 5


def test_on_one_thread_blas_is_too_and_comes_back() -> None:
    def counts() -> list[int]:
        return [one["num_threads"] for one in threadpool_info() if one["user_api"] == "blas"]

    with threadpool_limits(limits=2, user_api="blas"):
        before = counts()
        with one_thread():
            assert set(counts()) == {1}
            assert torch.get_num_threads() == 1
        assert counts() == before
    assert 2 in before


def test_batches_are_run_side_by_side_and_come_in_order(tmp_path) -> None:
    alive, most, lock = set(), [0], threading.Lock()

    def run(name: str, batch) -> tuple[str, list[int]]:
        with lock:
            assert name not in alive, "one run is used by one thread at a time"
            alive.add(name)
            most[0] = max(most[0], len(alive))
        time.sleep(0.01 if batch.positions[0] else 0.05)
        with lock:
            alive.remove(name)
        return name, batch.positions.tolist()

    runs = [lambda batch, name=name: run(name, batch) for name in "ab"]
    given = numbered(tmp_path), np.arange(11), PLAIN, 2, runs
    seen = [positions for _, positions in map_batches(*given)]
    assert seen == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10]]
    assert most == [2]
    assert image_threads() == []


def test_the_first_unreadable_image_in_order_is_raised(tmp_path) -> None:
    source = numbered(tmp_path, 9, broken=(3, 5))
    runs = [lambda batch: batch.positions.tolist()] * 3
    read = map_batches(source, np.arange(9), PLAIN, 2, runs)
    assert next(read) == [0, 1]
    with pytest.raises(ImageError, match=r"03\.png: is empty"):
        next(read)
    assert image_threads() == []


def test_images_of_another_size_are_refused_across_batches(tmp_path) -> None:
    def by_place(image) -> np.ndarray:
        side = 4 if np.asarray(image)[0, 0, 0] < 50 else 5
        return np.zeros((3, side, side), np.float32)

    read = map_batches(numbered(tmp_path), np.arange(11), by_place, 5, [len, len])
    assert next(read) == 5
    with pytest.raises(
        InputError, match=r"05\.png: preprocessed to \[3, 5, 5\], the images before"
    ):
        list(read)
