"""The benchmarks `service` and `soak`: their figures. Values, never seconds."""

import numpy as np
import pytest
from page_client import served
from service_client import explainer

from scripts.benchmarks import load, service, soak


def test_ratios_with_and_without_the_client():
    took = {
        "search": np.full(100, 100.0),
        "explain": np.r_[np.full(90, 109.0), np.full(10, 130.0)],
        "null": np.full(100, 20.0),
    }
    _, row = service.report(8, took).split("| explain |")
    # (109 - 20) / (100 - 20) and (130 - 20) / (100 - 20)
    assert [cell.strip() for cell in row.splitlines()[0].split("|")[:-1]] == [
        "100", "109.0", "1.090", "1.113", "<= 1.1: **not met**",
        "130.0", "1.300", "1.375", "<= 1.15: **not met**",
    ]  # fmt: skip


def test_growth_of_memory():
    held = [10e6] * 25 + [100e6] * 24 + [900e6] + [200e6] * 25 + [104e6] * 25
    memory = [(float(gone), int(one)) for gone, one in enumerate(held)]
    assert soak.growth(memory) == (100, 104, pytest.approx(1.04))


def test_a_closed_loop_sends_each_request_once(index):
    assert all(call.expected == 200 for call in soak.good_calls())
    assert all(400 <= call.expected < 500 for call in soak.hostile_calls())
    with served(explainer(index)) as running:
        port = int(running.address.rpartition(":")[2])
        calls = (load.Call("GET", "/healthz") for _ in range(20))
        assert len(service.answered(port, 3, calls)) == 20
        with pytest.raises(RuntimeError, match="POST /bad: 404"):
            service.answered(port, 1, iter([load.Call("POST", "/bad")]))
