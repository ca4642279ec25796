"""A run that generates with vLLM, which several files compare with."""

import pytest
from vllm_runs import SMALL

from luffy import make_config, train


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    return train(make_config("luffy", **SMALL), tmp_path_factory.mktemp("vllm") / "run")
