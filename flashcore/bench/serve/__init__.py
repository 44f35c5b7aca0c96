"""The serving benchmark: SGLang's engine with made-up weights, backend beside backend.

`shapes`, `configs` and `workloads` say what is run. `engine` starts SGLang and sends requests;
`scheduler` adds `weights`, the `clock` and the counts of `hicache` to its processes. `worker` is
the process that holds an engine and does what it is asked: `measure`, `session`, `answers`,
`logits`, `soak`, `cycles`. `suite` starts workers one after the other or together, `turns` has them
take turns, `pool` runs many; `families` and `modes` say which. `timeline` and `spread` are the
arithmetic, `deadline` ends a run in time, `report` prints.
"""
