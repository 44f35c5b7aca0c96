"""Attention for LLM serving on NVIDIA Hopper that reads each shared KV page once per batch.

Names are loaded on first use: `import flashcore` touches neither torch nor any NVIDIA wheel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Layout": "flashcore.layout.csr",
    "build_layout": "flashcore.layout.csr",
    "layout_from_page_table": "flashcore.layout.csr",
    "Plan": "flashcore.plan.types",
    "PlanStats": "flashcore.plan.stats",
    "plan": "flashcore.plan.build",
    "attention": "flashcore.api",
    "paged_attention": "flashcore.api",
}

__all__ = [
    "Layout",
    "Plan",
    "PlanStats",
    "__version__",
    "attention",
    "build_layout",
    "layout_from_page_table",
    "paged_attention",
    "plan",
]
