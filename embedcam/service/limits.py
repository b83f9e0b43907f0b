"""What one request, and all of them together, may cost."""

from dataclasses import dataclass

from .._options import check, setting


@dataclass(frozen=True)
class Limits:
    """The limits of a service; each refusal names the one that was met.

    Parameters
    ----------
    body_bytes : of a request's body, counted while it comes in
    pixels : of an uploaded picture, told from its header before any is decoded
    n_neighbors : results that a request may ask for
    seconds : from the first byte of the body to the answer, at least 0.01
    concurrency : requests that are worked on at the same time; one more is told to come back
    batch : pictures that go through the network together; None for what suits it
    batch_seconds : how long a picture waits for others that are being read meanwhile
    kept_bytes : of what is kept of indexed pictures, so that words are explained without a pass
    store_seconds : that a store, where there is one, may take for one question

    Raises
    ------
    InputError
        A limit that nothing could pass.
    """

    body_bytes: int = setting(
        20_000_000, "BYTES", "of a request (default 20000000)", least=1, flag="max_body"
    )
    pixels: int = setting(
        25_000_000, "N", "of a picture (default 25000000)", least=1, flag="max_pixels"
    )
    n_neighbors: int = setting(
        100, "N", "of a request (default 100)", least=1, flag="max_neighbors"
    )
    seconds: float = setting(
        30.0, "SECONDS", "for the body, and for the answer (30)", least=0.01, flag="timeout"
    )
    concurrency: int = setting(16, "N", "requests at a time (default 16)", least=1)
    batch: int | None = setting(
        None, "N", "pictures a pass of the network (default by the device)", kind=int, least=1
    )
    batch_seconds: float = setting(0.005, least=0.0)
    kept_bytes: int = setting(
        256_000_000, "BYTES", "kept of pictures that words find (256000000)", least=0, flag="kept"
    )
    store_seconds: float = setting(
        2.0, "SECONDS", "for an answer of the store (default 2)", least=0.01
    )

    def __post_init__(self) -> None:
        check(self)
