"""Records what the tests beside it know of torch and torchvision; run it where both import:

    python tests/weights/record.py

recorded/state_dict_{zip,stream}.pth: one small state dict in both serialisations of torch.save.
recorded/maskrcnn_resnet50_fpn{,_v2}.txt: names and shapes of torchvision's state dicts.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import torch
from torchvision.models import detection

FOLDER = Path(__file__).parent / "recorded"


def small_state_dict() -> OrderedDict[str, torch.Tensor]:
    """Every dtype, transposed, shared, strided and empty tensors, a scalar, a parameter."""
    shared = torch.arange(24.0)
    tensors = OrderedDict(
        matrix=torch.arange(12.0).reshape(3, 4) / 8,
        transposed=(torch.arange(6.0).reshape(2, 3) / 8).t(),
        parameter=torch.nn.Parameter(torch.arange(6.0).reshape(2, 3) / 4),
        part=shared[4:10].view(2, 3),
        steps=shared[::3],
        none=torch.zeros(0, 3),
        one=torch.tensor(7),
    )
    for dtype in ("float64", "float16", "bfloat16", "int32", "int16", "int8", "uint8", "bool"):
        tensors[dtype] = torch.arange(5).to(getattr(torch, dtype))
    tensors._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]  # as state_dict() leaves it
    return tensors


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    torch.save(small_state_dict(), FOLDER / "state_dict_zip.pth")
    wrapped = {"model": small_state_dict(), "epoch": 3, "lr": 0.1}
    torch.save(wrapped, FOLDER / "state_dict_stream.pth", _use_new_zipfile_serialization=False)
    for build in (detection.maskrcnn_resnet50_fpn, detection.maskrcnn_resnet50_fpn_v2):
        tensors = build(weights=None, weights_backbone=None).state_dict()
        lines = (" ".join((name, *map(str, tensor.shape))) for name, tensor in tensors.items())
        (FOLDER / f"{build.__name__}.txt").write_text("\n".join(lines) + "\n")
