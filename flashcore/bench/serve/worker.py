"""The process that holds an engine: python -m flashcore.bench.serve.worker FD

Loads SGLang, reads one JSON object a line from its standard input and answers each with one on file
descriptor FD. The first describes the engine; its answer comes when that has started. Standard
output and error are the engine's own. It ends with its input.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

from flashcore.bench.serve.engine import Engine, EngineOptions, load
from flashcore.bench.serve.measure import DoesNotFitError, measure
from flashcore.bench.serve.shapes import ModelShape
from flashcore.bench.serve.timeline import NotTogetherError
from flashcore.bench.serve.workloads import Workload


def serve(commands: IO[str], answers: IO[str]) -> None:
    """Start the engine that the first line asks for; then one answer a line."""

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    with tempfile.TemporaryDirectory(prefix="flashcore-serve-") as folder:
        load()
        engine = Engine(options_from(json.loads(commands.readline())), Path(folder))
        try:
            answer(
                {
                    "start_s": engine.start_seconds,
                    "capacity": engine.capacity,
                    "arguments": {**engine.arguments, "model_path": engine.options.shape.name},
                }
            )
            for line in commands:
                answer(_do(engine, json.loads(line)))
        finally:
            engine.stop()


def options_from(values: dict[str, Any]) -> EngineOptions:
    """The options that `dataclasses.asdict` and JSON made of."""
    return EngineOptions(
        **{
            **values,
            "shape": ModelShape(**values["shape"]),
            "decode_batches": tuple(values["decode_batches"]),
            "extra": tuple((key, value) for key, value in values["extra"]),
        }
    )


def _do(engine: Engine, command: dict[str, Any]) -> dict[str, Any]:
    if command["do"] == "measure":
        try:
            samples = measure(
                engine,
                Workload(**command["workload"]),
                vocab=engine.options.shape.vocab,
                page=engine.options.page_size,
                repeats=command["repeats"],
            )
        except (DoesNotFitError, NotTogetherError) as error:
            return {"skipped": str(error)}
        return {"samples": samples}
    if command["do"] == "logits":
        from flashcore.bench.serve.logits import record

        return record(engine, Path(command["file"]), command["forced"])
    if command["do"] == "soak":
        from flashcore.bench.serve.soak import soak

        return soak(engine, minutes=command["minutes"], seed=command["seed"])
    raise ValueError(f"unknown command {command['do']!r}")


if __name__ == "__main__":
    with os.fdopen(int(sys.argv[1]), "w") as replies:
        serve(sys.stdin, replies)
