"""Class maps of rasters of any size. This package takes plain arguments; the job `predict` adds settings and tracking.

- `find_images`: finds the images, and the output path of each map.
- `scene`: one image to map; reads its pixels in large parts.
- `tiling`: runs the network on overlapping tiles and blends them.
- `confidence`: how sure a prediction is, per pixel.
- `rule_masks`: masks from an index and a threshold, block by block, without a network.
- `mapping`: maps one image after the other, and resumes interrupted maps.
- `polygons`, `vector_file`, `qgis_style`: a finished map as polygons, and its colors in QGIS.
- `manifest`: the table of the images, with how each ended.
- `partial_map`, `rasters`: an unfinished map, and the finished files.
"""
