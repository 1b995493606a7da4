"""The state of processes."""

from __future__ import annotations


def has_ended(pid: int) -> bool:
    """Return whether a process has ended. A zombie counts as ended: its parent may be dead, so nobody waits for it."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True
