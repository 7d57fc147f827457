"""Before the first test: the server that the tests' processes are forked from.

multiprocessing has one for each process, and who starts it says what it has imported. Code under test that forks from a
server of its own (`bench/sparse_first_call.py`) finds this one, wherever in the order of tests it runs.
"""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def server() -> None:
    """Started once for each process of pytest."""
    from tests.conftest import fork_server

    fork_server()
