"""The serving benchmark: SGLang's engine with dummy weights, one attention backend beside another.

`shapes` and `workloads` say what is run, `timeline` turns token arrivals into figures, `engine`
starts SGLang and sends requests, `measure`, `logits` and `soak` are the three things done with an
engine, `worker` is the process that holds one, `suite` starts the workers and collects, `report`
prints.
"""
