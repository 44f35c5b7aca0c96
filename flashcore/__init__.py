"""Attention for LLM serving on NVIDIA Hopper that reads each shared KV page once per batch.

Names are loaded on first use: `import flashcore` touches neither torch nor any NVIDIA wheel.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if sys.version_info < (3, 10):  # noqa: UP036  (a checkout is used without pip, which would say so)
    raise ImportError(f"flashcore needs Python 3.10 or newer, this is {sys.version.split()[0]}")

__version__ = "0.1.0"

_HOME = {
    "Layout": "flashcore.pager.csr",
    "build_layout": "flashcore.pager.csr",
    "layout_from_csr": "flashcore.pager.csr",
    "layout_from_page_table": "flashcore.pager.csr",
    "Plan": "flashcore.planner.types",
    "PlanStats": "flashcore.planner.stats",
    "plan": "flashcore.planner.build",
    "Capacities": "flashcore.planner.device_plan",
    "Count": "flashcore.contract.counts",
    "DeviceLayout": "flashcore.sm90.device_pager",
    "DevicePager": "flashcore.sm90.device_pager",
    "DevicePlan": "flashcore.planner.device_plan",
    "DevicePlanner": "flashcore.sm90.device_planner",
    "Fault": "flashcore.contract.counts",
    "Stat": "flashcore.contract.counts",
    "append_kv": "flashcore.append",
    "attention": "flashcore.api",
    "paged_attention": "flashcore.api",
}

__all__ = [
    "Capacities",
    "Count",
    "DeviceLayout",
    "DevicePager",
    "DevicePlan",
    "DevicePlanner",
    "Fault",
    "Layout",
    "Plan",
    "PlanStats",
    "Stat",
    "__version__",
    "append_kv",
    "attention",
    "build_layout",
    "layout_from_csr",
    "layout_from_page_table",
    "paged_attention",
    "plan",
]

if TYPE_CHECKING:
    from flashcore.api import attention, paged_attention
    from flashcore.append import append_kv
    from flashcore.contract.counts import Count, Fault, Stat
    from flashcore.pager.csr import Layout, build_layout, layout_from_csr, layout_from_page_table
    from flashcore.planner.build import plan
    from flashcore.planner.device_plan import Capacities, DevicePlan
    from flashcore.planner.stats import PlanStats
    from flashcore.planner.types import Plan
    from flashcore.sm90.device_pager import DeviceLayout, DevicePager
    from flashcore.sm90.device_planner import DevicePlanner


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        from flashcore.names import of_package

        raise AttributeError(f"module 'flashcore' has no attribute {name!r}{of_package(name)}")
    from importlib import import_module

    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
