"""What processes tell each other, and that none waits for one that has died."""

import signal
import time

from lens_jax.distribution import processes
from tests.launch import runs

TALK = """
import sys
from lens_jax.distribution import (processes)
from lens_jax.config import DistributedConfig

address, number = sys.argv[1], int(sys.argv[2])
processes.start(DistributedConfig(address, 3, number, heartbeat_timeout=10))
assert processes.is_main() == (number == 0)
assert processes.total(number, 1) == [3, 3]
assert processes.gather({"a": "x" * 40 * number}) == [{"a": "x" * 40 * i} for i in range(3)]
assert processes.by_main(lambda: ["answer", number]) == ["answer", 0]
try:
    processes.by_main(lambda: 1 / number)
    raise AssertionError
except (ZeroDivisionError, processes.RemoteError) as error:
    assert "division by zero" in str(error)
print("ready", flush=True)
while True:
    processes.total(1)
"""


def test_processes_agree_and_name_the_one_that_died(tmp_path):
    address = f"localhost:{runs.free_port()}"
    running = runs.start(
        [("-c", TALK, address, str(i)) for i in range(3)], tmp_path / "log", devices=1
    )
    said = lambda i: runs.log_of(tmp_path / "log", i).read_text()  # noqa: E731
    try:
        while not all("ready" in said(i) for i in range(3)):
            assert all(process.poll() is None for process in running), [said(i) for i in range(3)]
            time.sleep(0.05)
        running[2].send_signal(signal.SIGSTOP)  # a host that hangs rather than ends
        for i in range(2):
            assert running[i].wait(60) != 0
        assert "stopped sending heartbeats):\n2\n" in said(0)
    finally:
        for process in running:
            process.kill()


FULL_DISK = """
import resource
import sys

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1 as ocp

from lens_jax.distribution import (processes)
from lens_jax.checkpoints import CheckpointError, TrainingCheckpoints
from lens_jax.config import DistributedConfig

address, number, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
processes.start(DistributedConfig(address, 2, number))
place = NamedSharding(Mesh(np.array(jax.devices()), ("x",)), P("x"))
x = np.random.default_rng(0).random((2, 2**18))
state = {"x": jax.make_array_from_callback(x.shape, place, x.__getitem__)}
store = TrainingCheckpoints(folder, keep=2)
store.save(1, state)
store.wait()
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
if number == 1:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
context = ocp.Context()
context.asynchronous.timeout_secs = 8
try:
    with context:
        store.save(2, state)
        store.wait()
    raise AssertionError
except CheckpointError as error:
    assert "2 could not be written, the last one is" in str(error) and "process 1: " in str(error)
    assert "File too large" in str(error)
resource.setrlimit(resource.RLIMIT_FSIZE, limits)
assert store.latest() == 1
store.save(3, state)
assert store.latest() == 3 and store.steps() == [1, 3]
"""


def test_a_disk_full_for_one_process_fails_the_save_of_all(tmp_path):
    """With the cause, and not that of those who waited; the next save succeeds."""
    address = f"localhost:{runs.free_port()}"
    folder, logs = str(tmp_path / "checkpoints"), tmp_path / "log"
    commands = [("-c", FULL_DISK, address, str(i), folder) for i in range(2)]
    runs.finish(runs.start(commands, logs, devices=1), logs)


def test_one_process_answers_itself():
    assert processes.total(3, True) == [3, True]
    assert processes.gather({"a": (1, 2)}) == [{"a": (1, 2)}]
    assert processes.by_main(lambda: 5) == 5
