"""Colours that stand for different things stay apart under the common kinds of colour blindness, in both themes."""

from __future__ import annotations

import re
from itertools import combinations

import numpy as np
import pytest
from serving import ROOT

STYLE = (ROOT / "lightning_gradguard/tensorboard_plugin/static/style.css").read_text()
KINDS = ("nonfinite", "explosion", "vanishing", "overflow", "rollback", "resume")
SPECIALS = ("nan", "inf", "zero", "none")

# Severe deficiency, on linear RGB: G. M. Machado, M. M. Oliveira and L. A. F. Fernandes, "A physiologically-based model for
# simulation of color vision deficiency", 2009.
SIGHTS = {
    "full": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
# sRGB to XYZ at D65, and from there to CIELAB: IEC 61966-2-1 and CIE 15.
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def palette(theme):
    """The colours of a theme by name; the dark one changes some of the light one's."""
    blocks = re.findall(r":root(\[data-theme=\"dark\"\])? \{(.*?)\}", STYLE, flags=re.DOTALL)
    found = {}
    for selector, block in blocks:
        if not selector or theme == "dark":
            found |= dict(re.findall(r"--([\w-]+): ([^;]+);", block))
    return found


def linear(colour):
    """Linear RGB of `#rgb` or `#rrggbb`."""
    digits = colour.lstrip("#")
    digits = "".join(2 * digit for digit in digits) if len(digits) == 3 else digits
    values = np.array([int(digits[index : index + 2], 16) / 255 for index in (0, 2, 4)])
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    """CIELAB."""
    ratios = TO_XYZ @ rgb.clip(0, 1) / (TO_XYZ @ np.ones(3))
    x, y, z = np.where(ratios > 0.008856, np.cbrt(ratios), 7.787 * ratios + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def distance(first, second, sight):
    """How far two colours are apart for someone; about 2 is the least that is seen side by side."""
    return float(np.linalg.norm(lab(SIGHTS[sight] @ linear(first)) - lab(SIGHTS[sight] @ linear(second))))


@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("names", [KINDS, SPECIALS], ids=["kinds", "specials"])
def test_colours_of_different_things_stay_apart(names, theme, sight):
    """Each pair by at least 10, five times what is noticed."""
    colours = palette(theme)
    found = {pair: distance(colours[pair[0]], colours[pair[1]], sight) for pair in combinations(names, 2)}
    assert min(found.values()) >= 10, sorted(found.items(), key=lambda item: item[1])[:3]


@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_damage_stands_out_from_every_norm(theme, sight):
    """NaN and Inf look like no colour of the heat map's scale."""
    colours = palette(theme)
    for name in ("nan", "inf"):
        assert min(distance(colours[name], other, sight) for other in colours["heat"].split()) >= 10, name


@pytest.mark.parametrize("name", ["heat", "change", "share"])
def test_dark_theme_has_no_white_glare(name):
    """No colour of a scale is much brighter than the text beside it needs to be."""
    assert max(lab(linear(colour))[0] for colour in palette("dark")[name].split()) <= 78
