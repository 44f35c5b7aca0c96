"""What the import says where it cannot serve."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

# The package's own name for it is the function.
registration = import_module("flashcore.integrations.transformers.register")


@pytest.mark.parametrize(
    ("absent", "said"),
    [
        ("transformers", r"not installed: pip install 'flashcore-attention\[transformers\]'"),
        ("transformers.masking_utils", f"needs transformers {registration.OLDEST} or newer"),
    ],
)
def test_no_transformers_and_an_old_one(
    absent: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find_spec(name: str) -> object:
        return None if name == absent else SimpleNamespace()

    monkeypatch.setattr(registration, "find_spec", find_spec)
    with pytest.raises(ImportError, match=said):
        registration.register()


def test_the_oldest_is_that_of_the_package() -> None:
    pyproject = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'"transformers>={registration.OLDEST},' in pyproject
