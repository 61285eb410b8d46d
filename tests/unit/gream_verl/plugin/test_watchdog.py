from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import time
from gream_verl.plugin.watchdog import Watchdog

dog = Watchdog(0.8, "it hangs")
for _ in range(6):
    dog.feed()
    time.sleep(0.2)
print("still here", flush=True)
time.sleep(60)
"""


def test_a_process_that_hangs_ends_with_the_message_and_one_that_works_does_not():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "still here\n", "it hangs\n")
