"""Stage 2, the planner: CSR layout -> groups, work items and merge lists."""
