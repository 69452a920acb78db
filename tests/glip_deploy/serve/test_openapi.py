"""What the OpenAPI description allows is asked, in many forms, and answered as it says."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi_offline", reason="FastAPI is not installed (extra serve)")
pytest.importorskip("schemathesis", reason="schemathesis is not installed (extra dev)")

import schemathesis
from hypothesis import HealthCheck, given, settings

from glip_deploy.detector import Detector
from glip_deploy.serve.app import create_app
from glip_deploy.serve.models import Model
from glip_deploy.serve.settings import Settings


@pytest.fixture(scope="module")
def api(tiny_bundle):
    detector = Detector.open(tiny_bundle, shortest_side=32, cache_dir=None, threads=1)
    model = Model("tiny", detector)
    limits = Settings(max_bytes=100_000, max_pixels=100_000, max_characters=2000)
    yield schemathesis.openapi.from_asgi("/openapi.json", create_app(limits, {"tiny": model}), headers=HOST)
    model.close()


HOST = {"Host": "127.0.0.1:8000"}
CHECKS = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")
OPERATIONS = ("/v1/detect", "/v1/encode", "/v1/models", "/healthz", "/readyz", "/metrics")


@pytest.mark.parametrize("path", OPERATIONS)
def test_answers_are_those_described(api, path):
    statuses = set()

    @settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(case=operation_of(api, path).as_strategy())
    def ask(case):
        answer = case.call(headers=HOST)
        statuses.add(answer.status_code)
        case.validate_response(answer, checks=[getattr(schemathesis.checks, name) for name in CHECKS])

    ask()
    assert statuses and statuses.isdisjoint({405, 421, 500, 501, 503}), statuses


def operation_of(api, path):
    (operation,) = [one.ok() for one in api.get_all_operations() if one.ok().path == path]
    return operation
