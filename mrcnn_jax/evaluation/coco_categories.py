"""COCO's 80 categories. Their ids run from 1 to 90, with ten gaps."""

from __future__ import annotations

Categories = tuple[tuple[int, str], ...]

_NAMES = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant,
N/A, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra,
giraffe, N/A, backpack, umbrella, N/A, N/A, handbag, tie, suitcase, frisbee, skis, snowboard,
sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle,
N/A, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot,
hot dog, pizza, donut, cake, chair, couch, potted plant, bed, N/A, dining table, N/A, N/A, toilet,
N/A, tv, laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator,
N/A, book, clock, vase, scissors, teddy bear, hair drier, toothbrush
"""
_ALL = tuple(enumerate(_NAMES.replace("\n", " ").strip().split(", "), start=1))

COCO: Categories = tuple((number, name) for number, name in _ALL if name != "N/A")
# torchvision's networks count the gaps as classes. They stay classes here: without them the softmax
# over the others would change.
COCO_WITH_GAPS: Categories = tuple(
    (number, f"N/A {number}" if name == "N/A" else name) for number, name in _ALL
)
