"""A launcher of runs in several processes, and the tiny run of the training tests."""

import pytest

from tests.multiprocess.harness import Launcher
from tests.runs import corpus, make_config

__all__ = ["corpus", "launcher", "make_config"]


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Launcher:
    return Launcher(tmp_path_factory.mktemp("jobs"), tmp_path_factory.mktemp("job_programs"))
