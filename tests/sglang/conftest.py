"""These tests need SGLang, and run where it is: `make test-sglang` installs it for them."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("sglang") else ["test_*.py"]
