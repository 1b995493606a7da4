"""Views of a scheduled graph: a report as a table, a drawing as an SVG document, and a profile of measured times.

:func:`report` and :func:`svg` read a snapshot of the graph that a scheduler holds; :func:`profile` also runs the graph.
"""

from ggml_cffi.viz.profile import NodeGroup, NodeTime, Profile, SplitTime, Times, profile
from ggml_cffi.viz.report import Memory, Report, SplitRow, report
from ggml_cffi.viz.snapshot import Copy
from ggml_cffi.viz.svg import svg

__all__ = [
    "Copy",
    "Memory",
    "NodeGroup",
    "NodeTime",
    "Profile",
    "Report",
    "SplitRow",
    "SplitTime",
    "Times",
    "profile",
    "report",
    "svg",
]
