"""Lay out 2,624 photographs of solar cells as an ImageFolder tree for configs/solar_cells.yaml: intact or defective?

usage: pip install elpv-dataset && python examples/solar_cells.py solar_cells

The photographs (300 x 300 pixels, electroluminescence) are licensed CC-BY-NC-SA 4.0: not for commercial use. They come
from the package elpv-dataset (Deitsch et al.), which the user installs; nothing of them is part of this project.
"""

import csv
import importlib.util
import shutil
import sys
from pathlib import Path


def main(target: Path) -> None:
    spec = importlib.util.find_spec("elpv_dataset")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("solar_cells.py: elpv-dataset is not installed. Type: pip install elpv-dataset")
    data = Path(spec.submodule_search_locations[0]) / "data"
    seen: dict[tuple[str, str], int] = {}
    with open(data / "labels.csv", encoding="ascii", newline="") as file:
        for path, probability, kind in (row[:3] for row in csv.reader(file, delimiter=" ", skipinitialspace=True)):
            label = "defective" if float(probability) > 0.5 else "intact"
            number = seen[kind, label] = seen.get((kind, label), -1) + 1
            folder = target / ("val" if number % 4 == 0 else "train") / label  # a quarter of each kind of cell
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(data / path, folder / Path(path).name)
    print(f"{sum(seen.values()) + len(seen)} photographs in {target}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]).expanduser())
