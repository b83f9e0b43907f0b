"""Parameters are taken at their word: one that means nothing here is refused, not passed over."""

from collections.abc import Callable, Collection
from difflib import get_close_matches

from fastapi import Request

from .errors import Refused


def only(*known: str, repeated: Collection[str] = ()) -> Callable[[Request], None]:
    """A dependency that refuses other query parameters, and one that is given twice.

    Args:
        known: names of those there are.
        repeated: those of them that may be given several times.
    """

    def check(request: Request) -> None:
        seen = [name for name, _ in request.query_params.multi_items()]
        for name in seen:
            if name not in known:
                near = get_close_matches(name[:64], known, 1)
                hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
                raise Refused(
                    422, "unknown_parameter", f"a query parameter means nothing here; {hint}"
                )
            if name not in repeated and seen.count(name) > 1:
                raise Refused(422, "repeated_parameter", f"{name}: given twice; give it once")

    return check
