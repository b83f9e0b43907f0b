"""Workers of a Ray cluster: the same bytes whatever is killed, one sentence whatever fails."""

import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from build_samples import everything
from photo_samples import picture, write_photos
from safetensors.torch import save_file
from torchvision.models import mobilenet_v2
from toys import seeded

from embedcam.errors import EmbedcamError, ImageError, InputError, NetworkMismatch
from embedcam.images import find_images
from embedcam.index import Index
from embedcam.network import load_network
from embedcam.offline import RayEngine, add_images, build_index, engine
from embedcam.recipe.recipe import Recipe

# Sockets and processes that Ray itself leaves to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
TOY = '''
import os, time
from pathlib import Path
from photo_samples import CROP, Flat, Pooled
from toys import seeded

HERE = Path(__file__).parent
IS_TEST = (HERE / "driver").read_text() == str(os.getpid())
if not IS_TEST:  # there a fixture does
    import embedcam.offline.plan

    embedcam.offline.plan.CHUNK = 4


def told(images):
    """Write a line a pass: the process, how many images, and which."""
    if (HERE / "watched").exists():
        with open(HERE / "passes", "a") as file:
            file.write(f"{os.getpid()} {len(images)} {float(images.double().sum())}\\n")
        time.sleep(0.03)


class Watched(Pooled):
    def forward(self, images):
        told(images)
        return super().forward(images)


class WatchedFlat(Flat):
    def forward(self, images):
        told(images)
        return super().forward(images)


def make():
    return seeded(Watched, 4), CROP

def flat():
    return seeded(WatchedFlat, 4), CROP

def differs():
    return seeded(Pooled, 4 if IS_TEST else 5), CROP

def dies():
    if not IS_TEST:
        os._exit(3)
    return make()

def lacks():
    if not IS_TEST:
        import a_package_that_is_not_there
    return make()
'''
FEW: dict[str, Any] = {"batch_size": 2, "workers": 0, "progress": False}
PHOTOS, CHUNK = 36, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Photos, and a module of networks that this process and the workers import from there."""
    folder = tmp_path_factory.mktemp("ray")
    (folder / "ray_toy.py").write_text(TOY)
    (folder / "driver").write_text(str(os.getpid()))
    write_photos(folder / "photos", each=PHOTOS // 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setattr("embedcam.offline.plan.CHUNK", CHUNK)
        patch.setattr("os.fsync", lambda descriptor: None)
        yield folder
    sys.modules.pop("ray_toy", None)


@pytest.fixture(scope="module")
def two(folder: Path) -> Iterator[RayEngine]:
    """Two workers, of a cluster that the tests share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        with engine._cluster(None, 2):
            yield RayEngine(workers=2)


@pytest.fixture
def passes(folder: Path) -> Iterator[Callable[[], list[list[str]]]]:
    """What the networks were asked, a list [process, images, which] each pass."""
    (folder / "watched").touch()

    def read() -> list[list[str]]:
        file = folder / "passes"
        return [line.split() for line in file.read_text().splitlines()] if file.exists() else []

    yield read
    for name in ("watched", "passes"):
        (folder / name).unlink(missing_ok=True)


def network(name: str = "make", **settings: Any):
    return load_network(f"ray_toy:{name}", layer="relu", **settings)


def embedded(passes: list[list[str]]) -> int:
    """How many images the workers were shown, without the probe pictures that all look at."""
    probes = {which for process, _, which in passes if process == str(os.getpid())}
    return sum(int(n) for process, n, which in passes
               if process != str(os.getpid()) and which not in probes)  # fmt: skip


@contextmanager
def meanwhile(work: Callable[[], object]) -> Iterator[None]:
    """Do something in another thread, which has to be done by the end."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    yield
    thread.join(5)
    assert not thread.is_alive()


@contextmanager
def interrupted_after(true: Callable[[], object]) -> Iterator[None]:
    """What a user who presses Ctrl-C once something is so does to what is done here."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def press() -> None:
        until(true)
        os.kill(os.getpid(), signal.SIGINT)

    try:
        with meanwhile(press), pytest.raises(KeyboardInterrupt):
            yield
    finally:
        signal.signal(signal.SIGINT, before)


def kill_one(passes: Callable[[], list[list[str]]], after: int, but: set[str]) -> None:
    """Kill a process that has made more than so many passes."""

    def busy() -> list[str]:
        seen = [process for process, *_ in passes()]
        return [process for process in {*seen} - but if seen.count(process) > after]

    until(busy)
    os.kill(int(busy()[0]), signal.SIGKILL)


def test_interrupted_and_killed_each_costs_a_chunk_and_changes_no_byte(
    folder, two, tmp_path, passes
) -> None:
    source, of = find_images(folder / "photos"), {"trust": False, **FEW}
    index, me = tmp_path / "ray", str(os.getpid())
    net = network()
    net.identity()
    probe = len(passes())  # what each asks first
    with interrupted_after(lambda: [*index.glob(".building/embed-*/arrays.json")]):
        build_index(source, net, index, engine=RayEngine(workers=1), **of)
    first = {process for process, *_ in passes()} - {me}
    until(lambda: all(map(gone, first)), 20)
    assert (len(first), (index / "manifest.json").exists()) == (1, False)
    with meanwhile(lambda: kill_one(passes, probe + 3, {me, *first})):
        report = build_index(source, net, index, engine=two, **of)
    assert (report.n_images, next(iter(report.seconds))) == (PHOTOS, "embed")
    seen = passes()
    assert len({process for process, *_ in seen}) == 5  # this, one, two, and one in place of these
    assert PHOTOS <= embedded(seen) <= PHOTOS + 2 * CHUNK
    build_index(source, net, tmp_path / "one", **of)
    assert everything(index) == everything(tmp_path / "one")
    with Index.open(index) as made:
        assert len(set(made.ids)) == len(made) == PHOTOS


@pytest.mark.peers
def test_images_are_looked_at_again_and_added(folder, two, tmp_path) -> None:
    recipe, net = Recipe(triplets=4, method="gradcam++", rank=3), network("flat")
    photos, more = tmp_path / "photos", tmp_path / "job"
    write_photos(photos, each=4)
    for where, by in (("one", None), ("ray", two)):
        options = {"scratch_gb": 0, "engine": by, **FEW}
        build_index(find_images(photos), net, tmp_path / where, recipe, **options)
    assert everything(tmp_path / "ray") == everything(tmp_path / "one")
    picture(0, 90).save(photos / "0/new.png")
    picture(1, 91).save(photos / "1/0.png")
    (photos / "2/3.png").unlink()
    for where, by in (("one", None), ("ray", RayEngine(workers=1, job=more))):
        report = add_images(
            find_images(photos), net, tmp_path / where, update=True, engine=by, **FEW
        )
        assert (report.changes.new, report.changes.vanished) == (["0/new.png"], ["2/3.png"])
    assert everything(tmp_path / "ray") == everything(tmp_path / "one")
    assert not more.exists()


def test_what_a_worker_meets_is_said_as_here(folder, two, tmp_path, monkeypatch) -> None:
    (tmp_path / "p").mkdir()
    for number in range(9):
        picture(0, number).save(tmp_path / f"p/{number}.png")
    (tmp_path / "p/5.png").write_bytes(b"GIF8?")
    source, said, one = find_images(tmp_path / "p"), [], RayEngine(workers=1)
    for by in (None, one):
        with pytest.raises(ImageError) as met:
            build_index(source, network(), tmp_path / f"i{by is None}", engine=by, **FEW)
        said.append(str(met.value))
    assert said[0] == said[1]


@pytest.mark.peers
def test_the_page_goes_from_tar_shards_to_an_index(two, tmp_path, monkeypatch, say) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("embedcam.offline.plan.CHUNK", 256)  # as workers without the toy have it
    (tmp_path / "shards").mkdir()
    for number in range(2):
        with tarfile.open(tmp_path / f"shards/{number}.tar", "w") as tar:
            for row in range(3):
                content = BytesIO()
                picture(number, row).save(content, "PNG")
                for ending, part in (("png", content.getvalue()), ("cls", str(number).encode())):
                    about = tarfile.TarInfo(f"{number}{row}.{ending}")
                    about.size = len(part)
                    tar.addfile(about, BytesIO(part))
    save_file(seeded(mobilenet_v2).state_dict(), tmp_path / "mobilenet.safetensors")
    page = (Path(__file__).parents[1] / "docs" / "shards.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^## Ray$.*?^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert block.count("\n") <= 10
    for line in block.replace("\\\n", "").splitlines():
        code, out, err = say(*shlex.split(line)[1:])
        assert code == 0, err
    assert "6" in out
    built = say("build", "shards/", "one", "--network", "torchvision:mobilenet_v2",
                "--weights", "mobilenet.safetensors")  # fmt: skip
    assert built[0] == 0
    assert everything(tmp_path / "my.index") == everything(tmp_path / "one")


@pytest.mark.peers
def test_what_is_missing_in_a_worker_and_what_is_skipped(folder, two, tmp_path) -> None:
    (tmp_path / "p").mkdir()
    for number in range(9):
        picture(0, number).save(tmp_path / f"p/{number}.png")
    (tmp_path / "p/5.png").write_bytes(b"GIF8?")
    source, options = find_images(tmp_path / "p"), {"on_unreadable": "skip", **FEW}
    report = build_index(source, network(), tmp_path / "i", engine=two, **options)
    assert [name for name, _ in report.skipped] == ["5.png"]
    with pytest.raises(EmbedcamError, match="a_package_that_is_not_there") as met:
        build_index(source, network("lacks"), tmp_path / "i2", engine=two, **options)
    assert "\n" not in str(met.value)
    assert "Traceback" not in str(met.value)
    with pytest.raises(NetworkMismatch, match=r"i3/.building: this is not the network of the plan"):
        build_index(source, network("differs"), tmp_path / "i3", engine=two, **FEW)


@pytest.mark.peers
def test_a_piece_that_kills_its_worker_is_given_up(folder, two, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(engine, "TRIES", 1)
    source = find_images(folder / "photos")
    with pytest.raises(EmbedcamError, match=r"piece \d of 9 ended its process 2 times .*memory"):
        build_index(source, network("dies"), tmp_path / "i", engine=RayEngine(workers=1), **FEW)


def test_what_cannot_be_is_refused_before_anything_is_done(
    folder, two, tmp_path, monkeypatch, refused
) -> None:
    source, net = find_images(folder / "photos"), network()
    unnamed = network()
    unnamed.spec = None
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine").touch()
    for by, given, words in (
        (RayEngine(workers=50), net, "has room for 2 workers with a CPU each, and 50"),
        (RayEngine(num_gpus=1), net, "num_gpus = 1, and the network is on the CPU"),
        (
            RayEngine(address="10.0.0.1:6379"),
            net,
            r"is connected .* leave out the address '10.0.0.1:6379'",
        ),
        (RayEngine(job=other), net, "holds 'mine', which is no part of a job"),
        (two, unnamed, r"load the network by its name"),
    ):
        with pytest.raises(InputError, match=words):
            build_index(source, given, tmp_path / "i", engine=by, **FEW)
    for wrong in ({"workers": 0}, {"num_gpus": -1}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            RayEngine(**wrong)
    told = json.loads(engine._Worker(str(tmp_path / "unseen"), "{}", [], 1).piece(0, 1))
    assert (told["error"], told["errno"]) == ("InputError", None)
    assert "unseen: is not seen by the worker on" in told["text"]
    features = ["build", tmp_path / "i", "--embeddings", "e", "--pooled", "p", "--grid", "7x7"]
    refused(2, "leave out --engine", *features, "--engine", "ray")
    for option in ("--ray-workers", "--ray-address", "--num-gpus", "--job"):
        refused(2, f"{option} goes with --engine ray", "build", "x", "y", option, "1")
    monkeypatch.setitem(sys.modules, "ray", None)
    refused(2, 'pip install "embedcam[ray]"', "add", "x", "y", "--engine", "ray")


@pytest.mark.parametrize(
    ("nodes", "workers", "gpus", "shares"),
    [
        ([(2, 0)], None, 0, (2, 1)),
        ([(2, 0)], 2, 0, (1, 2)),
        ([(16, 0), (16, 0)], None, 0, (4, 8)),
        ([(2, 0), (2, 0), (0, 0)], None, 0, (2, 2)),
        ([(16, 0), (4, 0)], 5, 0, (4, 5)),
        ([(16, 0), (4, 0)], 6, 0, (3, 6)),
        ([(16, 4), (8, 0)], None, 1, (4, 4)),
        ([(16, 1)], None, 0.5, (8, 2)),
        ([(16, 1), (4, 2)], 3, 1, (2, 3)),
    ],
)
def test_shares_of_a_cluster(nodes, workers, gpus, shares) -> None:
    about = [{"Alive": True, "Resources": {"CPU": c, "GPU": g}} for c, g in nodes]
    about.append({"Alive": False, "Resources": {"CPU": 99.0}})
    assert engine._shares(about, workers, gpus) == shares


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder of a short name, as those of sockets have to be."""
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as folder:
        yield Path(folder)


def command(folder: Path, index: Path, temporary: Path, *more: str) -> subprocess.Popen[str]:
    words = ["build", "photos", str(index), "--network", "ray_toy:make", "--layer", "relu"]
    words += ["--batch-size", "2", "--no-trust", "--engine", "ray", "--ray-workers", "1"]
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    env = {**os.environ, "PYTHONPATH": paths, "TMPDIR": str(temporary)}
    return subprocess.Popen(
        [sys.executable, "-m", "embedcam", *words, *more],
        cwd=folder,
        env=env,
        text=True,
        stderr=subprocess.PIPE,
    )


def until(true: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def gone(process: str) -> bool:
    """Whether a process is there no more, or only to be waited for."""
    try:
        return ") Z " in Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return True


@pytest.mark.peers
@pytest.mark.parametrize(
    ("how", "own"), [(signal.SIGINT, True), (signal.SIGKILL, True), (signal.SIGKILL, False)]
)
def test_an_ended_driver_ends_its_workers_and_goes_on(
    folder, short, tmp_path, passes, two, how, own
) -> None:
    index, shared = tmp_path / "i", importlib.import_module("ray").get_runtime_context()
    driver = command(folder, index, short, *([] if own else ["--ray-address", shared.gcs_address]))
    until(lambda: [*index.glob(".building/embed-*/arrays.json")] or driver.poll() is not None)
    driver.send_signal(how)
    code, (_, said) = driver.wait(120), driver.communicate()
    workers = {process for process, *_ in passes()} - {str(driver.pid)}
    if how == signal.SIGINT:
        assert (code, said.splitlines()[-1]) == (
            130,
            "embedcam: interrupted; run the same command again to go on",
        )
        assert [*short.iterdir()] == []
    until(lambda: all(map(gone, workers)), 20)
    chunks = {one.parent.name: one.stat().st_ino for one in index.glob(".building/embed-*/*.json")}
    assert 0 < len(chunks) < PHOTOS / CHUNK
    (folder / "passes").unlink()
    source, of = find_images(folder / "photos"), {"trust": False, **FEW}
    build_index(source, network(), index, engine=two, **of)
    assert embedded(passes()) == PHOTOS - CHUNK * len(chunks)
    build_index(source, network(), tmp_path / "one", **of)
    assert everything(index) == everything(tmp_path / "one")
    with Index.open(index) as made:
        assert len(set(made.ids)) == len(made) == PHOTOS
