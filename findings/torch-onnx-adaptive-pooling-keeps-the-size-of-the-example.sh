#!/usr/bin/env bash
# torch 2.15.0, onnx 1.23.2, onnxscript 0.7.2, onnxruntime 1.32.0: a network with AdaptiveAvgPool2d (PSPNet, UPerNet) that is exported
# to ONNX with free height and width (torch.onnx.export, dynamo) is right for the size of the example alone. For other sizes the file
# returns other numbers, or an output of another size, without a warning at the export and without an error when it runs.
# Expected: the free sides hold, as the exported program says, or the export refuses them.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.15.0 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import importlib.metadata
import io

import numpy as np
import onnxruntime
import torch

for name in ("torch", "onnx", "onnxscript", "onnxruntime"):
    print(name, importlib.metadata.version(name))
torch.manual_seed(0)
SIDES = {2: torch.export.Dim("height", min=8, max=4096), 3: torch.export.Dim("width", min=8, max=4096)}
seen = {}
for bins in (1, 2, 6):
    network = torch.nn.AdaptiveAvgPool2d(bins).eval()
    program = torch.onnx.export(network, (torch.randn(1, 2, 64, 64),), dynamo=True, dynamic_shapes=(SIDES,), verbose=False)
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue())
    for size in ((64, 64), (96, 96)):
        image = torch.randn(1, 2, *size)
        [found] = session.run(None, {session.get_inputs()[0].name: image.numpy()})
        wanted = network(image).numpy()
        same = found.shape == wanted.shape
        seen[bins, size] = float(np.abs(found - wanted).max()) if same else found.shape
        print(f"AdaptiveAvgPool2d({bins}), {size}: {'largest difference ' if same else 'output of shape '}{seen[bins, size]}")
assert all(seen[bins, (64, 64)] < 1e-6 for bins in (1, 2, 6)), "the size of the example is right"
assert seen[1, (96, 96)] < 1e-6, "one bin is right for all sizes"
assert seen[2, (96, 96)] == (1, 2, 3, 3), "two bins are two bins now"
assert seen[6, (96, 96)] > 0.01, "six bins are right now"
PYTHON
