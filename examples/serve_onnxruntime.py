"""Best categories of an image by an exported classifier in ONNX Runtime: serve_onnxruntime.py EXPORT_FOLDER IMAGE"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def model_input(file, steps):
    """The image as the model takes it, (1, C, H, W) float32, by the steps of serving.json."""
    image = ImageOps.exif_transpose(Image.open(file)).convert("RGB").convert(steps["channel_order"])
    sides, to, size = image.size[::-1], steps["to"], steps["size"]  # each (height, width)
    if steps["resize"] == "cover":
        ratio = min(side / least for side, least in zip(sides, to, strict=True))
        to = [int(to[0] * side / min(sides)) if to[0] == to[1] else round(side / ratio) for side in sides]
    image = image.resize(to[::-1], Image.Resampling[steps["interpolation"].upper()])
    top, left = (round((side - part) / 2) for side, part in zip(to, size, strict=True))
    pixels = np.atleast_3d(image.crop((left, top, left + size[1], top + size[0]))).astype(np.float32) / 255
    return ((pixels - np.float32(steps["mean"])) / np.float32(steps["std"])).transpose(2, 0, 1)[None]


def scores(folder, file):
    """Names of the categories, and the score that an image gets for each (categories,)."""
    serving = json.loads((Path(folder) / "serving.json").read_text(encoding="utf-8"))
    assert serving["task"] == "classification", f"{folder} serves {serving['task']}, which has outputs of other kinds"
    assert "onnx" in serving["programs"], f"{folder} has no ONNX file: add onnx to export.formats"
    program, image = Path(folder) / serving["programs"]["onnx"]["file"], model_input(file, serving["preprocessing"])
    session = onnxruntime.InferenceSession(program, providers=["CPUExecutionProvider"])
    return serving["categories"], session.run(None, {serving["input"]["name"]: image})[0][0]


if __name__ == "__main__":
    names, found = scores(*sys.argv[1:])
    print(*(f"{1 / np.exp(found - found[n]).sum():.4f} {names[n]}" for n in (-found).argsort()[:5]), sep="\n")
