"""`flashcore check`: the library tested on the machine that it will run on, a line for each case.

dense, paged, steps, bits ─► tests ─► swap: kernels that they ask for ─► compiled together
                               └────► command: launch, judge, plants; a line each, a verdict
"""
