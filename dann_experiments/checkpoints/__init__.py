"""Checkpoints and saved models.

- `weights`: reads the weights of any supported format and loads them into a network. `safe_load` reads `torch.save` files without
  running code; `prefixes` finds the network's weights by name.
- `saved_model`: writes and reads a finished model as a folder, which segmentation-models-pytorch can read, too.
- `files`: writes the checkpoints of a run atomically, with digests, and finds the newest undamaged one to resume from.
"""
