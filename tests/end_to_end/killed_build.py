"""A program for test_kill: builds, again and again, in children that are killed at random moments or at named steps.

Reads one JSON request a line ({"recipe", "output", "after_seconds" or "at_step"}), answers with one JSON line each. The
libraries are imported once, and each build runs in a fork, so that twenty kills take seconds. The parent
computes nothing, for a fork of a process with busy thread pools could hang.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

# Imported late by transformers and datasets; here so that no fork has to.
import datasets.packaged_modules.text.text  # noqa: F401
import transformers.integrations.sdpa_attention  # noqa: F401
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401

import builder.build.build as build_module
import builder.build.state
import builder.dataset.manifest
import builder.dataset.shards
from builder.recipe.file import load_recipe


def kill_at(step: str) -> None:
    """Make this process kill itself when it comes to `<module>.<function>#<nth call>:<before or after>`."""
    name, moment = step.split(":")
    name, nth = name.split("#")
    module_name, function_name = name.split(".")
    module = {"os": os, "state": builder.build.state, "build": build_module}[module_name]
    original, calls = getattr(module, function_name), 0

    def dying(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == int(nth) and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if calls == int(nth) and moment == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(module, function_name, dying)


def child(request: dict) -> None:
    status = 1
    try:
        if "at_step" in request:
            kill_at(request["at_step"])
        recipe = Path(request["recipe"])
        build_module.build(load_recipe(recipe), recipe.parent, Path(request["output"]))
        status = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        os._exit(status)


def main() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        started = time.perf_counter()
        pid = os.fork()
        if pid == 0:
            child(request)
        deadline = started + request.get("after_seconds", float("inf"))
        while (waited := os.waitpid(pid, os.WNOHANG))[0] == 0:
            if time.perf_counter() >= deadline:
                os.kill(pid, signal.SIGKILL)
                deadline = float("inf")
            time.sleep(0.002)
        status = os.waitstatus_to_exitcode(waited[1])
        seconds = time.perf_counter() - started
        answer = {"killed": status == -signal.SIGKILL, "status": status, "seconds": seconds}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
