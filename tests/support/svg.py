"""Parsing of the drawings."""

from xml.etree import ElementTree

SVG = "{http://www.w3.org/2000/svg}"


def parse(text):
    """Groups by what they are, and the edges."""
    root = ElementTree.fromstring(text)
    assert root.tag == f"{SVG}svg"
    found = {kind: root.findall(f".//{SVG}g[@class='{kind}']") for kind in ("node", "view", "leaf", "split", "bytes")}
    found |= {kind: root.findall(f".//{SVG}path[@class='{kind}']") for kind in ("edge", "copy")}
    return root, found
