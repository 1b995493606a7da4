"""The pictures of the pages: small, well-formed, used, and charts that agree with the figures of the pages."""

import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from xml.etree import ElementTree

import pytest

from tests.docs.test_docs import DOCS, PAGES
from tests.support import ROOT

IMAGES = sorted(path.name for path in (DOCS / "images").iterdir())


def make_pictures():
    """Return the script that makes the pictures, as a module."""
    spec = spec_from_file_location("make_pictures", DOCS / "make_pictures.py")
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", IMAGES)
def test_a_picture_is_a_small_svg_with_a_ground_and_a_title(name):
    path = DOCS / "images" / name
    assert path.stat().st_size < 100_000
    root = ElementTree.parse(path).getroot()
    spaces = {"svg": "http://www.w3.org/2000/svg"}
    assert root.find("svg:title", spaces).text
    ground = root.find("svg:rect", spaces)
    assert (ground.get("width"), ground.get("fill")) == (root.get("width"), "#ffffff")


def test_every_picture_is_on_a_page_with_a_text_for_readers_who_cannot_see_it():
    texts = [(DOCS / name).read_text() for name in PAGES] + [(ROOT / "README.md").read_text()]
    shown = {
        (name, bool(words.strip()))
        for text in texts
        for words, name in re.findall(r"!\[([^\]]*)\]\((?:docs/)?images/([\w.]+)\)", text)
    }
    assert shown == {(name, True) for name in IMAGES}


@pytest.mark.parametrize("name", ["graph.svg", "overlap.svg", "splits.svg"])
def test_a_chart_is_that_of_the_figures_on_the_page(name):
    # `python docs/make_pictures.py --charts` makes them again.
    assert make_pictures().CHARTS[name]() == (DOCS / "images" / name).read_text()
