"""Checkpoints and saved models in files: their formats, which weights in them are meant, and files that survive a kill.

- `weights`: read the weights of any format and load them into a network; `safe_load` reads `torch.save` files without running
  code, `prefixes` finds the network among the names.
- `saved_model`: a finished model as a folder that segmentation-models-pytorch reads, too.
- `files`: the checkpoints of a run in training, written whole with digests, and the newest one to resume from.
"""
