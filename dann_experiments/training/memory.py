"""Explains to the user what to change when memory runs out: in training, in evaluate, and in predict."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping

from dann_experiments.data.joined import Items
from dann_experiments.names import Domain

# Texts of plain RuntimeErrors by torch and its libraries; the text of torch.OutOfMemoryError contains "out of memory", too.
SIGNS = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "bad_alloc",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


@contextlib.contextmanager
def explain_out_of_memory(kind: type[Exception], advice: Callable[[], str]) -> Iterator[None]:
    """Raise `kind` if memory runs out in the block, with the reason and `advice`: the sizes, and how to make them smaller."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        # the frames of the failed step hold its feature maps, but closing the run needs memory as well
        traceback.clear_frames(error.__traceback__)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise kind(f"out of memory ({reason}). {advice()}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception of torch, its libraries or Python says that memory ran out."""
    return isinstance(error, MemoryError) or any(text.lower() in str(error).lower() for text in SIGNS)


def size_of_largest(datasets: Iterable[Items]) -> str:
    """Return the size of the largest image or window, such as `512 x 512 pixels`."""
    sizes = [piece.window[2:] for dataset in datasets for piece in dataset.pieces]
    height, width = max(sizes, key=lambda size: size[0] * size[1])
    return f"{height} x {width} pixels"


def advice_for_training(
    datasets: Mapping[Domain, Items], batch_sizes: Mapping[Domain, int], crop_size: int | None
) -> str:
    """Return the sizes of a training step, and how to make them smaller."""
    batches = [f"data.{domain}.batch_size is {batch_sizes[domain]}" for domain in datasets]
    sizes = f"crops of {crop_size} x {crop_size} pixels (data.crop_size)"
    if crop_size is None:
        sizes = f"images or windows of {size_of_largest(datasets.values())} (data.crop_size is null)"
    return (
        f"{', '.join(batches)}, with {sizes}. Use smaller batches, smaller crops (data.crop_size), a "
        f"smaller network, or on a GPU trainer.precision bf16-mixed; if validation failed, a smaller data.eval_batch_size."
    )
