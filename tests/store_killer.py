"""Copies the rows of an index into a store, as `embedcam rows` does: STORE INDEX; to be killed."""

import sys
from contextlib import closing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import embedcam.stores.copying as copying
import embedcam.stores.parquet as parquet
from embedcam.index import Index
from embedcam.stores import Table, open_store


def main(url: str, path: str) -> None:
    parquet._ROWS = copying.BATCH_ROWS = 8  # many batches of few rows
    with Index.open(path) as index, closing(open_store(url, Table.of(index, "full"))) as store:
        print("begins", flush=True)
        copying.copy_rows(index, store)
    print("done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
