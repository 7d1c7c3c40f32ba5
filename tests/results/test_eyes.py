"""No two lines of a panel look alike, to eyes without one kind of cone and on grey paper: they have another dash or
marker, or their colours are apart. Every figure is checked in test_frames."""

import itertools
import math

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from PIL import ImageColor

from sparse_nb.results import measure_plots, plots
from sparse_nb.results.axes import DISTINCT_COLOURS, ordered_colours

APART = 10  # CIEDE2000; about 1 can just be seen side by side, and thin lines need more
EYES = {  # on linear RGB: Machado, Oliveira & Fernandes 2009, at full severity
    "most": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    "grey paper": [[0.2126, 0.7152, 0.0722]] * 3,
}
XYZ = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]


def lab(colour, eye):
    """CIELAB of what an eye sees of a colour. eye: (3, 3)."""
    rgb = np.array(ImageColor.getrgb(colour)[:3]) / 255
    linear = np.clip(np.array(eye) @ np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4), 0, 1)
    x, y, z = (
        f if f > 216 / 24389 else ((24389 / 27 * f + 16) / 116) ** 3 for f in XYZ @ linear / [0.95047, 1, 1.08883]
    )
    return 116 * np.cbrt(y) - 16, 500 * (np.cbrt(x) - np.cbrt(y)), 200 * (np.cbrt(y) - np.cbrt(z))


def difference(one, other):
    """CIEDE2000 of two colours in CIELAB. Sharma, Wu & Dalal 2005."""
    (l1, a1, b1), (l2, a2, b2) = one, other
    mean = (math.hypot(a1, b1) + math.hypot(a2, b2)) / 2
    stretch = 1.5 - 0.5 * math.sqrt(mean**7 / (mean**7 + 25**7))
    a1, a2 = a1 * stretch, a2 * stretch
    c1, c2 = math.hypot(a1, b1), math.hypot(a2, b2)
    h1, h2 = (math.degrees(math.atan2(b, a)) % 360 for a, b in ((a1, b1), (a2, b2)))
    turn = (h2 - h1 + 180) % 360 - 180 if c1 * c2 else 0
    light, chroma, hue = (l1 + l2) / 2, (c1 + c2) / 2, h1 + turn / 2 if c1 * c2 else h1 + h2
    t = 1 + sum(
        share * math.cos(math.radians(k * hue - shift))
        for share, k, shift in ((-0.17, 1, 30), (0.24, 2, 0), (0.32, 3, -6), (-0.2, 4, 63))
    )
    of_light = (l2 - l1) / (1 + 0.015 * (light - 50) ** 2 / math.sqrt(20 + (light - 50) ** 2))
    of_chroma = (c2 - c1) / (1 + 0.045 * chroma)
    of_hue = 2 * math.sqrt(c1 * c2) * math.sin(math.radians(turn / 2)) / (1 + 0.015 * chroma * t)
    rotation = -2 * math.sqrt(chroma**7 / (chroma**7 + 25**7))
    rotation *= math.sin(math.radians(60 * math.exp(-((((hue % 360) - 275) / 25) ** 2))))
    return math.sqrt(of_light**2 + of_chroma**2 + of_hue**2 + rotation * of_chroma * of_hue)


def apart(one, other):
    """The least `difference` of two colours over all eyes."""
    return min(difference(lab(one, eye), lab(other, eye)) for eye in EYES.values())


def alike(figure):
    """Pairs of names in one panel with the same dash and marker in colours that some eye takes for each other."""
    panels, found = {}, set()
    for trace in figure.data:
        if trace.customdata is not None and len(trace.customdata):  # neither an entry of the legend nor a mark
            shape = trace.line.dash or "solid", trace.marker.symbol[0].removesuffix("-open")
            panels.setdefault((trace.xaxis, shape), set()).add((trace.name, trace.marker.color))
    for lines in panels.values():
        found |= {
            (a, b) for (a, one), (b, other) in itertools.combinations(sorted(lines), 2) if apart(one, other) < APART
        }
    return found


def test_the_difference_is_the_published_one():
    pairs = [  # Sharma, Wu & Dalal 2005, table 1
        ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
        ((50, -1, 2), (50, 0, 0), 2.3669),
        ((50, 2.5, 0), (58, 24, 15), 19.4535),
        ((22.7233, 20.0904, -46.6940), (23.0331, 14.9730, -42.5619), 2.0373),
        ((2.0776, 0.0795, -1.1350), (0.9033, -0.0636, -0.5514), 0.9082),
    ]
    for one, other, expected in pairs:
        assert difference(one, other) == pytest.approx(expected, abs=1e-4)
    assert lab("#ff0000", EYES["most"]) == pytest.approx((53.24, 80.09, 67.20), abs=0.02)
    assert abs(np.array(lab("#c08040", EYES["grey paper"]))[1:]).max() < 0.02


def test_the_check_sees_what_is_alike():
    figure = go.Figure()
    for name, colour, dash in (("a", "#0072b2", "solid"), ("b", "#d55e00", "solid"), ("c", "#009e73", "dash")):
        line, marker = dict(color=colour, dash=dash), dict(color=colour, symbol=["circle"])
        figure.add_scatter(x=[1], y=[1], name=name, mode="lines+markers", line=line, marker=marker, customdata=["it"])
    assert alike(figure) == {("a", "b")}  # on grey paper


def test_palettes():
    assert min(apart(*pair) for pair in itertools.combinations(ordered_colours(5)[:4], 2)) > APART
    seen = {name: [lab(colour, eye) for colour in DISTINCT_COLOURS] for name, eye in EYES.items()}
    for name, colours in seen.items():
        assert name == "grey paper" or min(difference(*pair) for pair in itertools.combinations(colours, 2)) > APART


def test_all_densities_of_a_panel_have_markers():
    curves = pd.DataFrame(
        {"dataset": "mnist", "rule": "water_filling", "family": "mlp", "density": [2.0**-k for k in range(9)]}
    )
    curves = pd.concat([curves, curves.assign(family="vgg", density=curves.density * 2**-1)])
    for of_panel in measure_plots.density_lines(curves).values():
        assert len({line.symbol for line in of_panel.values()}) == len(of_panel) == 4
    styled = plots.lines_of_rules(list(of_panel.values()), ["water_filling", "proportional"], marked=True)
    assert len({(line.dash, line.symbol) for lines in styled.values() for line in lines}) == 8
