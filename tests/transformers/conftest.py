"""These tests need transformers, and run where it is: `make test-transformers` installs it."""

from __future__ import annotations

import importlib.util

import torch

HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None
collect_ignore_glob = [] if HAS_TRANSFORMERS else ["test_*.py"]

# The models are too small for threads, which wait for each other where cores are shared.
if HAS_TRANSFORMERS:
    torch.set_num_threads(1)
