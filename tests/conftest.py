"""Tests compare with figures of the CPU, so they run there on a machine with a GPU too; ``-m gpu`` asks for it."""

import os


def pytest_configure(config):
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
