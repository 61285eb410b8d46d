from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import time
from gream_verl.plugin.watchdog import Watchdog

dog = Watchdog(3, "it hangs")
for _ in range(10):
    dog.feed()
    time.sleep(0.5)
print("still here", flush=True)
time.sleep(60)
"""


def run(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=50, check=False)


def test_a_process_that_hangs_ends_with_the_message_and_one_that_works_does_not():
    done = run(SCRIPT)
    assert (done.returncode, done.stdout, done.stderr) == (1, "still here\n", "it hangs\n")


def test_a_process_that_ends_in_time_ends_as_usual():
    done = run(SCRIPT.replace("time.sleep(60)", ""))
    assert (done.returncode, done.stderr) == (0, "")
