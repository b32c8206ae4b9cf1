"""What a user is told when memory runs out: in training, in evaluate, and in predict."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterable, Iterator

from dann_experiments.config import Config, TrainingFailed
from dann_experiments.data.dataset import SegmentationDataset
from dann_experiments.jobs.setup import Data

# What torch and its libraries say in a plain RuntimeError; torch.OutOfMemoryError has "out of memory" in its text, too.
SAID = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "bad_alloc",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


@contextlib.contextmanager
def memory_told(kind: type[Exception], advice: Callable[[], str]) -> Iterator[None]:
    """Where memory runs out in the block, raise `kind` with the reason and the advice: the sizes, and what makes them smaller."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        # the frames of the failed step hold its maps: closing the run needs memory as well
        traceback.clear_frames(error.__traceback__)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise kind(f"out of memory ({reason}). {advice()}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of torch, its libraries or Python says that memory ran out."""
    return isinstance(error, MemoryError) or any(text.lower() in str(error).lower() for text in SAID)


def memory_explained(config: Config, data: Data) -> contextlib.AbstractContextManager[None]:
    """`memory_told` for training: TrainingFailed."""
    return memory_told(TrainingFailed, lambda: _advice(config, data))


def size_of_largest(datasets: Iterable[SegmentationDataset]) -> str:
    """Of their images and windows: `512 x 512 pixels`."""
    sizes = [piece.window[2:] for dataset in datasets for piece in dataset.pieces]
    height, width = max(sizes, key=lambda size: size[0] * size[1])
    return f"{height} x {width} pixels"


def _advice(config: Config, data: Data) -> str:
    batches = [
        f"data.{domain}.batch_size is {getattr(config.data, domain).batch_size}"
        for domain in ("source", "target")
        if data.get(f"{domain}_train") is not None
    ]
    crop = config.data.crop_size
    sizes = f"crops of {crop} x {crop} pixels (data.crop_size)"
    if crop is None:
        largest = size_of_largest(dataset for name, dataset in data.sets.items() if name.endswith("_train"))
        sizes = f"images or windows of {largest} (data.crop_size is null)"
    return (
        f"{', '.join(batches)}, with {sizes}. Take smaller batches, smaller crops (data.crop_size), a "
        f"smaller network, or on a GPU trainer.precision bf16-mixed; if validation failed, a smaller data.eval_batch_size."
    )
