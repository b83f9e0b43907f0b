"""Addresses of indexed images."""

from urllib.parse import quote


def item_url(prefix: str, name: str, what: str) -> str:
    """The path of an indexed image's picture or map.

    Args:
        prefix: path that a proxy serves the application under, or "".
        name: id, any string.
        what: "image" or "cam".
    """
    # Browsers resolve "." and "..", and proxies merge empty parts: such ids keep no slash.
    odd = any(part in ("", ".", "..") for part in name.split("/"))
    return f"{prefix}/items/{quote(name, safe='' if odd else '/', errors='replace')}/{what}"
