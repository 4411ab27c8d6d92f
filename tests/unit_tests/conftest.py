"""Fixtures of several modules."""

from argparse import Namespace

import pytest


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch):
    """Parses a command line with Megatron's parser, on a given number of processes.

    Imports late: pytest may read this file before ``tests/conftest.py`` turns the interpreter on.
    """
    from megatron.training.arguments import parse_args

    from megatron_echo import environment
    from megatron_echo.arguments import add_echo_arguments

    def parse(*argv: str, world_size: int = 1) -> Namespace:
        words = environment.add_missing_flags(argv, has_cuda=False, verbose=False)
        monkeypatch.setattr("sys.argv", ["pretrain_gpt_moe.py", *words])
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        return parse_args(add_echo_arguments)

    return parse
