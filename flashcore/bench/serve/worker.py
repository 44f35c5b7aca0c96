"""The process that holds an engine: python -m flashcore.bench.serve.worker FD ENGINE

Loads SGLang or vLLM, reads one JSON object a line from its standard input and answers each with one
on file descriptor FD. The first describes the engine; its answer comes when that has started.
Standard output and error are the engine's own. It ends with its input.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

from flashcore.bench.serve import vllm_engine
from flashcore.bench.serve.engine import Engine, EngineOptions, load
from flashcore.bench.serve.measure import DoesNotFitError, measure
from flashcore.bench.serve.session import Session
from flashcore.bench.serve.shapes import ModelShape
from flashcore.bench.serve.timeline import NotTogetherError
from flashcore.bench.serve.workloads import Workload


def serve(commands: IO[str], answers: IO[str], name: str = "sglang") -> None:
    """Start the engine that the first line asks for; then one answer a line. name: of the engine,
    which is loaded before that line comes."""

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    with tempfile.TemporaryDirectory(prefix="flashcore-serve-") as folder:
        start: Any = Engine
        if name == "vllm":
            vllm_engine.load()
            start = vllm_engine.VllmEngine
        else:
            load()
        options = options_from(json.loads(commands.readline()))
        engine = start(options, Path(folder))
        try:
            answer(
                {
                    "start_s": engine.start_seconds,
                    "capacity": engine.capacity,
                    "arguments": engine.about(),
                }
            )
            asked = Commands(engine)
            for line in commands:
                answer(asked.do(json.loads(line)))
        finally:
            engine.stop()


def options_from(values: dict[str, Any]) -> EngineOptions:
    """The options that `dataclasses.asdict` and JSON made of."""
    return EngineOptions(
        **{
            **values,
            "shape": ModelShape(**values["shape"]),
            "decode_batches": tuple(values["decode_batches"]),
            "ranks": tuple(values["ranks"]),
            "extra": tuple((key, value) for key, value in values["extra"]),
        }
    )


class Commands:
    """What an engine is asked to do, one command after another."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._session: Session | None = None

    def do(self, command: dict[str, Any]) -> dict[str, Any]:
        """The answer to a command. Raises ValueError for one that there is not."""
        engine, name = self._engine, command["do"]
        if name == "measure":
            return self._measure(command)
        if name in ("prepare", "first_token", "ready", "decode"):
            return self._by_turns(command)
        if name == "logits":
            from flashcore.bench.serve.logits import record

            return record(engine, Path(command["file"]), command["forced"])
        if name == "answers":
            from flashcore.bench.serve.answers import ask

            return ask(engine, command["rounds"])
        if name == "bits":
            from flashcore.bench.serve.deterministic import bits

            return bits(engine)
        if name == "soak":
            from flashcore.bench.serve.soak import soak

            return soak(engine, minutes=command["minutes"], seed=command["seed"])
        if name == "cycle":
            from flashcore.bench.serve.cycles import cycle

            return cycle(engine, command["number"])
        raise ValueError(f"unknown command {name!r}")

    def _measure(self, command: dict[str, Any]) -> dict[str, Any]:
        try:
            samples = measure(
                self._engine,
                Workload(**command["workload"]),
                vocab=self._engine.options.shape.vocab,
                page=self._engine.options.page_size,
                repeats=command["repeats"],
            )
        except (DoesNotFitError, NotTogetherError) as error:
            return {"skipped": str(error)}
        return {"samples": samples}

    def _by_turns(self, command: dict[str, Any]) -> dict[str, Any]:
        if command["do"] == "prepare":
            options = self._engine.options
            self._session = Session(self._engine, vocab=options.shape.vocab, page=options.page_size)
            try:
                workload = Workload(**command["workload"])
                return {"sample": self._session.prepare(workload, command["seed"])}
            except DoesNotFitError as error:
                return {"skipped": str(error)}
        assert self._session is not None
        if command["do"] == "ready":
            self._session.ready()
            return {"sample": {}}
        decode = command["do"] == "decode"
        return {"sample": self._session.decode() if decode else self._session.first_token()}


if __name__ == "__main__":
    with os.fdopen(int(sys.argv[1]), "w") as replies:
        serve(sys.stdin, replies, sys.argv[2])
