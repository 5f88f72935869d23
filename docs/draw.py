# SPDX-License-Identifier: Apache-2.0
"""Draws docs/images/way_of_the_data.svg: how keys, values and queries travel. Standard library only.

python docs/draw.py
"""

from __future__ import annotations

from html import escape
from pathlib import Path

OUT = Path(__file__).parent / "images" / "way_of_the_data.svg"
WIDTH, HEIGHT = 1060, 560
STORE, READ, HELD, MADE = "#e3edf9", "#e6f4e6", "#fdf3d8", "#f1e8f7"  # coding, attending, memory, calibration


class Picture:
    """Boxes and arrows on a grid of pixels."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def box(self, x: int, y: int, w: int, h: int, text: str, fill: str) -> None:
        """A box with centred lines; the first is bold."""
        self.parts.append(f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="6" fill="{fill}" stroke="#555"/>')
        lines = text.split("\n")
        top = y + h / 2 - 8 * (len(lines) - 1) + 4
        for i, line in enumerate(lines):
            weight = ' font-weight="bold"' if i == 0 else ""
            self.parts.append(
                f'<text x="{x + w / 2}" y="{top + 16 * i}" text-anchor="middle"{weight}>{escape(line)}</text>'
            )

    def label(self, x: int, y: int, text: str, size: int = 12, anchor: str = "start", bold: bool = False) -> None:
        """A line of text."""
        weight = ' font-weight="bold"' if bold else ""
        self.parts.append(
            f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}"{weight}>{escape(text)}</text>'
        )

    def arrow(self, *points: tuple[int, int], dashed: bool = False) -> None:
        """An arrow through the points."""
        path = " ".join(f"{'M' if i == 0 else 'L'}{x} {y}" for i, (x, y) in enumerate(points))
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(f'<path d="{path}" fill="none" stroke="#333" stroke-width="1.6"{dash} marker-end="url(#a)"/>')

    def svg(self) -> str:
        """The document."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
            f'font-family="Helvetica, Arial, DejaVu Sans, sans-serif" font-size="12">\n'
            '<defs><marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            '<path d="M0 0L8 4L0 8z" fill="#333"/></marker></defs>\n'
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>\n'
        )
        return head + "\n".join(self.parts) + "\n</svg>\n"


def draw() -> str:
    """The picture: calibration on the left, one engine step on the right."""
    p = Picture()
    p.label(125, 26, "once per model: kqsvd calibrate", 12, "middle", bold=True)
    p.label(660, 26, "every engine step: vllm serve", 12, "middle", bold=True)
    p.parts.append(f'<path d="M268 12V{HEIGHT - 12}" stroke="#bbb" stroke-dasharray="3 4"/>')
    steps = (
        "model + sample text",
        "capture\nq, k, v and their gradients",
        "moments in float64\nkeys in the frame of their rope block,\nsinks apart",
        "basis (KQ-SVD)\neigenvectors in the metric of\nthe queries and of the loss",
        "bits (SVDq)\ndynamic program: channel groups\nget 0 to 8 bits for least loss",
        "projection folder\nbases, means, steps, bit plan,\nfingerprint of the model",
    )
    y = 44
    for i, text in enumerate(steps):
        h = 24 + 16 * text.count("\n") + 14
        p.box(16, y, 236, h, text, MADE if i else "#fff")
        if i + 1 < len(steps):
            p.arrow((134, y + h), (134, y + h + 22))
        y += h + 22
    p.arrow((252, 488), (284, 488), dashed=True)
    p.label(288, 492, "each layer's constants, checked and cut by KV head for tensor parallelism", 11)

    p.box(300, 44, 150, 40, "new k, v\nafter RoPE", "#fff")
    p.box(870, 44, 150, 40, "q\nafter RoPE", "#fff")
    p.arrow((375, 84), (375, 112))
    p.box(300, 112, 150, 56, "turn back\nto the start of the\nrope block (k only)", STORE)
    p.arrow((375, 168), (375, 192))
    p.box(300, 192, 150, 56, "subtract the mean\nordinary or sink:\none class bit", STORE)
    p.arrow((375, 248), (375, 272))
    p.box(300, 272, 150, 40, "project\nd numbers to R latents", STORE)
    p.arrow((375, 312), (375, 336))
    p.box(300, 336, 150, 56, "scale and quantize\none scale byte,\n1 to 8 bits a channel", STORE)
    p.arrow((450, 364), (520, 364))
    p.box(
        520,
        300,
        190,
        128,
        "latent pages\n16 tokens to a tile,\nbit planes in the order in\n"
        "which tensor cores load them;\nall tokens, 128 to a block",
        HELD,
    )
    p.arrow((450, 64), (615, 64), (615, 112))
    p.box(
        520,
        112,
        190,
        72,
        "exact pages\nlast 64 tokens in bf16;\nvLLM's sliding-window group,\nsame pool of blocks",
        HELD,
    )

    p.arrow((945, 84), (945, 112))
    p.box(870, 112, 150, 56, "scores, exact\nq . k of the\nlast 64 tokens", READ)
    p.arrow((710, 140), (870, 140))
    p.arrow((1020, 64), (1042, 64), (1042, 228), (1020, 228))
    p.box(870, 192, 150, 72, "absorb\nturn q back per rope\nblock, into the basis:\na = decode q", READ)
    p.arrow((945, 264), (945, 292))
    p.box(780, 292, 240, 56, "scores, latent\na . integers of the page,\ntimes the token's scale, plus q . mean", READ)
    p.arrow((710, 320), (780, 320))
    p.arrow((900, 348), (900, 376))
    p.box(780, 376, 240, 40, "sum of integers\nweighted by softmax and scale", READ)
    p.arrow((710, 396), (780, 396))
    p.arrow((900, 416), (900, 440))
    p.box(780, 440, 240, 40, "value basis\none product per query, plus the mean", READ)
    p.arrow((900, 480), (900, 504))
    p.box(780, 504, 240, 40, "merge by log-sum-exp\nwith the exact tokens' part: output", READ)
    p.arrow((870, 152), (750, 152), (750, 524), (780, 524))

    for x, fill, text in (
        (288, STORE, "store"),
        (368, HELD, "memory"),
        (458, READ, "attend"),
        (543, MADE, "calibrate"),
    ):
        p.parts.append(f'<rect x="{x}" y="{HEIGHT - 32}" width="14" height="14" fill="{fill}" stroke="#555"/>')
        p.label(x + 20, HEIGHT - 20, text)
    return p.svg()


if __name__ == "__main__":
    OUT.write_text(draw())
