"""The machine is described as it is."""

import pytest
from glip_bench.machine.host import describe_machine, versions


def test_machine_and_versions_are_real():
    machine = describe_machine()
    assert machine["cpu"]
    assert machine["cores"] >= 1
    assert versions()["onnxruntime"].count(".") == 2


@pytest.mark.parametrize("key", ["python", "numpy", "onnxruntime"])
def test_versions_names(key):
    assert key in versions()
