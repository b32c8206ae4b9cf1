#!/usr/bin/env bash
# pytorch-lightning 2.6.6 with torch 2.15.0: EMAWeightAveraging copies the module in `setup` and pairs its parameters and buffers with
# those of the module by position, without a check of their number. A module that creates a parameter in `on_train_start` (learned
# loss weights in a submodule of their own) shifts all buffers by one. Where shapes fit, there is no error and no warning: the
# validation and the end of training look right, because the same pairs are exchanged back, but the `state_dict` of every checkpoint
# names the parameter's value `mean` and the mean `std`, the buffers that normalize images. Expected: an error, or pairs by name.
# (Where shapes do not fit, torch raises a size error that names neither the callback nor the parameter.)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.15.0 pytorch-lightning==2.6.6 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import logging

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn

logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
print("pytorch-lightning", pl.__version__, "torch", torch.__version__)


class Module(pl.LightningModule):
    def __init__(self, late: bool) -> None:
        super().__init__()
        self.late, self.layer = late, nn.Linear(1, 3)
        self.register_buffer("mean", torch.tensor([0.4]))
        self.register_buffer("std", torch.tensor([0.2]))

    def on_train_start(self) -> None:
        if self.late:
            self.loss_weights = nn.ParameterList([torch.tensor([5.0])])

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        return self.layer((batch - self.mean) / self.std).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


found = {}
for late in (False, True):
    torch.manual_seed(0)
    callback = EMAWeightAveraging(decay=0.5)
    module = Module(late)
    trainer = pl.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[callback, ModelCheckpoint(".", filename=f"late_{late}", save_top_k=-1, every_n_train_steps=2)],
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(torch.rand(8, 1), batch_size=8))
    saved = torch.load(f"late_{late}.ckpt", weights_only=True)["state_dict"]
    found[late] = [round(float(saved[name]), 3) for name in ("mean", "std")]
    print("a parameter made in on_train_start:", late, "-> mean and std in the checkpoint", found[late])
    print("    and in the module", round(float(module.mean), 3), round(float(module.std), 3))
assert found[False] == [0.4, 0.2]
assert found[True] == [5.0, 0.4], "late parameters no longer reach the buffers in the checkpoint"
PYTHON
