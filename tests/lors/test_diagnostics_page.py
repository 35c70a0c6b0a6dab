from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
import torch
from test_diagnostics import SHAPES, vector

from lors.checkpoint import Checkpoint
from lors.diagnostics import diagnose
from lors.diagnostics_page import MOST_PAIRS, page

VOID = {"meta", "rect", "path", "br"}


class Document(HTMLParser):
    """The tags of a page, which must close in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def base(tensor_folder):
    return Checkpoint(tensor_folder("base", vector(99, scale=1.0).tensors))


def test_a_page_is_well_formed_self_contained_and_escaped(base):
    hostile = '<script>alert("x")</script>&amp;'
    text = page(diagnose(base, {hostile: vector(1), "b": vector(2), "c": vector(3)}), f"On {hostile}")
    document = Document(text)
    assert "script" not in document.tags
    assert not re.search(r"(https?:)?//\w|@import|url\(", text)
    assert not {name for name, _ in document.attributes} & {"src", "href", "onclick"}
    assert any(hostile in found for found in document.text)
    assert document.tags.count("svg") == document.tags.count("details") == 9


def test_every_cell_has_its_value_as_a_title(base):
    text = page(diagnose(base, {"a": vector(1), "b": vector(2)}), "Two")
    layers = 6
    cells = re.findall(r"<rect[^>]*><title>([^<]*)</title></rect>", text)
    assert len(cells) == 2 * layers * 2 + 5 * layers + 2 * 3
    assert any(re.fullmatch(r"a, encoder\.layers\.10: \d+\.\d\d%", cell) for cell in cells)
    assert "a + b, encoder.layer_norm: -" in cells  # a vector has no subspaces
    assert "nan" not in text.lower().replace("nance", "")


def test_stacked_bars_fill_the_width(base):
    text = page(diagnose(base, {"a": vector(1)}), "One")
    widths = [float(w) for w in re.findall(r'width="([\d.]+)" height="17"><title>a, ', text)]
    assert len(widths) == 3
    assert sum(widths) == pytest.approx(480, abs=0.5)


def test_one_expert_has_no_section_of_pairs(base):
    text = page(diagnose(base, {"a": vector(1)}), "One")
    Document(text)
    assert "<h2>Pairs</h2>" not in text
    assert "Cosine" not in text


def test_zero_deltas_and_a_model_of_vectors_alone(tensor_folder, base):
    text = page(diagnose(base, {"a": vector(1).scaled(0), "b": vector(1)}), "Zero")
    Document(text)
    shapes = {"x.bias": (3,), "y.bias": (4,)}
    vectors = Checkpoint(tensor_folder("vectors", vector(9, shapes).tensors))
    Document(page(diagnose(vectors, {"a": vector(1, shapes), "b": vector(2, shapes)}), "Vectors"))
    Document(page(diagnose(vectors, {"a": vector(1, shapes).scaled(0)}), "Zero vectors"))


def test_many_experts_show_the_pairs_that_meet_most(tensor_folder):
    shapes = {name: SHAPES[name] for name in ("model.encoder.layers.2.fc1.weight",)}
    base = Checkpoint(tensor_folder("many", vector(99, shapes).tensors))
    experts = {f"an-expert-with-a-rather-long-name-{number:02}": vector(number, shapes) for number in range(12)}
    text = page(diagnose(base, experts), "Twelve")
    Document(text)
    assert f"The maps show the {MOST_PAIRS} of 66 pairs" in text
    assert text.count(">cosine<") == 1
    assert all(len(label) <= 34 for label in re.findall(r'text-anchor="end">([^<]*)<title>', text))


def test_colours_span_the_scale(base):
    same = vector(1)
    other = vector(2)
    other.tensors["model.encoder.conv1.weight"] = -same.tensors["model.encoder.conv1.weight"]
    other.tensors["model.decoder.layers.0.fc2.weight"] = torch.zeros(5, 8)
    text = page(diagnose(base, {"a": same, "b": other}), "Opposite")
    assert 'class="below" style="--p:100.0%"><title>a + b, encoder.conv1: -1.000' in text
    assert 'class="above" style="--p:100.0%"><title>a + b, encoder.conv1: 100.0%' in text
    assert 'class="none"><title>a + b, decoder.layers.0: -' in text
