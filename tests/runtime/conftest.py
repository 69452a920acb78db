"""The C++ runtime, built once."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))


@pytest.fixture(scope="module", autouse=True)
def simulated_libraries_stay_out() -> Iterator[None]:
    """A simulated driver in this process would be that of the machine for all tests that follow, in any folder."""
    yield
    maps = Path("/proc/self/maps")
    assert not maps.exists() or "/simulated/" not in maps.read_text()


@pytest.fixture(scope="session")
def runtime() -> Any:
    """The folder in which it was built."""
    from runtime_build import absence, build

    reason = absence()
    if reason is not None:
        pytest.skip(reason)
    pytest.importorskip("openvino", reason="openvino is not installed")
    return build()


@pytest.fixture(scope="session")
def bert_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tokenizer of BERT's whole vocabulary, as bundles of GLIP-T have it: (file, Python's)."""
    from glip_export.tokenizer import build_tokenizer

    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer = build_tokenizer()
    tokenizer.save(str(file))
    return file, tokenizer


@pytest.fixture(scope="session")
def address() -> Any:
    """The folder in which it was built with the address and undefined behavior sanitizers, and no inference engine."""
    from runtime_build import absence, build_sanitized

    reason = absence()
    if reason is not None:
        pytest.skip(reason)
    return build_sanitized("address")


@pytest.fixture(scope="session", params=["runtime", "address"])
def probe(request: pytest.FixtureRequest, bert_tokenizer: tuple[Path, Any]) -> Iterator[Any]:
    """The program that shows the library's parts, as it is used and with sanitizers."""
    from runtime_build import Probe

    opened = Probe(request.getfixturevalue(request.param), bert_tokenizer[0])
    yield opened
    opened.close()
