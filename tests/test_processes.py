"""What processes tell each other, and that none waits for one that has died."""

import signal
import time

from lens_jax import processes
from tests.launch import runs

TALK = """
import sys
from lens_jax import processes
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


def test_one_process_answers_itself():
    assert processes.total(3, True) == [3, True]
    assert processes.gather({"a": (1, 2)}) == [{"a": (1, 2)}]
    assert processes.by_main(lambda: 5) == 5
