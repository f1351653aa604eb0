"""A process that has imported PyTorch and runs programs in forks of itself; see forks.py.

A line of input is a list of programs that run at the same time, a line of output says how they
ended. Nothing of this package is imported, so that a program may import another copy of it.
"""

import gc
import importlib
import json
import os
import runpy
import signal
import sys
import traceback
from typing import Any

#: seconds after which a program is killed
LIMIT = 300


def warm_up() -> None:
    """Import what compilation imports on its way, and start no thread: no fork would have it."""
    import torch
    import torch.distributed.checkpoint
    import torch.distributed.fsdp
    import torch.distributed.tensor

    model, x = torch.nn.Linear(4, 4), torch.randn(3, 4)
    with torch.no_grad():
        torch.compile(model, backend="inductor", options={"fallback_by_default": True})(x)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


def run(program: dict[str, Any]) -> int:
    """In a fork: what an interpreter does that is given a script."""
    signal.alarm(LIMIT)
    for descriptor, name in enumerate(("stdout", "stderr"), 1):
        os.dup2(os.open(program[name], os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(program["cwd"])
    os.environ.update(program["environment"])
    for name, value in program["settings"].items():
        module, _, setting = name.rpartition(".config.")
        config: Any = importlib.import_module(f"{module}.config")
        *parts, last = setting.split(".")
        for part in parts:
            config = getattr(config, part)
        setattr(config, last, value)
    sys.argv = program["argv"]
    for name in program["modules"]:
        importlib.import_module(name)
    sys.path[:] = [os.path.dirname(sys.argv[0]), *sys.path, *program["path_last"]]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as exit:
        if isinstance(exit.code, str):
            print(exit.code, file=sys.stderr)
            return 1
        return exit.code or 0
    return 0


def main() -> None:
    warm_up()
    for line in sys.stdin:
        processes = []
        for program in json.loads(line):
            process = os.fork()
            if process == 0:
                code = 1
                try:
                    code = run(program)
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
            processes.append(process)
        ended = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
        print(json.dumps(ended), flush=True)


if __name__ == "__main__":
    main()
