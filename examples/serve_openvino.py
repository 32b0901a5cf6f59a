"""Best categories of an image by an exported classifier in OpenVINO: serve_openvino.py EXPORT_FOLDER IMAGE"""

import json
import sys
from pathlib import Path

import numpy as np
import openvino
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
    serving, core = json.loads((Path(folder) / "serving.json").read_text(encoding="utf-8")), openvino.Core()
    assert serving["task"] == "classification", f"{folder} serves {serving['task']}, which has outputs of other kinds"
    assert "openvino" in serving["programs"], f"{folder} has no OpenVINO file: add openvino to export.formats"
    program, image = serving["programs"]["openvino"], model_input(file, serving["preprocessing"])
    model = core.read_model(Path(folder) / program["file"])
    model.reshape(image.shape)  # one image and no other batch, as latencies are measured
    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": program["activations"].replace("fp32", "f32")}
    return serving["categories"], core.compile_model(model, "CPU", hints)(image)[0][0]


if __name__ == "__main__":
    names, found = scores(*sys.argv[1:])
    print(*(f"{1 / np.exp(found - found[n]).sum():.4f} {names[n]}" for n in (-found).argsort()[:5]), sep="\n")
