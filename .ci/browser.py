"""See to it that plotly can write SVG and PNG, which kaleido does through a Chrome or Chromium on this machine.

Nothing is done where a drawing succeeds. Else the download that kaleido offers is tried, then, for root, the system's
package.
"""

import os
import shutil
import subprocess
import sys

DRAW = "import plotly.graph_objects as go; go.Figure().to_image('svg')"
# The time limit is for a connection that says nothing, not for a slow one.
DOWNLOAD = "import socket; socket.setdefaulttimeout(20); import kaleido; kaleido.get_chrome_sync()"
APT = (
    "apt-get update -qq && DEBIAN_FRONTEND=noninteractive "
    "apt-get install -y -qq --no-install-recommends chromium fonts-liberation"
)


def succeeds(command, seconds):
    """Whether `command` ends well within `seconds`; what it prints is of no interest."""
    try:
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.run(command, timeout=seconds, **quiet).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def draws():
    return succeeds([sys.executable, "-c", DRAW], 60)


def main():
    if draws():
        return
    print("No Chrome or Chromium that draws: downloading one")
    if succeeds([sys.executable, "-c", DOWNLOAD], 600) and draws():
        return
    if os.name == "posix" and os.geteuid() == 0 and shutil.which("apt-get"):
        print("That failed: installing Debian's chromium")
        if succeeds(["sh", "-c", APT], 600) and draws():
            return
    sys.exit(
        "Figures need a Chrome or Chromium: install Google Chrome (on Debian: apt-get install chromium) "
        "and run make again."
    )


if __name__ == "__main__":
    main()
