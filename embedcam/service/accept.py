"""Which of the types on offer a client wants (RFC 9110, section 12.5.1)."""

from collections.abc import Sequence

from .errors import Refused


def choose(accept: str | None, offers: Sequence[str]) -> str:
    """The best of the offered types, the first of them where the client does not mind.

    Args:
        accept: the header; None or empty takes anything.
        offers: media types, the server's favourite first.

    Raises:
        Refused: 406, none of them will do.
    """
    ranges = [_range(part) for part in (accept or "*/*").split(",") if part.strip()]
    # Stable: among equals the server's order stands.
    best = max(offers, key=lambda offer: _quality(offer, ranges))
    if _quality(best, ranges) <= 0:
        raise Refused(
            406, "no_such_type", f"this is answered as {' or '.join(offers)}; ask for one of them"
        )
    return best


def _range(part: str) -> tuple[str, str, float]:
    kind, *parameters = (word.strip().lower() for word in part.split(";"))
    quality = 1.0
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            quality = _number(value.strip())
    main, _, sub = kind.partition("/")
    return main, sub, quality


def _number(text: str) -> float:
    """0 to 1; what is no such number counts as 0, for it asks for nothing."""
    plain = len(text) <= 5 and text.replace(".", "", 1).isascii()
    if not plain or not text.replace(".", "", 1).isdigit():
        return 0.0
    return min(float(text), 1.0)


def _quality(offer: str, ranges: Sequence[tuple[str, str, float]]) -> float:
    """Of the most specific range that covers the offer."""
    main, _, sub = offer.partition("/")
    covering = [
        (2 * (given[1] != "*") + (given[0] != "*"), given[2])
        for given in ranges
        if given[0] in (main, "*") and given[1] in (sub, "*")
    ]
    if not covering:
        return 0.0
    most = max(specific for specific, _ in covering)
    return max(quality for specific, quality in covering if specific == most)
