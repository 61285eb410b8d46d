"""The service against its own description: whatever a client sends, the fault is not the service's."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from serving_run import thinking

from gream_verl.core.run_folder import RunFolder
from gream_verl.serving.app import create_app
from gream_verl.serving.service import Service

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")


@pytest.fixture(scope="module")
def description(run: RunFolder) -> Iterator[Any]:
    service = thinking(Service(run))
    yield schemathesis.openapi.from_asgi("/openapi.json", create_app(service))
    asyncio.run(service.close())


schema = schemathesis.pytest.from_fixture("description")


@schema.parametrize()
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_no_request_is_the_services_fault(case: Any) -> None:
    checks = schemathesis.checks
    case.call_and_validate(checks=[checks.not_a_server_error, checks.response_schema_conformance])
