"""Class maps of rasters of any size. Takes plain arguments; the job `predict` adds settings and tracking.

- `find_images`: which images, and where the map of each goes.
- `scene`: one image to be mapped, and its pixels read in large parts.
- `tiling`: overlapping tiles through the network, blended.
- `mapping`: maps one image after the other, resuming what was interrupted.
- `partial_map`, `rasters`: a map in the making, and the files at the end.
"""
