"""Draws the picture of the README: a kernel, its two thin factors, and where `adapt` stands.

python docs/draw.py docs/images/adapt.svg
"""

import sys

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

FROZEN, TRAINED, TEXT, LINE = "#c9d3df", "#f2a65a", "#1f2933", "#52606d"


def box(axes, x, y, width, height, color, label, note=""):
  """A matrix to scale, with its name inside or above and its shape below."""
  axes.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor=LINE, linewidth=1.2))
  thin = min(width, height) < 0.6
  above = y + height + 0.22 if thin else y + height / 2
  axes.text(x + width / 2, above, label, ha="center", va="center", fontsize=15, color=TEXT)
  axes.text(x + width / 2, y - 0.24, note, ha="center", va="center", fontsize=9.5, color=LINE)


def arrow(axes, start, end):
  axes.add_patch(
    FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=16, color=LINE, linewidth=1.4)
  )


def words(axes, x, y, text, **how):
  axes.text(x, y, text, **({"ha": "center", "va": "center", "fontsize": 13, "color": TEXT} | how))


def draw():
  matplotlib.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "lora_jax", "font.size": 11})
  figure, axes = pyplot.subplots(figsize=(10.2, 3.5))
  axes.set_xlim(0, 15.3)
  axes.set_ylim(-0.9, 4.35)
  axes.set_aspect("equal")
  axes.axis("off")

  words(axes, 2.55, 4.05, "one leaf of the tree", fontsize=11, color=LINE)
  box(axes, 0.1, 0.7, 2.3, 2.3, FROZEN, "W", "d × k, frozen")
  words(axes, 2.98, 1.85, "+ s ·", fontsize=13)
  box(axes, 3.5, 0.7, 0.4, 2.3, TRAINED, "A", "d × r")
  box(axes, 4.05, 1.65, 1.5, 0.4, TRAINED, "B", "r × k")

  arrow(axes, (5.75, 1.85), (6.5, 1.85))
  mono = {"family": "monospace", "fontsize": 12}
  axes.add_patch(
    FancyBboxPatch(
      (6.6, 0.95), 2.7, 1.8, boxstyle="round,pad=0.08", facecolor="white", edgecolor=LINE
    )
  )
  words(axes, 7.95, 2.2, "adapt(f)", weight="bold", **mono)
  words(axes, 7.95, 1.5, "f is any function,\nunchanged", fontsize=10, color=LINE)
  arrow(axes, (9.4, 1.85), (10.3, 1.85))

  words(axes, 12.7, 4.05, "each product with the leaf", fontsize=11, color=LINE)
  words(axes, 12.7, 3.1, "x @ (W + s·A @ B)", **mono)
  words(axes, 12.7, 2.45, "becomes", fontsize=10, color=LINE)
  words(axes, 12.7, 1.85, "x @ W + s·(x @ A) @ B", weight="bold", **mono)
  words(axes, 12.7, 0.95, "A @ B is never computed,\nforward or backward", fontsize=10, color=LINE)
  words(axes, 7.65, -0.6, "orange: trained (small)      grey: frozen", fontsize=10, color=LINE)
  return figure


def main(path):
  figure = draw()
  figure.savefig(path, bbox_inches="tight", metadata={"Date": None, "Creator": None})
  return figure


if __name__ == "__main__":
  main(sys.argv[1])
