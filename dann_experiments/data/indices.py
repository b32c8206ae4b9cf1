"""Indices of pixels: one number per pixel, computed from its bands; a threshold on it makes weak labels.

Letters: B bands, h x w pixels. All functions take stored values of any type, compute in float64, and return NaN where a formula
has no value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from dann_experiments.names import IndexName

MEANINGS: Mapping[IndexName, str] = {
    "excess_green": "excess green, 2g - r - b",
    "ndvi": "NDVI, (nir - red) / (nir + red)",
    "ndwi": "NDWI, (green - nir) / (green + nir)",
    "band": "value of the band",
    "change_vector": "length of the change vector",
}
"""Label of the values in figures and masks."""


def excess_green(red: np.ndarray, green: np.ndarray, blue: np.ndarray) -> np.ndarray:
    """Return 2g - r - b of the chromatic coordinates r = R / (R + G + B), g and b alike (Woebbecke et al. 1995, Color indices
    for weed identification under various soil, residue, and lighting conditions, Trans. ASAE 38(1)).

    From -1 to 2 for values of 0 and more; 0 for gray. NaN where R + G + B is not above 0: black has no color.

    >>> excess_green(*np.array([[50, 0], [100, 0], [50, 0]], np.uint8))
    array([0.5, nan])
    """
    red, green, blue = (band.astype(np.float64) for band in (red, green, blue))
    return _ratio(2 * green - red - blue, red + green + blue)


def normalized_difference(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return (first - second) / (first + second), from -1 to 1 for values of 0 and more; NaN where the sum is not above 0.

    NDVI is that of near infrared and red (Rouse et al. 1974, Monitoring vegetation systems in the Great Plains with ERTS), high
    on plants. NDWI is that of green and near infrared (McFeeters 1996, The use of the Normalized Difference Water Index (NDWI)
    in the delineation of open water features, Int. J. Remote Sensing 17(7)), high on open water.

    >>> normalized_difference(np.array([300, 0], np.uint16), np.array([100, 0], np.uint16))
    array([0.5, nan])
    """
    first, second = first.astype(np.float64), second.astype(np.float64)
    return _ratio(first - second, first + second)


def change_vector(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Return the length of the difference of the band vectors (B, h, w) of two dates: sqrt(sum over bands of (after - before)^2)
    (Malila 1980, Change vector analysis: an approach for detecting forest changes with Landsat). Unit: that of the values.

    >>> change_vector(np.array([[[10]], [[20]]], np.uint8), np.array([[[7]], [[24]]], np.uint8))
    array([[5.]])
    """
    squares = np.zeros(after.shape[1:])
    for now, then in zip(after, before, strict=True):  # band by band, as there may be hundreds
        squares += np.square(now.astype(np.float64) - then)
    return np.sqrt(squares)


def index_values(name: IndexName, bands: np.ndarray, before: np.ndarray | None = None) -> np.ndarray:
    """Return an index (h, w) of bands (B, h, w); NaN = no value.

    `bands`: red, green, blue for excess_green; nir, red for ndvi; green, nir for ndwi; one for band; any for change_vector, which
    needs `before`, the same bands of the earlier date.
    """
    if name == "change_vector":
        assert before is not None
        result = change_vector(before, bands)
    else:
        result = _OF_ONE_DATE[name](*bands)
    result[~np.isfinite(result)] = np.nan
    return result


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Return part / whole, NaN where `whole` is 0 or less: a negative sum (dark pixels after a correction) has no meaning."""
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)


def _band(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float64)


_OF_ONE_DATE: Mapping[IndexName, Callable[..., np.ndarray]] = {
    "excess_green": excess_green,
    "ndvi": normalized_difference,
    "ndwi": normalized_difference,
    "band": _band,
}
