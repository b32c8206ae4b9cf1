"""What trainings, sweeps and maps reach on one GPU: one command of at most 8 minutes, which needs nothing but the environment.

    python benchmarks/gpu.py [--output gpu.json] [--seconds 480] [--parts steps resume ...]

Each part runs in a process of its own and has its share of the time, and what an earlier part leaves over. Results are printed,
and written into the file, as soon as they are there; what there was no time or memory for is named under "left out". Without a
GPU it ends with exit code 2. `--device cpu --small` runs every line of it on tiny images, as a test: its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# asked so, torch does not start CUDA in this process, which the parts are forked from
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

import loader
import numpy as np
import predict
import pytorch_lightning as pl
import segmentation_models_pytorch as smp
import step
import sweep
import torch
import torch._dynamo
from pages import circumstances
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from dann_experiments import Config, adapt
from dann_experiments.config import replace

Result = dict[str, Any]
Measures = Mapping[str, Callable[[], Result]]
Part = Callable[[argparse.Namespace], Measures]
HALF = {"precision": "bf16-mixed"}
COMPILED = {**HALF, "channels_last": "yes", "compile": True}
KINDS: dict[str, dict[str, Any]] = {"fp32": {}, "bf16": HALF, "bf16, channels last, compiled": COMPILED}
TAP = step.TAPS["deepest"]
SKIPPED, PROFILED = 4, 6  # steps
KILLED_AT, RESUMED_STEPS = 5, 8
WAITING = ("cudaStreamSynchronize", "cudaEventSynchronize", "aten::item", "aten::_local_scalar_dense", "aten::nonzero")
"""Names in a profile of calls in which the host waits for the device. Not cudaDeviceSynchronize: the profiler itself calls it."""
GOALS = {"share_of_bare": 0.95, "waits_per_step": 0}


def steps(options: argparse.Namespace) -> Measures:
    """Training steps of `adapt` against the bare loop of the same network, precision, memory format and compilation, in turn."""

    def measured(encoder: str, kind: dict[str, Any]) -> Result:
        asked = _asked(options, **kind)
        bare = "floor, channels last" if asked.channels_last == "yes" else "floor"
        count = options.batch * asked.block * (options.turns + step.WARM_UP)
        config = _config(options, encoder, asked, options.size, count)
        found = step.measured(config, TAP, asked, [bare])
        shares = np.quantile(found[bare] / found["ours"], [0.25, 0.5, 0.75])
        images = 2 * options.batch
        return {
            "images_per_second": images / float(np.median(found["ours"])),
            "bare_images_per_second": images / float(np.median(found[bare])),
            "share_of_bare": float(shares[1]),
            "share_of_bare_quartiles": [float(shares[0]), float(shares[2])],
        }

    return {
        f"{encoder}, {name}": lambda encoder=encoder, kind=kind: measured(encoder, kind)
        for encoder in options.encoders
        for name, kind in KINDS.items()
    }


class Profiled(pl.Callback):
    """Profiles some training steps: how often the host waits in a step, and for how much of the time the device computes."""

    def __init__(self, device: str) -> None:
        self.result: Result = {}
        self._on_gpu = device == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])]
        self._profile = profile(activities=activities)
        self._begun = 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == SKIPPED:
            self._wait()
            self._profile.__enter__()
            self._begun = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step != SKIPPED + PROFILED:
            return
        self._wait()
        seconds = time.perf_counter() - self._begun
        self._profile.__exit__(None, None, None)
        averages = self._profile.key_averages()
        counts = {name: sum(one.count for one in averages if one.key == name) / PROFILED for name in WAITING}
        if self._on_gpu:
            kernels = (one for one in averages if one.device_type == DeviceType.CUDA and not one.is_user_annotation)
            busy = sum(one.self_device_time_total for one in kernels)
        else:
            busy = sum(one.self_cpu_time_total for one in averages)
        self.result = {
            "waits_per_step": sum(counts.values()),
            "of_which": {name: count for name, count in counts.items() if count},
            "seconds_per_step": seconds / PROFILED,
            "utilization": busy / 1e6 / seconds,  # while profiled, which makes the host slower: a lower bound
        }

    def _wait(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()


def waits(options: argparse.Namespace) -> Measures:
    """Waits of the host in a step, and the share of time in which the device computes, loaders included."""

    def measured() -> Result:
        profiled, asked = Profiled(options.device), _asked(options, **HALF)
        count = options.batch * (SKIPPED + PROFILED + 2)
        adapt(_config(options, options.encoders[0], asked, options.size, count), callbacks=[profiled])
        return profiled.result

    return {f"{options.encoders[0]}, bf16": measured}


def loaders(options: argparse.Namespace) -> Measures:
    """Images per second that the loaders give and that a step takes."""

    def measured() -> Result:
        config = _config(options, options.encoders[0], _asked(options, **HALF), options.size, 4 * options.batch)
        loading, training = loader.rates(config, options.device)
        return {"loaders_images_per_second": loading, "step_images_per_second": training, "ratio": loading / training}

    return {f"{options.encoders[0]}, bf16": measured}


def memory(options: argparse.Namespace) -> Measures:
    """Peak memory of the device (of the process, on a CPU), megabytes: of the bare loop, then of `adapt`."""

    def measured(kind: dict[str, Any]) -> Result:
        asked = _asked(options, **kind)
        config = _config(options, options.encoders[0], asked, options.size, 3 * options.batch)
        _forget_peak(options.device)
        make = step.plain_steps(config, torch.device(options.device), TAP)["floor"]
        bare = make()
        for _ in range(3):
            bare()
        del bare
        of_bare = _peak(options.device)
        _forget_peak(options.device)
        adapt(config)
        return {"bare_mb": of_bare, "ours_mb": _peak(options.device)}

    return {f"{options.encoders[0]}, {name}": lambda kind=KINDS[name]: measured(kind) for name in ("fp32", "bf16")}


class Losses(pl.Callback):
    """The loss of each step; with `killed_at`, the process is killed after that step."""

    def __init__(self, killed_at: int | None = None) -> None:
        self.values: dict[int, float] = {}
        self._killed_at = killed_at

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        self.values[trainer.global_step] = float(outputs["loss"])
        if trainer.global_step == self._killed_at:
            os.kill(os.getpid(), signal.SIGKILL)


def resume(options: argparse.Namespace) -> Measures:
    """Losses of a run that was killed and resumed against those of a run that was not, and those of two such runs."""

    def measured() -> Result:
        settings = {"trainer.checkpoint_every_n_steps": KILLED_AT - 2, "trainer.max_epochs": 1}
        config = _config(
            options, options.encoders[0], _asked(options), options.small_size, options.batch * RESUMED_STEPS
        )
        config = replace(config, settings)
        killed = multiprocessing.get_context("fork").Process(target=adapt, args=(config, [Losses(KILLED_AT)]))
        killed.start()  # first: CUDA cannot be forked
        killed.join()
        assert killed.exitcode == -signal.SIGKILL, killed.exitcode
        resumed, whole, again = Losses(), Losses(), Losses()
        adapt(config, callbacks=[resumed], resume="auto")
        adapt(config, callbacks=[whole])
        adapt(config, callbacks=[again])
        assert 0 < len(resumed.values) < len(whole.values), "the run did not resume"
        return {
            "steps_compared": len(resumed.values),
            "largest_difference": max(abs(value - whole.values[at]) for at, value in resumed.values.items()),
            "largest_difference_of_two_runs": max(abs(value - again.values[at]) for at, value in whole.values.items()),
        }

    return {"killed and resumed": measured}


def trials(options: argparse.Namespace) -> Measures:
    """Seconds of a sweep of two trials: one after the other, and both at once, each with half of the GPU."""

    def measured() -> Result:
        config = _config(options, options.encoders[0], _asked(options), options.small_size, 8 * options.batch)
        config = replace(config, {"data.target.val": ["val"], "data.class_names": config.class_names})
        ways: dict[str, Any] = {"alone": {"workers": 1}, "shared": {"workers": 2}}
        if options.device == "cuda":
            ways = {"alone": {"workers": 1}, "shared": {"gpus_per_trial": 0.5}}
        more = {"space": sweep.SAME_COST, "n_trials": 2, "sampler": "random", "pruner": "none"}
        seconds = {}
        for name, way in ways.items():
            begun = time.perf_counter()
            found = sweep.sweep(name, config, **more, **way)
            seconds[f"{name}_seconds"] = time.perf_counter() - begun
            assert found.sweep.counts()["complete"] == 2, found.sweep.counts()
        return {**seconds, "shared_against_alone": seconds["shared_seconds"] / seconds["alone_seconds"]}

    return {"two trials": measured}


def maps(options: argparse.Namespace) -> Measures:
    """Output pixels per second of `predict` with its default settings, and the bare forwards of as many tiles."""

    def measured() -> Result:
        name, side = list(predict.NETWORKS)[-1 if options.small else 0], options.map_size
        predict.save_networks()
        predict.write_raster(side)
        accelerator = "gpu" if options.device == "cuda" else "cpu"
        predict.run(name, side, accelerator=accelerator)  # warms up
        pixels = predict.run(name, side, accelerator=accelerator)
        network = smp.create_model("unet", encoder_weights=None, classes=predict.CLASSES, **predict.NETWORKS[name])
        bare = predict.bare_seconds(network, side, torch.device(options.device))
        return {"pixels_per_second": pixels, "bare_pixels_per_second": side**2 / bare}

    return {f"{options.map_size} x {options.map_size} pixels": measured}


PARTS: dict[str, tuple[Part, float]] = {
    "waits": (waits, 0.1), "loaders": (loaders, 0.08), "memory": (memory, 0.1), "resume": (resume, 0.1),
    "trials": (trials, 0.12), "predict": (maps, 0.1), "steps": (steps, 0.4),
}  # fmt: skip
"""Each with its share of the time. The steps come last, as they can use what the others leave over."""


def _asked(options: argparse.Namespace, **changed: Any) -> argparse.Namespace:
    """Return options as benchmarks/step.py takes them."""
    plain = {
        "device": options.device, "precision": "32-true", "channels_last": "as by default", "compile": False,
        "batch": options.batch, "batchnorm": "separate", "workers": None, "threads": options.threads, "block": options.block,
    }  # fmt: skip
    return argparse.Namespace(**{**plain, **changed})


def _config(options: argparse.Namespace, encoder: str, asked: argparse.Namespace, side: int, count: int) -> Config:
    """Return settings of an `adapt` of one epoch on `count` random images, made here if there are none yet; without the probe,
    which is no part of what is measured."""
    root = Path.cwd() / f"{side}_{count}"
    if not root.exists():
        step.write_images(root, side, count)
    return replace(step.config_of(encoder, TAP, root, asked, side), {"monitor.probe": False})


def _forget_peak(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _peak(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def _run_part(part: Measures, out: Connection) -> None:
    """In a process of its own: measure, and send each name with its result, or the reason why there is none."""
    os.setsid()  # whatever the part starts can be ended with it
    for name, measure in part.items():
        try:
            with step.quiet():
                out.send((name, measure(), None))
        except Exception as error:
            text = "out of memory" if isinstance(error, torch.OutOfMemoryError) else f"{type(error).__name__}: {error}"
            out.send((name, None, " ".join(text.split())[:500]))


def measured(part: Measures, seconds: float) -> Iterator[tuple[str, Result | None, str | None]]:
    """Yield each name of a part with its result, or with the reason why there is none; it has `seconds` for all."""
    until, waiting = time.monotonic() + seconds, list(part)
    context = multiprocessing.get_context("fork")  # imports are not made again
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run_part, args=(part, theirs))
    process.start()
    theirs.close()
    reason = f"no time left (its part had {seconds:.0f} s)"
    try:
        while waiting and ours.poll(max(0.0, until - time.monotonic())):
            name, result, missing = ours.recv()
            waiting.remove(name)
            yield name, result, missing
    except EOFError:
        process.join()
        reason = f"its process ended with code {process.exitcode}"
    finally:
        if process.is_alive() and waiting:
            with contextlib.suppress(ProcessLookupError):  # it has no group of its own yet, and has started nothing
                os.killpg(process.pid or 0, signal.SIGKILL)
            process.kill()
        process.join()
    yield from ((name, None, reason) for name in waiting)


def device_name(device: str) -> str:
    """Return the name of the device, asked in another process, so that CUDA does not start in this one."""
    if device == "cpu":
        return "cpu"
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(torch.cuda.get_device_name)


def all_parts(options: argparse.Namespace) -> Result:
    """Measure every part; print each result, and write all there are so far to the file."""
    begun, parts = time.monotonic(), {name: PARTS[name] for name in options.parts}
    done: Result = {
        "device": device_name(options.device), "small": options.small, "images": f"{options.batch} + {options.batch} of "
        f"{options.size} x {options.size}", "parts": {}, "left out": [], "goals": {},
        "versions": circumstances("torch", "segmentation-models-pytorch", "pytorch-lightning", "mlflow"),
    }  # fmt: skip
    for index, (title, (part, share)) in enumerate(parts.items()):
        shares = sum(one for _, one in list(parts.values())[index:])
        seconds = (options.seconds - (time.monotonic() - begun)) * share / shares
        for name, result, missing in measured(part(options), max(seconds, 0.0)):
            if result is None:
                done["left out"].append({"part": title, "what": name, "why": missing})
            else:
                done["parts"].setdefault(title, {})[name] = result
            print(f"{title}: {name}: {missing if result is None else json.dumps(result)}", flush=True)
            done["goals"], done["seconds"] = goals(done["parts"]), time.monotonic() - begun
            if options.output is not None:
                options.output.write_text(json.dumps(done, indent=2) + "\n")
    return done


def goals(parts: Mapping[str, Mapping[str, Result]]) -> dict[str, str]:
    """Return each goal's result in words."""
    found = {}
    for title, key, met in (
        ("steps", "share_of_bare", lambda value: value >= GOALS["share_of_bare"]),
        ("waits", "waits_per_step", lambda value: value <= GOALS["waits_per_step"]),
    ):
        for name, result in parts.get(title, {}).items():
            found[f"{title}, {name}"] = (
                f"{'met' if met(result[key]) else 'missed'}: {result[key]:.3f}, goal {GOALS[key]}"
            )
    return found


def main() -> int:
    """Measure, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="file for all results, JSON")
    parser.add_argument("--seconds", type=float, default=480.0, help="time for everything but the imports")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--small", action="store_true", help="tiny images, networks and counts")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("There is no GPU that torch can use here; --device cpu --small only tests this program.", file=sys.stderr)
        return 2
    options.output = None if options.output is None else options.output.resolve()
    options.encoders, options.batch, options.size, options.small_size = ("resnet34", "mit_b2"), 32, 512, 128
    options.block, options.turns, options.map_size, options.threads = 3, 4, 8192, None
    if options.small:
        options.encoders, options.batch, options.size, options.small_size = ("tu-test_resnet",), 2, 64, 64
        options.block, options.turns, options.map_size, options.threads = 1, 2, 128, 1
        torch._dynamo.config.disable = True  # compiling takes minutes of a processor
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the process of the part, too
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        done = all_parts(options)
    print(json.dumps(done, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
