"""Prompts: everyday captions whose mean embedding stands for text as such.

Pictures and texts of a two-tower network lie in two cones, apart from each other (the modality gap:
Liang et al., NeurIPS 2022, arXiv 2203.02053). Less the mean of its own kind, a text's embedding
says what is particular about it.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import InputError, NetworkError, reason
from ..index import Index
from ..network import EmbeddingNetwork
from ..network.module import one_thread
from .report import Stages

SHIPPED = Path(__file__).with_name("prompts.txt")
MOST_PROMPTS, MOST_LETTERS = 100_000, 10_000
_BATCH = 32


def read_prompts(path: str | Path = SHIPPED) -> list[str]:
    """Return the prompts of a file, one a line; empty lines are left out.

    Raises InputError for what is no such file.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: the prompts cannot be read ({reason(error)})") from error
    return check_prompts([line.strip() for line in text.splitlines() if line.strip()], str(path))


def check_prompts(prompts: Sequence[str], where: str = "prompts") -> list[str]:
    """Return a list of prompts that is one, or raise InputError."""
    if isinstance(prompts, str) or not all(isinstance(one, str) and one.strip() for one in prompts):
        raise InputError(f"{where}: give a list of texts, none of them empty")
    if not 2 <= len(prompts) <= MOST_PROMPTS or max(map(len, prompts)) > MOST_LETTERS:
        raise InputError(
            f"{where}: holds {len(prompts):,} prompts; give from 2 to {MOST_PROMPTS:,} captions, "
            f"one a line, of at most {MOST_LETTERS:,} letters"
        )
    return list(prompts)


def text_mean(network: EmbeddingNetwork, prompts: Sequence[str], stages: Stages) -> np.ndarray:
    """Return the mean embedding of prompts, float32 `[D]`; the same on any number of cores."""
    total, count = 0.0, len(prompts)
    with stages("prompts", count) as progressed, one_thread():
        for start in range(0, count, _BATCH):
            some = prompts[start : start + _BATCH]
            total = total + network.embed_texts(some).sum(0, dtype=np.float64)
            progressed(len(some))
    mean = np.asarray(total / count, np.float32)
    if not np.isfinite(mean).all():
        raise NetworkError("the network's text tower makes numbers that are none of the prompts")
    return mean


def has_mean_of(index: Index, network: EmbeddingNetwork, prompts: Sequence[str]) -> bool:
    """Return whether an index keeps the mean embedding of these prompts."""
    if "text_mean" not in index.shared():
        return False
    mean = text_mean(network, prompts, Stages(False))
    return bool(np.allclose(index.fitted("text_mean"), mean, atol=1e-5))
