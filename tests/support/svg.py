"""Parsing of the drawings."""

from xml.etree import ElementTree

SVG = "{http://www.w3.org/2000/svg}"


def parse(text):
    """Return the root, and the groups and edges by class."""
    root = ElementTree.fromstring(text)
    assert root.tag == f"{SVG}svg"
    found = {kind: root.findall(f".//{SVG}g[@class='{kind}']") for kind in ("node", "view", "leaf", "split", "bytes")}
    found |= {kind: root.findall(f".//{SVG}path[@class='{kind}']") for kind in ("edge", "copy")}
    return root, found
