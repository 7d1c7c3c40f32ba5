"""See to it that plotly can write SVG, PNG and PDF, which kaleido does through a Chrome or Chromium on this machine.

Nothing is done where a drawing succeeds. Else the download that kaleido offers is tried, into the environment. Nothing
of the system is changed: without a browser this says so and ends with 1, and figures are drawn without pictures.
"""

import subprocess
import sys

DRAW = "import plotly.graph_objects as go; go.Figure().to_image('svg')"
# The time limit is for a connection that says nothing, not for a slow one.
DOWNLOAD = "import socket; socket.setdefaulttimeout(20); import kaleido; kaleido.get_chrome_sync()"


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
    print("No Chrome or Chromium that draws: downloading one", flush=True)
    if succeeds([sys.executable, "-c", DOWNLOAD], 600) and draws():
        return
    sys.exit("That failed. For SVG and PNG install Google Chrome or Chromium (on Debian: apt-get install chromium).")


if __name__ == "__main__":
    main()
